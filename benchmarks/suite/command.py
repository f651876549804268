"""Measure everything that BENCHMARKS.md reports, on this machine, in one command.

    python launch/benchmark.py --suite gpu                 # a CUDA machine, ten minutes
    python launch/benchmark.py suite --minutes 30          # continues: what was measured is not measured again
    python launch/benchmark.py suite --device cpu --model caris_tiny --others --size 64 --batch 2 --rounds 1

Measures, the most important first, until the time is over:

steps         training steps of --model without AML, with `paper` at both sizes of stage 1, and with `released`, in
              bf16, fp16, float32 with TF32 and exact float32; compiled
variants      forward and backward with attention as matrix products, and with channels-last maps
engines       steps through Accelerate with clipping: one process, DDP and FSDP2, each on one device
batch sizes   doubled until memory ends, with and without gradient checkpointing
evaluation    with and without encoding every image once for all its sentences
loader        samples per second by loader processes and decoder, on generated photographs
saving        how long a checkpoint stops training, written in the foreground and in the background
others        steps of the other models

Every measurement runs in another process. One that fails, or takes longer than --limit seconds, is reported as failed;
the next one starts in a new process. A step that does not fit into memory is tried again with half the batch.

Writes OUTPUT/results.json after every measurement, OUTPUT/results.md (a section for BENCHMARKS.md) and OUTPUT/log.txt
(the messages of the libraries).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from amltrain.errors import UserError, one_line_errors

OTHERS = (
    "lavt_swin_base",
    "cgformer_swin_base",
    "cris_r101",
    "detris_base",
    "etris_vit_base",
    "rela_swin_base",
    "magnet_swin_base",
    "barleria_vit_base",
    "dual_dinov3_base",
    "beit3_base",
    "detris_large",
    "remamber_mamba",
    "sam3",
)
"""A full-size model of every other family."""


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="python launch/benchmark.py suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu (default: cuda)")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for everything (default: 10)")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for one measurement (default: 150)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks"), help="folder (default: benchmarks)")
    parser.add_argument("--model", default="caris_swin_base", help="measured in full (default: caris_swin_base)")
    parser.add_argument("--others", nargs="*", default=list(OTHERS), help="models of which only steps are measured")
    parser.add_argument("--size", type=int, help="side of the input, pixels (default: each model's own)")
    parser.add_argument("--batch", type=int, default=16, help="samples per step (default: 16)")
    parser.add_argument("--largest-batch", type=int, default=512, help="where the batch sizes end (default: 512)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="only these kinds: steps, engines, loader, ...")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = build_parser().parse_args(arguments)
    with one_line_errors():
        for name in ("minutes", "limit", "batch", "largest_batch", "rounds", "size"):
            value = getattr(options, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name.replace('_', '-')} is {value} and must be more than 0")
        from benchmarks.suite.run import run_suite  # after the arguments are known to be good

        run_suite(options)
