"""Masks from files get the scores of the model that made them; faults are counted and named, and nothing is scored."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader

from amltrain.data.loaders import collate
from amltrain.errors import UserError
from amltrain.evaluation.evaluator import evaluate_model, evaluate_predictions
from amltrain.evaluation.prediction_files import PredictionWriter, find_predictions
from amltrain.evaluation.results import Results, named_protocol, presets
from amltrain.records import Batch, ModelOutput, Sample
from tests.evaluation.stand_in import COUNT, Info, Scenes, SeesBright, loader

HEIGHT, WIDTH = 64, 80


class Recorded(Scenes):
    """The recorded mask pairs: the picture is the predicted mask, so that a model can give it back."""

    def __init__(self, shared_dir: Path) -> None:
        with np.load(shared_dir / "goldens/metrics/masks.npz") as masks:
            shape = (-1, HEIGHT, WIDTH)
            pixels = HEIGHT * WIDTH
            unpacked = (np.unpackbits(masks[k], axis=1)[:, :pixels].reshape(shape) for k in ("pred", "gt"))
            self.predicted, self.truth = unpacked
            self.no_target, self.predicted_no_target = masks["gt_no_target"], masks["pred_no_target"]

    def __len__(self) -> int:
        return len(self.truth)

    def info(self, sample_id: int) -> Info:
        return Info("recorded", "val", sample_id, sample_id, 100 + sample_id, "")

    def counts(self) -> dict[str, int]:
        return {"images": len(self), "refs": len(self)}

    def __getitem__(self, index: int) -> Sample:
        truth = torch.from_numpy(self.truth[index] * np.uint8(255))
        return Sample(
            image=torch.from_numpy(self.predicted[index]).float().expand(3, HEIGHT, WIDTH),
            input_ids=torch.zeros(4, dtype=torch.int64),
            text_mask=torch.ones(4, dtype=torch.bool),
            target=truth,
            no_target=torch.tensor(bool(self.no_target[index])),
            sample_id=torch.tensor(index),
            random_key=torch.tensor(index),
            geometry=torch.tensor([HEIGHT, WIDTH, 1, 1, 0, 0], dtype=torch.float64),
            original_target=truth,
        )


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def scores(results: Results) -> dict:
    return {"metrics": results.metrics, "counts": results.counts, "samples": results.samples.tolist()}


@pytest.mark.parametrize("form", ["masks", "rle"])
@pytest.mark.parametrize("preset", presets())
def test_recorded_masks_through_files_score_as_through_a_model(
    accelerator: Accelerator, shared_dir: Path, tmp_path: Path, preset: str, form: str
):
    dataset, protocol = Recorded(shared_dir), named_protocol(preset)
    flags = torch.from_numpy(dataset.predicted_no_target.astype(np.float32))

    def model(batch: Batch) -> ModelOutput:
        margin = 20 * (batch.image.mean(1, keepdim=True) - 0.5)
        none = flags[batch.sample_id]
        return ModelOutput(torch.cat([-margin / 2, margin / 2], 1), {"no_target": torch.stack([1 - none, none], 1)})

    split = DataLoader(dataset, batch_size=16, collate_fn=collate)
    writer = PredictionWriter(tmp_path, form, accelerator)
    by_model = evaluate_model(accelerator, model, split, protocol, writer=writer)
    written = writer.finish(tmp_path / "recorded-val-abc")
    predictions = find_predictions(written, "recorded", "val")
    by_files = evaluate_predictions(accelerator, predictions, split, protocol)
    expected = scores(by_model)
    assert scores(by_files) == expected
    recorded = json.loads((shared_dir / "goldens/metrics/expected.json").read_text())
    assert expected["counts"]["samples"] == 46
    assert [row[1:3] for row in expected["samples"]] == [
        list(p) for p in zip(recorded["I"], recorded["U"], strict=True)
    ]
    assert by_files.protocol["no_target_by"] == "the files"
    assert find_predictions(tmp_path, "recorded", "val").source == written


Spoil = Callable[[Path], None]


def duplicate(folder: Path) -> None:
    Image.open(folder / "0_1.png").save(folder / "0_1.bmp")


def enlarge(folder: Path) -> None:
    Image.open(folder / "1_3.png").resize((30, 24), Image.Resampling.NEAREST).save(folder / "1_3.png")


def soften(folder: Path) -> None:
    Image.fromarray(np.arange(24 * 24, dtype=np.uint8).reshape(24, 24)).save(folder / "1_3.png")


FAULTS: list[tuple[Spoil, str]] = [
    (lambda f: (f / "0_1.png").unlink(), r"1 of 13 samples are missing \(ref 0 sentence 1\)"),
    (duplicate, r"1 of 13 samples are there twice \(ref 0 sentence 1\)"),
    (enlarge, r"1_3\.png is 24 x 30, not 24 x 24 \(height x width\)"),
    (soften, r"1_3\.png: it has the values 0, 1, 2, 3, \.\.\.; a mask has 0 and one other"),
    (lambda f: (f / "1_3.png").write_bytes(b"no picture"), r"1_3\.png: the file is damaged \(cannot identify"),
    (lambda f: (f / "cat.png").write_bytes(b""), r"cat\.png is not named REF_SENT\.png"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS, ids=["missing", "doubled", "size", "grey", "broken", "name"])
def test_faults_are_named_and_nothing_is_scored(accelerator: Accelerator, tmp_path: Path, spoil: Spoil, message: str):
    protocol = named_protocol("cris")
    writer = PredictionWriter(tmp_path, "masks", accelerator)
    evaluate_model(accelerator, SeesBright(), loader(Scenes()), protocol, writer=writer)
    folder = writer.finish(tmp_path / "masks")
    spoil(folder)
    with pytest.raises(UserError, match=message):
        evaluate_predictions(accelerator, find_predictions(folder, "scenes", "val"), loader(Scenes()), protocol)


def test_lines_without_ref_ids_and_of_other_splits(accelerator: Accelerator, tmp_path: Path):
    protocol = named_protocol("cris")
    writer = PredictionWriter(tmp_path, "rle", accelerator)
    by_model = evaluate_model(accelerator, SeesBright(), loader(Scenes()), protocol, writer=writer)
    path = writer.finish(tmp_path / "ours")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    foreign = rows[0] | {"split": "testA"}
    for row in rows:
        del row["ref_id"]
        row["no_target"] = False
        row["segmentation"] = {"size": row.pop("size"), "counts": row.pop("counts")}
    path.write_text("\n".join(map(json.dumps, [foreign, *rows])))
    found = find_predictions(path, "scenes", "val")
    assert len(found.entries) == COUNT
    assert scores(evaluate_predictions(accelerator, found, loader(Scenes()), protocol)) == scores(by_model)
    path.write_text('{"sent_id": 3}\n')
    with pytest.raises(UserError, match=r"line 1: not a prediction"):
        find_predictions(path, "scenes", "val")
