"""How a model was trained, in a phrase for each question: the first lines of a report and of a model card."""

from collections.abc import Mapping, Sequence
from typing import Any


def training_facts(training: Mapping[str, Any] | None, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How a model was trained, in a phrase for each question. training: of its folder; rows: of the run's log."""
    if training is None:
        return {}
    recipe = training["recipe"]
    data, optim, train = (recipe.get(name) or {} for name in ("data", "optim", "train"))
    logged = [row for row in rows if "lr" in row and "epoch" in row]
    facts = {
        "method": str(recipe.get("method")) + _options(training.get("method_options") or {}),
        "trained on": f"{' + '.join(data.get('datasets', []))}, split {data.get('train_split')}",
        "seed": str(recipe.get("seed")),
        "optimizer": f"{optim.get('optimizer')}, lr {float(optim.get('lr') or 0):g}, {optim.get('schedule')}, "
        f"{optim.get('warmup_steps')} warm-up steps",
        "batch": str(train.get("global_batch_size")),
        "hardware": str(training.get("hardware")),
        "commit": str(training.get("commit") or "unknown")[:12],
    }
    if logged:
        last = logged[-1]
        facts["length"] = f"{last['step']:,} steps, {last['epoch']:.1f} epochs"
        if seconds := seconds_trained(logged, int(train.get("global_batch_size") or 0)):
            facts["length"] += f", {_duration(seconds)} of training"
    return facts


def seconds_trained(rows: Sequence[Mapping[str, Any]], batch: int) -> float:
    """Seconds that the logged steps took, evaluations and saves left out; 0 where the log does not tell."""
    before, seconds = 0, 0.0
    for row in rows:
        rate = row.get("images_per_second")
        if rate:
            seconds += (row["step"] - before) * batch / rate
            before = row["step"]
    return seconds


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _options(options: Mapping[str, Any]) -> str:
    """The first options of a method, e.g. ` (tau 0.4, rho 0.25)`."""
    shown = [f"{name} {value}" for name, value in options.items() if isinstance(value, (int, float, str))]
    return f" ({', '.join(shown[:4])})" if shown else ""
