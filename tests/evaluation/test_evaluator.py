"""The evaluator on a split whose every answer is known."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from amltrain.data.loaders import collate
from amltrain.errors import UserError
from amltrain.evaluation.evaluator import evaluate_model
from amltrain.evaluation.results import named_protocol
from tests.evaluation.stand_in import COUNT, Scenes, SeesBright, loader

NETWORK = named_protocol("caris")


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def expected_pixels() -> tuple[np.ndarray, np.ndarray]:
    index = np.arange(COUNT)
    return 8 * (6 + index // 2), 8 * (6 + index)


def test_known_scores(accelerator: Accelerator):
    results = evaluate_model(accelerator, SeesBright(), loader(Scenes()), NETWORK)
    i, u = expected_pixels()
    np.testing.assert_array_equal(results.samples[:, 1:3], np.stack([i, u], axis=1))
    assert results.score("oIoU") == pytest.approx(100 * i.sum() / u.sum())
    assert results.score("mIoU") == pytest.approx(100 * (i / u).mean())
    assert results.counts == {
        "samples": 13, "referents": 7, "images": 4, "no_target": 0, "empty_unions": 0, "empty_masks": 0,
        "not_finite": 0,
    }  # fmt: skip
    assert (results.dataset, results.split) == ("scenes", "val")
    assert results.protocol["size"] == [24, 24]
    assert results.provenance["precision"] == "fp32"


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 5, 13, 64])
def test_batch_size_and_channels_change_nothing(accelerator: Accelerator, batch_size: int, channels: int):
    results = evaluate_model(accelerator, SeesBright(channels=channels), loader(Scenes(), batch_size), NETWORK)
    np.testing.assert_array_equal(results.samples[:, 1:3], np.stack(expected_pixels(), axis=1))


@pytest.mark.parametrize("preset", ["cris", "cgformer"])
def test_original_size(accelerator: Accelerator, preset: str):
    results = evaluate_model(accelerator, SeesBright(), loader(Scenes(original=(48, 72))), named_protocol(preset))
    i, u = expected_pixels()
    assert results.protocol["frame"] == "original"
    assert results.samples[:, 1].sum() == pytest.approx(6 * i.sum(), rel=0.12)  # 2 x 3 original pixels to a pixel
    assert results.samples[:, 2].sum() == pytest.approx(6 * u.sum(), rel=0.12)


def test_generalized_metrics_where_sentences_mean_nothing(accelerator: Accelerator):
    results = evaluate_model(accelerator, SeesBright(head=True), loader(Scenes(empty=(3, 5))), NETWORK)
    i, u = expected_pixels()
    index = np.arange(COUNT)
    iou = np.where(index % 3 == 0, index == 3, i / u)  # ids 0, 3, 6, ... are said to be nothing; only 3 is
    iou[5] = 0
    assert results.score("gIoU") == pytest.approx(100 * iou.mean())
    assert results.score("N-acc") == 50
    assert results.score("T-acc") == pytest.approx(100 * 7 / 11)
    assert results.protocol["metrics"] == "generalized"
    assert results.score("oIoU") == results.score(
        "cIoU"
    )  # the same form, so that "best by oIoU" works on every data set


def test_pixel_count_stands_in_for_a_head(accelerator: Accelerator):
    dataset = Scenes(empty=(0, 12))
    protocol = replace(NETWORK, no_target_pixels=50)
    results = evaluate_model(accelerator, SeesBright(), loader(dataset), protocol)
    assert results.score("N-acc") == 50  # the first scene's mask has 48 pixels, the last one's 144
    assert results.protocol["no_target_by"] == "fewer than 50 pixels"


def test_modes_are_restored(accelerator: Accelerator):
    model = SeesBright().train()
    model.norm.eval()  # a frozen part that training keeps in eval mode
    seen = []
    model.register_forward_pre_hook(lambda m, _: seen.append(m.training))
    evaluate_model(accelerator, model, loader(Scenes()), NETWORK)
    assert seen == [False] * 4
    assert model.training
    assert not model.norm.training


def test_logits_that_are_not_finite_are_counted(accelerator: Accelerator):
    def broken(batch):
        output = SeesBright()(batch)
        return output._replace(logits=torch.where(batch.sample_id.view(-1, 1, 1, 1) == 2, torch.nan, output.logits))

    results = evaluate_model(accelerator, broken, loader(Scenes()), NETWORK)
    assert results.counts["not_finite"] == 1


def test_pictures_are_spread_and_at_the_original_size(accelerator: Accelerator):
    results = evaluate_model(accelerator, SeesBright(), loader(Scenes(original=(48, 72))), NETWORK, pictures=3)
    assert [p.sample_id for p in results.predictions] == [0, 4, 8]
    assert results.predictions[1].mask.shape == results.predictions[1].truth.shape == (48, 72)
    assert results.predictions[1].mask.sum() > results.predictions[1].truth.sum() > 0


def test_a_loader_without_original_masks_is_rejected(accelerator: Accelerator):
    split = DataLoader(Scenes(), collate_fn=lambda samples: collate(samples)._replace(original_target=()))
    with pytest.raises(UserError, match="original size"):
        evaluate_model(accelerator, SeesBright(), split, named_protocol("cris"))


@pytest.mark.e2e
def test_any_number_of_processes_gives_the_same(accelerator: Accelerator, repository: Path, tmp_path: Path):
    processes = 3  # thirteen samples in batches of four; two are tried in tests/e2e
    alone = evaluate_model(
        accelerator, SeesBright(head=True), loader(Scenes(empty=(3, 5))), named_protocol("rela"), pictures=3
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "tests.evaluation.spread_evaluation", str(tmp_path)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=repository, env=environment, timeout=300)
    for rank in range(processes):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert said["samples"] == alone.samples.tolist()
        assert said["kept"] == [p.sample_id for p in alone.predictions]
        assert {k: said[k] for k in alone.to_dict()} == alone.to_dict()
