"""Contrast of sentences and images beside the model's own loss, so that patches and words come to share a space.

Paper: FILIP: Fine-grained Interactive Language-Image Pre-Training (ICLR 2022, arXiv 2111.07783), whose similarity this
uses: every word takes its most similar patch, and the words' mean is the similarity of sentence and image. Written from
the paper; as a training method for referring segmentation it is ours.

For encoders of one width (`dual`, `sam3`, `beit3`, CLIP's). After it, AML's `projection: identity` scores the cosine
that was trained here. Two samples of a batch with the same image count as different images.

Dimensions: B batch, L tokens, N patches, C width of the shared space.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.config.fields import ANY, check_number
from amltrain.errors import UserError
from amltrain.methods.base import Method, register_method
from amltrain.models.base import RISModel
from amltrain.records import AlignmentFeatures, Batch, Vocabulary


@dataclass
class ContrastiveOptions:
    """Sentences and images of a batch told apart by their most similar patches (arXiv 2111.07783)."""

    weight: float = 0.5
    """Weight of the contrast beside the model's own loss."""
    temperature: float = 0.07
    """Divides the similarities, which lie in -1..1."""

    def check(self) -> None:
        """Raise UserError for a number outside its range."""
        check_number("contrastive.weight", self.weight, 0, ANY)
        check_number("contrastive.temperature", self.temperature, 1e-3, ANY)


def late_interaction(features: AlignmentFeatures) -> Tensor:
    """Similarity of every sentence with every image of a batch, [B sentences, B images] float32 in -1..1."""
    with torch.autocast(features.visual.device.type, enabled=False):
        patches = F.normalize(features.visual.float().flatten(2).transpose(1, 2), dim=-1)
        words = F.normalize(features.text.float(), dim=-1)
        best = torch.einsum("ilc,jnc->ijln", words, patches).amax(dim=-1)  # [B, B, L]
        real = features.text_mask[:, None].float()
        return (best * real).sum(-1) / real.sum(-1).clamp(min=1)


def contrast(similarity: Tensor, temperature: float, counted: Tensor) -> Tensor:
    """Cross-entropy of finding the own image and the own sentence, [].

    similarity [B, B]; counted [B] bool: sentences about nothing in their image ask for no image of their own.
    """
    logits = similarity / temperature
    own = torch.arange(len(logits), device=logits.device)
    both = F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.T, own, reduction="none")
    return (both * counted).sum() / counted.sum().clamp(min=1) / 2


class Contrastive(Method):
    """The model's loss and the contrast, in one forward.

    forward(batch) returns "loss" [] and, detached, the model's own loss as "segmentation_loss", "contrastive_loss" and
    "images_found", the share of the sentences whose own image is the most similar one of the batch.
    """

    def __init__(self, model: RISModel, loss: nn.Module, options: ContrastiveOptions) -> None:
        super().__init__(model, loss)
        self.options = options

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.model.encode(batch)
        result = self.loss(self.model.decode(features, batch), batch)
        similarity = late_interaction(self.model.alignment_features(batch, features))
        counted = ~batch.no_target
        contrastive = contrast(similarity, self.options.temperature, counted)
        found = similarity.argmax(dim=1) == torch.arange(len(similarity), device=similarity.device)
        return {
            **result,
            "loss": result["loss"] + self.options.weight * contrastive,
            "segmentation_loss": result["loss"].detach(),
            "contrastive_loss": contrastive.detach(),
            "images_found": (found & counted).sum() / counted.sum().clamp(min=1),
        }

    def describe(self) -> dict[str, Any]:
        return {"weight": self.options.weight, "temperature": self.options.temperature}


@register_method(
    summary="sentences and images of a batch are told apart by their most similar patches, beside the model's own loss",
    paper="FILIP: Fine-grained Interactive Language-Image Pre-Training, arXiv 2111.07783",
    options=ContrastiveOptions,
)
def contrastive(
    model: RISModel, loss: nn.Module, options: ContrastiveOptions, vocabulary: Vocabulary | None
) -> Contrastive:
    """Build the method."""
    visual, text = model.alignment_dims
    if visual != text:
        raise UserError(
            f"method contrastive compares patches and words of one width; {type(model).__name__}'s are {visual} and "
            f"{text} wide; dual, sam3, beit3 and the models on CLIP share one"
        )
    return Contrastive(model, loss, options)
