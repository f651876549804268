"""Alignment statistics of a batch, as sums that can be added over batches and ranks and divided at the end.

Every statistic is a ratio of two sums. Nothing here waits for the device.

Dimensions: B batch, h w score map, r c blocks, H W image, K statistics.

Drawings of alignment diagnostics: curves of the statistics, heat maps of scores, masked images.

Alignment diagnostics during training: a table, a plot and pictures of what AML scores and masks.

    output/alignment.csv             a row every N steps, over all patches since the row before
    output/alignment.png             the rows as curves
    output/alignment/step-NNNNNNN.png  scores and masked images of a fixed set of samples

Sums stay on the device and are read once per row.
"""

import csv
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from amltrain.data.dataset import ReferDataset
from amltrain.data.loaders import collate
from amltrain.data.transforms import prepare_batch
from amltrain.files import write_text
from amltrain.methods.aml.masking import weak_pixels
from amltrain.methods.base import spread_blocks
from amltrain.models.base import eval_mode
from amltrain.records import Batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TAUS = (0.2, 0.3, 0.4, 0.6)
LEVELS = (0.5, 0.9)
STATISTICS = (
    "score_mean",
    "score_square",
    *(f"below_{tau}" for tau in TAUS),
    *(f"above_{level}" for level in LEVELS),
    *(f"referent_below_{tau}" for tau in TAUS),
    "masked_image",
    "masked_referent",
    "masked_background",
    "auc",
    "auc_shuffled",
    "agreement",
)


def alignment_sums(
    scores: Tensor,
    blocks: Tensor,
    target: Tensor,
    block: int,
    shuffled: Tensor | None = None,
    other: Tensor | None = None,
) -> Tensor:
    """Numerators and denominators of `STATISTICS`, [K, 2] float32, detached.

    scores [B, h, w]; blocks [B, r, c] bool, the masked ones; target [B, H, W] uint8, 255 = referent.
    score_mean, score_square, below_T, above_T are over patches; referent_below_T is the share of the referents' area
    in patches scored under T (the paper's mask-on-ground-truth coverage); masked_image, masked_referent and
    masked_background are the shares of all pixels, of the referents' pixels and of the others that are masked.
    auc: see `referent_auc`; auc_shuffled: of `shuffled`, the scores with other samples' sentences. agreement:
    correlation with `other`, the scores of other projections, over the patches of an image. Both as `scores`; None
    counts nothing.
    """
    scores = scores.detach().float()
    referent = target.float() / 255
    inside = F.adaptive_avg_pool2d(referent[:, None], (scores.shape[-2], scores.shape[-1]))[:, 0]
    masked = spread_blocks(blocks.detach(), (target.shape[-2], target.shape[-1]), block)
    patches, pixels = (torch.full_like(scores[0, 0, 0], float(part.numel())) for part in (scores, target))
    area = inside.sum()
    rows = [(scores.sum(), patches), (scores.square().sum(), patches)]
    rows += [((scores < tau).sum(), patches) for tau in TAUS]
    rows += [((scores >= level).sum(), patches) for level in LEVELS]
    rows += [((inside * (scores < tau)).sum(), area) for tau in TAUS]
    rows += [(masked.sum(), pixels), ((referent * masked).sum(), referent.sum())]
    rows += [(((1 - referent) * masked).sum(), (1 - referent).sum())]
    nothing = (torch.zeros_like(area), torch.zeros_like(area))
    grid = (blocks.shape[-2], blocks.shape[-1])
    rows += [nothing if s is None else referent_auc(s, referent, grid) for s in (scores, shuffled)]
    rows += [nothing if other is None else correlation(scores, other)]
    return torch.stack([torch.stack([part.float() for part in row]) for row in rows])


def referent_auc(scores: Tensor, referent: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sum over images of the chance that a patch of the referent scores above a patch of the background; their number.

    scores [B, h, w], referent [B, H, W] in 0..1. A map finer than `grid`, the blocks, is averaged to it first. The
    referent's patches are covered at least half as much as the most covered one; the background's are not covered at
    all; others count for neither. 0.5 = the score does not tell them apart. Images without one of the two are left out.
    """
    if scores.shape[-2] * scores.shape[-1] > grid[0] * grid[1]:
        scores = F.adaptive_avg_pool2d(scores[:, None].float(), grid)[:, 0]
    scores = scores.detach().float()
    covered = F.adaptive_avg_pool2d(referent[:, None], (scores.shape[-2], scores.shape[-1])).flatten(1)
    most = covered.amax(dim=1, keepdim=True)
    positive, negative = (covered >= most / 2) & (most > 0), covered == 0
    values = scores.flatten(1)
    above = (values[:, :, None] > values[:, None]).float() + 0.5 * (values[:, :, None] == values[:, None]).float()
    pairs = (positive[:, :, None] & negative[:, None]).float()
    number = pairs.sum(dim=(1, 2))
    auc = (above * pairs).sum(dim=(1, 2)) / number.clamp(min=1)
    return auc.sum(), (number > 0).sum().float()


def correlation(scores: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over images of the correlation of two maps [B, h, w] over their patches, and the number of images."""
    a, b = (maps.detach().float().flatten(1) for maps in (scores, other))
    a, b = (F.normalize(maps - maps.mean(dim=1, keepdim=True), dim=1) for maps in (a, b))
    return (a * b).sum(), torch.full_like(a[0, 0], float(len(a)))


def summarise(sums: Tensor) -> dict[str, float]:
    """Ratios by name from added-up `alignment_sums`; score_square becomes score_std, and referent_ratio says how much
    more often the referent is masked than the background. NaN where nothing was counted.
    """
    numbers: Sequence[Sequence[float]] = sums.double().tolist()
    values = {
        name: top / bottom if bottom else float("nan") for name, (top, bottom) in zip(STATISTICS, numbers, strict=True)
    }
    mean, square = values["score_mean"], values.pop("score_square")
    background = values["masked_background"]
    ratio = values["masked_referent"] / background if background else float("nan")
    return {"score_mean": mean, "score_std": max(square - mean**2, 0.0) ** 0.5, **values, "referent_ratio": ratio}


REFERENT, WEAK = "lime", "#ff4fa3"
PANELS = (
    ("alignment scores", ("score_mean", "score_std", "above_0.5", "above_0.9")),
    ("share of patches below", tuple(f"below_{tau}" for tau in TAUS)),
    ("share of the referents below", tuple(f"referent_below_{tau}" for tau in TAUS)),
    ("share masked", ("masked_image", "masked_referent", "masked_background")),
    ("does the score find the referent (0.5 = no)", ("auc", "auc_shuffled")),
    ("agreement of two projections", ("agreement",)),
)


class FixedSamples(NamedTuple):
    """Samples drawn again and again: a batch on the task's device, its images [H, W, 3] uint8 RGB, its sentences.

    tau: threshold of the scores, to outline weak patches; None = no outlines.
    """

    batch: Batch
    images: Sequence[NDArray[np.uint8]]
    sentences: Sequence[str]
    tau: float | None = None


def plot_rows(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Statistics over steps, six panels, as a PNG."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(15, 7)
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for name in names:
            axes.plot([r["step"] for r in rows], [r[name] for r in rows], marker=".", label=name.replace("_", " "))
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def draw_alignment(samples: FixedSamples, scores: Tensor, blocks: Tensor, block: int, path: Path) -> None:
    """Draw one row per sample: the image with the referent's outline, its scores (0..1), the image that stage 2 sees.

    All scores share one colour scale, on which tau is marked; pixels below tau are outlined (`FixedSamples.tau`).
    scores [B, h, w], blocks [B, r, c] bool as AML built with `diagnostics_every` returns them; all on any device.
    block: side of a block, pixels.
    """
    from matplotlib.lines import Line2D

    target = samples.batch.target.cpu()
    size = (target.shape[-2], target.shape[-1])
    masked = spread_blocks(blocks.cpu(), size, block)
    scores = scores.detach().float().cpu()
    weak = None if samples.tau is None else weak_pixels(scores, size, samples.tau)
    count = len(samples.images)
    figure = _figure(9, 2.9 * count + 0.4)
    grid = figure.subplots(count, 3, squeeze=False)
    for i, row in enumerate(grid):
        image = samples.images[i]
        row[0].imshow(image)
        row[0].set_title(textwrap.fill(samples.sentences[i], 42), fontsize=9, loc="left")
        row[1].imshow(image.mean(-1), cmap="gray", vmin=0, vmax=255)
        extent = (-0.5, size[1] - 0.5, size[0] - 0.5, -0.5)
        heat = row[1].imshow(scores[i].numpy(), extent=extent, cmap="viridis", vmin=0, vmax=1, alpha=0.8)
        share = "" if weak is None else f", {weak[i].float().mean():.0%} weak"
        row[1].set_title(f"scores, mean {scores[i].mean():.2f}{share}", fontsize=9)
        _outline(row[1], None if weak is None else weak[i], WEAK)
        row[2].imshow(image * ~masked[i][..., None].numpy())
        row[2].set_title(f"stage 2: {masked[i].float().mean():.0%} masked", fontsize=9)
        for axes in row:
            _outline(axes, target[i] > 127, REFERENT)
            axes.set_axis_off()
    bar = figure.colorbar(heat, ax=grid, fraction=0.03, pad=0.02, label="alignment score")
    lines = [Line2D([], [], color=REFERENT, label="referent")]
    if samples.tau is not None:
        bar.ax.axhline(samples.tau, color=WEAK, linewidth=2)
        lines.append(Line2D([], [], color=WEAK, label=f"weak: score below tau = {samples.tau:g}"))
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def _outline(axes: "Axes", mask: Tensor | None, colour: str) -> None:
    """Outline a mask [H, W] bool; nothing where it is empty, full or None."""
    if mask is not None and mask.any() and not mask.all():
        axes.contour(mask.float().numpy(), levels=[0.5], colors=colour, linewidths=1.3)


def _figure(width: float, height: float) -> "Figure":
    """A figure of so many inches, without display or global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second, which no run without pictures needs
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


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
    moved = prepare_batch(batch, dataset.transform.normalization, device)
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
    earlier one, go. Written atomically. Returns all rows.
    """
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
