"""One way to open and save a figure: no display, no global state, PNG or PDF by the name's ending."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from amltrain.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; used in this order."""


@contextmanager
def saved_figure(path: Path, size: tuple[float, float]) -> "Iterator[Figure]":
    """A figure of this size in inches, written to `path` at the end. Raises UserError when it cannot be written."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with rc_context({"pdf.fonttype": 42}):  # publishers refuse the default, Type 3
            figure.savefig(path, dpi=200)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
