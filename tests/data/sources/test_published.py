"""Every published data set from a small file in its real layout: prepare, read, train and evaluate."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from amltrain.commands.evaluate import main as evaluate
from amltrain.commands.prepare import main
from amltrain.commands.train import read_run
from amltrain.data.catalog import dataset_spec, read_manifest
from amltrain.data.rows import open_rows
from amltrain.data.segmentation import decode_mask
from amltrain.evaluation.results import read_results
from amltrain.registry import READERS
from amltrain.training.trainer import train
from tests.data.layouts import LAYOUTS, rewrite_refs, square


def prepare(name: str, root: Path) -> Path:
    LAYOUTS[name](root)
    main(["--dataset", name, "--refer_root", str(root), "--output", str(root / "prepared"), "--workers", "1"])
    return root / "prepared"


def referents(prepared: Path, name: str, split: str) -> list[dict[str, Any]]:
    rows = open_rows(str(prepared), name, split, streaming=True).columns.column("referents").to_pylist()
    return [referent for row in rows for referent in row]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_split_is_read(name: str, tmp_path: Path) -> None:
    prepared = prepare(name, tmp_path)
    for split in dataset_spec(name).splits:
        found = referents(prepared, name, split)
        assert found and all(referent["sentences"] for referent in found)
        assert all(decode_mask(r["mask"]).any() != r["no_target"] for r in found)
    manifest = read_manifest(prepared / name)
    assert manifest["skipped"] == [] and manifest["spec"]["metrics"] == list(dataset_spec(name).metrics)
    assert all(verdict.startswith("published: ") for verdict in manifest["published"].values())


@pytest.mark.parametrize("name", ["rrsis-d", "refclef", "refcoco-m", "refsegrs"])
def test_run_lengths_and_mask_files_are_exact(name: str, tmp_path: Path) -> None:
    for referent in referents(prepare(name, tmp_path), name, dataset_spec(name).splits[-1]):
        assert np.array_equal(decode_mask(referent["mask"]), square())


def test_sentences_about_nothing_are_no_positives(tmp_path: Path) -> None:
    real, absent = referents(prepare("r-refcoco", tmp_path / "r"), "r-refcoco", "val")[:2]
    assert real["ref_id"] == absent["ref_id"] and (real["no_target"], absent["no_target"]) == (False, True)
    assert [s["sent"] for s in real["sentences"]] == ["the square"]
    assert [s["sent"] for s in absent["sentences"]] == ["left thing"]
    zero = referents(prepare("ref-zom", tmp_path / "zom"), "ref-zom", "test")
    assert [r["no_target"] for r in zero] == [False, False, True]


def test_an_ignored_region_is_background_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (referent,) = referents(prepare("reasonseg", tmp_path), "reasonseg", "val")
    mask = decode_mask(referent["mask"])
    assert mask[20, 20] and not mask[12, 12] and referent["sentences"][0]["raw"].endswith("Café")
    assert "3 images have `ignore` regions; here they are background" in capsys.readouterr().out


def test_instances_of_a_phrase_are_one_target(tmp_path: Path) -> None:
    prepared = prepare("phrasecut", tmp_path)
    found = referents(prepared, "phrasecut", "train")
    assert [r["sentences"][0]["raw"] for r in found] == ["white squares", "all the things"]
    assert decode_mask(found[0]["mask"]).sum() == 400 + 48
    assert len(referents(prepared, "phrasecut", "val")) == 4  # of refer_val.json and refer_miniv.json


def test_the_wrong_name_for_a_file_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """R-RefCOCO and Ref-ZOM filed as RefCOCO would train sentences about nothing as positives."""
    for name, key in (("r-refcoco", "exist"), ("ref-zom", "source")):
        LAYOUTS[name](tmp_path / name)
        folder = tmp_path / name / dataset_spec(name).folder
        folder.rename(tmp_path / name / "refcoco")
        (tmp_path / name / "refcoco" / f"{dataset_spec(name).refs_name}.p").rename(
            tmp_path / name / "refcoco/refs(unc).p"
        )
        with pytest.raises(SystemExit):
            main(["--dataset", "refcoco", "--refer_root", str(tmp_path / name), "--output", str(tmp_path / "out")])
        said = capsys.readouterr().err
        assert f"has {key!r}" in said and "which changes its meaning and is not part of refcoco" in said


@pytest.mark.parametrize("value", ["no", 2, None])
def test_exist_is_true_or_false(value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LAYOUTS["r-refcoco"](tmp_path)
    rewrite_refs(tmp_path / "rrefcoco/refs(unc).p", lambda refs: refs[1]["sentences"][0].update(exist=value))
    with pytest.raises(SystemExit):
        main(["--dataset", "r-refcoco", "--refer_root", str(tmp_path), "--output", str(tmp_path / "out")])
    assert "a sentence of ref 1002 has 'exist'" in capsys.readouterr().err


SLOW = pytest.mark.slow
RUNS = [
    ("rrsis-d", "caris_tiny", "test", ()),
    ("r-refcoco", "rela_tiny", "testA", ()),
    *(
        pytest.param(*run, marks=SLOW)
        for run in (
            ("refclef", "caris_tiny", "test", ()),
            ("refclef-unc", "caris_tiny", "testC", ()),
            ("ref-zom", "rela_tiny", "test", ()),
            ("r-refcoco+", "caris_tiny", "testB", ()),
            ("r-refcocog", "rela_tiny", "test", ()),
            ("phrasecut", "caris_tiny", "test", ()),
            ("refcoco-m", "caris_tiny", "val", ("--data.train_split", "val")),
            ("reasonseg", "caris_tiny", "test", ()),
            ("refsegrs", "caris_tiny", "test", ()),
        )
    ),
]


@pytest.mark.parametrize(("name", "model", "split", "more"), RUNS)
def test_prepared_trained_and_evaluated(
    name: str, model: str, split: str, more: tuple[str, ...], tmp_path: Path, repository: Path
) -> None:
    prepared = str(prepare(name, tmp_path))
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    last_split = dataset_spec(name).splits[-1]
    train(read_run([
        "--config", str(repository / "configs/recipes/refer_mini.yaml"),
        "--config", str(repository / f"configs/models/{model}.yaml"), "--preprocess.size", "64",
        "--data.datasets", f"[{name}]", "--data.prepared", prepared, "--data.refer_root", "null",
        "--data.workers", "0", "--output", str(tmp_path / "run"), "--train.max_steps", "2",
        "--train.global_batch_size", "2", "--evaluation.splits", f"[{last_split}]", "--evaluation.every_steps", "null",
        "--evaluation.best_metric", "mIoU", "--evaluation.pictures", "0", "--tracking.trackers", "[]", *more,
    ]))  # fmt: skip
    evaluate([
        "--checkpoint", str(tmp_path / "run/best"), "--data.datasets", f"[{name}]", "--data.prepared", prepared,
        "--splits", split, "--output", str(tmp_path / "scores"), "--data.workers", "0", "--pictures", "0",
    ])  # fmt: skip
    (result,) = read_results(tmp_path / "scores/results.json")
    sentences = [len(r["sentences"]) for r in referents(tmp_path / "prepared", name, split)]
    assert (result.dataset, result.split, result.counts["samples"]) == (name, split, sum(sentences))
    absent = sum(len(r["sentences"]) for r in referents(tmp_path / "prepared", name, split) if r["no_target"])
    assert result.counts["no_target"] == absent
    assert (absent > 0) == bool(dataset_spec(name).special_keys)
    assert set(dataset_spec(name).metrics) <= result.metrics.keys()
    assert all(0 <= value <= 100 for value in result.metrics.values())


def test_files_of_reasonseg_without_a_target_are_counted(tmp_path: Path) -> None:
    LAYOUTS["reasonseg"](tmp_path)
    (whole,) = tmp_path.rglob("train/*.json")
    content = json.loads(whole.read_text())
    flag = {"label": "flag", "points": [[1, 1], [2, 2], [3, 1]]}
    for name, shapes in (("none", None), ("empty", []), ("flag", [flag])):
        changed = {key: value for key, value in {**content, "shapes": shapes}.items() if value is not None}
        whole.with_name(f"{name}.json").write_text(json.dumps(changed))
        whole.with_name(f"{name}.jpg").write_bytes(whole.with_suffix(".jpg").read_bytes())
    files = READERS["reasonseg"].value(tmp_path, "reasonseg")
    assert any(note.startswith("3 files as published have no target shape") for note in files.notes)
    assert {ref["place"] for ref in files.refs if ref["split"] == "train"} == {whole.name}
