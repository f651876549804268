"""The contracts of a training method and of a masker, their registration, and the plain baseline.

A method is an nn.Module around a model and its loss. The trainer calls `forward(batch)` once per micro-batch and
`backward` once on what it returns, so Accelerate, DDP, FSDP2 and DeepSpeed see one forward and one backward, whatever
the method does inside. It knows no method by name; everything that it asks is on this page.

A masker decides which square blocks of an image to hide; the method applies the decision. So a method that masks can
use the masker of another one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, get_type_hints

import torch
from torch import Tensor, nn

from amltrain.data.dataset import ReferDataset
from amltrain.errors import UserError, fits, type_name, unknown_name
from amltrain.frames import at_view
from amltrain.losses import check_channels
from amltrain.models.base import RISModel
from amltrain.records import Batch, Features, ModelOutput, Vocabulary
from amltrain.registry import MASKERS, METHODS, NoOptions, check_options

Reduce = Callable[[Tensor], Tensor]
"""Averages or sums a tensor over the processes, e.g. `accelerator.reduce`; every process must call it."""


class Recorder(Protocol):
    """Collects statistics of a method during training; see `Method.recorder`."""

    def update(self, result: Mapping[str, Tensor]) -> None:
        """Add what one forward returned. Must not wait for the device."""

    def after_step(
        self, step: int, method: nn.Module, reduce: Reduce | None = None, is_main: bool = True
    ) -> dict[str, float] | None:
        """Called by every process after each optimizer step; a row for log and trackers when one is due, else None."""

    def window(self, reduce: Reduce | None = None) -> Any:
        """Return JSON values collected since the last row; every process calls it when the run saves."""

    def restore(self, window: Any, device: torch.device) -> None:
        """Continue with what `window` returned."""


class Method(nn.Module):
    """A model, its loss, and the way they are trained.

    Buffers and parameters of a subclass are part of the training state, so a resumed run has them; the exported model
    is `self.model` alone. Randomness must come from `batch.random_key`, a function of (seed, epoch, sample).
    """

    name: str = ""
    """As registered."""
    before_step_needs_weights: bool = False
    """Whether `before_step` runs the model, which is impossible where weights are sharded between steps."""

    needs_regions: bool = False
    """Whether `forward` reads `Batch.regions`, the ground truth of every pixel."""
    hides_images: bool = False
    """Whether it hides parts of the image of every sentence; then sentences cannot share a picture (`with_image`)."""
    hides_words: bool = False
    """Whether it hides words in `input_ids`, which a model that reads conversations does not look at."""

    def __init__(self, model: RISModel, loss: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return a step's "loss" [] with gradient, and detached extras; scalars among them are logged."""
        raise NotImplementedError

    def setup(self, first_batches: Iterable[Batch], reduce: Reduce | None = None) -> list[str]:
        """Prepare on the first batches of a new run, before anything is wrapped; returns lines to log.

        first_batches: this process's share, on the model's device; an iterator that costs nothing until it is read. Not
        called when a run resumes: what was found must be in buffers.
        """
        return []

    def before_step(self, step: int, batches: list[Batch], reduce: Reduce | None = None) -> list[str]:
        """Called before optimizer step `step` (from 0) with its micro-batches; returns lines to log."""
        return []

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups of everything that this method trains."""
        return self.model.param_groups(lr, weight_decay)

    def describe(self) -> dict[str, Any]:
        """Describe the settings of this training as JSON values."""
        return {}

    def summary(self) -> str:
        """The method in one line: "aml, preset paper, temperature 0.0051"."""
        facts = [f"{key} {_short(value)}" for key, value in self.describe().items()]
        return ", ".join([self.name, *facts])

    def recorder(self, dataset: ReferDataset, folder: Path, device: torch.device) -> Recorder | None:
        """Statistics to record during training into a run's output folder; None = nothing."""
        return None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class MethodInfo(NamedTuple):
    """One sentence about a method, and its paper ("" = none)."""

    summary: str
    paper: str


Builder = TypeVar("Builder", bound=Callable[..., Method])


def register_method(*, summary: str, paper: str = "", options: type = NoOptions) -> Callable[[Builder], Builder]:
    """Register a function `build(model, loss, options, vocabulary) -> Method` under its own name.

    options: a dataclass whose fields all have defaults; it is the section of a run that bears the method's name. A
    `check()` on it raises UserError for values that cannot work, before any data is read. `presets()` on it returns
    named complete settings, which `amltrain list methods NAME` shows.
    """

    def register(build: Builder) -> Builder:
        METHODS.add(build.__name__, build, MethodInfo(summary, paper), options=options)
        return build

    return register


def build_method(
    name: str, model: RISModel, loss: nn.Module, options: Any = None, vocabulary: Vocabulary | None = None
) -> Method:
    """Build a method around a model and its loss.

    options: of the method's own type; None = its defaults. vocabulary: of the run's tokenizer, for methods that change
    sentences. Raises UserError for options that this model cannot have, and for a loss that does not fit the model.
    """
    check_channels(loss, type(model).__name__, model.mask_channels)
    options = METHODS.options(name)() if options is None else options
    check_options(options)
    return named_method(METHODS[name].value(model, loss, options, vocabulary), name)


def named_method(method: Any, name: str) -> Method:
    """Give a method that was built its name. Raises UserError for anything but a `Method`."""
    if not isinstance(method, Method):
        raise UserError(
            f"the function that builds method {name} returns an object of type {type(method).__name__}; return a Method"
        )
    method.name = name
    return method


class Supervised(Method):
    """The model's own loss on the batch as it is."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.loss(self.model(batch), batch)


@register_method(summary="the model's own loss, nothing else")
def supervised(model: RISModel, loss: nn.Module, options: NoOptions, vocabulary: Vocabulary | None) -> Supervised:
    """Build the plain baseline."""
    return Supervised(model, loss)


def spread_blocks(blocks: Tensor, size: tuple[int, int], block: int) -> Tensor:
    """[B, r, c] -> [B, H, W], every block's value on its pixels; differentiable for floating blocks."""
    rows = blocks.repeat_interleave(block, dim=1, output_size=blocks.shape[1] * block)
    pixels = rows.repeat_interleave(block, dim=2, output_size=blocks.shape[2] * block)
    return pixels[:, : size[0], : size[1]]


def mask_image(image: Tensor, blocks: Tensor, block: int) -> Tensor:
    """Image [B, 3, H, W] with the blocks [B, r, c] bool set to zero, which is the mean colour once normalised."""
    pixels = spread_blocks(blocks, (image.shape[-2], image.shape[-1]), block)
    return image.masked_fill(pixels[:, None], 0.0)


def with_image(batch: Batch, image: Tensor, blocks: Tensor, block: int) -> Batch:
    """The batch with an image [B, 3, H, W] of its own for every sentence, in which the blocks [B, r, c] are hidden.

    The second picture hides the same places. A conversation is then about its own sentence's picture; there is one for
    each, see `Method.hides_images`.
    """
    view, talk = batch.view, batch.conversation
    if view is not None:
        assert batch.view_geometry is not None
        pixels = spread_blocks(blocks, (image.shape[-2], image.shape[-1]), block)
        view = view.masked_fill(at_view(pixels, batch.geometry, batch.view_geometry, view.shape[-1])[:, None], 0.0)
    if talk is not None:
        each = torch.arange(len(image), device=image.device)
        talk = talk._replace(owner=talk.row.argsort(), pictures=each)
    return batch._replace(image=image, view=view, conversation=talk)


class Masking(NamedTuple):
    """blocks [B, r, c] bool, True = hide; scores [B, h, w] float32 that led to it, None where nothing was scored."""

    blocks: Tensor
    scores: Tensor | None = None


class MaskingMaps(Protocol):
    """Scores and masks samples of a trained model, for whoever draws them."""

    def calibrate(self, batches: Sequence[Batch]) -> None:
        """Prepare on batches of the data that will be drawn."""

    def __call__(self, batch: Batch) -> Masking:
        """Score and mask a batch."""


class Masker(nn.Module):
    """Decides which blocks to hide. The model is an argument, so that it is not registered here a second time."""

    block: int
    needs_regions: bool = False
    """As `Method.needs_regions`; a method passes it on."""

    def forward(
        self, model: RISModel, batch: Batch, features: Features | None = None, output: ModelOutput | None = None
    ) -> Masking:
        """features, output: of the unmasked image in training mode, where the method has them already."""
        raise NotImplementedError

    def setup(self, model: RISModel, batches: Iterable[Batch], reduce: Reduce | None = None) -> list[str]:
        """Prepare on first batches; see `Method.setup`."""
        return []

    def describe(self) -> dict[str, Any]:
        """Describe the settings; see `Method.describe`."""
        return {}


MaskerBuilder = TypeVar("MaskerBuilder", bound=Callable[..., Masker])


def register_masker(name: str, *, options: type) -> Callable[[MaskerBuilder], MaskerBuilder]:
    """Register a function `build(model, options) -> Masker`."""

    def register(build: MaskerBuilder) -> MaskerBuilder:
        MASKERS.add(name, build, options=options)
        return build

    return register


def build_masker(name: str, model: RISModel, options: Mapping[str, Any]) -> Masker:
    """Build a masker by name. options: plain values by field name. Raises UserError for unknown options."""
    build, kind = MASKERS[name].value, MASKERS.options(name)
    hints = get_type_hints(kind)
    for key, value in options.items():
        if key not in {field.name for field in fields(kind)}:
            raise unknown_name(f"option of masker {name}", key, [field.name for field in fields(kind)])
        if not fits(value, hints[key]):
            raise UserError(f"option {key} of masker {name} is {value!r}, not {type_name(hints[key])}")
    return build(model, kind(**options))
