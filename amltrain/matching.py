"""Boxes, points of masks, and which query belongs to which referent: pure functions of tensors, and their losses.

Boxes are floats. "Corners" are (x1, y1, x2, y2), "shares" are (centre x, centre y, width, height) divided by the
image's width and height. Both may be outside the image; widths and heights are at least 0.

Points are (x, y) as shares of the image, in [0, 1).

Dimensions: B samples, Q queries, N referents of a sample, M pairs of a query and a referent, P points, H W image size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from amltrain.errors import UserError
from amltrain.randomness import uniform
from amltrain.records import Batch, ModelOutput
from amltrain.registry import LOSSES


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays, so that a loss can be compared with one recorded in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def corners_of(shares: Tensor) -> Tensor:
    """Centre, width and height [..., 4] -> corners [..., 4] of the same unit."""
    centre, half = shares[..., :2], shares[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def shares_of(corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Corners [..., 4] in pixels of an image of size (H, W) -> centre, width and height [..., 4] as shares of it."""
    height, width = size
    low, high = corners[..., :2], corners[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1) / sides(corners, width, height)


def sides(like: Tensor, width: float, height: float) -> Tensor:
    """(width, height, width, height), [4] in the dtype and on the device of `like`, without a copy to it."""
    one = like.new_ones(1)
    return torch.cat([one * width, one * height]).repeat(2)


def box_overlap(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (Rezatofighi et al., CVPR 2019) of corners [..., 4], pair by pair: [...] each.

    Two boxes without any area have IoU and generalised IoU 0.
    """
    both, union = box_overlap_areas(one, other)
    around = torch.cat([torch.minimum(one, other)[..., :2], torch.maximum(one, other)[..., 2:]], dim=-1)
    hull = _area(around)
    iou = both / union.where(union > 0, union.new_ones(()))
    return iou, iou - (hull - union) / hull.where(hull > 0, hull.new_ones(()))


def box_overlap_areas(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union of corners [..., 4] of any dtype, pair by pair: [...] each."""
    low, high = torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:])
    both = _extent((high - low).clamp(min=0))
    return both, _area(one) + _area(other) - both


def box_loss(predicted: Tensor, target: Tensor, l1_weight: float = 5.0, giou_weight: float = 2.0) -> Tensor:
    """l1_weight * sum of absolute differences + giou_weight * (1 - generalised IoU), per box.

    predicted, target [B, 4] shares -> [B]. Source: DETR (Carion et al., ECCV 2020).
    """
    distance = F.l1_loss(predicted, target, reduction="none").sum(dim=-1)
    _, giou = box_overlap(corners_of(predicted), corners_of(target))
    return l1_weight * distance + giou_weight * (1 - giou)


def boxes_of_masks(masks: Tensor, end: int = 1) -> Tensor:
    """The smallest box around every mask: masks [B, H, W] bool -> corners [B, 4] float32 in pixels, 0 for no mask.

    end: 1 = x2 and y2 lie just beyond the last pixel, so that one pixel has a box of one pixel; 0 = its index.
    """

    def ends(filled: Tensor) -> tuple[Tensor, Tensor]:
        """Filled [B, n] bool -> first and last index, 0 where nothing is filled."""
        count = filled.shape[1]
        first = filled.byte().argmax(dim=1)
        last = count - 1 - filled.flip(1).byte().argmax(dim=1)
        return first, last

    (x1, x2), (y1, y2) = ends(masks.any(dim=1)), ends(masks.any(dim=2))
    boxes = torch.stack([x1, y1, x2 + end, y2 + end], dim=1).float()
    return boxes * masks.flatten(1).any(dim=1)[:, None]


def share_outside(masks: Tensor, corners: Tensor) -> Tensor:
    """Share of every mask that lies outside its box; 1 for an empty mask. Counting: no gradient.

    masks [B, H, W] bool, corners [B, 4] in pixels, cut to whole pixels toward 0, ends excluded -> [B] float32.
    """
    cells = corners.detach().long()
    rows = torch.arange(masks.shape[1], device=masks.device)
    columns = torch.arange(masks.shape[2], device=masks.device)
    inside_rows = (rows >= cells[:, 1:2]) & (rows < cells[:, 3:4])
    inside_columns = (columns >= cells[:, 0:1]) & (columns < cells[:, 2:3])
    inside = masks & inside_rows[:, :, None] & inside_columns[:, None, :]
    counts = masks.flatten(1).sum(dim=1).float()
    return 1 - inside.flatten(1).sum(dim=1).float() / counts.clamp(min=1)


class Pairs(NamedTuple):
    """Matched queries and referents of a batch.

    sample, query [M] int64; target [M, H, W] float, 1 = the referent's; weight [M] float, 0 = no pair after all
    """

    sample: Tensor
    query: Tensor
    target: Tensor
    weight: Tensor


def enlarge_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits [B, Q, h, w] at stride 4 of a picture padded at right and bottom -> [B, Q, H, W] of the picture itself.

    Bilinear with align_corners=True, in at least float32.
    """
    whole = F.interpolate(at_least_float32(masks), scale_factor=4, mode="bilinear", align_corners=True)
    return whole[..., : size[0], : size[1]]


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values at points, 0 outside: maps [M, K, H, W], points [M, P, 2] -> [M, K, P]."""
    grid = 2 * points[:, :, None].to(maps.dtype) - 1
    return F.grid_sample(maps, grid, mode="bilinear", align_corners=False)[..., 0]


def matching_cost(
    masks: Tensor,
    refer: Tensor,
    targets: Tensor,
    points: Tensor,
    weights: tuple[float, float, float] = (2.0, 5.0, 5.0),
) -> Tensor:
    """Cost [B, Q, N] of giving a referent to a query: minus its score, cross-entropy and Dice at common points.

    masks [B, Q, H, W] logits; refer [B, Q, 2] logits, class 0 = referred to; targets [B, N, H, W] float; points
    [B, P, 2]; weights: of score, cross-entropy and Dice. Source: Mask2Former (Cheng et al., CVPR 2022), whose matcher
    in transformers gives the same numbers with the same points.
    """
    logits, wanted = sample_points(masks, points), sample_points(targets.to(masks.dtype), points)
    score = refer.softmax(dim=-1)[..., :1]
    swapped = wanted.transpose(1, 2)
    cross_entropy = (F.softplus(-logits) @ swapped + F.softplus(logits) @ (1 - swapped)) / logits.shape[-1]
    probability = logits.sigmoid()
    both = 2 * (probability @ swapped)
    dice = 1 - (both + 1) / (probability.sum(dim=-1)[..., None] + wanted.sum(dim=-1)[:, None] + 1)
    return -weights[0] * score + weights[1] * cross_entropy + weights[2] * dice


def assign(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest one-to-one assignment (Hungarian): cost [Q, N] -> queries in order and their referents, [M] each.

    Costs that are not finite count as the largest. Waits for the device.
    """
    largest = torch.finfo(cost.dtype).max
    known = cost.detach().nan_to_num(largest, largest, largest).cpu().numpy()
    queries, referents = linear_sum_assignment(known)
    device = cost.device
    return torch.as_tensor(queries, device=device), torch.as_tensor(referents, device=device)


def uncertain_points(logits: Tensor, candidates: Tensor, others: Tensor, count: int) -> Tensor:
    """The `count` candidates whose logits are nearest to 0, and other points: [M, count + R, 2].

    logits [M, 1, H, W], candidates [M, K, 2], others [M, R, 2]. Source: PointRend (Kirillov et al., CVPR 2020).
    """
    uncertainty = -sample_points(logits, candidates)[:, 0].abs()
    chosen = (
        uncertainty.topk(count, dim=1).indices if len(logits) else candidates.new_zeros((0, count), dtype=torch.long)
    )
    return torch.cat([candidates.gather(1, chosen[..., None].expand(-1, -1, 2)), others], dim=1)


def pair_losses(logits: Tensor, pairs: Pairs, points: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and Dice at points, summed over pairs and divided by their number, at least 1.

    logits [M, H, W] of the pairs' queries, points [M, P, 2] -> two scalars.
    """
    sampled = sample_points(logits[:, None], points)[:, 0]
    wanted = sample_points(pairs.target[:, None].to(logits.dtype), points)[:, 0]
    number = pairs.weight.sum().clamp(min=1)
    cross_entropy = F.binary_cross_entropy_with_logits(sampled, wanted, reduction="none").mean(dim=1)
    probability = sampled.sigmoid()
    both = 2 * (probability * wanted).sum(dim=1)
    dice = 1 - (both + 1) / (probability.sum(dim=1) + wanted.sum(dim=1) + 1)
    return (cross_entropy * pairs.weight).sum() / number, (dice * pairs.weight).sum() / number


def _area(corners: Tensor) -> Tensor:
    return _extent(corners[..., 2:] - corners[..., :2])


MATCH, CANDIDATES, OTHERS = 0x44455200, 0x44455210, 0x44455220
"""Streams of random points: for matching, to choose uncertain ones from, and the rest; plus the step."""


class QueryMasks(nn.Module):
    """DeRIS's loss: after every step referents are matched to queries, whose masks and scores are then taught.

    Each step: class_weight * cross-entropy of "referred to" (unmatched queries count unmatched_weight) + mask_weight *
    (cross-entropy + Dice of matched masks at points where they are uncertain); steps but the last count step_weight.
    And cross-entropy of the existence of any referent. Source: Dai et al., ICCV 2025, and its official code, which
    divides by the mean number of pairs of all processes; here it is each process's own.
    """

    channels = 1
    needs_heads = True
    weight: Tensor

    def __init__(
        self,
        points: int = 12544,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        step_weight: float = 0.2,
        unmatched_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.points, self.uncertain = points, int(0.75 * points)
        self.class_weight, self.mask_weight, self.step_weight = class_weight, mask_weight, step_weight
        self.register_buffer("weight", torch.tensor([1.0, unmatched_weight]), persistent=False)

    def forward(
        self, output: ModelOutput, batch: Batch, instances: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """output.aux masks0.. [B, Q, h, w] and refer0.. [B, Q, 2] logits, existence [B, 1] logits; batch.target
        [B, H, W] uint8; instances: B tensors [N, H, W] (0 or 1), the referents one by one; None = batch.instances, or
        where there are none the target as one.

        Returns loss, and detached, weighted and summed over steps: class, mask, dice, existence.
        """
        if "existence" not in output.aux:
            raise UserError("loss deris needs a model with queries of several steps (deris_*); name another loss.name")
        if instances is None and batch.instances is not None:
            counts = batch.instances.flatten(2).any(dim=2).sum(dim=1).tolist()  # `assign` waits for the device anyway
            instances = [(each[:n] >= 128).float() for each, n in zip(batch.instances, counts, strict=True)]
        steps = sum(name.startswith("masks") for name in output.aux)
        targets = [*(batch.target >= 128)[:, None].float()] if instances is None else instances
        totals: dict[str, Tensor] = {}
        for step in range(steps):
            weight = 1.0 if step == steps - 1 else self.step_weight
            for name, term in self.terms(output, batch, targets, step, instances is not None).items():
                scale = weight * (self.class_weight if name == "class" else self.mask_weight)
                totals[name] = totals.get(name, 0) + scale * term
        some = torch.stack([target.flatten().any() for target in targets]).float()
        existence = at_least_float32(output.aux["existence"])[:, 0]
        totals["existence"] = F.binary_cross_entropy_with_logits(existence, some.to(existence.dtype))
        loss = torch.stack(list(totals.values())).sum()
        return {"loss": loss, **{name: term.detach() for name, term in totals.items()}}

    def terms(
        self, output: ModelOutput, batch: Batch, targets: Sequence[Tensor], step: int, several: bool
    ) -> dict[str, Tensor]:
        """Unweighted class, mask and dice of one step. several: a sample may have any number of referents."""
        masks = enlarge_masks(output.aux[f"masks{step}"], (batch.target.shape[-2], batch.target.shape[-1]))
        refer = at_least_float32(output.aux[f"refer{step}"])
        pairs = self.match(masks, refer, targets, batch.random_key, step, several)
        queries = refer.shape[1]
        labels = torch.ones(refer.shape[:2].numel(), device=refer.device, dtype=pairs.weight.dtype)
        labels = labels.scatter(0, pairs.sample * queries + pairs.query, 1 - pairs.weight).long()
        chosen = masks.flatten(0, 1)[pairs.sample * queries + pairs.query]
        keys = batch.random_key[pairs.sample] + pairs.query  # two pairs of a sample get different points
        candidates = self.draw(CANDIDATES + step, keys, 3 * self.points)
        others = self.draw(OTHERS + step, keys, self.points - self.uncertain)
        with torch.no_grad():
            points = uncertain_points(chosen[:, None], candidates, others, self.uncertain)
        cross_entropy, dice = pair_losses(chosen, pairs, points)
        return {
            "class": F.cross_entropy(refer.flatten(0, 1), labels, self.weight.to(refer.dtype)),
            "mask": cross_entropy + 0 * masks.sum(),  # a batch without a pair has a gradient too
            "dice": dice,
        }

    @torch.no_grad()
    def match(
        self, masks: Tensor, refer: Tensor, targets: Sequence[Tensor], keys: Tensor, step: int, several: bool
    ) -> Pairs:
        """Masks [B, Q, H, W] logits, refer [B, Q, 2] logits, targets B tensors [N, H, W], keys [B] int64."""
        points = self.draw(MATCH + step, keys, self.points)
        if not several:  # one referent each: the cheapest query is the assignment, and nothing waits for the device
            whole = torch.stack([target[0] for target in targets])
            query = matching_cost(masks, refer, whole[:, None], points)[..., 0].argmin(dim=1)
            return Pairs(torch.arange(len(whole), device=whole.device), query, whole, whole.flatten(1).amax(dim=1))
        found = [
            assign(matching_cost(masks[i, None], refer[i, None], target[None].float(), points[i, None])[0])
            for i, target in enumerate(targets)
        ]
        sample = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(found)])
        wanted = torch.cat([target[referents].float() for target, (_, referents) in zip(targets, found, strict=True)])
        return Pairs(sample, torch.cat([query for query, _ in found]), wanted, torch.ones_like(sample).float())

    def draw(self, stream: int, keys: Tensor, count: int) -> Tensor:
        """`count` random points for every key: [B, count, 2], a function of the key and the stream."""
        return uniform(keys, 2 * count, stream).unflatten(1, (count, 2))


LOSSES.add("deris", QueryMasks)


def _extent(lengths: Tensor) -> Tensor:
    """Width times height: [..., 2] -> [...]. The gradient of `prod` counts zeros on the host: a synchronisation."""
    return lengths[..., 0] * lengths[..., 1]
