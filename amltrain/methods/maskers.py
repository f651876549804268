"""Square blocks of an image that a method masks: a decision [B, r, c] per block, spread to the image's pixels.

Maskers: which blocks of an image a method hides. A method that masks can use the masker of another one.

A masker decides per block of `block` x `block` pixels; the method applies the decision. Register
one with `@register_masker` on a function `build(model, options) -> Masker` and one line in `MASKERS`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, Protocol, TypeVar, get_type_hints

from torch import Tensor, nn

from amltrain.errors import UserError, fits, type_name, unknown_name
from amltrain.methods.base import Reduce
from amltrain.models.base import RISModel
from amltrain.records import Batch, Features, ModelOutput
from amltrain.registry import MASKERS


def spread_blocks(blocks: Tensor, size: tuple[int, int], block: int) -> Tensor:
    """[B, r, c] -> [B, H, W], every block's value on its pixels; differentiable for floating blocks."""
    rows = blocks.repeat_interleave(block, dim=1, output_size=blocks.shape[1] * block)
    pixels = rows.repeat_interleave(block, dim=2, output_size=blocks.shape[2] * block)
    return pixels[:, : size[0], : size[1]]


def mask_image(image: Tensor, blocks: Tensor, block: int) -> Tensor:
    """image [B, 3, H, W] with the blocks [B, r, c] bool set to zero, which is the mean colour once normalised."""
    pixels = spread_blocks(blocks, (image.shape[-2], image.shape[-1]), block)
    return image.masked_fill(pixels[:, None], 0.0)


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


Builder = TypeVar("Builder", bound=Callable[..., Masker])


def register_masker(name: str, *, options: type) -> Callable[[Builder], Builder]:
    """Register a function `build(model, options) -> Masker`."""

    def register(build: Builder) -> Builder:
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
