"""Swin Transformer v1, exact at every input size, stage by stage.

Paper: Liu et al., Swin Transformer, ICCV 2021. The blocks are timm's; two things differ from timm's whole model,
because CARIS, LAVT, CGFormer and ReLA were trained that way:

- a map is padded to a multiple of the window first and rolled afterwards (timm rolls first), so timm's numbers differ
  wherever padding happens;
- the window is never shrunk and the shift never dropped, also on maps smaller than a window.

Each output passes a LayerNorm of its own. Key names are the official ones: `layers.{i}.downsample` follows stage i.

Dimensions: B batch, H W a map's size, C its width.

Swin that reads the sentence: pixel-word attention after every stage, as in LAVT, ReLA and CGFormer.

The backbone returns the normed fused map; the next stage gets the trunk plus a gated share of the fused map.

Dimensions: B batch, H W a map's size, C its width, L text tokens, D text width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amltrain.models.layers.basic import ModuleListOf
from amltrain.models.layers.pwam import LanguageGate, PixelWordAttention


def shift_mask(height: int, width: int, window: int, shift: int, like: Tensor) -> Tensor:
    """Return the attention mask of shifted windows: 0, or -100 between regions that were not neighbours.

    Returns [windows, window**2, window**2] in the dtype and on the device of `like`.
    """

    def regions(size: int) -> Tensor:
        position = torch.arange(size, device=like.device)
        return (position >= size - window).long() + (position >= size - shift).long()

    region = (3 * regions(height)[:, None] + regions(width)[None, :])[None, :, :, None]  # [1, H, W, 1]
    windows = window_partition(region, (window, window)).flatten(1)  # [windows, window**2]
    return (windows[:, None, :] != windows[:, :, None]).to(like.dtype) * -100.0


class SwinBlock(SwinTransformerBlock):
    """timm's block with the official order: pad, roll, attend, roll back, crop."""

    def __init__(self, dim: int, num_heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__(
            dim,
            input_resolution=(window, window),
            num_heads=num_heads,
            window_size=window,
            shift_size=shift,
            always_partition=True,
            drop_path=drop_path,
        )
        self.window, self.shift = window, shift
        self.attn_mask = None  # timm's is for one fixed size

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # type: ignore[override]  # also takes the mask
        """X [B, H, W, C]; mask of `shift_mask` at the padded size where the block shifts -> [B, H, W, C]."""
        x = x + self.drop_path1(self.attend(self.norm1(x), mask))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        height, width = x.shape[1:3]
        size = (self.window, self.window)
        x = F.pad(x, (0, 0, 0, -width % self.window, 0, -height % self.window))
        padded_height, padded_width = x.shape[1:3]
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        windows = self.attn(window_partition(x, size).flatten(1, 2), mask=mask)
        x = window_reverse(windows.unflatten(1, size), size, padded_height, padded_width)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        return x[:, :height, :width]


class SwinStage(nn.Module):
    """The blocks of one resolution, and the merging that leads to the next (none after the last stage)."""

    def __init__(
        self, dim: int, depth: int, num_heads: int, window: int, drop_path: Sequence[float], merge: bool
    ) -> None:
        super().__init__()
        self.window, self.shift = window, window // 2
        self.blocks = ModuleListOf(
            SwinBlock(dim, num_heads, window, self.shift if i % 2 else 0, drop_path[i]) for i in range(depth)
        )
        self.downsample = PatchMerging(dim) if merge else None
        self.gradient_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks, not the merging. [B, H, W, C] -> [B, H, W, C]."""
        height, width = (size + -size % self.window for size in x.shape[1:3])
        mask = shift_mask(height, width, self.window, self.shift, like=x)
        for block in self.blocks:
            block_mask = mask if block.shift else None
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, block_mask, use_reentrant=False)
            else:
                x = block(x, block_mask)
        return x


class Swin(nn.Module):
    """Swin with four normed output maps at strides 4, 8, 16 and 32."""

    def __init__(
        self,
        *,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: int = 7,
        drop_path_rate: float = 0.3,
        output_norms: bool = True,
    ) -> None:
        """output_norms: False leaves out the output maps' LayerNorms, for a model that norms elsewhere (MagNet)."""
        super().__init__()
        self.channels = tuple(embed_dim * 2**i for i in range(len(depths)))
        self.patch_embed = PatchEmbed(
            img_size=None,
            patch_size=4,
            embed_dim=embed_dim,
            norm_layer=nn.LayerNorm,
            output_fmt="NHWC",
            dynamic_img_pad=True,
        )
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.layers: ModuleListOf[SwinStage] = ModuleListOf()
        for i, depth in enumerate(depths):
            first = sum(depths[:i])
            self.layers.append(
                SwinStage(
                    self.channels[i],
                    depth,
                    num_heads[i],
                    window_size,
                    rates[first : first + depth],
                    merge=i + 1 < len(depths),
                )
            )
            if output_norms:
                self.add_module(f"norm{i}", nn.LayerNorm(self.channels[i]))
        self.layers.apply(_init_linear)

    def normed(self, stage: int, x: Tensor) -> Tensor:
        """Output of a stage through its LayerNorm, [B, H, W, C] -> [B, C, H, W] contiguous."""
        return self.get_submodule(f"norm{stage}")(x).permute(0, 3, 1, 2).contiguous()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Image [B, 3, H, W] of any size -> maps [B, C_i, ceil(H / 2**(i + 2)), ...], fine to coarse."""
        x = self.patch_embed(image)
        maps = []
        for i, stage in enumerate(self.layers):
            x = stage(x)
            maps.append(self.normed(i, x))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return tuple(maps)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        for stage in self.layers:
            stage.gradient_checkpointing = enabled


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


OFFICIAL_NAMES = [
    (r"^backbone\.layers\.(\d)\.(?:pwam_)?fusion\.vis_project\.0\.", r"backbone.fusion.\1.visual."),
    (r"^backbone\.layers\.(\d)\.(?:pwam_)?fusion\.project_mm\.0\.", r"backbone.fusion.\1.project."),
    (
        r"^backbone\.layers\.(\d)\.(?:pwam_)?fusion\.image_lang_att\.f_(query|key|value)\.0\.",
        r"backbone.fusion.\1.\2.",
    ),
    (r"^backbone\.layers\.(\d)\.(?:pwam_)?fusion\.image_lang_att\.W\.0\.", r"backbone.fusion.\1.output."),
    (r"^backbone\.layers\.(\d)\.(?:res|pwam)_gate\.0\.", r"backbone.gates.\1.reduce."),
    (r"^backbone\.layers\.(\d)\.(?:res|pwam)_gate\.2\.", r"backbone.gates.\1.expand."),
    (r"^backbone\.(patch_embed|layers|norm\d)\.", r"backbone.swin.\1."),
]
"""Renaming rules for a `LanguageSwin` called `backbone`: LAVT's, ReLA's and CGFormer's names to ours."""


class LanguageSwin(nn.Module):
    """A `Swin` with a `PixelWordAttention` after every stage and a `LanguageGate` before every merging."""

    def __init__(
        self,
        swin: Swin,
        *,
        text_dim: int = 768,
        heads: int | Sequence[int] = 1,
        dropout: float = 0.0,
        gate_std: float = 0.02,
    ) -> None:
        """heads: of the attention to words, for every stage or stage by stage.

        gate_std: spread of the gates' first weights; at 0 they never open, because both of their gradients are 0
        (ReLA; LAVT and CGFormer start at 0.02).
        """
        super().__init__()
        self.swin = swin
        self.channels = swin.channels
        heads = [heads] * len(swin.channels) if isinstance(heads, int) else heads
        self.fusion = nn.ModuleList(
            PixelWordAttention(dim, text_dim, heads=count, dropout=dropout)
            for dim, count in zip(swin.channels, heads, strict=True)
        )
        self.gates = nn.ModuleList(LanguageGate(dim, std=gate_std) for dim in swin.channels[:-1])

    def forward(self, image: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, ...]:
        """Image [B, 3, H, W], text [B, L, D], text_mask [B, L] bool -> fused [B, C_i, h_i, w_i], fine to coarse."""
        return self.read_words(self.before_words(image), text, text_mask)

    def before_words(self, image: Tensor) -> tuple[Tensor, ...]:
        """The first stage's blocks, before anything reads the words: [B, h, w, C] at stride 4."""
        return (self.swin.layers[0](self.swin.patch_embed(image)),)

    def read_words(self, start: tuple[Tensor, ...], text: Tensor, text_mask: Tensor) -> tuple[Tensor, ...]:
        """The rest of `forward`, given what `before_words` returned."""
        [x] = start
        maps = []
        for i, stage in enumerate(self.swin.layers):
            x = stage(x) if i else x
            fused = self._fuse(i, x, text, text_mask)
            maps.append(self.swin.normed(i, fused))
            if stage.downsample is not None:
                x = stage.downsample(self.gates[i](x, fused))
        return tuple(maps)

    def _fuse(self, stage: int, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        return self.fusion[stage](x.flatten(1, 2), text, text_mask).unflatten(1, x.shape[1:3])

    def before_last_fusion(self, image: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """The last stage's blocks, words let in by the earlier stages' gates only: [B, C, h, w] at stride 32."""
        x = self.swin.patch_embed(image)
        for i, stage in enumerate(self.swin.layers):
            x = stage(x)
            if stage.downsample is not None:
                x = stage.downsample(self.gates[i](x, self._fuse(i, x, text, text_mask)))
        return x.permute(0, 3, 1, 2)

    def without_words(self, image: Tensor) -> Tensor:
        """The last stage's blocks on the image alone, no fusion, no gate, no norm: [B, C, h, w] at stride 32."""
        x = self.swin.patch_embed(image)
        for stage in self.swin.layers:
            x = stage(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return x.permute(0, 3, 1, 2)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.swin.set_gradient_checkpointing(enabled)
