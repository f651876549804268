"""Every baseline on photographs: one epoch of the training expressions, AML included, then an evaluation."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from amltrain.commands.train import read_run
from amltrain.data.prepare import prepare
from amltrain.models import list_models
from amltrain.training.trainer import train

TINY = [name for name in list_models() if name.endswith("_tiny") and "swin" not in name]


@pytest.fixture(scope="module")
def prepared(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("refcoco", "refcocog"):
        prepare(name, shared_dir / "data" / "refer_mini", folder, progress=False)
    return folder


@pytest.mark.parametrize("model", TINY)
def test_an_epoch_and_an_evaluation(model: str, prepared: Path, tmp_path: Path, repository: Path) -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    recipe = ["--config", str(repository / "configs" / "recipes" / "refer_mini.yaml"), "--model.name", model]
    frame = ["--preprocess.size", "null", "--preprocess.max_tokens", "null", "--data.workers", "0"]
    epoch = ["--train.max_steps", "null", "--train.epochs", "1", "--evaluation.every_steps", "null"]
    folders = ["--data.prepared", str(prepared), "--output", str(tmp_path), "--tracking.trackers", "[]"]
    results = train(read_run([*recipe, *frame, *epoch, *folders, "--evaluation.pictures", "0"]))
    samples = {(r.dataset, r.split): r.counts["samples"] for r in results}
    assert samples == {
        ("refcoco", "train"): 37,
        ("refcocog", "train"): 22,
        ("refcoco", "val"): 10,
        ("refcoco", "testA"): 3,
        ("refcoco", "testB"): 14,
        ("refcocog", "val"): 1,
        ("refcocog", "test"): 5,
    }
    assert all(r.counts["not_finite"] == 0 and r.provenance["step"] == 3 for r in results)
    assert (tmp_path / "best" / "model" / "model.safetensors").is_file()
