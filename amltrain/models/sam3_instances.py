"""SAM 3's other path: instances one by one, each with a score, a box and a mask, taught by matching.

Paper and modules as in `sam3`; the numbers are those of transformers' `Sam3Model`, which has no loss: the loss
`instances` is ours (`amltrain.instance_loss`). A query's score is the probability that it is meant
times the presence token's. The mask is the union of the queries whose score exceeds `score_threshold`, as DeRIS joins
them: the logit of a pixel is at least 0 where a query that is meant has it in its mask. No such query = nothing is
meant. The box is the best query's. The semantic head learns beside, and is given in aux["semantic"].

What AML scores: as in `sam3`.

Dimensions: B batch, Q queries, D decoder layers, C width, h w the stride-14 grid.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amltrain.errors import UserError
from amltrain.matching import at_least_float32
from amltrain.models.layers.basic import Tuning
from amltrain.models.registry import register_model
from amltrain.models.sam3 import SAM3, build_published, build_small, sam3_info
from amltrain.records import Batch, Features, ModelOutput

SCORE_LIMIT = 12.0
"""Scores are cut at this logit, as in SAM 3."""


class SAM3Instances(SAM3):
    """SAM 3 with instances: one-channel logits at a quarter of a patch, a no-target head and a box."""

    unused = ("geometry_encoder", "text_encoder.text_projection")
    needs_boxes = True
    needs_instances = True

    def __init__(self, sam3: Any, *, score_threshold: float = 0.5, **tuning: Any) -> None:
        """score_threshold: a query is meant if its score exceeds it. tuning: as in `SAM3`. Raises UserError."""
        if not 0 < score_threshold < 1:
            raise UserError(f"model.kwargs.score_threshold is {score_threshold} and must lie between 0 and 1")
        super().__init__(sam3, **tuning)
        self.score_threshold = score_threshold

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        """Aux besides those of `SAM3`: scores [B, D, Q] logits and boxes [B, D, Q, 4] shares of every decoder layer,
        masks [B, Q, 4h, 4w] logits of the last, presence [B, 1] and semantic [B, 1, 4h, 4w] logits, box [B, 4] shares.
        """
        vision, code, mask, shape = self._fused(features)
        layers, boxes = self._queries(vision, code, features.text, mask, shape)
        decoder, head = self.sam3.detr_decoder, self.sam3.mask_decoder
        presence = self._presence(layers[-1])
        queries = torch.stack([decoder.output_layer_norm(queries[:, 1:]) for queries in layers])  # [D, B, Q, C]
        scores = self._scores(queries, features.text, features.text_mask)
        semantic, fused, pixels = self._mask(vision, features, mask)
        masks = torch.einsum("bqc,bchw->bqhw", head.mask_embedder(queries[-1]), head.instance_projection(pixels))
        logits, no_target, best = self.union(masks, scores[:, -1], presence)
        each = torch.arange(len(best), device=best.device)
        aux = {
            "no_target": no_target,
            "fused_visual": fused,
            "fused_text": features.text,
            "scores": scores,
            "boxes": torch.stack(boxes, dim=1),
            "masks": masks,
            "presence": presence,
            "semantic": semantic,
            "box": boxes[-1][each, best],
        }
        return ModelOutput(logits, aux)

    def _scores(self, queries: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """How well each query fits the sentence, logits [B, D, Q]: its product with the mean of the words."""
        scoring = self.sam3.dot_product_scoring
        return scoring(decoder_hidden_states=queries, text_features=text, text_mask=text_mask)[..., 0].transpose(0, 1)

    def union(self, masks: Tensor, scores: Tensor, presence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Masks [B, Q, h, w], scores [B, Q] and presence [B, 1] logits -> logits [B, 1, h, w], no-target logits [B, 2],
        and the best query [B] int64.
        """
        exact = at_least_float32(scores)
        both = F.logsigmoid(exact) + F.logsigmoid(at_least_float32(presence))  # log of the score
        odds = both - torch.log(-torch.expm1(both.clamp(max=-1e-6)))
        margin = odds - math.log(self.score_threshold / (1 - self.score_threshold))
        logits = torch.minimum(masks, margin[..., None, None].to(masks.dtype)).amax(dim=1, keepdim=True)
        best = margin.amax(dim=1, keepdim=True)
        return logits, torch.cat([best, torch.zeros_like(best)], dim=1), margin.argmax(dim=1)


@register_model(sam3_info(1008, "openai/clip-vit-base-patch32", 32, loss="instances"))
def sam3_instances(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 49408,
    image_size: int = 1008,
    vision_tuning: Tuning = "frozen",
    text_tuning: Tuning = "frozen",
    lora_rank: int = 16,
    score_threshold: float = 0.5,
) -> SAM3Instances:
    """SAM 3 at its published size by its instances; arguments as in `sam3`, and the least score of what is meant."""
    tuning: dict[str, Any] = {"vision_tuning": vision_tuning, "text_tuning": text_tuning, "lora_rank": lora_rank}
    return SAM3Instances(
        build_published(image_size, vision_weights, text_weights), score_threshold=score_threshold, **tuning
    )


@register_model(sam3_info(96, "wordpiece", 24, loss="instances", score_weight=0.2, box_weight=0.05, mask_weight=0.5))
def sam3_instances_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    dropout: float = 0.0,
    score_threshold: float = 0.3,
) -> SAM3Instances:
    """The small SAM 3 by its instances, that learns synthetic scenes from scratch; 96 pixels.

    score_threshold: lower than the published size's: its eight queries come to share a referent, and so its score.
    """
    sam3 = build_small(vocab_size, dropout, vision_weights, text_weights)
    if vision_weights is None:
        spread_queries(sam3.detr_decoder)
    return SAM3Instances(
        sam3,
        score_threshold=score_threshold,
        vision_tuning="full",
        text_tuning="full",
        encoder_lr_scale=1.0,
    )


def spread_queries(decoder: Any) -> None:
    """Let the queries of an untrained decoder start in different places: alike, they would all learn the same.

    Boxes of a quarter of the image lie anywhere in its middle; the queries themselves differ as DETR's do.
    """
    torch.nn.init.normal_(decoder.query_embed.weight)
    with torch.no_grad():
        centres = torch.empty_like(decoder.reference_points.weight[:, :2]).uniform_(0.1, 0.9)
        decoder.reference_points.weight.copy_(torch.cat([centres, torch.full_like(centres, 0.25)], dim=1).logit())
