"""What a long process keeps: memory, open files and threads over steps, scored sentences and predicted pictures.

    python launch/benchmark.py leaks
    python launch/benchmark.py leaks --steps 200 --sentences 500 --pictures 50     # in a minute

Trains `caris_tiny` on drawn scenes of 32 pixels, evaluates it again and again, and predicts picture after picture, all
in one process. Memory is resident memory; it grows at first, while caches fill, so what counts is the second half.
"""

import argparse
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from amltrain import api
from amltrain.errors import UserError, one_line_errors
from amltrain.inference.predictor import Predictor
from amltrain.training.run import Callback, Run, Step
from benchmarks.steps import measured_on

POINTS = 20
"""Measurements of each part."""
SETTINGS: dict[str, Any] = {
    "model": {"name": "caris_tiny"},
    "data": {"shapes": {"train": 60, "evaluation": 40, "size": 32}, "workers": 2},
    "preprocess": {"size": 32},
    "tracking": {"trackers": []},
    "hub": {"push": "never"},
}


class Held(NamedTuple):
    """What the process holds: MiB of memory, open files, threads."""

    memory: float
    files: int
    threads: int


def held() -> Held:
    """What this process holds now, on Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")), threading.active_count())


class Watch(Callback):
    """Measures every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.seen: list[Held] = []

    def on_step(self, run: Run, step: Step) -> None:
        """Measure."""
        if run.progress.step % self.every == 0:
            self.seen.append(held())


def train(folder: Path, steps: int) -> list[Held]:
    """Train for so many steps, with ten evaluations and ten saves on the way."""
    watch = Watch(max(1, steps // POINTS))
    tenth = max(1, steps // 10)
    settings = SETTINGS | {
        "output": str(folder / "run"),
        "data": SETTINGS["data"] | {"prepared": str(folder / "prepared")},
        "train": {"max_steps": steps, "global_batch_size": 2, "log_every": tenth},
        "evaluation": {"every_steps": tenth, "splits": ["val"]},
        "checkpoint": {"every_steps": tenth, "keep": 2},
    }
    api.train(settings, base="quickstart", callbacks=[watch])
    return watch.seen


def evaluate(folder: Path, sentences: int) -> tuple[list[Held], int]:
    """Evaluate a split until so many sentences were scored; measurements, and sentences."""
    seen, scored = [], 0
    while scored < sentences:
        results = api.evaluate(folder / "run", splits=["val"], output=str(folder / "evaluation"))
        scored += sum(result.counts["samples"] for result in results)
        seen.append(held())
    return seen, scored


def predict(folder: Path, pictures: int) -> list[Held]:
    """Predict so many pictures of changing sizes."""
    predictor = Predictor(folder / "run" / "best")
    generator, seen = np.random.default_rng(0), []
    for number in range(1, pictures + 1):
        height, width = generator.integers(24, 320, 2)
        predictor(generator.integers(0, 256, (height, width, 3), np.uint8), ["the red square", "a circle"])
        if number % max(1, pictures // POINTS) == 0:
            seen.append(held())
    return seen


def row(what: str, seen: Sequence[Held]) -> str:
    """A row of the table: memory at the start, the middle and the end, and what the second half added."""
    middle = seen[len(seen) // 2]
    first, last = seen[0], seen[-1]
    memory = " | ".join(f"{point.memory:.0f}" for point in (first, middle, last))
    grown = last.memory - middle.memory
    return f"| {what} | {memory} | {grown:+.1f} | {middle.files} -> {last.files} | {middle.threads} -> {last.threads} |"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python launch/benchmark.py leaks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sentences", type=int, default=20_000)
    parser.add_argument("--pictures", type=int, default=2000)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = build_parser().parse_args(argv)
    with one_line_errors(), tempfile.TemporaryDirectory() as name:
        for flag, least in (("steps", 10), ("sentences", 1), ("pictures", 2)):
            if getattr(options, flag) < least:
                raise UserError(f"--{flag} must be at least {least}")
        folder = Path(name)
        with redirect_stdout(sys.stderr):
            trained = train(folder, options.steps)
            evaluated, scored = evaluate(folder, options.sentences)
            predicted = predict(folder, options.pictures)
        print(f"{measured_on(torch.device('cpu'))}\n")
        print("| part | MiB at first | in the middle | at the end | second half | open files | threads |")
        print("| --- | --: | --: | --: | --: | --: | --: |")
        print(row(f"{options.steps:,} training steps", trained))
        print(row(f"{scored:,} sentences, {len(evaluated)} evaluations", evaluated))
        print(row(f"{options.pictures:,} pictures", predicted))


if __name__ == "__main__":
    main()
