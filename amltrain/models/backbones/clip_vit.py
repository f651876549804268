"""CLIP's Vision Transformer as a giver of maps, in thirds, so that something can work between them.

Paper: Radford et al., CLIP, ICML 2021. The blocks are those of `clip.py`. Equal to transformers' CLIPVisionModel; the
position table is resampled bicubically and not antialiased, as ETRIS does (timm antialiases: features differ).

Dimensions: B batch, h w grid of patches, C width, E width of the space shared with CLIP's text tower.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amltrain.models.backbones.clip import OFFICIAL_NAMES, Between, CLIPBlock
from amltrain.models.backbones.torchscript import is_torchscript, read_torchscript
from amltrain.models.backbones.weights import fill, is_file, read_state_dict, timm_state
from amltrain.models.layers.module_list import ModuleListOf

OFFICIAL_VIT_NAMES = [(r"^vision\.conv1\.", "vision.patch_embed."), *OFFICIAL_NAMES]
"""OpenAI's key names, after "visual." became "vision.", to ours: rules for `re.sub`."""

_TIMM_NAMES = [
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^cls_token$", "class_embedding"),
    (r"^pos_embed$", "positional_embedding"),
    (r"^norm_pre\.", "ln_pre."),
    (r"^norm\.", "ln_post."),
    (r"\.attn\.qkv\.", ".attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"^head\.weight$", "proj"),
]


class CLIPViT(nn.Module):
    """Maps after a third and two thirds of the blocks, and the end in CLIP's shared space. The defaults are ViT-B/16
    at 416 px."""

    def __init__(
        self,
        *,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        patch_size: int = 16,
        table_size: int = 26,
        embed_dim: int = 512,
    ) -> None:
        """layers: a multiple of three. table_size: side of the position table in patches; it trains at that size."""
        super().__init__()
        self.stride, self.width = patch_size, width
        self.channels = (width, width, embed_dim)
        self.stream_channels = (width, width, width)
        self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) / width**0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + table_size**2, width) / width**0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = ModuleListOf(CLIPBlock(width, heads) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) / width**0.5)
        self.gradient_checkpointing = False

    def forward(self, image: Tensor, between: Between | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """image [B, 3, H, W], sides multiples of the patch -> maps of H / patch x W / patch, `channels` wide.

        between: what works on the patches after every third of the blocks, before anything reads them; the class
        token is not shown to it.
        """
        return self.encode_rest(self.encode_start(image), between)

    def encode_start(self, image: Tensor) -> tuple[Tensor, ...]:
        """The first third of the blocks, before `between`: patches [B, C, h, w], class token [B, 1, C]."""
        x, grid = self.embed(image)
        for block in self.blocks[: len(self.blocks) // 3]:
            x = self._run(block, x)
        return x[:, 1:].transpose(1, 2).unflatten(2, grid), x[:, :1]

    def encode_rest(self, start: tuple[Tensor, ...], between: Between | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The rest of `forward`, given what `encode_start` returned."""
        seen, first = start
        grid, third = seen.shape[-2:], len(self.blocks) // 3
        maps = []
        for level in range(3):
            if level:
                x = torch.cat([first, seen.flatten(2).transpose(1, 2)], dim=1)
                for block in self.blocks[level * third : (level + 1) * third]:
                    x = self._run(block, x)
                first, seen = x[:, :1], x[:, 1:].transpose(1, 2).unflatten(2, grid)
            seen = seen if between is None else between(level, seen)
            maps.append(seen)
        patches = seen.flatten(2).transpose(1, 2)
        return maps[0], maps[1], self.finish(patches).transpose(1, 2).unflatten(2, grid)

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Class token and patches as they enter the first block [B, 1 + N, C], and the grid (h, w)."""
        patches = self.patch_embed(image)
        grid = (patches.shape[-2], patches.shape[-1])
        first = self.class_embedding.expand(image.shape[0], 1, -1)
        x = torch.cat([first, patches.flatten(2).transpose(1, 2).to(first.dtype)], dim=1)
        return self.ln_pre(x + resample(self.positional_embedding, grid)), grid

    def rotary(self, grid: tuple[int, int], inserted: int) -> Tensor | None:
        """No rotary code: the table is all that tells positions."""
        return None

    def read(self, index: int, x: Tensor, code: Tensor | None) -> Tensor:
        """Return the attention output of block `index` for the stream. code: None, as `rotary` gives it."""
        return self.blocks[index].read(x)

    def finish(self, patches: Tensor) -> Tensor:
        """Patches after the last block in the shared space, [B, N, C] -> [B, N, E]."""
        return self.ln_post(patches) @ self.proj

    def shared(self, image: Tensor) -> Tensor:
        """CLIP's own answer at every patch, in the space that it shares with the text: [B, E, h, w]."""
        return self(image)[2]

    def _run(self, block: CLIPBlock, x: Tensor) -> Tensor:
        def whole(x: Tensor) -> Tensor:
            return block.transform(block.attend(x))

        if self.gradient_checkpointing and self.training:
            return checkpoint(whole, x, use_reentrant=False)
        return whole(x)


def resample(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position table [1 + side * side, C], the class token's row first, at a grid (h, w): [1 + h * w, C]."""
    side = round((len(table) - 1) ** 0.5)
    if grid == (side, side):
        return table
    patches = table[1:].T.unflatten(1, (side, side))[None].float()
    patches = F.interpolate(patches, size=grid, mode="bicubic").to(table.dtype)
    return torch.cat([table[:1], patches[0].flatten(1).T])


def load_clip_vit(vision: CLIPViT, weights: str) -> None:
    """Fill a ViT from OpenAI's archive (ViT-B-16.pt), a state dict of it, or a timm name or file
    (vit_base_patch16_clip_quickgelu_224.openai); the position table is resampled to this model's.

    Raises UserError for a source that is missing or of another size.
    """
    if not is_file(weights):
        state = timm_state(weights)
    elif is_torchscript(Path(weights)):
        state = read_torchscript(Path(weights))
    else:
        state = read_state_dict(Path(weights))
    ours = _image_tower(state)
    side = round((len(vision.positional_embedding) - 1) ** 0.5)
    if "positional_embedding" in ours:
        ours["positional_embedding"] = resample(ours["positional_embedding"], (side, side))
    fill(vision, ours, weights)


def _image_tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image part of a CLIP state dict under OpenAI's or timm's names, under ours and in float32."""
    official = any(key.startswith("visual.") for key in state)
    renamed = {}
    for key, value in state.items():
        if (official and not key.startswith("visual.")) or key == "head.bias":
            continue  # the text tower; zeros that timm's linear layer has and CLIP's projection has not
        name = re.sub(r"^visual\.", "vision.", key)
        for pattern, replacement in OFFICIAL_VIT_NAMES if official else _TIMM_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name.removeprefix("vision.")] = value.float()
    if not official:  # timm: a batch dimension on tokens, a linear layer's layout
        for token in ("class_embedding", "positional_embedding"):
            renamed[token] = renamed[token].squeeze(0)
        renamed["class_embedding"] = renamed["class_embedding"].squeeze(0)
        renamed["proj"] = renamed["proj"].T.contiguous()
    return renamed
