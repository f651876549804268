"""The loss of models that find instances one by one: each is matched to a query, whose score, box and mask are taught.

Dimensions: B samples, D decoder layers, Q queries, N instances of a sample, M pairs, H W image size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.errors import UserError
from amltrain.losses import MaskAndPresence, pixel_weights, register_loss, upsample_logits
from amltrain.matching import assign, at_least_float32, box_loss, boxes_of_masks, shares_of
from amltrain.records import Batch, ModelOutput

HEADS = ("scores", "boxes", "masks", "presence", "semantic")


class Wanted(NamedTuple):
    """The instances of a batch. masks [B, N, H, W] bool; boxes [B, N, 4] shares; there [B, N] bool: which are some."""

    masks: Tensor
    boxes: Tensor
    there: Tensor


class Matched(NamedTuple):
    """Pairs of one decoder layer: sample, query, instance [M] int64, and weight [M] float, 0 = no pair after all."""

    sample: Tensor
    query: Tensor
    instance: Tensor
    weight: Tensor


@register_loss("instances")
class Instances(nn.Module):
    """Ours, for SAM 3, whose release has no loss; in the manner of DETR and Mask2Former.

    After every decoder layer, instances are matched to queries by score and box (Hungarian). Each layer: score_weight *
    focal loss of "is meant", matched queries counted positive_weight times, over sentences that mean something (whether
    they do is the presence token's question); and box_weight * (5 * L1 + 2 * (1 - generalised IoU)) of matched boxes.
    The last layer: mask_weight * (cross-entropy + Dice) of matched masks. And the semantic head's `mask_and_presence`.
    The box of one instance is the annotated one.
    """

    channels = 1
    needs_heads = True
    weighs_pixels = True

    def __init__(
        self,
        score_weight: float = 2.0,
        box_weight: float = 1.0,
        mask_weight: float = 2.0,
        semantic_weight: float = 1.0,
        presence_weight: float = 1.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        positive_weight: float = 10.0,
    ) -> None:
        """alpha, gamma: of the focal loss (Lin et al., ICCV 2017)."""
        super().__init__()
        self.score_weight, self.box_weight = score_weight, box_weight
        self.mask_weight, self.semantic_weight = mask_weight, semantic_weight
        self.alpha, self.gamma, self.positive_weight = alpha, gamma, positive_weight
        self.whole = MaskAndPresence(presence_weight=presence_weight)

    def forward(self, output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """output.aux: scores [B, D, Q] logits, boxes [B, D, Q, 4] shares, masks [B, Q, h, w] logits, presence [B, 1]
        and semantic [B, 1, h, w] logits; batch.target [B, H, W] uint8, box, instances and no_target.

        Returns loss, and detached, weighted and averaged over layers: score, box; and mask, semantic.
        """
        if not output.aux.keys() >= set(HEADS):
            raise UserError(
                "loss instances needs a model that finds instances (sam3_instances); name another loss.name"
            )
        scores, boxes = (at_least_float32(output.aux[name]) for name in ("scores", "boxes"))
        wanted = instances_of(batch, boxes.dtype)
        layers = scores.shape[1]
        score, box = scores.new_zeros(()), scores.new_zeros(())
        for layer in range(layers):
            pairs = self.match(scores[:, layer], boxes[:, layer], wanted)
            score = score + self.score_weight * self.score_loss(scores[:, layer], pairs, wanted) / layers
            box = box + self.box_weight * self.box_loss(boxes[:, layer], pairs, wanted) / layers
        mask = self.mask_weight * self.mask_loss(output.aux["masks"], pairs, wanted, batch)
        presence = output.aux["presence"]
        heads = {"no_target": torch.cat([presence, torch.zeros_like(presence)], dim=1)}
        semantic = self.semantic_weight * self.whole(ModelOutput(output.aux["semantic"], heads), batch)["loss"]
        terms = {"score": score, "box": box, "mask": mask, "semantic": semantic}
        return {"loss": score + box + mask + semantic, **{name: term.detach() for name, term in terms.items()}}

    @torch.no_grad()
    def match(self, scores: Tensor, boxes: Tensor, wanted: Wanted) -> Matched:
        """Scores [B, Q] logits, boxes [B, Q, 4] shares. With one instance each, nothing waits for the device."""
        distance = box_loss(*torch.broadcast_tensors(boxes[:, :, None], wanted.boxes[:, None]))  # [B, Q, N]
        cost = distance - self.score_weight * scores.sigmoid()[..., None]
        if wanted.there.shape[1] == 1:
            each = torch.arange(len(cost), device=cost.device)
            return Matched(each, cost[..., 0].argmin(dim=1), torch.zeros_like(each), wanted.there[:, 0].to(cost.dtype))
        found = []
        for i, there in enumerate(wanted.there):
            places = there.nonzero()[:, 0]
            query, place = assign(cost[i][:, places])
            found.append((torch.full_like(query, i), query, places[place]))
        sample, query, instance = (torch.cat(column) for column in zip(*found, strict=True))
        return Matched(sample, query, instance, torch.ones_like(sample).to(cost.dtype))

    def score_loss(self, scores: Tensor, pairs: Matched, wanted: Wanted) -> Tensor:
        """Focal loss of all queries of the samples that mean something, by the number of pairs."""
        labels = torch.zeros_like(scores).index_put((pairs.sample, pairs.query), pairs.weight, accumulate=True)
        cross_entropy = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
        probability = scores.sigmoid()
        wrong = torch.where(labels > 0, 1 - probability, probability)
        share = torch.where(labels > 0, self.alpha * self.positive_weight, 1 - self.alpha)
        counted = wanted.there.any(dim=1)[:, None].to(scores.dtype)
        return (share * wrong**self.gamma * cross_entropy * counted).sum() / pairs.weight.sum().clamp(min=1)

    def box_loss(self, boxes: Tensor, pairs: Matched, wanted: Wanted) -> Tensor:
        """L1 and generalised IoU of matched boxes, by the number of pairs."""
        each = box_loss(boxes[pairs.sample, pairs.query], wanted.boxes[pairs.sample, pairs.instance])
        return (each * pairs.weight).sum() / pairs.weight.sum().clamp(min=1)

    def mask_loss(self, masks: Tensor, pairs: Matched, wanted: Wanted, batch: Batch) -> Tensor:
        """Cross-entropy and Dice of matched masks at the image's size, by the number of pairs."""
        size = wanted.masks.shape[-2:]
        logits = upsample_logits(masks[pairs.sample, pairs.query][:, None], size)[:, 0]
        truth = wanted.masks[pairs.sample, pairs.instance].to(logits.dtype)
        weights = pixel_weights(batch, size)
        counts = torch.ones_like(truth) if weights is None else weights[pairs.sample].to(truth.dtype)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        cross_entropy = (cross_entropy * counts).flatten(1).sum(1) / counts.flatten(1).sum(1).clamp(min=1)
        probability = logits.sigmoid() * counts
        both = 2 * (probability * truth).flatten(1).sum(1)
        dice = 1 - (both + 1) / (probability.flatten(1).sum(1) + (truth * counts).flatten(1).sum(1) + 1)
        return ((cross_entropy + dice) * pairs.weight).sum() / pairs.weight.sum().clamp(min=1) + 0 * masks.sum()


def instances_of(batch: Batch, dtype: torch.dtype) -> Wanted:
    """The instances of a batch; where it has none one by one, the target is one."""
    size = (batch.target.shape[-2], batch.target.shape[-1])
    if batch.instances is None:
        masks = (batch.target >= 128)[:, None]
        corners = boxes_of_masks(masks[:, 0]) if batch.box is None else batch.box
        return Wanted(masks, shares_of(corners.to(dtype), size)[:, None], masks.flatten(2).any(dim=2))
    masks = batch.instances >= 128
    corners = boxes_of_masks(masks.flatten(0, 1)).unflatten(0, masks.shape[:2])
    return Wanted(masks, shares_of(corners.to(dtype), size), masks.flatten(2).any(dim=2))
