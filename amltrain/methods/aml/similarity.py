"""PMME, PatchMax Matching Evaluation: how well does a visual patch match its best word? (arXiv 2602.22740, section 3.2)

A patch's score is its largest softmax probability over the tokens. The paper compares L2-normalised features after two
fixed, independent Gaussian projections to D dimensions; `Wi^T Wt` is one [C_v, C_t] matrix, so nothing of width D is
ever built. Scores are computed in float32, also under autocast: a softmax at a temperature near 0.005 needs it.

Dimensions: B batch, N patches, L text tokens, C_v C_t widths of the two encoders, D projection width.

The temperature of PMME's softmax, solved so that the mean score over the first batches is the paper's.

With independent projections, `<Wi v, Wt t>` of unit vectors has mean 0 and variance 1/D whatever v and t are. Taken
literally (temperature 1) every score is therefore about 1/L, all of the image falls under tau and is masked. The
published mean score, 0.754 in epoch 1, fixes the temperature instead; it comes out near 1/5 of the logits' spread.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.errors import UserError
from amltrain.randomness import random_key
from amltrain.records import AlignmentFeatures


def patch_logits(visual: Tensor, text: Tensor, form: Tensor | None = None) -> Tensor:
    """Similarity of every patch with every token: visual [B, N, C_v], text [B, L, C_t], form [C_v, C_t] -> [B, N, L].

    form None: the encoders share a space, C_v = C_t. The form is applied to the text, by far the shorter side.
    """
    if form is not None:
        text = text @ form.T  # [B, L, C_v]
    return visual @ text.transpose(1, 2)


def patch_max(logits: Tensor, temperature: Tensor | float, text_mask: Tensor | None = None) -> Tensor:
    """`S_i = max_j softmax_j(logits / temperature)`: logits [B, N, L] -> scores [B, N] in [1/L, 1].

    text_mask [B, L] bool (True = a real token): other tokens are excluded, and L above counts the real ones only.
    Every row needs a real token. None: padded tokens are included (as in the public code).
    """
    logits = logits / temperature
    if text_mask is not None:
        logits = logits.masked_fill(~text_mask[:, None, :], -torch.inf)
    return logits.softmax(dim=-1).amax(dim=-1)


def seeded(seed: int) -> torch.Generator:
    """A CPU generator whose stream no model initialised from the same seed shares."""
    return torch.Generator().manual_seed(random_key(seed, 0x414D4C))


def gaussian_projections(visual_dim: int, text_dim: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The paper's two fixed matrices, `Wi [D, C_v]` and `Wt [D, C_t]`, float32, entries i.i.d. N(0, 1/D).

    Always drawn on the CPU from `seed`, so they are the same on every rank and every kind of device.
    """
    generator = seeded(seed)
    scale = dim**-0.5
    visual = torch.randn(dim, visual_dim, generator=generator, device="cpu") * scale
    return visual, torch.randn(dim, text_dim, generator=generator, device="cpu") * scale


class RandomProjection(nn.Module):
    """Two fixed Gaussian matrices, collapsed into the bilinear form `Wi^T Wt` [C_v, C_t].

    explicit: keep the two matrices and project both sides to D, as the paper writes it. Same scores, more work.
    """

    visual: Tensor
    text: Tensor
    form: Tensor

    def __init__(
        self, visual_dim: int, text_dim: int, *, dim: int = 2048, seed: int = 0, explicit: bool = False
    ) -> None:
        super().__init__()
        visual, text = gaussian_projections(visual_dim, text_dim, dim, seed)
        self.explicit = explicit
        if explicit:
            self.register_buffer("visual", visual)
            self.register_buffer("text", text)
        else:
            self.register_buffer("form", (visual.double().T @ text.double()).float())

    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        """Visual [B, N, C_v], text [B, L, C_t] -> logits [B, N, L]."""
        if self.explicit:
            return patch_logits(F.linear(visual, self.visual.float()), F.linear(text, self.text.float()))
        return patch_logits(visual, text, self.form.float())


class LearnableProjection(nn.Module):
    """Two linear layers without bias, trained with the model; they start as the Gaussian matrices do."""

    def __init__(self, visual_dim: int, text_dim: int, *, dim: int = 2048, seed: int = 0) -> None:
        super().__init__()
        visual, text = gaussian_projections(visual_dim, text_dim, dim, seed)
        self.visual, self.text = nn.Parameter(visual), nn.Parameter(text)

    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        """Visual [B, N, C_v], text [B, L, C_t] -> logits [B, N, L]."""
        return patch_logits(F.linear(visual, self.visual.float()), F.linear(text, self.text.float()))


class LinearProjection(nn.Module):
    """One fixed linear map of the text to the visual width (preset `released`).

    PyTorch's default initialisation with bias, U(-1/sqrt(C_t), 1/sqrt(C_t)). The public code lists the map among its
    trained parameters, but no gradient ever reaches it.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, visual_dim: int, text_dim: int, *, seed: int = 0) -> None:
        super().__init__()
        generator = seeded(seed)
        bound = text_dim**-0.5
        self.register_buffer("weight", torch.empty(visual_dim, text_dim).uniform_(-bound, bound, generator=generator))
        self.register_buffer("bias", torch.empty(visual_dim).uniform_(-bound, bound, generator=generator))

    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        """Visual [B, N, C_v], text [B, L, C_t] -> logits [B, N, L]."""
        return patch_logits(visual, F.linear(text, self.weight.float(), self.bias.float()))


class IdentityProjection(nn.Module):
    """No projection: for encoders that share a space, such as CLIP's."""

    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        """Visual [B, N, C], text [B, L, C] -> logits [B, N, L]."""
        return patch_logits(visual, text)


Projection = Literal["random", "learnable", "identity", "linear"]
"""Of two encoders' features; `cosine` and `grounded` give scores themselves."""


def create_projection(
    kind: Projection, visual_dim: int, text_dim: int, *, dim: int = 2048, seed: int = 0, explicit: bool = False
) -> nn.Module:
    """Build a projection by name. Raises UserError for a pair of widths that it cannot compare."""
    if kind == "random":
        return RandomProjection(visual_dim, text_dim, dim=dim, seed=seed, explicit=explicit)
    if kind == "learnable":
        return LearnableProjection(visual_dim, text_dim, dim=dim, seed=seed)
    if kind == "linear":
        return LinearProjection(visual_dim, text_dim, seed=seed)
    check_widths("identity", visual_dim, text_dim)
    return IdentityProjection()


def check_widths(projection: str, visual_dim: int, text_dim: int) -> None:
    """Raise UserError unless patches and words are equally wide."""
    if visual_dim != text_dim:
        raise UserError(
            f"aml.projection={projection} compares features as they are, but this model's are {visual_dim} (visual) "
            f"and {text_dim} (text) wide; use aml.projection=random"
        )


class CosineSimilarity(nn.Module):
    """Cosine of a patch and its most similar word, for encoders that share a space (ours).

    PMME's softmax compares the words of a patch with each other; this compares the patches.
    """

    def forward(self, features: AlignmentFeatures) -> Tensor:
        """Scores [B, h, w] float32 in 0..1: (1 + cosine) / 2. Gradient flows to the features."""
        with torch.autocast(features.visual.device.type, enabled=False):
            visual = F.normalize(features.visual.float().flatten(2).transpose(1, 2), dim=-1)
            cosines = patch_logits(visual, F.normalize(features.text.float(), dim=-1))
            cosines = cosines.masked_fill(~features.text_mask[:, None, :], -1.0)
            return ((1 + cosines.amax(dim=-1)) / 2).clamp(0, 1).unflatten(1, features.visual.shape[-2:])


class PatchScorer(nn.Module):
    """PMME as a module: normalise, project, divide by the temperature, softmax over tokens, maximum.

    Buffers, so that they are part of the training state and not of the exported model: the projection's, the
    `temperature` [] float32 and the flag `calibrated` [] bool that keeps a resumed run from calibrating again.
    """

    temperature: Tensor
    calibrated: Tensor

    def __init__(
        self,
        projection: nn.Module,
        *,
        temperature: float | None = None,
        normalize: bool = True,
        score_padding: bool = False,
    ) -> None:
        """temperature: None leaves it to calibration, 1.0 until then. score_padding: include padded tokens."""
        super().__init__()
        self.projection = projection
        self.normalize = normalize
        self.score_padding = score_padding
        self.register_buffer("temperature", torch.tensor(1.0 if temperature is None else float(temperature)))
        self.register_buffer("calibrated", torch.tensor(temperature is not None))

    def logits(self, features: AlignmentFeatures, projection: nn.Module | None = None) -> Tensor:
        """Visual [B, C_v, h, w], text [B, L, C_t] -> [B, h * w, L] float32, before the temperature.

        projection: instead of this module's own.
        """
        with torch.autocast(features.visual.device.type, enabled=False):
            visual = features.visual.float().flatten(2).transpose(1, 2)
            text = features.text.float()
            if self.normalize:
                visual, text = F.normalize(visual, dim=-1), F.normalize(text, dim=-1)
            return (projection or self.projection)(visual, text)

    def token_mask(self, features: AlignmentFeatures) -> Tensor | None:
        """Return the tokens to include, [B, L] bool; None = all."""
        return None if self.score_padding else features.text_mask

    def score(self, features: AlignmentFeatures, projection: nn.Module | None = None) -> Tensor:
        """Scores [B, h, w] float32 in [1/L, 1]. projection: instead of this module's own."""
        logits = self.logits(features, projection)
        with torch.autocast(logits.device.type, enabled=False):
            scores = patch_max(logits, self.temperature.float(), self.token_mask(features))
        return scores.unflatten(1, features.visual.shape[-2:])

    def forward(self, features: AlignmentFeatures) -> Tensor:
        """As `score`."""
        return self.score(features)


TARGET_MEAN_SCORE = 0.75
Reduce = Callable[[Tensor], Tensor]
Scored = tuple[Tensor, Tensor | None]


class Calibration(NamedTuple):
    """temperature, the mean score it gives over all ranks, and the number of patches on this rank."""

    temperature: float
    mean_score: float
    patches: int


def mean_score(scored: Sequence[Scored], temperature: float, reduce: Reduce | None = None) -> float:
    """Mean PMME score of pairs (logits [B, N, L], text mask [B, L] or None) at a temperature, over all ranks.

    reduce: sums or averages a tensor over the ranks, e.g. `accelerator.reduce`; None = there is one rank.
    """
    scores = [patch_max(logits.double(), temperature, mask) for logits, mask in scored]
    totals = torch.stack(
        [torch.stack([s.sum() for s in scores]).sum(), scores[0].new_tensor(sum(map(Tensor.numel, scores)))]
    )
    if reduce is not None:
        # float32, which every backend reduces; every rank then sees the same two numbers
        totals = reduce(totals.float()).double()
    return (totals[0] / totals[1]).item()


def solve_temperature(
    scored: Sequence[Scored], target: float = TARGET_MEAN_SCORE, reduce: Reduce | None = None
) -> Calibration:
    """Bisect for the temperature at which the mean score is `target`: the mean falls as the temperature rises.

    Every rank must call this with as many iterations as the others; it makes the same number of reductions always.
    Raises UserError when no temperature reaches the target (features without any contrast, one-token sentences).
    """
    low, high = math.log(1e-6), math.log(1e6)
    for _ in range(50):
        middle = (low + high) / 2
        if mean_score(scored, math.exp(middle), reduce) > target:
            low = middle
        else:
            high = middle
    temperature = math.exp((low + high) / 2)
    reached = mean_score(scored, temperature, reduce)
    if not abs(reached - target) < 0.01:
        raise UserError(
            f"no temperature gives a mean alignment score of {target} (closest: {reached:.3f}); the features are "
            "constant, not finite, or the sentences have one token: set aml.temperature to a number"
        )
    return Calibration(temperature, reached, sum(logits.shape[0] * logits.shape[1] for logits, _ in scored))


def warn_if_literal(temperature: float, normalize: bool) -> None:
    """Warn about the literal formula, which masks whole images."""
    if temperature == 1.0 and normalize:
        warnings.warn(
            "aml.temperature=1.0 takes the paper's formula literally: scores of unit vectors are then all "
            "about 1 / tokens, everything is under tau and whole images are blanked; use aml.temperature=auto",
            stacklevel=2,
        )
