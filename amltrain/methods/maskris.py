"""MaskRIS: train on the image and sentence as they are, and on a masked image and sentence against its own prediction.

Paper: MaskRIS: Semantic Distortion-aware Data Augmentation for Referring Image Segmentation (arXiv 2411.19067).
Official code: naver-ai/maskris at 01b54d5, Apache-2.0; reimplemented, nothing is copied.

Each step runs the model twice in training mode. Pass A sees the original pair and learns from the ground truth. Pass B
sees the masked pair and learns from pass A's prediction, which gets no gradient. loss = (1 - w) * A + w * B, w = 0.5.

Kept       random image blocks, exactly the same number per image; BERT-style word masking with an unchanged attention
           mask; soft targets at the logits' own size with the loss's class weights.
Different  both passes are in one forward and one backward, which gives the same gradient under DDP, FSDP2 and
           DeepSpeed. Random numbers come from each sample's key. Images of any size work.
Ours       tokenizers without a mask token (CLIP): a masked word is dropped, words close up. One-channel logits: binary
           cross-entropy against the sigmoid. The blocks may come from another method's masker.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.config.fields import ANY, check_number
from amltrain.errors import UserError
from amltrain.losses import at_least_float32
from amltrain.methods.base import (
    Masker,
    Masking,
    Method,
    Reduce,
    build_masker,
    mask_image,
    register_masker,
    register_method,
    with_image,
)
from amltrain.models.base import RISModel
from amltrain.randomness import uniform
from amltrain.records import Batch, Features, ModelOutput, Vocabulary

IMAGE, WORD, REPLACEMENT = 8, 9, 10
"""Streams of random numbers."""


@dataclass
class RandomMaskerOptions:
    """Blocks of an image at random places, exactly the same number in every image."""

    ratio: float = 0.75
    """Share of the blocks that is hidden."""
    block: int = 32
    """Side of a block, pixels."""


@dataclass
class MaskRISOptions:
    """Masked image and sentence with self-distillation (arXiv 2411.19067)."""

    masker: str = "random"
    """Which blocks of the image are hidden: random, or the masker of another method (aml)."""
    masker_options: dict[str, Any] = field(default_factory=dict)
    """Options of the masker, e.g. ratio and block of random (0.75 and 32), or tau of aml."""
    text_ratio: float = 0.15
    """Probability that a word is selected; special tokens never are."""
    mask_share: float = 0.8
    """Share of the selected words that become the mask token."""
    replace_share: float = 0.1
    """Share of the selected words that become a random token; the rest stays as it is."""
    distillation_weight: float = 0.5
    """Weight of the masked pass, 0..1; the unmasked one gets the rest."""

    def check(self) -> None:
        """Raise UserError for a number outside its range."""
        for name in ("text_ratio", "mask_share", "replace_share", "distillation_weight"):
            check_number(f"maskris.{name}", getattr(self, name), 0, 1)
        if self.mask_share + self.replace_share > 1:
            raise UserError(
                f"maskris.mask_share + maskris.replace_share is {self.mask_share + self.replace_share:g}; they are "
                "shares of the selected words and may add up to 1 at most"
            )


class RandomMasker(Masker):
    """Hides a fixed share of the blocks of every image."""

    def __init__(self, ratio: float = 0.75, block: int = 32) -> None:
        super().__init__()
        self.ratio, self.block = ratio, block

    def forward(
        self, model: RISModel, batch: Batch, features: Features | None = None, output: ModelOutput | None = None
    ) -> Masking:
        rows, columns = (-(-side // self.block) for side in batch.image.shape[-2:])
        noise = uniform(batch.random_key, rows * columns, IMAGE)
        return Masking(hide_by_rank(noise, self.ratio).unflatten(1, (rows, columns)))

    def describe(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "block": self.block}


def hide_by_rank(noise: Tensor, ratio: float) -> Tensor:
    """Hide all but the `int(N * (1 - ratio))` smallest of N random numbers: noise [B, N] -> [B, N] bool."""
    kept = int(noise.shape[1] * (1 - ratio))
    return noise.argsort(dim=1).argsort(dim=1) >= kept


def mask_words(
    input_ids: Tensor, draws: Tensor, replacements: Tensor, vocabulary: Vocabulary, options: MaskRISOptions
) -> Tensor:
    """Replace selected words: input_ids [B, L] int64 -> [B, L] int64.

    draws [B, L] in 0..1, replacements [B, L] int64 in [0, vocabulary size). A position is selected where its draw is
    below text_ratio; the draw divided by text_ratio then decides what becomes of it.
    """
    special = torch.tensor(vocabulary.special, device=input_ids.device)
    selected = (draws < options.text_ratio) & ~torch.isin(input_ids, special)
    kind = draws / max(options.text_ratio, 1e-12)
    masked = selected & (kind < options.mask_share)
    replaced = selected & ~masked & (kind < options.mask_share + options.replace_share)
    result = torch.where(replaced, replacements, input_ids)
    return result if vocabulary.mask is None else result.masked_fill(masked, vocabulary.mask)


def drop_words(input_ids: Tensor, text_mask: Tensor, dropped: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Leave positions out; the rest closes up and padding fills the end. All [B, L]; returns ids and mask."""
    order = dropped.long().argsort(dim=1, stable=True)
    length = input_ids.shape[1] - dropped.sum(dim=1, keepdim=True)
    inside = torch.arange(input_ids.shape[1], device=input_ids.device) < length
    return input_ids.gather(1, order).where(inside, padding), text_mask.gather(1, order) & inside


def distillation_loss(logits: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of logits [B, K, h, w] against a teacher's, which gets no gradient.

    Two channels: class-weighted (weight [2]), mean over the pixels. One channel: binary cross-entropy.
    """
    logits, teacher = at_least_float32(logits), at_least_float32(teacher.detach())
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits, teacher.sigmoid())
    return F.cross_entropy(logits, teacher.softmax(dim=1), None if weight is None else weight.to(logits.dtype))


class MaskRIS(Method):
    """Two passes in one forward: the original pair against the truth, the masked pair against the first prediction.

    forward(batch) returns "loss" [] and, detached, the loss's own values of pass A, "clean_loss", "distillation_loss"
    and "masked_share" of the image's blocks.
    """

    hides_images = True
    hides_words = True

    def __init__(
        self, model: RISModel, loss: nn.Module, masker: Masker, vocabulary: Vocabulary, options: MaskRISOptions
    ) -> None:
        super().__init__(model, loss)
        self.masker, self.vocabulary, self.options = masker, vocabulary, options
        self.needs_regions = masker.needs_regions

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        clean = self.model(batch)
        truth = self.loss(clean, batch)
        blocks = self.masker(self.model, batch).blocks
        image = mask_image(batch.image, blocks, self.masker.block)
        masked = with_image(self.masked_sentences(batch), image, blocks, self.masker.block)
        student = self.model(masked)
        weight = getattr(self.loss, "weight", None)
        distilled = distillation_loss(student.logits, clean.logits, weight)
        share = self.options.distillation_weight
        return {
            **truth,
            "loss": (1 - share) * truth["loss"] + share * distilled,
            "clean_loss": truth["loss"].detach(),
            "distillation_loss": distilled.detach(),
            "masked_share": blocks.float().mean(),
        }

    def masked_sentences(self, batch: Batch) -> Batch:
        """The batch with words masked, or dropped where the tokenizer has no mask token."""
        ids, vocabulary = batch.input_ids, self.vocabulary
        draws = uniform(batch.random_key, ids.shape[1], WORD)
        replacements = (uniform(batch.random_key, ids.shape[1], REPLACEMENT) * vocabulary.size).long()
        if vocabulary.mask is not None:
            return batch._replace(input_ids=mask_words(ids, draws, replacements, vocabulary, self.options))
        marked = mask_words(ids, draws, replacements, vocabulary._replace(mask=-1), self.options)
        ids, text_mask = drop_words(marked, batch.text_mask, marked == -1, vocabulary.padding)
        return batch._replace(input_ids=ids, text_mask=text_mask)

    def setup(self, first_batches: Iterable[Batch], reduce: Reduce | None = None) -> list[str]:
        return self.masker.setup(self.model, first_batches, reduce)

    def describe(self) -> dict[str, Any]:
        return {"masker": self.options.masker, **self.masker.describe(), "text_ratio": self.options.text_ratio}


@register_masker("random", options=RandomMaskerOptions)
def random_masker(model: RISModel, options: RandomMaskerOptions) -> RandomMasker:
    """Build the masker."""
    check_number("option ratio of masker random", options.ratio, 0, 1)
    check_number("option block of masker random", options.block, 1, ANY)
    return RandomMasker(options.ratio, options.block)


@register_method(
    summary="a masked image and sentence learn from the model's own prediction on the unmasked ones",
    paper="MaskRIS: Semantic Distortion-aware Data Augmentation for Referring Image Segmentation, arXiv 2411.19067",
    options=MaskRISOptions,
)
def maskris(model: RISModel, loss: nn.Module, options: MaskRISOptions, vocabulary: Vocabulary | None) -> MaskRIS:
    """Build the method."""
    if vocabulary is None:
        raise UserError("method maskris masks words and needs the run's vocabulary; build it with a tokenizer")
    return MaskRIS(model, loss, build_masker(options.masker, model, options.masker_options), vocabulary, options)
