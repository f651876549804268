"""Small runs that the trainer's tests share."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from torch import Tensor

from amltrain.config import RunConfig, parse_config
from amltrain.training.trainer import train

REPOSITORY = Path(__file__).resolve().parents[2]


def arguments(prepared: Path, output: Path, *extra: str) -> list[str]:
    """A run of 8 steps of 8 samples that saves every 2."""
    return [
        *("--output", str(output), "--data.prepared", str(prepared), "--data.workers", "0"),
        *("--preprocess.size", "64", "--train.max_steps", "8", "--train.global_batch_size", "8"),
        *("--train.log_every", "1", "--evaluation.every_steps", "8", "--evaluation.batch_size", "8"),
        *("--evaluation.pictures", "0", "--checkpoint.every_steps", "2", "--checkpoint.keep", "9"),
        *("--optim.lr", "1e-3", "--tracking.trackers", "[]", "--model.kwargs.text_dropout", "0.1"),
        *extra,
    ]


def run(prepared: Path, output: Path, *extra: str) -> RunConfig:
    """Train in this process, as a fresh one would."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    config = parse_config(arguments(prepared, output, *extra))
    train(config)
    return config


def command(prepared: Path, output: Path, *extra: str, processes: int = 1) -> list[str]:
    """The command line of the same run, in processes of its own."""
    script = [str(REPOSITORY / "launch" / "train.py"), *arguments(prepared, output, *extra)]
    if processes == 1:
        return [sys.executable, *script]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launcher, *script]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}


def launch(prepared: Path, output: Path, *extra: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(prepared, output, *extra, processes=processes),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in log(output) if "loss" in entry]


def log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def weights(output: Path, checkpoint: str = "last") -> dict[str, Tensor]:
    return load_file(output / checkpoint / "model" / "model.safetensors")
