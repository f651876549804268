"""FSDP2 on CPU processes: it trains as DDP does, and resumes at any number of processes and under any engine."""

from functools import partial
from pathlib import Path

import pytest
import yaml

from amltrain.errors import REQUEUE_EXIT_CODE
from amltrain.models import list_models
from tests.training import runs, sabotage
from tests.training.sharding import FSDP2, AllowCPU

STEPS = 6
SPREAD = ("--train.micro_batch_size", "2", "--train.max_steps", str(STEPS), "--evaluation.every_steps", str(STEPS))
MODELS = [name for name in list_models() if name.endswith("_tiny") and "swin" not in name]
METHODS = ("supervised", "maskris", "mask_grounding", "aml --aml.temperature 0.01", "aml --aml.preset released",
           "aml --aml.projection learnable --aml.temperature 0.01")  # fmt: skip


def sharded(shapes: Path, output: Path, *extra: str, processes: int = 2, stop: int = 0) -> str:
    """Train under FSDP2. stop: ask to stop in this step."""
    before = AllowCPU(partial(sabotage.ask_to_stop, stop) if stop else None)
    code = REQUEUE_EXIT_CODE if stop else 0
    return runs.finished(shapes, output, *extra, processes=processes, environment=FSDP2, before=before, expected=code)


@pytest.fixture(scope="module")
def ddp(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fsdp") / "ddp"
    runs.finished(shapes, output, *SPREAD, processes=2)
    return output


@pytest.fixture(scope="module")
def whole(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fsdp") / "whole"
    said = sharded(shapes, output, *SPREAD)
    assert ", fsdp" in said
    return output


def test_the_configuration_is_the_one_tested(repository: Path) -> None:
    settings = yaml.safe_load((repository / "configs" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    assert {f"FSDP_{key.removeprefix('fsdp_').upper()}": str(value).lower() for key, value in settings.items()} == {
        key: value.lower() for key, value in FSDP2.items() if key.startswith("FSDP_")
    } | {"FSDP_AUTO_WRAP_POLICY": "no_wrap", "FSDP_STATE_DICT_TYPE": "full_state_dict"}


def test_it_follows_ddp(ddp: Path, whole: Path) -> None:
    assert runs.losses(whole) == pytest.approx(runs.losses(ddp), abs=5e-5)
    assert runs.largest_difference(whole, ddp) < 2e-3


def test_it_resumes_bit_for_bit(whole: Path, shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    sharded(shapes, output, *SPREAD, stop=3)
    names = {path.name for path in (output / "last" / "state").iterdir()}
    assert names == {
        "rank-00000-of-00002.safetensors",
        "rank-00001-of-00002.safetensors",
        "optimizer.json",
        "trainer.json",
    }
    assert "step-000003 at step 3" in sharded(shapes, output, *SPREAD)
    assert runs.same_weights(output, whole)


def test_its_state_continues_on_one_process_then_sharded_on_four(whole: Path, shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    sharded(shapes, output, *SPREAD, stop=2)
    runs.finished(shapes, output, *SPREAD, before=partial(sabotage.ask_to_stop, 4), expected=REQUEUE_EXIT_CODE)
    said = sharded(shapes, output, *SPREAD, processes=4)
    assert "step-000003 at step 3" in said
    assert runs.losses(output) == pytest.approx(runs.losses(whole), abs=5e-5)
    assert runs.largest_difference(output, whole) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_model_follows_ddp_and_resumes(model: str, shapes: Path, tmp_path: Path) -> None:
    extra = ("--train.micro_batch_size", "2", "--train.max_steps", "3", "--evaluation.splits", "[]", "--method")
    extra += ("supervised", "--model.name", model, "--model.kwargs", "{}", "--preprocess.size", "null")
    runs.finished(shapes, tmp_path / "ddp", *extra, processes=2)
    sharded(shapes, tmp_path / "whole", *extra)
    sharded(shapes, tmp_path / "cut", *extra, stop=2)
    sharded(shapes, tmp_path / "cut", *extra)
    assert runs.losses(tmp_path / "whole") == pytest.approx(runs.losses(tmp_path / "ddp"), rel=2e-4)
    assert runs.same_weights(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_follows_ddp(method: str, shapes: Path, tmp_path: Path) -> None:
    extra = ("--train.micro_batch_size", "2", "--train.max_steps", "3", "--evaluation.splits", "[]", "--method")
    extra += tuple(method.split())
    runs.finished(shapes, tmp_path / "ddp", *extra, processes=2)
    sharded(shapes, tmp_path / "fsdp", *extra)
    assert runs.losses(tmp_path / "fsdp") == pytest.approx(runs.losses(tmp_path / "ddp"), rel=2e-4)


TALKS = (
    "--data.datasets", "[grefshapes]", "--model.name", "mllm_tiny", "--preprocess.conversation", "gsva",
    "--preprocess.size", "96", "--preprocess.view_size", "96", "--preprocess.image_tokens", "144",
    "--data.sentences_per_image", "2", "--data.train_unit", "sentence", "--method", "supervised",
    "--train.micro_batch_size", "4", "--train.max_steps", "4", "--evaluation.splits", "[]",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_language_model_in_conversation_follows_one_process(tuning: str, shapes: Path, tmp_path: Path) -> None:
    """Frozen, updated and whole-trained parts in one tree; rows of several sentences, [SEG] and [REJ] among them."""
    pytest.importorskip("peft")
    extra = (*TALKS, "--model.kwargs", f"{{text_tuning: {tuning}}}")
    runs.finished(shapes, tmp_path / "one", *extra)
    sharded(shapes, tmp_path / "whole", *extra)
    sharded(shapes, tmp_path / "cut", *extra, stop=2)
    sharded(shapes, tmp_path / "cut", *extra)
    assert runs.losses(tmp_path / "whole") == pytest.approx(runs.losses(tmp_path / "one"), rel=2e-4)
    assert runs.same_weights(tmp_path / "cut", tmp_path / "whole")


def test_an_optimizer_of_whole_parameters_is_rejected(shapes: Path, tmp_path: Path) -> None:
    flags = (*SPREAD, "--optim.optimizer", "muon")
    started = {"processes": 2, "environment": FSDP2, "before": AllowCPU(None), "expected": 2}
    said = runs.finished(shapes, tmp_path / "run", *flags, **started)
    assert (
        "optim.optimizer muon has not been tried on the parts of parameters that FSDP keeps; use adamw, or DDP" in said
    )
