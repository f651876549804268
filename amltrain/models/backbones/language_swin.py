"""Swin that reads the sentence: pixel-word attention after every stage, as in LAVT, ReLA and CGFormer.

The backbone returns the normed fused map; the next stage gets the trunk plus a gated share of the fused map.

Dimensions: B batch, H W a map's size, C its width, L text tokens, D text width.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from amltrain.models.backbones.swin import Swin
from amltrain.models.layers.pwam import LanguageGate, PixelWordAttention

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
        (ReLA; LAVT and CGFormer start at 0.02)."""
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
        """image [B, 3, H, W], text [B, L, D], text_mask [B, L] bool -> fused [B, C_i, h_i, w_i], fine to coarse."""
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
