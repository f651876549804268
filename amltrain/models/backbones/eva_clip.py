"""EVA-02-CLIP's image tower as a giver of token streams, on timm's EVA.

Paper: Sun et al., EVA-CLIP (arXiv 2303.15389). As BarLeRIa uses it: the position table is resampled bicubically and not
antialiased, patches keep their rotary code whatever is inserted before them, and the last norm is left out.

Dimensions: B batch, P inserted tokens, N patches, C width, E width of the space shared with the text tower.
"""

from functools import partial
from typing import cast

import torch
from timm.layers import RotaryEmbeddingCat
from timm.models.eva import Eva, EvaBlock
from torch import Tensor, nn

from amltrain.models.backbones.clip import resample
from amltrain.models.layers.basic import ModuleListOf

OFFICIAL_EVA_NAMES = [
    (r"^vision\.(blocks\.\d+)\.attn\.inner_attn_ln\.", r"vision.\1.attn.norm."),
    (r"^vision\.(blocks\.\d+)\.attn\.([qv])_bias$", r"vision.\1.attn.\2_proj.bias"),
    (r"^vision\.(blocks\.\d+)\.mlp\.w1\.", r"vision.\1.mlp.fc1_g."),
    (r"^vision\.(blocks\.\d+)\.mlp\.w2\.", r"vision.\1.mlp.fc1_x."),
    (r"^vision\.(blocks\.\d+)\.mlp\.w3\.", r"vision.\1.mlp.fc2."),
    (r"^vision\.(blocks\.\d+)\.mlp\.ffn_ln\.", r"vision.\1.mlp.norm."),
    (r"^vision\.(?=blocks|cls_token|pos_embed|patch_embed|head)", "vision.eva."),
]
"""Official key names, after "visual." became "vision.", to ours: rules for `re.sub`."""
EVA_DROPS = [
    (r"(?:backbone\.)?visual\..*freqs_(?:cos|sin)", "a rotary table, recomputed from the grid"),
    (r"(?:backbone\.)?visual\.norm\..*", "the last norm, which is not applied"),
]


class EvaCLIPViT(nn.Module):
    """The defaults are EVA-02-CLIP-B/16."""

    def __init__(
        self,
        *,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        patch_size: int = 16,
        mlp_ratio: float = 4 * 2 / 3,
        embed_dim: int = 512,
    ) -> None:
        super().__init__()
        self.stride, self.width = patch_size, width
        self.channels = (width, width, embed_dim)
        self.eva = Eva(
            img_size=14 * patch_size,
            patch_size=patch_size,
            embed_dim=width,
            depth=layers,
            num_heads=heads,
            qkv_fused=False,
            mlp_ratio=mlp_ratio,
            swiglu_mlp=True,
            scale_mlp=True,
            scale_attn_inner=True,
            use_rot_pos_emb=True,
            ref_feat_shape=(16, 16),
            global_pool="token",
            num_classes=embed_dim,
            dynamic_img_size=True,  # so that rotary codes can be made for any grid
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.eva.norm = nn.Identity()

    @property
    def blocks(self) -> "ModuleListOf[EvaBlock]":
        return cast("ModuleListOf[EvaBlock]", self.eva.blocks)

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image [B, 3, H, W], sides multiples of the patch -> class token and patches [B, 1 + N, C], and the grid."""
        cls_token, pos_embed = self.eva.cls_token, self.eva.pos_embed
        assert cls_token is not None and pos_embed is not None  # Eva was built with both
        patches = self.eva.patch_embed.proj(image)
        grid = (patches.shape[-2], patches.shape[-1])
        first = cls_token.expand(image.shape[0], -1, -1)
        x = torch.cat([first, patches.flatten(2).transpose(1, 2).to(first.dtype)], dim=1)
        return x + resample(pos_embed[0], grid), grid

    def rotary(self, grid: tuple[int, int], inserted: int) -> Tensor:
        """Rotary code of everything but the class token; inserted tokens are not turned. [P + N, 2 C / heads]."""
        rope = self.eva.rope
        assert isinstance(rope, RotaryEmbeddingCat)  # Eva was built with it
        code = rope.get_embed(shape=list(grid))
        sine, cosine = code.chunk(2, dim=-1)
        still = torch.cat([sine.new_zeros(inserted, sine.shape[-1]), cosine.new_ones(inserted, cosine.shape[-1])], -1)
        return torch.cat([still, code])

    def read(self, index: int, x: Tensor, code: Tensor | None) -> Tensor:
        """Return the attention output of block `index` for the stream."""
        block = self.blocks[index]
        return block.attn(block.norm1(x), rope=code)

    def finish(self, patches: Tensor) -> Tensor:
        """Patches after the last block in the shared space, [B, N, C] -> [B, N, E]."""
        return self.eva.head(patches)
