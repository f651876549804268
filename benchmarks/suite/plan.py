"""What the suite measures, the most important first. Light: imports neither torch nor a model."""

import argparse
from typing import Any, NamedTuple

from amltrain.errors import unknown_name

STEPS, VARIANTS, ENGINES, BATCHES = "steps", "variants", "engines", "batch sizes"
EVALUATION, LOADER, SAVING, OTHERS = "evaluation", "loader", "saving", "others"
KINDS = (STEPS, VARIANTS, ENGINES, BATCHES, EVALUATION, LOADER, SAVING, OTHERS)
PRECISIONS = {"cuda": ("bf16", "tf32", "fp16", "fp32"), "cpu": ("fp32", "bf16")}
"""The usual one first; tf32 is float32 with TensorFloat-32 products."""


class Case(NamedTuple):
    """One measurement.

    name: unique. kind: its table. function: MODULE:NAME in this folder, called with `options` in another process.
    engine: of Accelerate; one whose environment a process keeps for good.
    """

    name: str
    kind: str
    function: str
    options: dict[str, Any]
    engine: str = "single"


def plan(options: argparse.Namespace) -> list[Case]:
    """List the cases of a command line, in order. Raises UserError for an unknown --only."""
    wanted = options.only or KINDS
    for kind in wanted:
        if kind not in KINDS:
            raise unknown_name("kind (--only)", kind, KINDS)
    return [case for case in _cases(options) if case.kind in wanted]


def _cases(options: argparse.Namespace) -> list[Case]:
    common = {"device": options.device, "size": options.size, "batch": options.batch, "rounds": options.rounds}

    def steps(model: str, kind: str = STEPS, **changed: Any) -> Case:
        given = {**common, "model": model, **changed}
        compiled = ", compiled" if given.get("compiled") else ""
        return Case(f"{model}, {given['precision']}{compiled}", kind, "training:steps", given)

    main = options.model
    usual, *more = PRECISIONS["cpu" if options.device == "cpu" else "cuda"]
    half = {"device": options.device, "size": options.size, "model": main, "precision": usual}
    sizes = {**half, "largest": options.largest_batch, "rounds": max(2, options.rounds // 2)}
    step = {**common, "model": main, "precision": usual}
    engines = [
        Case(f"{main}, {engine}", ENGINES, "training:engine", {**step, "sharded": engine == "fsdp2"}, engine)
        for engine in ("single", "ddp", "fsdp2")
    ]
    return [
        steps(main, precision=usual),
        Case(f"{main}, batch sizes", BATCHES, "training:batch_sizes", sizes),
        steps(main, precision=more[0]),
        Case(f"{main}, evaluation", EVALUATION, "evaluation:evaluation", {**half, "batch": options.batch, "rounds": 3}),
        Case("loader", LOADER, "loading:loader", {"device": options.device, "size": options.size or 448}),
        *engines,
        Case(f"{main}, batch sizes, checkpointing", BATCHES, "training:batch_sizes", {**sizes, "checkpointing": True}),
        steps(main, precision=usual, compiled=True, count=2),
        Case(f"{main}, saving", SAVING, "saving:saving", {**half, "batch": min(2, options.batch)}),
        Case(f"{main}, variants", VARIANTS, "variants:variants", step),
        *(steps(main, precision=precision) for precision in more[1:]),
        *(steps(model, OTHERS, precision=precision) for precision in (usual, *more) for model in options.others),
    ]
