"""A planned comparison of masking methods: the arms, seeds, metric and stop rule of a file that is written before.

    python launch/benchmark.py masking --plan benchmarks/masking_shapes.yaml --folder runs/masking --minutes 60
    python launch/benchmark.py masking --plan benchmarks/masking_shapes.yaml --folder runs/masking --report

Every run that is finished stays; a call continues where the last one stopped, one seed of everything after the other,
so that every slice of the time gives a balanced table. `--share 1/2` runs every other one, for two processes at once.
The plan's SHA-256 is kept with the first run, and another plan is rejected: what was planned cannot be changed
afterwards.
"""

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

import amltrain
from amltrain.errors import UserError, one_line_errors
from amltrain.evaluation.compare import Difference, compare
from amltrain.evaluation.results import read_results
from amltrain.evaluation.statistics import detectable, holm
from amltrain.evaluation.tables import markdown
from amltrain.run_folder import FINISHED_FILE, LOG_FILE, RESULTS_FILE

PLAN_FILE = "plan.sha256"


class Cell(NamedTuple):
    """One run: a seed of an arm under a condition."""

    condition: str
    arm: str
    seed: int

    def folder(self, study: Path) -> Path:
        """Where the run lies."""
        return study / self.condition / f"{self.arm}-{self.seed}"


class Plan(NamedTuple):
    """What is run, and how it will be judged; see the YAML files beside this one for the fields."""

    path: Path
    digest: str
    question: str
    metric: str
    rule: str
    start: Mapping[str, Any]
    common: Mapping[str, Any]
    conditions: Mapping[str, Mapping[str, Any]]
    arms: Mapping[str, Mapping[str, Any]]
    pairs: Sequence[tuple[str, str]]

    def cells(self) -> Iterator[Cell]:
        """Every run, one seed of everything after the other."""
        most = max(arm["seeds"] for arm in self.arms.values())
        for seed in range(1, most + 1):
            for condition in self.conditions:
                for name, arm in self.arms.items():
                    if seed <= arm["seeds"]:
                        yield Cell(condition, name, seed)


def read_plan(path: Path) -> Plan:
    """Read a plan. Raises UserError for a file that lacks a field."""
    text = path.read_bytes()
    given = yaml.safe_load(text)
    fields = [name for name in Plan._fields if name not in ("path", "digest")]
    missing = [name for name in fields if name not in given]
    if missing:
        raise UserError(f"{path} has no {missing[0]}; see benchmarks/masking_shapes.yaml")
    pairs = [tuple(pair) for pair in given["pairs"]]
    return Plan(path, hashlib.sha256(text).hexdigest(), **{**{name: given[name] for name in fields}, "pairs": pairs})


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, later ones over earlier ones."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both else value
    return result


def train_start(plan: Plan, study: Path) -> Path:
    """Train what every run starts from, once; returns its model folder."""
    folder = study / "start"
    if not (folder / FINISHED_FILE).exists():
        amltrain.train(merged(plan.common, plan.start, {"output": str(folder)}))
    return folder / "last" / "model"


def train_cell(plan: Plan, study: Path, cell: Cell, start: Path) -> None:
    """Train one run and keep its scores, its log and its config; weights are thrown away, as there are too many."""
    folder = cell.folder(study)
    shutil.rmtree(folder, ignore_errors=True)  # a run that was cut short: its weights are no use to anyone
    arm = {key: value for key, value in plan.arms[cell.arm].items() if key not in ("seeds", "what")}
    own = {"seed": cell.seed, "output": str(folder), "model": {"checkpoint": str(start)}}
    amltrain.train(merged(plan.common, plan.conditions[cell.condition], arm, own))
    for checkpoint in [*folder.glob("step-*"), folder / "last", folder / "best"]:
        checkpoint.unlink() if checkpoint.is_symlink() else shutil.rmtree(checkpoint, ignore_errors=True)


def is_done(cell: Cell, study: Path) -> bool:
    """Whether a run has ended with its scores."""
    folder = cell.folder(study)
    return (folder / FINISHED_FILE).exists() and (folder / RESULTS_FILE).exists()


def check_plan(plan: Plan, study: Path) -> None:
    """Keep the plan's digest with the first run. Raises UserError if it has changed since."""
    study.mkdir(parents=True, exist_ok=True)
    path = study / PLAN_FILE
    if not path.exists():
        path.write_text(plan.digest + "\n")
    elif path.read_text().strip() != plan.digest:
        raise UserError(f"{plan.path} was changed after {study} was begun; use the plan as it was, or another folder")


def run(plan: Plan, study: Path, minutes: float, share: tuple[int, int]) -> None:
    """Train what is missing until the time is up; `share` (i, n): only every n-th run, from the i-th on."""
    check_plan(plan, study)
    begun = time.monotonic()
    start = train_start(plan, study) if share[0] == 1 else wait_for_start(study)
    missing = [cell for number, cell in enumerate(plan.cells()) if number % share[1] == share[0] - 1]
    missing = [cell for cell in missing if not is_done(cell, study)]
    longest = 0.0
    for number, cell in enumerate(missing):
        before = time.monotonic()
        if before - begun + longest > 60 * minutes:
            print(f"time is up; {len(missing) - number} runs of this share are missing")
            return
        print(f"[{number + 1}/{len(missing)}] {cell.condition} {cell.arm} seed {cell.seed}", flush=True)
        train_cell(plan, study, cell, start)
        longest = max(longest, time.monotonic() - before)


def wait_for_start(study: Path) -> Path:
    """Wait until the process with the first share has trained the start."""
    while not (study / "start" / FINISHED_FILE).exists():
        time.sleep(5)
    return study / "start" / "last" / "model"


def finished(plan: Plan, study: Path, condition: str) -> dict[str, list[int]]:
    """Seeds that every arm of a condition has finished, by arm."""
    done = {arm: [c.seed for c in plan.cells() if c[:2] == (condition, arm) and is_done(c, study)] for arm in plan.arms}
    return {arm: seeds for arm, seeds in done.items() if seeds}


def score(cell: Cell, study: Path, metric: str) -> float:
    """The metric of a finished run, percent."""
    [row] = read_results(cell.folder(study) / RESULTS_FILE)
    return row.score(metric)


def masked_share(cell: Cell, study: Path) -> float:
    """Mean share of the blocks that the logged steps masked, percent; 0 where the method masks nothing."""
    lines = [json.loads(line) for line in (cell.folder(study) / LOG_FILE).read_text().splitlines()]
    return 100 * float(np.mean([line["masked_share"] for line in lines if "masked_share" in line] or [0]))


class Pair(NamedTuple):
    """One planned comparison under one condition. least: the smallest true difference that these seeds would find."""

    condition: str
    names: str
    difference: Difference
    least: float


def planned_pairs(plan: Plan, study: Path) -> list[Pair]:
    """Every planned pair with two seeds or more in common, p values corrected for all of them together."""
    found = []
    for condition in plan.conditions:
        seeds = finished(plan, study, condition)
        for one, two in plan.pairs:
            common = [seed for seed in seeds.get(one, []) if seed in seeds.get(two, [])]
            if len(common) < 2:
                continue
            places = {arm: [Cell(condition, arm, seed).folder(study) for seed in common] for arm in (two, one)}
            [difference] = compare(places, metrics=[plan.metric], draws=10_000).differences
            each = [score(Cell(condition, one, s), study, plan.metric) for s in common]
            other = [score(Cell(condition, two, s), study, plan.metric) for s in common]
            least = detectable([a - b for a, b in zip(each, other, strict=True)])
            found.append(Pair(condition, f"{one} - {two}", difference, least))
    corrected = holm([pair.difference.p for pair in found])
    return [
        pair._replace(difference=pair.difference._replace(p_holm=p)) for pair, p in zip(found, corrected, strict=True)
    ]


def report(plan: Plan, study: Path) -> str:
    """The tables as Markdown: every arm and seed, and the planned pairs with tests and power."""
    check_plan(plan, study)
    lines = [f"Plan `{plan.path.name}`, SHA-256 {plan.digest[:12]}. {plan.question}", "", f"Rule: {plan.rule}", ""]
    for condition in plan.conditions:
        seeds = finished(plan, study, condition)
        if seeds:
            lines += [f"### {condition}", "", *_arms(plan, study, condition, seeds), ""]
    pairs = planned_pairs(plan, study)
    header = ("condition", "difference", plan.metric, "95 %, images and seeds", "seeds", "p", "p (Holm)", "p (t)")
    rows = [
        (
            pair.condition,
            pair.names,
            f"{d.value:+.2f}",
            f"{d.low:+.2f} to {d.high:+.2f}{' *' if d.unequal else ''}",
            str(d.seeds.pairs if d.seeds else 1),
            f"{d.p:.3f}",
            f"{d.p_holm:.3f}",
            f"{d.seeds.p:.3f}" if d.seeds else "-",
            f"{d.flip:.3f}" if d.flip is not None else "-",
            f"{pair.least:.2f}",
        )
        for pair in pairs
        for d in [pair.difference]
    ]
    lines += [f"### Planned comparisons ({len(pairs)})", "", *markdown([(*header, "p (flip)", "would find"), *rows], 2)]
    lines += [
        "",
        "`would find`: the smallest true difference that a paired t-test of these seeds finds in 80 of 100 tries.",
    ]
    return "\n".join(lines)


def _arms(plan: Plan, study: Path, condition: str, seeds: Mapping[str, Sequence[int]]) -> list[str]:
    rows = [("arm", f"{plan.metric} of every seed", "mean", "masked, %")]
    for arm, own in seeds.items():
        values = [score(Cell(condition, arm, seed), study, plan.metric) for seed in own]
        share = np.mean([masked_share(Cell(condition, arm, seed), study) for seed in own])
        deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        rows.append((arm, ", ".join(f"{v:.1f}" for v in values), f"{np.mean(values):.2f}{deviation}", f"{share:.1f}"))
    return markdown(rows, 2)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python launch/benchmark.py masking",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plan", type=Path, required=True, help="the YAML file of the plan")
    parser.add_argument("--folder", type=Path, required=True, help="folder of the study: runs are added to it")
    parser.add_argument("--minutes", type=float, default=60, help="time for this call (default 60)")
    parser.add_argument("--share", default="1/1", help="I/N: every N-th run from the I-th on, for N processes at once")
    parser.add_argument("--report", action="store_true", help="print the tables of what is finished; train nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = build_parser().parse_args(arguments)
    with one_line_errors():
        plan = read_plan(args.plan)
        if args.report:
            print(report(plan, args.folder))
            return
        part, _, count = args.share.partition("/")
        if not (part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
            raise UserError(f"--share {args.share} is not a part of the runs; give e.g. 1/2 and 2/2")
        run(plan, args.folder, args.minutes, (int(part), int(count)))


if __name__ == "__main__":
    main()
