"""Alignment diagnostics during training: a table, a plot and pictures of what AML scores and masks.

    output/alignment.csv             a row every N steps, over all patches since the row before
    output/alignment.png             the rows as curves
    output/alignment/step-NNNNNNN.png  scores and masked images of a fixed set of samples

Sums stay on the device and are read once per row.
"""

import csv
import io
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from amltrain.data.collate import collate
from amltrain.data.dataset import ReferDataset
from amltrain.data.transforms import normalise_batch
from amltrain.files import write_text
from amltrain.methods.aml.pictures import FixedSamples, draw_alignment, plot_rows
from amltrain.methods.aml.statistics import STATISTICS, summarise
from amltrain.models.eval_mode import eval_mode
from amltrain.records import Batch


class AlignmentDiagnostics:
    """Collects what AML with `diagnostics_every` returns; a Recorder of `methods.base`.

    Every rank calls `update` after each forward and `after_step` after each optimizer step.
    """

    def __init__(self, folder: Path, every_steps: int, samples: FixedSamples | None = None, *, block: int = 32) -> None:
        """block: side of a masked block in pixels, `aml.block`."""
        self.folder = folder
        self.every_steps = every_steps
        self.samples = samples
        self.block = block
        self.sums: Tensor | None = None

    def update(self, result: Mapping[str, Tensor]) -> None:
        """Add one forward's sums, on the device."""
        sums = result["alignment"]
        self.sums = sums.clone() if self.sums is None else self.sums + sums

    def window(self, reduce: Callable[[Tensor], Tensor] | None = None) -> list[list[float]] | None:
        """The sums since the last row, over all ranks, as JSON values."""
        if self.sums is None:
            return None
        return (self.sums if reduce is None else reduce(self.sums.clone())).tolist()

    def restore(self, window: list[list[float]] | None, device: torch.device) -> None:
        """Continue with the sums that `window` returned."""
        if window is not None and len(window) != len(STATISTICS):
            window = None  # of another version, which counted other statistics
        self.sums = None if window is None else torch.tensor(window, device=device)

    def after_step(
        self,
        step: int,
        method: nn.Module,
        reduce: Callable[[Tensor], Tensor] | None = None,
        is_main: bool = True,
    ) -> dict[str, float] | None:
        """Every `every_steps` steps write a row and the pictures; returns the row's values for the trackers, else None.

        step: optimizer steps done, from 1. method: AML as prepared (wrapped), which every rank runs forward once
        on the fixed samples. reduce: sums or averages over ranks (`accelerator.reduce`). Only the main rank writes.
        """
        if step % self.every_steps or self.sums is None:
            return None
        sums = self.sums if reduce is None else reduce(self.sums)
        self.sums = None
        values = summarise(sums)
        drawn = None if self.samples is None else forward_in_evaluation(method, self.samples.batch)
        if is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            rows = append_row(self.folder / "alignment.csv", {"step": float(step), **values})
            plot_rows(rows, self.folder / "alignment.png")
            if self.samples is not None and drawn is not None:
                picture = self.folder / "alignment" / f"step-{step:07d}.png"
                picture.parent.mkdir(exist_ok=True)
                draw_alignment(self.samples, drawn["scores"], drawn["blocks"], self.block, picture)
        return {f"alignment/{name}": value for name, value in values.items()}


def build_alignment_diagnostics(
    dataset: ReferDataset,
    folder: Path,
    device: torch.device,
    every_steps: int,
    *,
    block: int,
    tau: float | None = None,
    count: int = 4,
) -> AlignmentDiagnostics:
    """Diagnostics with `count` samples spread over the data set, on the device. tau: see `FixedSamples`."""
    indices = [i * len(dataset) // count for i in range(min(count, len(dataset)))]
    batch = collate([dataset[i] for i in indices])
    images = [dataset.transform.denormalise(image) for image in batch.image]
    moved = normalise_batch(batch.mapped(lambda part: part.to(device)), dataset.transform.normalization)
    samples = FixedSamples(moved, images, [dataset.info(i).sentence for i in indices], tau)
    return AlignmentDiagnostics(folder, every_steps, samples, block=block)


@torch.no_grad()
def forward_in_evaluation(method: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Run one forward without dropout and without changing batch norms or the random state.

    It calls the wrapper, because sharded engines gather weights in forward only.
    """
    with eval_mode(method):
        return method(batch)


def append_row(path: Path, row: Mapping[str, float]) -> list[dict[str, float]]:
    """Append to a CSV whose first column is `step`; rows of this step or later, left by a run that was resumed from an
    earlier one, go. Written atomically. Returns all rows."""
    rows: list[dict[str, float]] = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = [{name: float(value) for name, value in old.items()} for old in csv.DictReader(file)]
    rows = [*(old for old in rows if old["step"] < row["step"]), dict(row)]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(row), restval="nan", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: f"{value:.6g}" for name, value in r.items()} for r in rows)
    write_text(path, text.getvalue())
    return rows
