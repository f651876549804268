"""Types of a table of the paper. The tables themselves are in `tables`.

They are Python, not YAML: types are checked, and every YAML file under configs/ stays a run.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

Scale = Literal["tiny", "full"]
Kind = Literal[
    "scores", "log", "losses", "alignment", "robustness", "occlusion", "activation", "histogram", "cost", "bound"
]
"""Where the values of a row come from.

scores      `amltrain evaluate`; measure "refcoco:val/oIoU"
log         log.jsonl of the run; "val/oIoU, epoch 10" or "epoch_loss, epoch 1"
losses      `analyse losses`: mean loss on images without masks; "loss, epoch 1"
alignment   `analyse dynamics`; "score_mean, epoch 1"
robustness  `analyse robustness`: mean over the seven perturbations; "refcoco:val/oIoU"
occlusion   `analyse occlusion`; "refcoco+:testA/oIoU, 30 %" or "..., drop at 30 %"
activation  `analyse activation`; "positive in truth" or "positive outside", percent of the pixels
histogram   `analyse histogram`; "score_mean"
cost        `amltrain benchmark`, relative to the baseline's step; "time", "memory" or "FLOPs"
bound       computed: the Johnson-Lindenstrauss distortion of the recipe's projections; "distortion bound"
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
    "Tables 4, 17"; what: in a few words; notes: printed below it."""

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
        trained = (row.run for row in self.rows if row.kind not in ("cost", "bound"))
        return list(dict.fromkeys(trained))

    def recipes(self) -> list[str]:
        """The recipes that the table names, each once."""
        return list(dict.fromkeys(row.run.recipe for row in self.rows))

    def kinds(self) -> list[Kind]:
        return list(dict.fromkeys(row.kind for row in self.rows))

    def rows_of(self, kind: Kind) -> Iterator[Row]:
        return (row for row in self.rows if row.kind == kind)


def splits_of(rows: Sequence[Row]) -> list[str]:
    """The splits that measures like "refcoco:val/oIoU, 30 %" name, each once: ["refcoco:val"]."""
    return list(dict.fromkeys(measure.partition("/")[0] for row in rows for measure in row.cells if ":" in measure))
