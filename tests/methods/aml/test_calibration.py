"""Temperature `auto`, solved on 64 samples as in training, judged on whole sets of scenes and of photographs."""

from pathlib import Path

import pytest
import torch

from amltrain.config.schema import DataConfig, Preprocess
from amltrain.data.loaders import build_tokenizer, build_train_dataset, collate
from amltrain.data.prepare import prepare
from amltrain.data.sources.shapes import write_refshapes
from amltrain.data.transforms import prepare_batch
from amltrain.methods.aml.similarity import TARGET_MEAN_SCORE
from benchmarks.steps import random_batch
from tests.methods.aml.test_method import make_task


def prepared_shapes(folder: Path, shared_dir: Path) -> list[str]:
    write_refshapes(folder / "source", split_sizes={"train": 50}, progress=False)
    prepare("refshapes", folder / "source", folder / "prepared", max_skipped=1.0, progress=False)
    return ["refshapes"]


def prepared_photographs(folder: Path, shared_dir: Path) -> list[str]:
    names = ["refcoco", "refcocog"]
    for name in names:
        prepare(name, shared_dir / "data" / "refer_mini", folder / "prepared", progress=False)
    return names


@pytest.mark.parametrize("prepared", [prepared_shapes, prepared_photographs])
def test_mean_score_after_calibration(prepared, tmp_path: Path, shared_dir: Path) -> None:
    data = DataConfig(prepared=str(tmp_path / "prepared"), leak_filter=False, datasets=prepared(tmp_path, shared_dir))
    preprocess = Preprocess(
        size=96, resize="square", normalization="imagenet", tokenizer="wordpiece", max_tokens=24, sentence_field="sent"
    )
    tokenizer = build_tokenizer(data, preprocess)
    dataset = build_train_dataset(data, preprocess, tokenizer, mask_parts="union", seed=0)
    task = make_task({"vocab_size": tokenizer.vocab_size})
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    task.calibrate([prepare_batch(collate([dataset[i] for i in order[:64]]), "imagenet")])
    everything = prepare_batch(collate([dataset[i] for i in range(len(dataset))]), "imagenet")
    scores = task.score(everything)
    assert scores.mean().item() == pytest.approx(TARGET_MEAN_SCORE, abs=0.02)
    assert 0 < task.blocks(scores, everything).float().mean() < 0.5


@pytest.mark.parametrize("variant", [{"level": "feature"}, {"clean_loss_weight": 0.5}])
def test_what_is_scored_in_training_mode_is_calibrated_in_it(variant: dict) -> None:
    """Dropout and drop path move the scores; batch norms and the random numbers of the run must not notice."""
    torch.manual_seed(0)
    task = make_task({"vocab_size": 500, "drop_path_rate": 0.3, "text_dropout": 0.1}, **variant)
    batch = random_batch(32, 96, 12, 500, torch.device("cpu"))
    buffers = {name: buffer.clone() for name, buffer in task.model.named_buffers()}
    before = torch.get_rng_state()
    task.calibrate([batch])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in task.model.named_buffers())
    with torch.no_grad():
        assert task(batch)["mean_score"].item() == pytest.approx(TARGET_MEAN_SCORE, abs=0.02)
