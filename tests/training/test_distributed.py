"""One run however it is spread: DDP, nodes and DeepSpeed with CPU processes, AML and dropout included.

Micro-batches are the same in all of them, and so is what AML and dropout draw; what differs is the order of sums.
"""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from amltrain import distributed
from amltrain import run_folder as checkpoints
from amltrain.config.schema import RunConfig, TrainConfig
from amltrain.errors import REQUEUE_EXIT_CODE, UserError
from tests.training import runs, sabotage

STEPS = 10
SPREAD = ("--train.micro_batch_size", "2", "--train.max_steps", str(STEPS), "--evaluation.every_steps", str(STEPS))


BRIEFLY = ("--train.micro_batch_size", "2", "--train.max_steps", "4", "--evaluation.every_steps", "4")


def zero(stage: int) -> dict[str, str]:
    """The environment that `accelerate launch` makes of configs/accelerate/zeroN.yaml."""
    return {
        "ACCELERATE_USE_CPU": "false",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
        "ACCELERATE_GRADIENT_CLIPPING": "9.0",  # the recipe's own is what counts
    }


@pytest.fixture(scope="module")
def alone(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 process x 2 samples x 4 accumulated."""
    output = tmp_path_factory.mktemp("alone")
    runs.run(shapes, output, *SPREAD)
    return output


@pytest.fixture(scope="module")
def briefly_alone(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("briefly-alone")
    runs.run(shapes, output, *BRIEFLY)
    return output


def compare(output: Path, alone: Path, *, loss: float, weights: float) -> None:
    """Steps as many, losses and weights within these tolerances of the run on one process; prints the differences."""
    ours, theirs = runs.losses(output), runs.losses(alone)
    assert len(ours) == len(theirs)
    loss_differs = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    weights_differ = runs.largest_difference(output, alone)
    print(f"{output.name}: largest difference of losses {loss_differs:.1e}, of weights {weights_differ:.1e}")
    assert loss_differs < loss and weights_differ < weights


@pytest.mark.parametrize("processes", [2, 4])
def test_ddp_follows_one_process(alone: Path, shapes: Path, tmp_path: Path, processes: int) -> None:
    output = tmp_path / f"ddp-{processes}"
    nothing_said = {"ACCELERATE_USE_CPU": "false"}  # a machine that has only CPUs is enough to be spread over them
    said = runs.finished(shapes, output, *SPREAD, processes=processes, environment=nothing_said)
    assert "multi_cpu" in said
    assert f"8 = {processes} processes x 2 x {4 // processes} accumulated" in said
    compare(output, alone, loss=5e-5, weights=5e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles what its CPU processes talk through")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_follows_one_process_and_resumes(briefly_alone: Path, shapes: Path, tmp_path: Path, stage: int) -> None:
    pytest.importorskip("deepspeed")
    output, start = tmp_path / f"zero-{stage}", partial(runs.finished, processes=2, environment=zero(stage))
    start(shapes, output, *BRIEFLY, before=partial(sabotage.ask_to_stop, 3), expected=REQUEUE_EXIT_CODE)
    said = start(shapes, output, *BRIEFLY)
    assert ", deepspeed" in said and "step-000003 at step 3" in said
    compare(output, briefly_alone, loss=5e-5, weights=5e-3)
    assert {key: (t.shape, t.dtype) for key, t in runs.weights(output).items()} == {
        key: (t.shape, t.dtype) for key, t in runs.weights(briefly_alone).items()
    }


def test_two_nodes_then_one_process_then_four(alone: Path, shapes: Path, tmp_path: Path) -> None:
    """Two launchers meet at a rendezvous; one process resumes their checkpoint, and four resume that one."""
    output = tmp_path / "nodes"
    launched = runs.launch_nodes(shapes, output, *SPREAD, nodes=2, before=partial(sabotage.ask_to_stop, 3))
    assert launched.finish() == 1, launched.said()  # what launchers make of every failure
    assert (output / "requeue").is_file()
    runs.finished(shapes, output, *SPREAD, before=partial(sabotage.ask_to_stop, 7), expected=REQUEUE_EXIT_CODE)
    said = runs.finished(shapes, output, *SPREAD, processes=4)
    assert "the run was spread 1 x 2 x 4 (processes x micro x accumulated) and continues as 4 x 2 x 1" in said
    compare(output, alone, loss=5e-5, weights=5e-3)


def test_processes_agree_to_skip(shapes: Path, tmp_path: Path) -> None:
    """One of them alone gets an image that is NaN."""
    output = tmp_path / "run"
    said = runs.finished(
        shapes, output, *SPREAD[:2], "--train.max_steps", "4", processes=2,
        before=partial(sabotage.nan_images, (2, 3), everywhere=False),
    )  # fmt: skip
    assert "step 2: loss nan" in said
    state = checkpoints.load_trainer_state(output / "last")
    assert (state["skipped"], state["bad_in_a_row"]) == (2, 0)
    assert all(torch.isfinite(tensor).all() for tensor in runs.weights(output).values())
    assert [len(line["skipped_samples"]) for line in runs.log(output) if "skipped_samples" in line] == [8, 8]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("wandbb", r"unknown tracker \(tracking\.trackers\) 'wandbb'; did you mean .*wandb"),
        ("wandb", "tracking.trackers: wandb is not installed; pip install wandb, or leave it out"),
    ],
)
def test_a_tracker_that_cannot_be_used_stops_the_run_at_once(
    named: str, message: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(UserError, match=message):
        runs.run(shapes, tmp_path / "run", "--tracking.trackers", f"[tensorboard,{named}]")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("processes", "micro", "message"),
    [
        (32, None, "global_batch_size=16 takes at most 16 processes, not 32"),
        (3, None, "16 is not a multiple of 3 processes; start as many as divide 16"),
        (4, 3, "not a multiple of 4 processes x train.micro_batch_size=3; leave the latter out, or .* divides 4"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_rejected_with_what_helps(
    processes: int, micro: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        distributed.plan_batches(TrainConfig(global_batch_size=16, micro_batch_size=micro), processes)


def test_fp16_under_deepspeed_is_rejected_with_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(UserError, match=r"add --train\.mixed_precision bf16"):
        distributed.build_accelerator(RunConfig(train=TrainConfig(mixed_precision="fp16")))
