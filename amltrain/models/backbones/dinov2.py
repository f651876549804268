"""DINOv2 with registers, block by block, so that adapters can work inside; key names are Meta's own.

Papers: Oquab et al., DINOv2, TMLR 2024; Darcet et al., Vision Transformers Need Registers, ICLR 2024. The blocks are
timm's. Two things differ from timm's whole model, because Meta's code and DETRIS with it do them that way:

- the position table stays at its pretrained size and is resampled in every forward: bicubic, not antialiased, by a
  scale factor of (cells + 0.1) / table cells, whose 0.1 shifts the sampling points (timm: by size and antialiased,
  which changes features by up to 0.6);
- the class token and its position are two parameters, as in the official file.

Dimensions: B batch, H W image size, h w grid of patches, R registers, N = 1 + R + h w tokens, C width.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amltrain.models.backbones.weights import fill, is_file, read_state_dict, timm_state
from amltrain.models.layers.basic import ModuleListOf

Adapter = Callable[[Tensor, tuple[int, int]], Tensor]
"""(normed tokens [B, N, C], (h, w)) -> what is added to the block's MLP output, [B, N, C]."""


class DINOv2(nn.Module):
    """A Vision Transformer that gives the maps of chosen blocks. The defaults are ViT-B/14 with 4 registers."""

    def __init__(
        self,
        *,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        patch_size: int = 14,
        registers: int = 4,
        table_size: int = 37,
    ) -> None:
        """table_size: side of the pretrained position table in patches (518 px / 14 = 37)."""
        super().__init__()
        self.embed_dim, self.patch_size, self.table_size = embed_dim, patch_size, table_size
        self.prefix = 1 + registers
        # an image whose side is not a multiple of the patch is padded with zeros at the right and bottom
        self.patch_embed = PatchEmbed(
            img_size=None, patch_size=patch_size, embed_dim=embed_dim, flatten=False, dynamic_img_pad=True
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.register_tokens = nn.Parameter(torch.empty(1, registers, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + table_size**2, embed_dim))
        # pretraining's stand-in for hidden patches: in the official file, read by nothing here
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim), requires_grad=False)
        self.blocks = ModuleListOf(
            Block(
                embed_dim,
                num_heads,
                qkv_bias=True,
                init_values=1.0,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]  # timm takes any factory
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        for token in (self.cls_token, self.register_tokens, self.pos_embed):
            trunc_normal_(token, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self, image: Tensor, taps: Sequence[int] = (), adapters: Mapping[int, Adapter] | None = None
    ) -> tuple[Tensor, ...]:
        """Image [B, 3, H, W] of any size -> maps [B, C, ceil(H / patch), ceil(W / patch)].

        taps: blocks (from 0) whose output is given as it is, in rising order; the last map is the normed end.
        adapters: modules parallel to the MLP of a block (from 0).
        """
        return self.encode_rest(self.encode_start(image, 0), self.grid(image), 0, taps, adapters or {})

    def encode_start(self, image: Tensor, blocks: int) -> Tensor:
        """The first blocks, without adapters: tokens [B, N, C]. blocks: how many."""
        x, grid = self.embed(image)
        for block in self.blocks[:blocks]:
            x = self._run_block(block, x, grid, None)
        return x

    def encode_rest(
        self, x: Tensor, grid: tuple[int, int], done: int, taps: Sequence[int], adapters: Mapping[int, Adapter]
    ) -> tuple[Tensor, ...]:
        """The rest of `forward`, given what `encode_start(image, done)` returned for images of this grid."""
        maps = []
        for i, block in enumerate(self.blocks[done:], done):
            x = self._run_block(block, x, grid, adapters.get(i))
            if i in taps:
                maps.append(self._as_map(x, grid))
        maps.append(self._as_map(self.norm(x), grid))
        return tuple(maps)

    def grid(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of an image [B, 3, H, W]."""
        height, width = image.shape[-2:]
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens that enter the first block, [B, N, C], and the grid (h, w)."""
        patches = self.patch_embed(image)
        grid = (patches.shape[-2], patches.shape[-1])
        patches = (patches + self.position(grid)).flatten(2).transpose(1, 2)
        batch = patches.shape[0]
        first = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        tokens = torch.cat([first, self.register_tokens.expand(batch, -1, -1), patches.to(first.dtype)], dim=1)
        return tokens, grid

    def position(self, grid: tuple[int, int]) -> Tensor:
        """The patches' part of the position table at a grid (h, w): [1, C, h, w]."""
        side = self.table_size
        table = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if grid == (side, side):
            return table
        scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
        return F.interpolate(table.float(), scale_factor=scale, mode="bicubic").to(table.dtype)

    def _run_block(self, block: Block, x: Tensor, grid: tuple[int, int], adapter: Adapter | None) -> Tensor:
        # adapters stay outside recomputation: it would feed their batch norms' running statistics twice
        x = x + self._recomputed(lambda y: block.ls1(block.attn(block.norm1(y))), x)
        normed = block.norm2(x)
        change = self._recomputed(block.mlp, normed)
        if adapter is not None:
            change = change + adapter(normed, grid)
        return x + block.ls2(change)

    def _recomputed(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(function, x, use_reentrant=False)
        return function(x)

    def _as_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return tokens[:, self.prefix :].transpose(1, 2).unflatten(2, grid)


def load_dinov2(vision: DINOv2, weights: str) -> None:
    """Fill a DINOv2 from Meta's file (dinov2_vitb14_reg4_pretrain.pth), or from a timm name, `hf-hub:` id or file.

    Raises UserError for a file or name that is missing, or of another architecture.
    """
    state = read_state_dict(Path(weights)) if is_file(weights) else timm_state(weights)
    fill(vision, _from_timm(state) if "reg_token" in state else state, weights)


def _from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Timm adds the class token's position into the token and drops what pretraining alone needs."""
    renamed = {("register_tokens" if key == "reg_token" else key): value for key, value in state.items()}
    class_position = torch.zeros_like(renamed["cls_token"])
    renamed["pos_embed"] = torch.cat([class_position, renamed["pos_embed"]], dim=1)
    renamed["mask_token"] = torch.zeros_like(class_position[0])
    return renamed
