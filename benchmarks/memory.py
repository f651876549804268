"""What a training step of every full-size model takes, and the largest micro batch of each card, without a card.

    python launch/benchmark.py memory > table.md                     # about 20 seconds a model
    python launch/benchmark.py memory sam3 gsva_7b --method aml

Figures are those of `amltrain train --estimate`: bfloat16, AdamW, the model's own input size, one process.
"""

import argparse
from collections.abc import Sequence

from amltrain.config.parse import checked
from amltrain.errors import one_line_errors
from amltrain.models import list_models
from amltrain.training.estimate import CARDS, GIB, estimate

SHOWN = [card for card in CARDS if card.name in ("RTX 4090 24 GB", "A100 40 GB", "A100 80 GB", "H200 141 GB")]
BATCH = 16


def row(name: str, method: str) -> str:
    """One model: GiB at the batch, with checkpointing, TFLOP and launches of a pass, samples that fit each card."""
    flags = [f"--train.global_batch_size={BATCH}", "--train.micro_batch_size=null", "--train.mixed_precision=bf16"]
    config = checked([f"--model.name={name}", f"--method={method}", *flags])
    found = estimate(config)
    memory, less = (line.at(BATCH) / GIB for line in (found.memory, found.memory_checkpointed))
    fits = [f"{found.memory.most(card.gib)} / {found.memory_checkpointed.most(card.gib)}" for card in SHOWN]
    cells = (f"`{name}`", f"{memory:.1f}", f"{less:.1f}", f"{found.step.flops / 1e12:.1f}", f"{found.step.launches:,}")
    return f"| {' | '.join((*cells, *fits))} |"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python launch/benchmark.py memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", help="default: every model that is not tiny")
    parser.add_argument("--method", default="supervised")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    names = args.models or [name for name in list_models() if not name.endswith(("_tiny", "_lite"))]
    cards = " | ".join(card.name for card in SHOWN)
    print(f"| model | GiB at {BATCH} | checkpointed | TFLOP | operations | {cards} |")
    print(f"| --- |{' ---: |' * (4 + len(SHOWN))}")
    with one_line_errors():
        for name in names:
            print(row(name, args.method), flush=True)


if __name__ == "__main__":
    main()
