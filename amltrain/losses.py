"""Segmentation losses: `loss(output, batch) -> {"loss": scalar, ...}`; a baseline's registry entry names its own.

Terms of a loss that are worth a curve are returned detached, next to `loss`. Losses compute in float32 at
least, under autocast too.

`batch.loss_weight` [B, H, W] says how much each pixel counts; a loss that reads it says so (`weighs_pixels`). Terms
that are no sums over pixels (boxes, the no-target head, reconstruction) are not weighed.

Dimensions: B batch, H W network input size, h w the logits' size.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.errors import UserError
from amltrain.frames import from_longest
from amltrain.matching import (
    at_least_float32,
    box_loss,
    boxes_of_masks,
    corners_of,
    share_outside,
    shares_of,
    sides,
)
from amltrain.records import Batch, ModelOutput
from amltrain.registry import LOSSES

Loss = TypeVar("Loss", bound=Callable[..., nn.Module])


def register_loss(name: str) -> Callable[[Loss], Loss]:
    """Register a class or function that builds a loss from its keyword arguments (`loss.kwargs`)."""

    def register(loss: Loss) -> Loss:
        LOSSES.add(name, loss)
        return loss

    return register


def create_loss(name: str, **kwargs: Any) -> nn.Module:
    """Build a loss by name. Raises UserError for an unknown name or argument."""
    build = LOSSES[name].value
    try:
        return build(**kwargs)
    except TypeError as error:
        raise UserError(f"loss {name}: {error} (loss.kwargs)") from error


def check_channels(loss: nn.Module, model_name: str, channels: int | None) -> None:
    """Reject a loss that reads another number of channels than a model's logits have; None = not known.

    A loss class declares the number as `channels`, and `needs_heads` where it reads more than the logits.
    """
    wanted = getattr(loss, "channels", None)
    if channels is None or wanted in (None, channels):
        return
    name = next((entry.name for entry in LOSSES.entries() if entry.value is type(loss)), type(loss).__name__)
    fitting = [
        entry.name
        for entry in LOSSES.entries()
        if getattr(entry.value, "channels", None) == channels and not hasattr(entry.value, "needs_heads")
    ]
    raise UserError(
        f"loss.name={name} reads {wanted}-channel logits and {model_name} gives {channels}; "
        f"use {' or '.join(fitting)}, or leave loss.name out for the model's own loss"
    )


def check_weighs_pixels(loss: nn.Module, asked_by: str) -> None:
    """Raise UserError for a loss that does not read `batch.loss_weight`; asked_by: the setting that needs it."""
    if not getattr(loss, "weighs_pixels", False):
        able = ", ".join(entry.name for entry in LOSSES.entries() if getattr(entry.value, "weighs_pixels", False))
        raise UserError(f"{asked_by} leaves pixels out of the loss, and {type(loss).__name__} cannot; use {able}")


def pixel_weights(batch: Batch, size: torch.Size | tuple[int, ...]) -> Tensor | None:
    """`batch.loss_weight` at the size (h, w), by nearest neighbour, [B, h, w]; None: all count the same."""
    if batch.loss_weight is None or batch.loss_weight.shape[-2:] == size:
        return batch.loss_weight
    return F.interpolate(batch.loss_weight[:, None], size=size, mode="nearest")[:, 0]


def weighted_mean(values: Tensor, weights: Tensor | None, normaliser: Tensor | None = None) -> Tensor:
    """Mean of values by weights of the same shape, []; 0 where all weights are 0.

    normaliser: what a weight of 1 counts as, per value (class weights); None = 1.
    """
    if weights is None:
        return values.mean()
    weights = weights.to(values.dtype)
    total = (weights if normaliser is None else weights * normaliser).sum()
    return (values * weights).sum() / total.clamp(min=torch.finfo(values.dtype).tiny)


def class_cross_entropy(logits: Tensor, referent: Tensor, weight: Tensor, weights: Tensor | None) -> Tensor:
    """Cross-entropy of logits [B, 2, H, W] and referent [B, H, W] bool, a mean weighted by class and by pixel, [].

    weight [2]: background, referent. weights [B, H, W]: of the pixels; None = the same for all.
    """
    weight, truth = weight.to(logits.dtype), referent.long()
    if weights is None:
        return F.cross_entropy(logits, truth, weight)
    return weighted_mean(F.cross_entropy(logits, truth, weight, reduction="none"), weights, weight[truth])


def binary_cross_entropy(logits: Tensor, truth: Tensor, weights: Tensor | None) -> Tensor:
    """Binary cross-entropy of logits and truth (0..1) [B, 1, h, w], a mean weighted by pixel, [].

    weights [B, h, w]; None = the same for all.
    """
    if weights is None:
        return F.binary_cross_entropy_with_logits(logits, truth)
    return weighted_mean(F.binary_cross_entropy_with_logits(logits, truth, reduction="none"), weights[:, None])


def upsample_logits(logits: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """[B, K, h, w] -> [B, K, H, W] in at least float32, bilinear, align_corners=True as all official code does."""
    logits = at_least_float32(logits)
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


@register_loss("weighted_cross_entropy")
class WeightedCrossEntropy(nn.Module):
    """Two-class cross-entropy, a mean weighted by class (CARIS, LAVT, AML: 0.9 background, 1.1 referent).

    The logits are resized to the target's size; a pixel that is at least half covered is the referent's.
    """

    channels = 2
    weighs_pixels = True
    weight: Tensor

    def __init__(self, background_weight: float = 0.9, referent_weight: float = 1.1) -> None:
        super().__init__()
        # not persistent: class weights are the recipe's, not the checkpoint's
        self.register_buffer("weight", torch.tensor([background_weight, referent_weight]), persistent=False)

    def forward(self, output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """output.logits [B, 2, h, w], batch.target [B, H, W] uint8."""
        logits = upsample_logits(output.logits, batch.target.shape[-2:])
        weights = pixel_weights(batch, batch.target.shape[-2:])
        return {"loss": class_cross_entropy(logits, batch.target >= 128, self.weight, weights)}


@register_loss("binary_cross_entropy")
class BinaryCrossEntropy(nn.Module):
    """Mean binary cross-entropy of one-channel logits at their own size (CRIS, ETRIS, DETRIS).

    The target is resized to the logits' size by nearest neighbour and keeps its soft edges.
    """

    channels = 1
    weighs_pixels = True

    def forward(self, output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """output.logits [B, 1, h, w], batch.target [B, H, W] uint8."""
        logits = at_least_float32(output.logits)
        target = F.interpolate(batch.target[:, None].to(logits.dtype) / 255, size=logits.shape[-2:], mode="nearest")
        return {"loss": binary_cross_entropy(logits, target, pixel_weights(batch, logits.shape[-2:]))}


@register_loss("barleria")
class ReconstructionLoss(BinaryCrossEntropy):
    """Binary cross-entropy as in CRIS, plus the reconstruction error of BarLeRIa's feedback chain."""

    needs_heads = True

    def forward(self, output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """output.logits [B, 1, h, w]; aux reconstruction [B]; batch.target [B, H, W] uint8.

        Returns loss, and detached its two terms: cross_entropy, reconstruction.
        """
        if "reconstruction" not in output.aux:
            raise UserError("loss barleria needs a model with a feedback chain (barleria_*); name another loss.name")
        cross_entropy = super().forward(output, batch)["loss"]
        reconstruction = at_least_float32(output.aux["reconstruction"]).mean()
        return {
            "loss": cross_entropy + reconstruction,
            "cross_entropy": cross_entropy.detach(),
            "reconstruction": reconstruction.detach(),
        }


@register_loss("cross_entropy_dice")
class CrossEntropyDice(nn.Module):
    """Binary cross-entropy plus Dice of one-channel logits at the target's size (ReMamber, MagNet, EVF-SAM).

    A pixel that is at least half covered is the referent's.
    """

    channels = 1
    weighs_pixels = True

    def __init__(self, dice_weight: float = 1.0, smoothing: float = 1.0) -> None:
        """smoothing: added to both sides of Dice's fraction; EVF-SAM has 1e-3."""
        super().__init__()
        self.dice_weight, self.smoothing = dice_weight, smoothing

    def forward(self, output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """output.logits [B, 1, h, w], batch.target [B, H, W] uint8.

        Returns loss, and detached and unweighted its two terms: cross_entropy, dice.
        """
        logits = upsample_logits(output.logits, batch.target.shape[-2:])
        truth = (batch.target >= 128)[:, None].to(logits.dtype)
        weights = pixel_weights(batch, truth.shape[-2:])
        cross_entropy = binary_cross_entropy(logits, truth, weights)
        dice = dice_loss(logits, truth, self.smoothing, weights)
        return {
            "loss": cross_entropy + self.dice_weight * dice,
            "cross_entropy": cross_entropy.detach(),
            "dice": dice.detach(),
        }


@register_loss("rela")
class RegionLoss(nn.Module):
    """ReLA's loss: class-weighted cross-entropies of the mask, the minimap and the no-target decision.

    scale * (mask + minimap_weight * minimap + no_target_weight * no_target); the weights of background and referent are
    also those of "target" and "no target". Source: GRES (CVPR 2023) and its official code.

    Kept from the official code: a cell of the minimap is the referent's only where the mask, resized bilinearly to the
    grid of regions, is exactly 1.
    """

    channels = 2
    needs_heads = True
    weighs_pixels = True
    weight: Tensor

    def __init__(
        self,
        background_weight: float = 0.9,
        referent_weight: float = 1.1,
        minimap_weight: float = 0.1,
        no_target_weight: float = 0.1,
        scale: float = 5.0,
    ) -> None:
        super().__init__()
        self.minimap_weight, self.no_target_weight, self.scale = minimap_weight, no_target_weight, scale
        self.register_buffer("weight", torch.tensor([background_weight, referent_weight]), persistent=False)

    def forward(self, output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """output.logits [B, 2, h, w]; aux minimap [B, P * P, 2] and no_target [B, 2] logits; batch.target, no_target.

        Returns loss, and detached and unweighted: mask_loss, minimap_loss, no_target_loss.
        """
        if "minimap" not in output.aux or "no_target" not in output.aux:
            raise UserError(
                "loss rela needs a model with a minimap and a no-target head (rela_*); name another loss.name"
            )
        referent = batch.target >= 128
        logits = upsample_logits(output.logits, batch.target.shape[-2:])
        mask = class_cross_entropy(logits, referent, self.weight, pixel_weights(batch, referent.shape[-2:]))
        cells = at_least_float32(output.aux["minimap"]).transpose(1, 2)
        minimap = F.cross_entropy(cells, self.minimap_target(referent, output), self.weight)
        decision = at_least_float32(output.aux["no_target"])
        no_target = F.cross_entropy(decision, batch.no_target.long(), self.weight)
        return {
            "loss": self.scale * (mask + self.minimap_weight * minimap + self.no_target_weight * no_target),
            "mask_loss": mask.detach(),
            "minimap_loss": minimap.detach(),
            "no_target_loss": no_target.detach(),
        }

    @staticmethod
    def minimap_target(referent: Tensor, output: ModelOutput) -> Tensor:
        """Referent [B, H, W] bool -> [B, P * P] int64 in {0, 1}."""
        side = math.isqrt(output.aux["minimap"].shape[1])
        cells = F.interpolate(referent[:, None].float(), size=(side, side), mode="bilinear", align_corners=False)
        return cells.long().flatten(1)


@register_loss("cgformer")
class GroupingLoss(nn.Module):
    """CGFormer's loss: cross-entropy and Dice of the mask, and a little Dice of every round's assignment.

    Source: Tang et al., CVPR 2023, and its official code (SooLab/CGFormer). Kept from it: the assignments, which are 0
    or 1 already, pass a sigmoid as if they were logits.
    """

    channels = 1
    needs_heads = True
    weighs_pixels = True

    def __init__(self, assignment_weights: Sequence[float] = (0.001, 0.01, 0.1)) -> None:
        super().__init__()
        self.assignment_weights = tuple(assignment_weights)

    def forward(self, output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """output.logits [B, 1, h, w]; aux assigned0, assigned1, ... [B, h_i, w_i]; batch.target [B, H, W] uint8.

        Returns loss, and detached its three terms: cross_entropy, dice, assignment_dice.
        """
        missing = [f"assigned{i}" for i in range(len(self.assignment_weights)) if f"assigned{i}" not in output.aux]
        if missing:
            raise UserError(f"loss cgformer needs a model that gives {missing[0]} (cgformer_*); name another loss.name")
        logits = upsample_logits(output.logits, batch.target.shape[-2:])
        truth = (batch.target >= 128)[:, None].to(logits.dtype)
        weights = pixel_weights(batch, truth.shape[-2:])
        cross_entropy = binary_cross_entropy(logits, truth, weights)
        dice = dice_loss(logits, truth, weights=weights)
        assignment = logits.new_zeros(())
        for i, weight in enumerate(self.assignment_weights):
            assigned = at_least_float32(output.aux[f"assigned{i}"])[:, None]
            small = F.interpolate(truth, size=assigned.shape[-2:], mode="nearest")
            seen = pixel_weights(batch, assigned.shape[-2:])
            assignment = assignment + weight * dice_loss(assigned, small, weights=seen)
        return {
            "loss": cross_entropy + dice + assignment,
            "cross_entropy": cross_entropy.detach(),
            "dice": dice.detach(),
            "assignment_dice": assignment.detach(),
        }


def dice_loss(logits: Tensor, truth: Tensor, smoothing: float = 1.0, weights: Tensor | None = None) -> Tensor:
    """Mean over samples of 1 - (2 |P and G| + s) / (|P| + |G| + s); logits and truth (0 or 1) [B, 1, H, W].

    weights [B, H, W] multiply every pixel's share of the three sums; None = 1.
    """
    probability, truth = logits.sigmoid().flatten(1), truth.flatten(1)
    counted = truth
    if weights is not None:
        probability, counted = probability * weights.flatten(1), truth * weights.flatten(1)
    both = (probability * truth).sum(dim=1)
    return (1 - (2 * both + smoothing) / (probability.sum(dim=1) + counted.sum(dim=1) + smoothing)).mean()


@register_loss("mask_and_presence")
class MaskAndPresence(nn.Module):
    """Binary cross-entropy and Dice of a one-channel mask, and cross-entropy of the no-target head (SAM 3, ours).

    The mask term is a mean over all samples; without a target the mask is empty.
    """

    channels = 1
    needs_heads = True
    weighs_pixels = True

    def __init__(self, dice_weight: float = 1.0, presence_weight: float = 0.1) -> None:
        super().__init__()
        self.dice_weight, self.presence_weight = dice_weight, presence_weight

    def forward(self, output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """output.logits [B, 1, h, w]; aux no_target [B, 2] logits; batch.target [B, H, W] uint8, no_target [B] bool.

        Returns loss, and detached and unweighted: cross_entropy, dice, presence.
        """
        if "no_target" not in output.aux:
            raise UserError("loss mask_and_presence needs a model with a no-target head (sam3); name another loss.name")
        logits = upsample_logits(output.logits, batch.target.shape[-2:])
        truth = batch.target[:, None].to(logits.dtype) / 255
        weights = pixel_weights(batch, truth.shape[-2:])
        cross_entropy = binary_cross_entropy(logits, truth, weights)
        dice = dice_loss(logits, truth, weights=weights)
        presence = F.cross_entropy(at_least_float32(output.aux["no_target"]), batch.no_target.long())
        return {
            "loss": cross_entropy + self.dice_weight * dice + self.presence_weight * presence,
            "cross_entropy": cross_entropy.detach(),
            "dice": dice.detach(),
            "presence": presence.detach(),
        }


@register_loss("c3vg")
class CoarseToFine(nn.Module):
    """C3VG's loss: masks, boxes, and how far masks and boxes contradict each other, of a coarse and a fine stage.

    Each stage: Dice + binary cross-entropy of the mask; box_weight * box; consistency_weight * (0.3 * share of the mask
    outside the box + 0.1 * box against the box around the mask). The coarse stage counts coarse_weight. Source: Dai et
    al., AAAI 2025, and its official code.

    Kept from the official code: the share outside is a count without a gradient, and the box around the mask teaches
    only the predicted box; its last pixel is left out. A sample whose mask is empty has no box and no consistency.
    """

    channels = 1
    needs_heads = True
    weighs_pixels = True

    def __init__(self, coarse_weight: float = 0.3, box_weight: float = 0.05, consistency_weight: float = 0.1) -> None:
        super().__init__()
        self.coarse_weight, self.box_weight, self.consistency_weight = coarse_weight, box_weight, consistency_weight

    def forward(self, output: ModelOutput, batch: Batch, boxes: Tensor | None = None) -> dict[str, Tensor]:
        """output.logits [B, 1, h, w]; aux coarse_logits [B, 1, h', w'], box and coarse_box [B, 4] shares;
        batch.target [B, H, W] uint8; boxes [B, 4] corners in pixels of the network's input, None = batch.box, or where
        there is none the box around the target.

        Returns loss, and detached with their weights: {mask, box, consistency}_{coarse, fine}.
        """
        if not {"coarse_logits", "coarse_box", "box"} <= output.aux.keys():
            raise UserError("loss c3vg needs a model with a coarse stage and boxes (c3vg_*); name another loss.name")
        truth = batch.target >= 128
        size = (truth.shape[-2], truth.shape[-1])
        boxes = batch.box if boxes is None else boxes
        wanted = shares_of(boxes_of_masks(truth) if boxes is None else boxes, size)
        some = truth.flatten(1).any(dim=1).float()
        stages = (
            ("coarse", self.coarse_weight, output.aux["coarse_logits"], output.aux["coarse_box"]),
            ("fine", 1.0, output.logits, output.aux["box"]),
        )
        terms = {}
        for stage, weight, small, given in stages:
            logits, box = upsample_logits(small, size), at_least_float32(given)
            covered, weights = truth[:, None].to(logits.dtype), pixel_weights(batch, size)
            mask = dice_loss(logits, covered, weights=weights) + binary_cross_entropy(logits, covered, weights)
            terms[f"mask_{stage}"] = weight * mask
            terms[f"box_{stage}"] = weight * self.box_weight * (box_loss(box, wanted) * some).mean()
            contradiction = consistency(logits, box)
            terms[f"consistency_{stage}"] = weight * self.consistency_weight * (contradiction * some).mean()
        return {
            "loss": torch.stack(list(terms.values())).sum(),
            **{name: term.detach() for name, term in terms.items()},
        }


def consistency(logits: Tensor, boxes: Tensor) -> Tensor:
    """How far every mask and its box contradict each other: 0.3 * share outside + 0.1 * box loss.

    logits [B, 1, H, W], boxes [B, 4] shares -> [B]. The mask gets no gradient.
    """
    masks = logits[:, 0] > 0
    size = (masks.shape[-2], masks.shape[-1])
    corners = corners_of(boxes) * sides(boxes, size[1], size[0])
    around = shares_of(boxes_of_masks(masks, end=0), size).to(boxes.dtype)
    return 0.3 * share_outside(masks, corners) + 0.1 * box_loss(boxes, around)


@register_loss("language_and_masks")
class LanguageAndMasks(nn.Module):
    """GSVA's and LISA's loss: next token of the answers, binary cross-entropy and Dice of the masks.

    Both are means over the masks of the batch, at each picture's own size where the batch has it (the official code),
    else at the network's. Source: the official code (LeapLabTHU/GSVA, dvlab-research/LISA). Kept from it: Dice of sums
    divided by 1000, smoothed with 1e-6; means divided by the count plus 1e-8.
    """

    channels = 1
    needs_heads = True
    reads_original = True
    weighs_pixels = True

    def __init__(self, language_weight: float = 1.0, bce_weight: float = 2.0, dice_weight: float = 0.5) -> None:
        super().__init__()
        self.weights = (language_weight, bce_weight, dice_weight)

    def forward(self, output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """output.logits [B, 1, S, S]; aux language_loss []; batch.original_target B tensors [h0, w0], or target.

        Returns loss, and detached and weighted its three terms: language_loss, cross_entropy, dice.
        """
        if "language_loss" not in output.aux:
            raise UserError(
                "loss language_and_masks needs a language model (gsva_*, lisa_*, mllm_*); name another loss.name"
            )
        logits = at_least_float32(output.logits)
        weights = batch.loss_weight
        if batch.original_target:
            masks = [
                (
                    from_longest(logits[i : i + 1], truth.shape),
                    truth[None, None] > 0,
                    None if weights is None else from_longest(weights[i : i + 1], truth.shape),
                )
                for i, truth in enumerate(batch.original_target)
            ]
        else:
            size = batch.target.shape[-2:]
            resized, seen = (
                F.interpolate(logits, size, mode="bilinear", align_corners=False),
                pixel_weights(batch, size),
            )
            masks = [
                (resized[i : i + 1], batch.target[i : i + 1, None] >= 128, None if seen is None else seen[i : i + 1])
                for i in range(len(logits))
            ]
        crossed = torch.stack([binary_cross_entropy(a, b.to(a.dtype), w) for a, b, w in masks])
        diced = torch.stack([dice_loss(a, b.to(a.dtype), 1e-3, w) for a, b, w in masks])
        count = len(masks) + 1e-8
        language, bce, dice = (
            weight * term
            for weight, term in zip(
                self.weights, (output.aux["language_loss"], crossed.sum() / count, diced.sum() / count), strict=True
            )
        )
        return {
            "loss": language + bce + dice,
            "language_loss": language.detach(),
            "cross_entropy": bce.detach(),
            "dice": dice.detach(),
        }
