"""The commands that make a table at a scale, and the folders that they write to.

Full scale trains the recipes into their own folders (`runs/paper/...`), so a run that you started by hand counts. Tiny
scale trains the small model of the same family, with the same method and options, for a few steps on synthetic scenes:
it shows that every command works, and compares with nothing.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from amltrain.data.manifest import read_manifest
from amltrain.errors import UserError
from amltrain.evaluation.results import read_results
from amltrain.reproduce.definition import SHARED, Kind, Row, Run, Scale, Table, splits_of
from amltrain.reproduce.recipes import SHAPES, read_recipe, stand_ins
from amltrain.training.finished import FINISHED_FILE

TINY_CONFIG = "tiny_table"
TINY_STEPS, TINY_SIZE = 24, 96
PAIRS = {"tiny": 16, "full": 2048}
"""Pairs whose losses and alignment scores are followed over the checkpoints."""
SHARES = ("0", "0.3", "0.5")


class Settings(NamedTuple):
    """What the command line chose. root: folder of tables and tiny runs. flags: more flags of `amltrain train`."""

    scale: Scale
    root: Path
    steps: int = TINY_STEPS
    seeds: tuple[int, ...] = (0,)
    prepared: str = "prepared"
    flags: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the tables of this scale lie; tiny ones of another number of steps lie elsewhere."""
        return self.root / (f"tiny-{self.steps}-steps" if self.scale == "tiny" else "full")


class Command(NamedTuple):
    """`amltrain NAME ARGUMENTS`. done: whether what it makes is there."""

    name: str
    arguments: tuple[str, ...]
    done: bool

    def __str__(self) -> str:
        return shlex.join(["amltrain", self.name, *self.arguments])


def plan(table: Table, settings: Settings) -> list[Command]:
    """Every command of a table, in order; those already done are marked."""
    runs = [(run, seed) for seed in settings.seeds for run in table.runs()]
    commands = [_train(run, seed, settings) for run, seed in runs]
    for seed in settings.seeds:
        for run in table.runs():
            commands += _single(run, [row for row in table.rows if row.run == run], seed, settings)
        commands += [_shared(kind, table, seed, settings) for kind in table.kinds() if kind in SHARED]
    return [*commands, *(c for row in table.rows_of("cost") for c in _cost(row, settings))]


def run_folder(run: Run, seed: int, settings: Settings) -> Path:
    """The output folder of a training."""
    recipe = read_recipe(run.recipe)
    kept = f"-checkpoints-{run.stop_after}" if run.checkpoints else f"-first-{run.stop_after}" if run.stop_after else ""
    base = Path(recipe.output) if settings.scale == "full" else settings.folder / "runs" / run.recipe
    return base.with_name(base.name + kept + (f"-seed-{seed}" if seed else ""))


def shared_folder(kind: Kind, table: Table, seed: int, settings: Settings) -> Path:
    """The folder of an analysis of all rows' models."""
    return settings.folder / "analyses" / table.name / f"seed-{seed}"


def cost_files(row: Row, settings: Settings) -> tuple[Path, Path]:
    """The JSON files of a benchmark: timed, and counted."""
    folder = settings.folder / "analyses" / "cost"
    name = read_recipe(row.run.recipe).model.partition("_")[0]
    return folder / f"{name}.json", folder / f"{name}-counted.json"


def analysed(row: Row, run: Path) -> str:
    """NAME=PLACE of a row's model for `amltrain analyse`."""
    return f"{row.label.replace(' ', '-').replace('=', '')}={run}"


def last_step(run: Run, settings: Settings) -> int:
    """The last step of a tiny run: a quarter of the steps for a run of a few epochs or of ReLA's 5,000 steps."""
    recipe = read_recipe(run.recipe)
    epochs = run.stop_after or recipe.stop_after or recipe.epochs
    short = epochs <= 10 or recipe.max_steps == 5000
    return max(2, settings.steps // 4) if short else settings.steps


def shown_split(split: str, settings: Settings) -> str:
    """`refcoco:val`, or its stand-in at the tiny scale, `refshapes:val`."""
    dataset, _, name = split.partition(":")
    return f"{SHAPES[dataset]}:{name}" if settings.scale == "tiny" else split


def check_data(table: Table, settings: Settings) -> None:
    """Raise UserError, with the commands to run, for data that a table at full scale needs and lacks."""
    if settings.scale == "tiny" or (settings.prepared.count("/") == 1 and not Path(settings.prepared).exists()):
        return  # drawn, or on the Hub
    needed = {name for run in table.runs() for name in read_recipe(run.recipe).datasets}
    needed |= {split.partition(":")[0] for split in splits_of(table.rows)}
    missing = sorted(name for name in needed if read_manifest(Path(settings.prepared) / name) is None)
    if missing:
        raise UserError(
            f"{table.name} at full scale needs {', '.join(missing)} in {settings.prepared}; run amltrain download "
            f"{' '.join(missing)} coco --root data/refer, then amltrain prepare --dataset {' '.join(missing)} "
            f"--refer_root data/refer --output {settings.prepared}"
        )


def _train(run: Run, seed: int, settings: Settings) -> Command:
    folder = run_folder(run, seed, settings)
    flags = _tiny_flags(run, settings) if settings.scale == "tiny" else _full_flags(run, settings)
    arguments = (*flags, "--seed", str(seed), "--output", str(folder), *settings.flags)
    return Command("train", arguments, _finished(folder, arguments, read_recipe(run.recipe).stop_after))


def _finished(folder: Path, arguments: Sequence[str], stop_after: int | None) -> bool:
    """Whether a run has ended where these arguments end. stop_after: of the recipe."""
    if not (folder / FINISHED_FILE).is_file():
        return False
    stop = arguments.index("--train.stop_after") if "--train.stop_after" in arguments else None
    if stop is not None:
        stop_after = int(arguments[stop + 1])
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return config["train"].get("stop_after") == stop_after


def _full_flags(run: Run, settings: Settings) -> list[str]:
    flags = ["--config", f"recipes/{run.recipe}"]
    if run.stop_after:
        flags += ["--train.stop_after", str(run.stop_after)]
    if run.checkpoints:
        flags += ["--checkpoint.initial", "true", "--checkpoint.keep", str((run.stop_after or 50) + 2)]
    return flags if settings.prepared == "prepared" else [*flags, "--data.prepared", settings.prepared]


def _tiny_flags(run: Run, settings: Settings) -> list[str]:
    """The recipe's method and options, on a small model and synthetic scenes."""
    recipe, last = read_recipe(run.recipe), last_step(run, settings)
    if run.stop_after or recipe.stop_after:
        length = ["--train.max_steps", str(settings.steps), "--train.stop_after", str(last)]
    else:
        length = ["--train.max_steps", str(last)]
    every = max(1, last // 4) if run.checkpoints else last
    kept = ["--checkpoint.initial", "true", "--checkpoint.keep", "99"] if run.checkpoints else []
    options = [word for name, value in recipe.options.items() for word in (f"--{recipe.method}.{name}", str(value))]
    return [
        *("--config", f"models/{recipe.tiny_model}", "--config", TINY_CONFIG),
        *("--data.datasets", f"[{', '.join(stand_ins(recipe.datasets))}]"),
        *("--data.prepared", str(settings.folder / "prepared")),
        *length,
        *("--evaluation.every_steps", str(every)),
        *kept,
        *("--method", recipe.method, *options),
    ]


def _single(run: Run, rows: Sequence[Row], seed: int, settings: Settings) -> list[Command]:
    """Commands that take one run: its evaluation, its losses, its alignment scores."""
    folder = run_folder(run, seed, settings)
    commands = []
    for kind in dict.fromkeys(row.kind for row in rows):
        own = [row for row in rows if row.kind == kind]
        if kind == "scores":
            commands += _evaluate(folder, splits_of(own), settings)
        elif kind in ("losses", "alignment"):
            name, split = ("losses", "train") if kind == "losses" else ("dynamics", "val")
            output = folder / name
            sizes = ("--split", split, "--pairs", str(PAIRS[settings.scale]), "--workers", _workers(settings))
            arguments = (name, "--models", f"model={folder}", *sizes, "--output", str(output))
            commands.append(Command("analyse", arguments, _newer(output / f"{name}.md", folder)))
    return commands


def _evaluate(folder: Path, splits: Sequence[str], settings: Settings) -> list[Command]:
    """Evaluate the splits that the run's results lack."""
    wanted = [shown_split(split, settings) for split in splits]
    output = folder / "reproduce"
    results = output / "results.json"
    there = {f"{r.dataset}:{r.split}" for r in read_results(results)} if _newer(results, folder) else set()
    missing = [split for split in wanted if split not in there]
    arguments = ("--checkpoint", str(folder), "--splits", *(missing or wanted), "--output", str(output))
    workers = ("--data.workers", _workers(settings), "--pictures", "0")
    return [Command("evaluate", (*arguments, *workers), not missing)]


def _shared(kind: Kind, table: Table, seed: int, settings: Settings) -> Command:
    """An analysis of all rows' models in one command."""
    rows = list(table.rows_of(kind))
    folders = [run_folder(row.run, seed, settings) for row in rows]
    output = shared_folder(kind, table, seed, settings)
    splits = [shown_split(split, settings).split(":") for split in splits_of(rows)]
    models = [analysed(row, folder) for row, folder in zip(rows, folders, strict=True)]
    options: list[str] = []
    if splits:
        options += ["--datasets", *dict.fromkeys(dataset for dataset, _ in splits), "--split", splits[0][1]]
    if kind == "occlusion":
        options += ["--shares", *SHARES]
    if kind == "histogram":
        options += ["--pairs", str(PAIRS[settings.scale])]
    if settings.scale == "tiny" and kind == "activation":
        options += ["--count", "2"]
    arguments = (kind, "--models", *models, *options, "--workers", _workers(settings), "--output", str(output))
    return Command("analyse", arguments, all(_newer(output / f"{kind}.md", folder) for folder in folders))


def _cost(row: Row, settings: Settings) -> list[Command]:
    recipe = read_recipe(row.run.recipe)
    timed, counted = cost_files(row, settings)
    tiny = settings.scale == "tiny"
    model = recipe.tiny_model if tiny else recipe.model
    size = ("--size", str(TINY_SIZE)) if tiny else ()
    precision = "fp32" if tiny or recipe.precision == "no" else recipe.precision
    how = ("--batch", "4" if tiny else "16", "--rounds", "3" if tiny else "10", "--precision", precision)
    return [
        Command("benchmark", ("--model", model, *size, *how, "--json", str(timed)), timed.is_file()),
        Command("benchmark", ("--model", model, *size, "--count", "--json", str(counted)), counted.is_file()),
    ]


def _newer(made: Path, run: Path) -> bool:
    """Whether a file was made after its run had finished."""
    finished = run / FINISHED_FILE
    return made.is_file() and finished.is_file() and made.stat().st_mtime >= finished.stat().st_mtime


def _workers(settings: Settings) -> str:
    return "0" if settings.scale == "tiny" else "2"


def read_json(path: Path) -> dict:
    """A JSON file, empty where it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
