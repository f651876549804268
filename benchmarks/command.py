"""What AML costs: training steps of the baseline and of AML's presets, side by side in one run.

    python launch/benchmark.py --model caris_tiny --size 96 --batch 8
    python launch/benchmark.py suite --help               # everything on one machine, e.g. on a GPU in ten minutes
    python launch/benchmark.py loader --help              # loading data
    python launch/benchmark.py sentences --help           # sentences that share an image
    python launch/benchmark.py scale --help               # large data
    python launch/benchmark.py masking --help             # a planned comparison of masking methods
    python launch/benchmark.py memory --help              # memory of every full-size model, without a card
    python launch/benchmark.py leaks --help               # what a long process keeps
    python launch/benchmark.py --model caris_swin_base --size 448 --batch 1 --rounds 3          # CPU, see below
    python launch/benchmark.py --model caris_swin_base --size 448 --batch 16 --precision bf16   # GPU

On one CPU core full-size CARIS takes 6 to 9 GiB, and 11 to 21 s a step.

All contenders train the same model with the same optimizer on random data. Rounds are interleaved: each times one step
of every contender, so a slow minute of the machine slows all of them. Figures are medians over rounds; the ratio to the
baseline is the median of each round's ratio. Peak memory is that of one more step, on its own: allocated bytes on a
GPU, resident memory of the process on Linux. GFLOP are counted, not timed: forward and backward of one sample. Prints
a Markdown table and the hardware; `--count` only counts, in seconds and without memory, at any size.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from amltrain.errors import one_line_errors


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python launch/benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="caris_tiny", help="a registered model (default: caris_tiny)")
    parser.add_argument("--size", type=int, help="side of the input, pixels (default: the model's own)")
    parser.add_argument("--batch", type=int, default=8, help="samples per step (default: 8)")
    parser.add_argument("--stage1-size", type=int, help="side that the third contender scores at (default: half)")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (default: 10)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before, not timed (default: 2)")
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16", "fp16"],
        default="fp32",
        help="of autocast; fp16 scales the loss (default: fp32)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--count", action="store_true", help="only count FLOPs; nothing is timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    return parser


OTHERS = {
    "loader": "benchmarks.loader",
    "sentences": "benchmarks.sentences",
    "scale": "benchmarks.scale",
    "suite": "benchmarks.suite.command",
    "masking": "benchmarks.masking",
    "memory": "benchmarks.memory",
    "leaks": "benchmarks.leaks",
}
"""Benchmarks that the first argument chooses; without it, steps are measured."""
SUITES = {"gpu": "cuda", "cpu": "cpu"}
"""Devices of `--suite`."""


def choose_benchmark(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the module that these arguments mean, and what is left of them for its parser."""
    given = list(arguments)
    if given[:1] == ["--suite"] and len(given) > 1 and given[1] in SUITES:
        given[:2] = ["suite", "--device", SUITES[given[1]]]
    if given and given[0] in OTHERS:
        return OTHERS[given[0]], given[1:]
    return __name__, given


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark of these arguments (default: the command line's)."""
    module, given = choose_benchmark(sys.argv[1:] if arguments is None else arguments)
    if module != __name__:
        importlib.import_module(module).main(given)
        return
    args = build_parser().parse_args(given)
    with one_line_errors():
        from benchmarks import steps as benchmark_steps  # imports torch

        benchmark_steps.run(args)
