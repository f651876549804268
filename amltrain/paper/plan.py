"""What a table needs to know of a recipe, read from its YAML layers without importing torch.

Types of a table of the paper. The tables themselves are in `tables`.

They are Python, not YAML: types are checked, and every YAML file under configs/ stays a run.

The commands that make a table at a scale, and the folders that they write to.

Full scale trains the recipes into their own folders (`runs/paper/...`), so a run that you started by hand counts. Tiny
scale trains the small model of the same family, with the same method and options, for a few steps on synthetic scenes:
it shows that every command works, and compares with nothing.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from amltrain.config.files import read_config_files
from amltrain.config.schema import COMBINED
from amltrain.data.catalog import read_manifest
from amltrain.errors import UserError
from amltrain.evaluation.results import read_results
from amltrain.registry import MODELS
from amltrain.run_folder import FINISHED_FILE, RESULTS_FILE, RUN_CONFIG

SHAPES = {
    "refcoco": "refshapes",
    "refcoco+": "refshapes+",
    "refcocog": "refshapesg",
    "refcocog-google": "refshapesg",
    "grefcoco": "grefshapes",
}
"""The synthetic stand-in of each data set at the tiny scale."""
DEFAULT_EPOCHS = 50
"""`train.epochs` of a recipe that does not set it."""


class Recipe(NamedTuple):
    """name: of the shipped config, without `recipes/`. options: of the method, as the recipe sets them.

    epochs, max_steps: of its schedule; max_steps comes first. precision: of its training.
    """

    name: str
    model: str
    datasets: tuple[str, ...]
    method: str
    options: dict[str, Any]
    epochs: int
    max_steps: int | None
    stop_after: int | None
    precision: str
    output: str

    @property
    def tiny_model(self) -> str:
        """The small model of the same family, e.g. caris_tiny for caris_swin_base."""
        return min((name for name in MODELS.family_of(self.model) if name.endswith("_tiny")), key=len)


@cache
def read_recipe(name: str) -> Recipe:
    """Read a recipe and its bases. Raises UserError if there is none of this name."""
    arguments = read_config_files(["--config", f"recipes/{name}"], {}).arguments
    values: dict[str, Any] = {}
    for layer in arguments[1::2]:
        values = _merged(values, yaml.safe_load(layer))
    datasets, method = values["data"]["datasets"], values["method"]
    train = values.get("train", {})
    return Recipe(
        name=name,
        model=values["model"]["name"],
        datasets=COMBINED if datasets == ["combined"] else tuple(datasets),
        method=method,
        options=values.get(method, {}),
        epochs=train.get("epochs", DEFAULT_EPOCHS),
        max_steps=train.get("max_steps"),
        stop_after=train.get("stop_after"),
        precision=train.get("mixed_precision", "no"),
        output=values["output"],
    )


def stand_ins(datasets: Sequence[str]) -> list[str]:
    """The synthetic data sets that stand for these."""
    return [SHAPES[name] for name in datasets]


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two layers of a config; groups are merged, anything else of the upper one wins."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


Scale = Literal["tiny", "full"]
Kind = Literal[
    "scores",
    "log",
    "losses",
    "alignment",
    "robustness",
    "occlusion",
    "activation",
    "histogram",
    "cost",
    "bound",
    "published",
]
"""Where the values of a row come from.

scores      `amltrain evaluate`; measure "refcoco:val/oIoU"
log         log.jsonl of the run; "val/oIoU, epoch 10" or "epoch_loss, epoch 1"
losses      `analyse losses`: mean loss on images without masks; "loss, epoch 1"
alignment   `analyse dynamics`; "score_mean, epoch 1"
robustness  `analyse robustness`; "refcoco:val/oIoU, haze" or "..., mean" of the seven perturbations
occlusion   `analyse occlusion`; "refcoco+:testA/oIoU, 30 %" or "..., drop at 30 %"
activation  `analyse activation`; "positive in truth" or "positive outside", percent of the pixels
histogram   `analyse histogram`; "score_mean"
cost        `python launch/benchmark.py`, relative to the baseline's step; "time", "memory" or "FLOPs"
bound       computed: the Johnson-Lindenstrauss distortion of the recipe's projections; "distortion bound", or as the
            paper computes it, "JL error of the paper"
published   nowhere: a system that is not trained here, or a number whose definition is not known
"""
SHARED: tuple[Kind, ...] = ("robustness", "occlusion", "activation", "histogram")
"""Kinds whose command takes the models of all rows at once."""
PERCENT: tuple[Kind, ...] = ("scores", "robustness", "occlusion", "activation")


class Run(NamedTuple):
    """A training. recipe: a config in configs/recipes.

    stop_after: epochs of the recipe's schedule; None = all. checkpoints: keep those of every epoch, and the untrained
    model.
    """

    recipe: str
    stop_after: int | None = None
    checkpoints: bool = False


class Row(NamedTuple):
    """A row of a table. cells: measure -> published value, None where it is not known to us."""

    label: str
    run: Run
    cells: Mapping[str, float | None]
    kind: Kind = "scores"


class Table(NamedTuple):
    """A table or figure. names: what the command line calls it, the first one is that of its files; paper: e.g.
    "Tables 4, 17"; what: in a few words; notes: printed below it.
    """

    names: tuple[str, ...]
    paper: str
    what: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.names[0]

    def runs(self) -> list[Run]:
        """The trainings that the table needs, each once."""
        trained = (row.run for row in self.rows if row.kind not in ("cost", "bound", "published"))
        return list(dict.fromkeys(trained))

    def recipes(self) -> list[str]:
        """The recipes that the table names, each once."""
        return list(dict.fromkeys(row.run.recipe for row in self.rows if row.kind != "published"))

    def kinds(self) -> list[Kind]:
        return list(dict.fromkeys(row.kind for row in self.rows))

    def rows_of(self, kind: Kind) -> Iterator[Row]:
        return (row for row in self.rows if row.kind == kind)


def splits_of(rows: Sequence[Row]) -> list[str]:
    """The splits that measures like "refcoco:val/oIoU, 30 %" name, each once: ["refcoco:val"]."""
    return list(dict.fromkeys(measure.partition("/")[0] for row in rows for measure in row.cells if ":" in measure))


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
    name = read_recipe(row.run.recipe).tiny_model.removesuffix("_tiny")
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
            f"{table.name} at full scale needs {', '.join(missing)} in {settings.prepared}; run amltrain data download "
            f"{' '.join(missing)} coco --root data/refer, then amltrain data prepare --dataset {' '.join(missing)} "
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
    config = yaml.safe_load((folder / RUN_CONFIG).read_text(encoding="utf-8"))
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
    results = output / RESULTS_FILE
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file, empty where it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
