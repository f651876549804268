"""A score that is trained on the ground truth (ours): is this patch inside the object that the sentence refers to?

Two linear maps compare a patch with the mean of the sentence's tokens. They learn beside the model: features are
detached, and the loss is scaled down so far that it does not change how the model's gradient is clipped. Adam divides
the scale out again, so the maps learn at the full rate.

Dimensions: B batch, N patches, h w score map, L text tokens, C_v C_t widths of the two encoders, D projection width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.methods.aml.similarity import gaussian_projections
from amltrain.records import AlignmentFeatures

GROUNDING_SCALE = 1e-2
"""Of the maps' loss; see the file's head."""
START_SCALE = 10.0
"""Factor of the similarity of unit vectors at the start; it is trained."""


class GroundedProjection(nn.Module):
    """Probability of every patch to lie inside the referent."""

    def __init__(self, visual_dim: int, text_dim: int, *, dim: int, seed: int = 0) -> None:
        super().__init__()
        visual, text = gaussian_projections(visual_dim, text_dim, dim, seed)
        self.visual, self.text = nn.Parameter(visual), nn.Parameter(text)
        self.scale, self.bias = nn.Parameter(torch.tensor(START_SCALE)), nn.Parameter(torch.zeros(()))

    def forward(self, features: AlignmentFeatures) -> Tensor:
        """Probabilities [B, h, w] float32, with gradient for the maps alone; `features` are used as they are."""
        with torch.autocast(features.visual.device.type, enabled=False):
            visual = _standardised(features.visual.float().flatten(2).transpose(1, 2))
            real = features.text_mask[..., None].float()
            text = (_standardised(features.text.float()) * real).sum(1) / real.sum(1).clamp(min=1)
            query = F.linear(F.linear(text, self.text.float()), self.visual.float().T)  # [B, C_v]
            logits = self.scale.float() * torch.einsum("bnc,bc->bn", visual, query) + self.bias.float()
            return logits.sigmoid().unflatten(1, features.visual.shape[-2:])


def _standardised(vectors: Tensor) -> Tensor:
    """Vectors [..., C] with mean 0 and length 1."""
    return F.normalize(vectors - vectors.mean(-1, keepdim=True), dim=-1)


def grounding_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of probabilities [B, h, w] against the share of each patch inside the referent, [].

    target [B, H, W] uint8, 255 = referent. Referent and background weigh the same in a batch, whatever their areas.
    """
    inside = F.adaptive_avg_pool2d(target[:, None].float() / 255, (scores.shape[-2], scores.shape[-1]))[:, 0]
    scores = scores.float().clamp(1e-6, 1 - 1e-6)
    hit = (inside * scores.log()).sum() / inside.sum().clamp(min=1e-6)
    miss = ((1 - inside) * (1 - scores).log()).sum() / (1 - inside).sum().clamp(min=1e-6)
    return -(hit + miss) / 2
