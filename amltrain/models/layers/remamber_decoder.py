"""ReMamber's two heads, convolutional and of selective scans, and the map of local text that the twisters use too.

Paper: Yang et al., ReMamber, ECCV 2024 (arXiv 2403.17839).

Dimensions: B batch, H W a map's size, C its width, L text tokens, D text width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.models.backbones.vmamba import convolve
from amltrain.models.layers.selective_scan import SelectiveScan


class LocalText(nn.Module):
    """How well every pixel matches every token, made a map of features again."""

    def __init__(self, dim: int, text_dim: int, hidden: int, tokens: int) -> None:
        super().__init__()
        self.vis_proj = nn.Linear(dim, hidden)
        self.text_proj = nn.Linear(text_dim, hidden)
        self.unsqueeze = nn.Conv2d(tokens, hidden, 3, padding=1)
        self.out_proj = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """X [B, H, W, C], text [B, L, D] -> [B, H, W, C]."""
        image_values, text_values = F.gelu(self.vis_proj(x)), F.gelu(self.text_proj(text))
        matches = torch.einsum("bhwc,blc->bhwl", image_values, text_values)
        return self.out_proj(F.gelu(convolve(self.unsqueeze, matches)))


class ConvNorm(nn.Module):
    """1x1 convolution without bias and batch norm."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(in_dim, dim, 1, bias=False), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Mixer(nn.Module):
    """Pointwise, depth-wise and pointwise convolution: [B, C, H, W] -> [B, C', H, W]."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_dim, in_dim)
        self.dwconv = nn.Conv2d(in_dim, in_dim, 3, padding=1, groups=in_dim, bias=False)
        self.norm = nn.BatchNorm2d(in_dim)
        self.conv2 = ConvNorm(in_dim, dim)
        for conv in (self.conv1.conv, self.dwconv, self.conv2.conv):
            fan_out = conv.out_channels * conv.kernel_size[0] ** 2 // conv.groups
            nn.init.normal_(conv.weight, std=(2 / fan_out) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.dwconv(F.hardswish(self.conv1(x)))))
        return self.conv2(x)


def twice(x: Tensor, *, align_corners: bool = True) -> Tensor:
    """Double the size of a map [B, C, H, W]."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=align_corners)


class ConvDecoder(nn.Module):
    """The default head: from the coarsest map to the finest, then to the input's size."""

    def __init__(self, channels: Sequence[int]) -> None:
        """channels: widths of the maps, fine to coarse."""
        super().__init__()
        dim = channels[-1] // 2
        widths = [channels[3], dim + channels[2], dim + channels[1]]
        self.mixers = nn.ModuleList(Mixer(width, dim) for width in widths)
        self.neck = nn.Sequential(
            nn.Conv2d(dim + channels[0], dim, 3, padding=1),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(dim, 1, 3, padding=1),
        )

    def forward(self, maps: Sequence[Tensor], text: Tensor) -> Tensor:
        """Maps [B, h_i, w_i, C_i], fine to coarse -> logits [B, 1, H, W]; the words are not read again."""
        *finer, coarsest = (m.permute(0, 3, 1, 2) for m in maps)
        x = twice(self.mixers[0](coarsest))
        for mixer, fine in zip(list(self.mixers)[1:], (finer[2], finer[1]), strict=True):
            x = twice(mixer(torch.cat((x, fine), dim=1)))
        return self.neck(torch.cat((x, finer[0]), dim=1))


class HeadBlock(nn.Module):
    """Pre-norm selective scan, residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = SelectiveScan(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.op(self.norm(x))


class HeadLevel(nn.Module):
    """One level of the Mamba head: join image and words, scan, go to twice the size and half the width."""

    def __init__(self, dim: int, text_dim: int, *, hidden: int, tokens: int, blocks: int) -> None:
        super().__init__()
        self.guide = nn.Linear(text_dim, dim)
        self.local = LocalText(dim, text_dim, hidden, tokens)
        self.join = nn.Linear(3 * dim, dim, bias=False)
        self.blocks = nn.ModuleList(HeadBlock(dim) for _ in range(blocks))
        self.narrow = nn.Linear(dim, dim // 2, bias=False)
        self.norm = nn.LayerNorm(dim // 2)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """X [B, H, W, C], text [B, L, D] -> [B, 2H, 2W, C / 2]."""
        guidance = F.relu(self.guide(text[:, 0]))[:, None, None].expand_as(x)
        x = self.join(torch.cat((x, guidance, self.local(x, text)), dim=-1))
        for block in self.blocks:
            x = block(x)
        x = twice(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(self.narrow(x))


class MambaDecoder(nn.Module):
    """The head of selective scans, which reads the words again at every level."""

    def __init__(
        self, channels: Sequence[int], text_dim: int, *, hidden: int, tokens: int, blocks: Sequence[int] = (2, 4, 2, 2)
    ) -> None:
        super().__init__()
        widths = channels[::-1]
        self.levels = nn.ModuleList(
            HeadLevel(width, text_dim, hidden=hidden, tokens=tokens, blocks=count)
            for width, count in zip(widths, blocks, strict=True)
        )
        self.fusions = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(2 * width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
            for width in widths[1:]
        )
        last = widths[-1] // 2
        self.head = nn.Sequential(
            nn.Conv2d(last, last, 3, padding=1, bias=False),
            nn.BatchNorm2d(last),
            nn.ReLU(),
            nn.Conv2d(last, 1, 3, padding=1),
        )

    def forward(self, maps: Sequence[Tensor], text: Tensor) -> Tensor:
        """Maps [B, h_i, w_i, C_i], fine to coarse, text [B, L, D] -> logits [B, 1, H, W]."""
        *finer, x = maps
        for i, level in enumerate(self.levels):
            x = level(x, text)
            if i < len(self.fusions):
                fine = finer[-1 - i]
                joined = torch.cat((x, fine), dim=-1).permute(0, 3, 1, 2)
                x = fine + self.fusions[i](joined).permute(0, 2, 3, 1)
        return self.head(twice(x.permute(0, 3, 1, 2), align_corners=False))
