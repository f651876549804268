"""VMamba: a vision backbone of selective scans instead of attention; four stages at strides 4, 8, 16 and 32.

Paper: Liu et al., VMamba: Visual State Space Model, NeurIPS 2024 (arXiv 2401.10166); official code MzeroMiko/VMamba,
MIT. Reimplemented; timm and transformers have no such model. Maps are channels-last, [B, H, W, C].
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amltrain.errors import UserError
from amltrain.models.backbones.weights import fill, is_file, read_state_dict
from amltrain.models.layers.basic import ModuleListOf
from amltrain.models.layers.selective_scan import SelectiveScan


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a convolution to a channels-last map: [B, H, W, C] -> [B, h, w, C']."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Stem(nn.Module):
    """Two strided convolutions with norms: image [B, 3, H, W] -> [B, ceil(H / 4), ceil(W / 4), C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, dim // 2, 3, stride=2, padding=1), nn.LayerNorm(dim // 2)
        self.conv2, self.norm2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1), nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        x = nn.functional.gelu(self.norm1(convolve(self.conv1, image.permute(0, 2, 3, 1))))
        return self.norm2(convolve(self.conv2, x))


class Downsample(nn.Module):
    """Half the size, twice the width: [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1), nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(convolve(self.conv, x))


class ScanBlock(nn.Module):
    """Pre-norm selective scan and MLP, both residual."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = SelectiveScan(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.op(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """The blocks of one resolution, and the step to the next (none after the last stage)."""

    def __init__(self, dim: int, drop_path: Sequence[float], downsample: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ScanBlock(dim, rate) for rate in drop_path)
        self.downsample = Downsample(dim) if downsample else None
        self.gradient_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks, not the step to the next stage. [B, H, W, C] -> [B, H, W, C]."""
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class VMamba(nn.Module):
    """The defaults are VMamba-B. A caller runs stem, stages and the steps between itself."""

    def __init__(
        self,
        *,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 15, 2),
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.channels = tuple(embed_dim * 2**i for i in range(len(depths)))
        self.patch_embed = Stem(embed_dim)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.layers: ModuleListOf[Stage] = ModuleListOf()
        for i, depth in enumerate(depths):
            first = sum(depths[:i])
            self.layers.append(Stage(self.channels[i], rates[first : first + depth], downsample=i + 1 < len(depths)))
        self.apply(_init_linear)

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] -> the last stage's map, [B, h, w, C] at stride 32."""
        x = self.patch_embed(image)
        for stage in self.layers:
            x = stage(x)
            x = x if stage.downsample is None else stage.downsample(x)
        return x

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        for stage in self.layers:
            stage.gradient_checkpointing = enabled


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


OFFICIAL_VMAMBA_NAMES = [
    (r"\bpatch_embed\.0\.", "patch_embed.conv1."),
    (r"\bpatch_embed\.2\.", "patch_embed.norm1."),
    (r"\bpatch_embed\.5\.", "patch_embed.conv2."),
    (r"\bpatch_embed\.7\.", "patch_embed.norm2."),
    (r"\bdownsample\.1\.", "downsample.conv."),
    (r"\bdownsample\.3\.", "downsample.norm."),
]
"""Official key names to ours, as rules for `re.sub`."""


def load_vmamba(vision: VMamba, weights: str) -> None:
    """Fill a VMamba from an official file (vssm_base_0229_ckpt_epoch_237.pth); its classifier is left out.

    Raises UserError for a file that is missing or of another size.
    """
    if not is_file(weights):
        raise UserError(
            f"vision encoder {weights!r} is not a file, and no hub has VMamba by name; download the official "
            "vssm_base_0229_ckpt_epoch_237.pth and name its path (model.vision_weights)"
        )
    fill(vision, _renamed(read_state_dict(Path(weights))), weights)


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        if key.startswith("classifier."):
            continue
        for pattern, replacement in OFFICIAL_VMAMBA_NAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed
