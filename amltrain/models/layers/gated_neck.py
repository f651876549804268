"""The neck of ETRIS, which DETRIS keeps: maps gated by the sentence become one map that knows where its cells are.

Papers: Xu et al., ETRIS, ICCV 2023; Huang et al., DETRIS, AAAI 2025.

Dimensions: B batch, h w size of the middle map, C_i widths of the maps, E sentence width, D output width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from amltrain.models.layers.cris_decoder import conv_norm_relu, with_coordinates

OFFICIAL_NECK_NAMES = [
    (r"^neck\.txt_proj\.", "neck.sentence_proj."),
    *((rf"^neck\.f{i + 3}_proj\.", f"neck.projections.{i}.") for i in range(3)),
    *((rf"^neck\.fusion{i + 3}\.multihead_attn\.", f"neck.gates.{i}.") for i in range(3)),
    (r"^neck\.aggr\.", "neck.aggregate."),
    (r"^neck\.coordconv\.0\.conv1\.", "neck.locate.0."),
    (r"^neck\.coordconv\.1\.", "neck.locate.1."),
]
"""Key names of a module `neck` in both official repositories to ours, as rules for `re.sub`."""


class GatedNeck(nn.Module):
    """Join three maps gated by the sentence, and add the coordinates of every cell."""

    def __init__(
        self,
        vision_dims: Sequence[int],
        sentence_dim: int,
        dim: int,
        *,
        strides: Sequence[int] = (1, 1, 1),
        residual: bool,
        heads: int = 8,
    ) -> None:
        """vision_dims: widths of the maps. strides: by how much the first two are finer and the third is coarser than
        the output. residual: the output of the coordinate layer is added to its input."""
        super().__init__()
        self.residual = residual
        self.sentence_proj = nn.Linear(sentence_dim, dim)
        # at stride 1 a transposed convolution differs in its weight's layout and first values only
        convs = [nn.Conv2d, nn.Conv2d, nn.ConvTranspose2d]
        self.projections = nn.ModuleList(
            nn.Sequential(conv(width, dim, stride, stride, bias=False), nn.BatchNorm2d(dim), nn.ReLU())
            for conv, width, stride in zip(convs, vision_dims, strides, strict=True)
        )
        self.gates = nn.ModuleList(nn.MultiheadAttention(dim, heads, batch_first=True) for _ in convs)
        self.aggregate = conv_norm_relu(3 * dim, dim)
        self.locate = nn.Sequential(conv_norm_relu(dim + 2, dim, 3), conv_norm_relu(dim, dim, 3))

    def forward(self, maps: Sequence[Tensor], sentence: Tensor) -> Tensor:
        """maps [B, C_i, h_i, w_i], sentence [B, E] -> [B, D, h, w]."""
        key = self.sentence_proj(sentence)[:, None]
        gated = []
        for project, gate, features in zip(self.projections, self.gates, maps, strict=True):
            # one key: every query gets the same answer, so one query is enough
            answer = gate(key, key, key, need_weights=False)[0]
            gated.append(project(features) * answer.transpose(1, 2)[..., None])
        joined = self.aggregate(torch.cat(gated, dim=1))
        located = self.locate(with_coordinates(joined))
        return joined + located if self.residual else located
