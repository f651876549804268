"""Mask grounding: hide words of the sentence and recover them from the image, the other words and the referent's mask.

Paper: Mask Grounding for Referring Image Segmentation (MagNet, CVPR 2024, arXiv 2312.12198).
Official code: yxchng/mask-grounding at 2debc7e, AGPL-3.0, inference only, without these losses.

Kept       the idea: a small predictor reads the sentence with hidden words, the image's features and an encoding of the
           ground-truth mask, and names the hidden words; beside it a loss that pulls the referent's pixels together and
           towards the sentence. The exported model contains nothing of it.
Ours       everything that the release is silent about: all sizes, weights, rates and the temperature; one pass, so the
           segmentation learns from the sentence with hidden words, too; what is read is a model's fused features, so
           any model can be trained this way; tokenizers without a mask token (CLIP) get a random token instead.

Nothing here can be compared with the authors' training, and no published number belongs to it.

Dimensions: B batch, L tokens, N positions of the fused map, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.config.fields import ANY, check_number
from amltrain.errors import UserError
from amltrain.losses import at_least_float32
from amltrain.methods.base import Method, register_method
from amltrain.models.base import RISModel
from amltrain.randomness import uniform
from amltrain.records import Batch, Vocabulary

WORD, REPLACEMENT = 11, 12
"""Streams of random numbers."""


@dataclass
class MaskGroundingOptions:
    """Hidden words recovered from image and mask, and aligned pixels (arXiv 2312.12198); all values are ours."""

    rate: float = 0.15
    """Probability that a word is hidden; special tokens never are."""
    grounding_weight: float = 0.1
    """Weight of the cross-entropy of the hidden words."""
    alignment_weight: float = 0.1
    """Weight of the two losses that align the referent's pixels with each other and with the sentence."""
    temperature: float = 0.1
    """Divides the cosines of the alignment losses."""
    width: int = 256
    """Width of the predictor, a multiple of 8."""
    layers: int = 2
    """Layers of the predictor."""

    def check(self) -> None:
        """Raise UserError for a number outside its range."""
        check_number("mask_grounding.rate", self.rate, 0, 1)
        for name in ("grounding_weight", "alignment_weight"):
            check_number(f"mask_grounding.{name}", getattr(self, name), 0, ANY)
        check_number("mask_grounding.temperature", self.temperature, 1e-3, ANY)
        check_number("mask_grounding.layers", self.layers, 1, ANY)
        if self.width < 8 or self.width % 8:
            raise UserError(f"mask_grounding.width is {self.width}; give a multiple of 8, which is its number of heads")


def hide_words(batch: Batch, vocabulary: Vocabulary, rate: float) -> tuple[Tensor, Tensor]:
    """Hide words of each sentence: token ids [B, L] int64, and which positions were hidden [B, L] bool."""
    ids = batch.input_ids
    special = torch.tensor(vocabulary.special, device=ids.device)
    hidden = (uniform(batch.random_key, ids.shape[1], WORD) < rate) & ~torch.isin(ids, special)
    if vocabulary.mask is not None:
        return ids.masked_fill(hidden, vocabulary.mask), hidden
    random = (uniform(batch.random_key, ids.shape[1], REPLACEMENT) * vocabulary.size).long()
    return torch.where(hidden, random, ids), hidden


class WordPredictor(nn.Module):
    """Names every word of a sentence from the words, the fused map and how much of each position is the referent."""

    def __init__(self, visual_dim: int, text_dim: int, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.text, self.visual = nn.Linear(text_dim, width), nn.Linear(visual_dim, width)
        self.position = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width))
        self.inside = nn.Parameter(torch.randn(width) * width**-0.5)
        layer = nn.TransformerDecoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))
        self.words = nn.Linear(width, vocabulary)

    def forward(self, visual: Tensor, text: Tensor, text_mask: Tensor, inside: Tensor) -> Tensor:
        """Visual [B, C_v, h, w], text [B, L, C_t], text_mask [B, L] bool, inside [B, h, w] in 0..1 -> [B, L, V]."""
        height, width = visual.shape[-2:]
        rows = (torch.arange(height, device=visual.device, dtype=visual.dtype) + 0.5) / height
        columns = (torch.arange(width, device=visual.device, dtype=visual.dtype) + 0.5) / width
        places = self.position(torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1))
        memory = self.visual(visual.flatten(2).transpose(1, 2)) + places + inside.flatten(1)[..., None] * self.inside
        read = self.decoder(self.text(text), memory, tgt_key_padding_mask=~text_mask)
        return self.words(read)


class PixelAlignment(nn.Module):
    """Pull the referent's pixels towards each other and towards the sentence, and the background's away from both."""

    def __init__(self, visual_dim: int, text_dim: int, width: int, temperature: float) -> None:
        super().__init__()
        self.visual, self.text = nn.Linear(visual_dim, width), nn.Linear(text_dim, width)
        self.temperature = temperature

    def forward(self, visual: Tensor, text: Tensor, text_mask: Tensor, inside: Tensor) -> Tensor:
        """Arguments as of `WordPredictor`; returns [] float32. Sentences about nothing only push away."""
        pixels = F.normalize(at_least_float32(self.visual(visual.flatten(2).transpose(1, 2))), dim=-1)
        real = text_mask[..., None].to(text.dtype)
        sentence = (text * real).sum(1) / real.sum(1).clamp(min=1)
        words = F.normalize(at_least_float32(self.text(sentence)), dim=-1)
        share = inside.flatten(1).to(pixels.dtype)
        centre = F.normalize((pixels.detach() * share[..., None]).sum(1), dim=-1)
        return self._separate(pixels, words, share) + self._separate(pixels, centre, share)

    def _separate(self, pixels: Tensor, target: Tensor, share: Tensor) -> Tensor:
        """Binary cross-entropy of cosines to one vector per image; referent and background weigh the same."""
        logits = torch.einsum("bnc,bc->bn", pixels, target) / self.temperature
        hit = (share * F.softplus(-logits)).sum() / share.sum().clamp(min=1e-6)
        miss = ((1 - share) * F.softplus(logits)).sum() / (1 - share).sum().clamp(min=1e-6)
        return (hit + miss) / 2


class MaskGrounding(Method):
    """One pass over the sentence with hidden words; the model's loss, the words' loss and the pixels' loss.

    forward(batch) returns "loss" [] and, detached, the model's own loss as "segmentation_loss", "grounding_loss",
    "alignment_loss" and "words_found", the share of the hidden words that were named right (0 where none was hidden).
    """

    hides_words = True

    def __init__(self, model: RISModel, loss: nn.Module, vocabulary: Vocabulary, options: MaskGroundingOptions) -> None:
        super().__init__(model, loss)
        assert model.fused_dims is not None
        self.vocabulary, self.options = vocabulary, options
        self.predictor = WordPredictor(*model.fused_dims, vocabulary.size, options.width, options.layers)
        self.alignment = PixelAlignment(*model.fused_dims, options.width, options.temperature)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        ids, hidden = hide_words(batch, self.vocabulary, self.options.rate)
        output = self.model(batch._replace(input_ids=ids))
        result = self.loss(output, batch)
        visual, text = output.aux["fused_visual"], output.aux["fused_text"]
        inside = F.adaptive_avg_pool2d(batch.target[:, None].to(visual.dtype) / 255, visual.shape[-2:])[:, 0]
        words = at_least_float32(self.predictor(visual, text, batch.text_mask, inside))
        count = hidden.sum().clamp(min=1)
        grounding = (F.cross_entropy(words.transpose(1, 2), batch.input_ids, reduction="none") * hidden).sum() / count
        alignment = self.alignment(visual, text, batch.text_mask, inside)
        options = self.options
        return {
            **result,
            "loss": result["loss"] + options.grounding_weight * grounding + options.alignment_weight * alignment,
            "segmentation_loss": result["loss"].detach(),
            "grounding_loss": grounding.detach(),
            "alignment_loss": alignment.detach(),
            "words_found": ((words.argmax(-1) == batch.input_ids) & hidden).sum() / count,
        }

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The model's groups, and one of the two heads."""
        own = [*self.predictor.parameters(), *self.alignment.parameters()]
        return [
            *super().param_groups(lr, weight_decay),
            {"name": "mask_grounding", "params": own, "lr": lr, "weight_decay": weight_decay},
        ]

    def describe(self) -> dict[str, Any]:
        names = ("rate", "grounding_weight", "alignment_weight")
        return {name: getattr(self.options, name) for name in names}


@register_method(
    summary="hidden words are recovered from image and mask, and pixels aligned (training code not public: ours)",
    paper="MagNet: Mask Grounding for Referring Image Segmentation, arXiv 2312.12198",
    options=MaskGroundingOptions,
)
def mask_grounding(
    model: RISModel, loss: nn.Module, options: MaskGroundingOptions, vocabulary: Vocabulary | None
) -> MaskGrounding:
    """Build the method."""
    if vocabulary is None:
        raise UserError("method mask_grounding hides words and needs the run's vocabulary; build it with a tokenizer")
    if model.fused_dims is None:
        raise UserError(f"method mask_grounding reads fused features, which {type(model).__name__} does not give")
    return MaskGrounding(model, loss, vocabulary, options)
