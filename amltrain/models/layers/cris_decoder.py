"""The decoder of CRIS, which ETRIS and DETRIS keep: image positions read each other and the words, then a convolution
whose kernel is made from the sentence answers at every pixel.

Paper: Wang et al., CRIS: CLIP-Driven Referring Image Segmentation, CVPR 2022.

Dimensions: B batch, h w map size, N = h w, L text tokens, C width, E sentence width.

The neck of ETRIS, which DETRIS keeps: maps gated by the sentence become one map that knows where its cells are.

Papers: Xu et al., ETRIS, ICCV 2023; Huang et al., DETRIS, AAAI 2025.

Dimensions: B batch, h w size of the middle map, C_i widths of the maps, E sentence width, D output width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OFFICIAL_DECODER_NAMES = [
    (r"^(decoder\..*)\.multihead_attn\.", r"\1.cross_attn."),
    (r"^proj\.vis\.", "head.visual."),
    (r"^proj\.txt\.", "head.kernel."),
]
"""The official key names of decoder and head (modules `decoder` and `head` here) to ours, as rules for `re.sub`."""


def conv_norm_relu(in_dim: int, dim: int, kernel: int = 1) -> nn.Sequential:
    """Convolution without bias that keeps the size, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_dim, dim, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(dim), nn.ReLU()
    )


def with_coordinates(x: Tensor) -> Tensor:
    """Append two channels, the column and the row in [-1, 1]: [B, C, h, w] -> [B, C + 2, h, w]."""
    batch, _, height, width = x.shape
    columns = torch.linspace(-1, 1, width, device=x.device, dtype=x.dtype).expand(batch, 1, height, width)
    rows = torch.linspace(-1, 1, height, device=x.device, dtype=x.dtype)[:, None].expand(batch, 1, height, width)
    return torch.cat([x, columns, rows], dim=1)


def index_code(count: int, dim: int, *, device: torch.device | None = None) -> Tensor:
    """The Transformer's sine code of 0..count-1, sine and cosine alternating: [count, dim] float32."""
    frequency = torch.exp(torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10000) / dim))
    angle = torch.arange(count, device=device, dtype=torch.float32)[:, None] * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def map_code(height: int, width: int, dim: int, *, device: torch.device | None = None) -> Tensor:
    """Column code in the first half of the channels, row code in the second: [height * width, dim] float32."""
    columns = index_code(width, dim // 2, device=device)[None].expand(height, -1, -1)
    rows = index_code(height, dim // 2, device=device)[:, None].expand(-1, width, -1)
    return torch.cat((columns, rows), dim=-1).flatten(0, 1)


class PixelTextLayer(nn.Module):
    """Self-attention, attention to the words and a feed-forward network, each normed before and inside."""

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.self_attn_norm = nn.LayerNorm(dim)
        self.cross_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.cross_attn_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, feedforward),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.LayerNorm(feedforward),
            nn.Linear(feedforward, dim),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        position: Tensor,
        text_position: Tensor,
        padding: Tensor,
        suppressed: Tensor | None,
    ) -> Tensor:
        """X [B, N, C], text [B, L, C], positions [N, C] and [L, C]; padding [B, L], suppressed [B, N] bool, True = no
        query may read it -> [B, N, C]. Values carry no position.
        """
        normed = self.norm1(x)
        query = normed + position
        read = self.self_attn(query, query, normed, key_padding_mask=suppressed, need_weights=False)[0]
        x = x + self.dropout(self.self_attn_norm(read))
        query = self.norm2(x) + position
        read = self.cross_attn(query, text + text_position, text, key_padding_mask=padding, need_weights=False)[0]
        x = x + self.dropout(self.cross_attn_norm(read))
        return x + self.dropout(self.ffn(self.norm3(x)))


class PixelTextDecoder(nn.Module):
    """Pre-norm layers over one map and the words, both of width C."""

    def __init__(self, dim: int, *, layers: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PixelTextLayer(dim, heads, feedforward, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor, suppressed: Tensor | None = None) -> Tensor:
        """X [B, C, h, w], text [B, L, C], text_mask [B, L] bool (True = a real token), suppressed [B, h, w] bool (True
        = no position may read it; an image that is suppressed everywhere is left whole) -> [B, C, h, w].
        """
        dim, height, width = x.shape[1:]
        position = map_code(height, width, dim, device=x.device).to(x.dtype)
        text_position = index_code(text.shape[1], dim, device=x.device).to(text.dtype)
        if suppressed is not None:
            suppressed = suppressed.flatten(1)
            suppressed = suppressed & ~suppressed.all(dim=1, keepdim=True)
        x = x.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, text, position, text_position, ~text_mask, suppressed)
        return self.norm(x).transpose(1, 2).unflatten(2, (height, width))


class SentenceKernel(nn.Module):
    """Upsample a map four times and convolve it with a 3 x 3 kernel and a bias made from the sentence."""

    def __init__(self, dim: int, sentence_dim: int) -> None:
        super().__init__()
        self.visual = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"),
            conv_norm_relu(dim, dim, 3),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            conv_norm_relu(dim, dim // 2, 3),
            nn.Conv2d(dim // 2, dim // 2, 1),
        )
        self.kernel = nn.Linear(sentence_dim, dim // 2 * 9 + 1)

    def forward(self, x: Tensor, sentence: Tensor) -> Tensor:
        """X [B, C, h, w], sentence [B, E] -> logits [B, 1, 4h, 4w]."""
        parameters = self.kernel(sentence)
        return own_convolution(self.visual(x), parameters[:, :-1], parameters[:, -1])


def own_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve every sample with its own 3 x 3 kernel, zeros around the map.

    x [B, C, h, w], weight [B, C * 9], bias [B] -> [B, 1, h, w]. One product per cell of the kernel, shifted and added:
    a convolution with a group per sample gives the same at a tenth of the speed, and fixes the size of the batch.
    """
    height, width = x.shape[-2:]
    cells = weight.unflatten(1, (-1, 9)).transpose(1, 2) @ x.flatten(2)  # [B, 9, h w]
    cells = F.pad(cells.unflatten(2, (height, width)), (1, 1, 1, 1))
    shifted = [cells[:, i, i // 3 : i // 3 + height, i % 3 : i % 3 + width] for i in range(9)]
    return (torch.stack(shifted).sum(dim=0) + bias[:, None, None])[:, None]


def suppressed_at(suppressed: Tensor | None, size: tuple[int, int]) -> Tensor | None:
    """Suppressed positions [B, h, w] bool of a coarser map, at the size of the decoder's: [B, *size] bool."""
    if suppressed is None:
        return None
    return F.interpolate(suppressed[:, None].float(), size=size)[:, 0] > 0.5


def at_image_size(logits: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """Logits of an image that was padded at its right and bottom to multiples of `stride`, at its own size.

    logits [B, 1, h, w] of the padded image; size: the image's (H, W). Returned as they are where nothing was padded.
    """
    height, width = size
    if height % stride == 0 and width % stride == 0:
        return logits
    padded = (height + -height % stride, width + -width % stride)
    return F.interpolate(logits, size=padded, mode="bilinear", align_corners=False)[..., :height, :width]


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
        the output. residual: the output of the coordinate layer is added to its input.
        """
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
        """Maps [B, C_i, h_i, w_i], sentence [B, E] -> [B, D, h, w]."""
        key = self.sentence_proj(sentence)[:, None]
        gated = []
        for project, gate, features in zip(self.projections, self.gates, maps, strict=True):
            # one key: every query gets the same answer, so one query is enough
            answer = gate(key, key, key, need_weights=False)[0]
            gated.append(project(features) * answer.transpose(1, 2)[..., None])
        joined = self.aggregate(torch.cat(gated, dim=1))
        located = self.locate(with_coordinates(joined))
        return joined + located if self.residual else located
