"""DETRIS: frozen DINOv2 and CLIP text, tuned by small dense adapters, with CRIS' decoder on top.

Paper: Huang et al., Densely Connected Parameter-Efficient Tuning for Referring Image Segmentation, AAAI 2025.
Official code: jiaqihuang01/DETRIS, commit c94b1e1, MIT. Reimplemented on timm's ViT blocks and torch's attention.

Kept from the official code on purpose: DINOv2's position table is resampled with an offset of 0.1 and the image is
normalised as for CLIP; adapters and aligners read the padding, so that all sentences must be padded to one length; the
start token, the class token and the registers skip the adapters' convolutions and are doubled; the neck's attention has
a single key, so that its query and key weights never learn; adapters' batch norms have an epsilon of 1e-3.
Not kept: adapters of the text start from full-precision numbers (official code: rounded to half precision).

What AML scores: DINOv2's last map with every aligner skipped, because aligners bring words into the image from the
second block on, against CLIP's token features without adapters. All of it is frozen at full size
(`alignment_is_frozen`): the scores of an image and a sentence never change. The tiny model trains its encoders, so its
scores do change.

Dimensions: B batch, L text tokens, W text width, E sentence width, h w grid of patches, N tokens of the image (class,
registers, patches), C vision width, D decoder width, d adapter width.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from amltrain.config.schema import Preprocess
from amltrain.models.backbones.clip import OFFICIAL_NAMES, CLIPText, load_clip_text
from amltrain.models.backbones.dinov2 import DINOv2, load_dinov2
from amltrain.models.base import Conversion, convert
from amltrain.models.families import PixelTextModel
from amltrain.models.layers.cris_decoder import OFFICIAL_DECODER_NAMES, OFFICIAL_NECK_NAMES, GatedNeck
from amltrain.models.registry import LETTERBOX_UNDONE, ModelInfo, register_model
from amltrain.records import AlignmentFeatures, Batch, Features

ADAPTER_SCALE = 0.2

RENAMES = [
    (r"^txt_backbone\.transformer\.resblocks\.(\d+)\.adapter\.", r"text_adapters.\1."),
    (r"^dinov2\.blocks\.(\d+)\.adapter\.", r"aligners.\1."),
    (r"^txt_backbone\.", "text."),
    (r"^dinov2\.", "vision."),
    *OFFICIAL_NAMES,
    (r"\.D_fc1\.", ".down."),
    (r"\.D_fc2\.", ".up."),
    (r"\.dense_branch(\d)\.", r".dense.branch\1."),
    (r"(\.dense\..*)\.conv\.", r"\1.0."),
    (r"(\.dense\..*)\.bn\.", r"\1.1."),
    (r"\.cross\.multihead_attn\.", ".cross.attention."),
    *OFFICIAL_NECK_NAMES,
    *OFFICIAL_DECODER_NAMES,
]
"""The official key names to ours, as rules for `re.sub`."""


class DenseBranches(nn.Module):
    """Convolutions of sizes 1, 3 and 5, each reading the input and all branches before it; together as wide as it."""

    def __init__(self, dim: int, conv: type[nn.Conv1d] | type[nn.Conv2d]) -> None:
        super().__init__()
        norm = nn.BatchNorm1d if conv is nn.Conv1d else nn.BatchNorm2d

        def unit(in_dim: int, out_dim: int, kernel: int) -> nn.Sequential:
            return nn.Sequential(conv(in_dim, out_dim, kernel, padding=kernel // 2), norm(out_dim, eps=1e-3), nn.ReLU())

        narrow, quarter = dim // 16, dim // 4
        self.branch1 = unit(dim, dim // 2, 1)
        self.branch2 = nn.Sequential(unit(dim + dim // 2, narrow, 1), unit(narrow, quarter, 3))
        self.branch3 = nn.Sequential(unit(dim + dim // 2 + quarter, narrow, 1), unit(narrow, quarter, 5))

    def forward(self, x: Tensor) -> Tensor:
        """X [B, d, n] or [B, d, h, w] -> the same shape."""
        first = self.branch1(x)
        second = self.branch2(torch.cat([x, first], dim=1))
        third = self.branch3(torch.cat([x, first, second], dim=1))
        return torch.cat([first, second, third], dim=1)


class TextAdapter(nn.Module):
    """Adapter parallel to the MLP of a text block: neighbouring tokens read each other, in both directions."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, dim)
        self.dense = DenseBranches(dim, nn.Conv1d)
        self.up = nn.Linear(dim, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden [B, L, W], not normed -> [B, L, W]."""
        reduced = F.relu(self.down(hidden))
        start, words = reduced[:, :1], reduced[:, 1:].transpose(1, 2)
        words = (self.dense(words) + words).transpose(1, 2)
        return ADAPTER_SCALE * self.up(torch.cat([2 * start, words], dim=1))


class TextAttention(nn.Module):
    """Patches read the words, padding included."""

    def __init__(self, dim: int, text_dim: int, dropout: float, width: int = 128, heads: int = 8) -> None:
        super().__init__()
        self.image_proj = nn.Linear(dim, width)
        self.text_proj = nn.Linear(text_dim, width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.back_proj = nn.Linear(width, dim)

    def forward(self, patches: Tensor, text: Tensor) -> Tensor:
        """Patches [B, h w, d], text [B, L, W] -> [B, h w, d]."""
        words = self.text_proj(text)
        return self.back_proj(self.attention(self.image_proj(patches), words, words, need_weights=False)[0])


class DenseAligner(nn.Module):
    """Adapter parallel to the MLP of a vision block: patches read their neighbours and the words."""

    def __init__(self, width: int, text_dim: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, dim)
        self.dense = DenseBranches(dim, nn.Conv2d)
        self.cross = TextAttention(dim, text_dim, dropout)
        self.up = nn.Linear(dim, width)
        self.apply(_init_aligner)

    def forward(self, text: Tensor, normed: Tensor, grid: tuple[int, int]) -> Tensor:
        """Text [B, L, W], normed [B, N, C] with the patches of the grid (h, w) last -> [B, N, C]."""
        reduced = F.relu(self.down(normed))
        count = grid[0] * grid[1]
        special, patches = reduced[:, :-count], reduced[:, -count:]
        local = patches.transpose(1, 2).unflatten(2, grid)
        local = (self.dense(local) + local).flatten(2).transpose(1, 2)
        patches = patches + self.cross(local, text)
        return ADAPTER_SCALE * self.up(torch.cat([2 * special, patches], dim=1))


def _init_aligner(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d) and module.bias is not None:
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


class DETRIS(PixelTextModel):
    """DINOv2 with dense aligners, CLIP text with adapters, CRIS' decoder; one-channel logits, four per patch side."""

    vision: DINOv2
    encodes_image_alone = True

    def __init__(
        self,
        *,
        vision: DINOv2,
        text: CLIPText,
        vision_adapters: Sequence[int],
        vision_adapter_dim: int,
        text_adapters: Sequence[int],
        text_adapter_dim: int,
        taps: tuple[int, int],
        layers: int = 3,
        heads: int = 8,
        feedforward: int = 512,
        dropout: float = 0.1,
        train_encoders: bool = False,
    ) -> None:
        """vision, text: built encoders; the decoder is as wide as the text.

        vision_adapters, text_adapters: blocks (from 0) that get one; their widths are multiples of 16.
        taps: the two blocks whose output the neck reads in addition to the last. layers, heads, feedforward: of the
        decoder. dropout: of the decoder and of the aligners' attention. train_encoders: False freezes them, as the
        official code does.
        """
        super().__init__()
        self.vision, self.text, self.taps = vision, text, taps
        self.blocks_alone = min(*vision_adapters, *taps)
        if not train_encoders:
            vision.requires_grad_(False)
            text.requires_grad_(False)
        self.aligners = nn.ModuleDict(
            {str(i): DenseAligner(vision.embed_dim, text.width, vision_adapter_dim, dropout) for i in vision_adapters}
        )
        self.text_adapters = nn.ModuleDict({str(i): TextAdapter(text.width, text_adapter_dim) for i in text_adapters})
        neck = GatedNeck([vision.embed_dim] * 3, text.embed_dim, text.width, residual=True)
        self.add_decoder(neck, layers=layers, heads=heads, feedforward=feedforward, dropout=dropout)
        self.alignment_dims = (vision.embed_dim, text.width)
        self.alignment_is_frozen = not train_encoders

    @property
    def frame_stride(self) -> int:
        return self.vision.patch_size

    def encode(self, batch: Batch) -> Features:
        """Three maps of one size [B, C, h, w], the first two not normed; `extra["sentence"]` is [B, E]."""
        adapters = {int(i): adapter for i, adapter in self.text_adapters.items()}
        tokens, sentence = self.text(batch.input_ids, batch.text_mask, adapters)
        return Features(self._see(batch.image, tokens), tokens, batch.text_mask, {"sentence": sentence})

    def encode_image(self, image: Tensor) -> tuple[Tensor, ...]:
        """Encode the blocks before the first aligner and the first tap: tokens [B, N, C]."""
        return (self.vision.encode_start(image, self.blocks_alone),)

    def encode_with_image(self, batch: Batch, image: tuple[Tensor, ...]) -> Features:
        adapters = {int(i): adapter for i, adapter in self.text_adapters.items()}
        tokens, sentence = self.text(batch.input_ids, batch.text_mask, adapters)
        maps = self._see_rest(image[0], self.vision.grid(batch.image), tokens)
        return Features(maps, tokens, batch.text_mask, {"sentence": sentence})

    def _see(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        return self._see_rest(self.encode_image(image)[0], self.vision.grid(image), tokens)

    def _see_rest(self, x: Tensor, grid: tuple[int, int], tokens: Tensor) -> tuple[Tensor, ...]:
        aligners = {int(i): partial(aligner, tokens) for i, aligner in self.aligners.items()}
        return self.vision.encode_rest(x, grid, self.blocks_alone, self.taps, aligners)

    def alignment_features(
        self, batch: Batch, features: Features | None = None, *, text: str | None = None, visual: str | None = None
    ) -> AlignmentFeatures:
        """Both encoders without their adapters, so `features` serve nothing here: [B, C, h, w] and [B, L, W]."""
        tokens, _ = self.text(batch.input_ids, batch.text_mask)
        return AlignmentFeatures(self.vision(batch.image)[-1], tokens, batch.text_mask)

    def reencode_image(self, batch: Batch, features: Features) -> Features:
        return features._replace(visual=self._see(batch.image, features.text))

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Adapters and head, both at the full rate as in the official code; encoders, where they train, as well."""
        parts = {
            "adapters": (self.text_adapters, self.aligners),
            "head": (self.neck, self.decoder, self.head),
            "encoders": (self.text, self.vision),
        }
        groups = []
        for name, modules in parts.items():
            params = [p for module in modules for p in module.parameters() if p.requires_grad]
            if params:
                groups.append({"name": name, "params": params, "lr": lr, "weight_decay": weight_decay})
        return groups

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        return convert(official, self.state_dict(), renames=RENAMES)


def _info(size: int, tokenizer: str, max_tokens: int = 17) -> ModelInfo:
    return ModelInfo(
        paper="Densely Connected Parameter-Efficient Tuning for Referring Image Segmentation (AAAI 2025)",
        official_code="github.com/jiaqihuang01/DETRIS, commit c94b1e1",
        licence="MIT; its DINOv2 part Apache-2.0",
        aml_scores="last DINOv2 map without aligners x CLIP tokens without adapters, both frozen",
        preprocess=Preprocess(
            size=size,
            resize="letterbox",
            normalization="clip",
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            sentence_field="sent",
        ),
        protocol=LETTERBOX_UNDONE,
        loss="binary_cross_entropy",
    )


CLIP_TOKENIZER = "openai/clip-vit-base-patch16"
EVERY_SECOND = (1, 3, 5, 7, 9, 11)


@register_model(_info(448, CLIP_TOKENIZER))
def detris_base(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 49408,
    dropout: float = 0.1,
) -> DETRIS:
    """DINOv2 ViT-B/14 and CLIP ViT-B/16 text: 175.5 M parameters, 25.5 M trained.

    vision_weights: dinov2_vitb14_reg4_pretrain.pth or timm's vit_base_patch14_reg4_dinov2.lvd142m.
    text_weights: ViT-B-16.pt or openai/clip-vit-base-patch16.
    """
    vision, text = _encoders(DINOv2(), CLIPText(vocab_size=vocab_size), vision_weights, text_weights)
    return DETRIS(
        vision=vision,
        text=text,
        vision_adapters=EVERY_SECOND,
        vision_adapter_dim=128,
        text_adapters=EVERY_SECOND,
        text_adapter_dim=64,
        taps=(4, 8),
        dropout=dropout,
    )


@register_model(_info(448, CLIP_TOKENIZER))
def detris_large(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 49408,
    dropout: float = 0.1,
) -> DETRIS:
    """DINOv2 ViT-L/14 and CLIP ViT-B/16 text: 394.1 M parameters, 26.3 M trained."""
    vision, text = _encoders(_dinov2_large(), CLIPText(vocab_size=vocab_size), vision_weights, text_weights)
    return DETRIS(
        vision=vision,
        text=text,
        vision_adapters=range(2, 24, 4),
        vision_adapter_dim=128,
        text_adapters=EVERY_SECOND,
        text_adapter_dim=64,
        taps=(8, 16),
        dropout=dropout,
    )


@register_model(_info(448, CLIP_TOKENIZER))
def detris_large_mixed(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 49408,
    dropout: float = 0.1,
) -> DETRIS:
    """DETRIS-L with wider adapters in nearly every block, for combined training: 424.3 M parameters, 56.5 M trained.

    The official code trains it on images that other sets test on; `data.leak_filter` keeps those out.
    """
    vision, text = _encoders(_dinov2_large(), CLIPText(vocab_size=vocab_size), vision_weights, text_weights)
    return DETRIS(
        vision=vision,
        text=text,
        vision_adapters=range(1, 24),
        vision_adapter_dim=384,
        text_adapters=range(1, 12),
        text_adapter_dim=384,
        taps=(8, 16),
        dropout=dropout,
    )


@register_model(_info(98, "wordpiece", max_tokens=24))
def detris_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    dropout: float = 0.0,
    train_encoders: bool = True,
) -> DETRIS:
    """Small enough to learn synthetic scenes from scratch on two CPU cores; patches of 7 pixels, 14 x 14 at 98.

    train_encoders: frozen encoders that start at random would teach nothing, so here they train; False freezes them as
    at full size.
    """
    vision, text = _encoders(
        DINOv2(embed_dim=96, depth=4, num_heads=4, patch_size=7, table_size=14),
        CLIPText(width=64, layers=2, heads=4, vocab_size=vocab_size, max_positions=64, embed_dim=64),
        vision_weights,
        text_weights,
    )
    return DETRIS(
        vision=vision,
        text=text,
        vision_adapters=(1, 3),
        vision_adapter_dim=48,
        text_adapters=(1,),
        text_adapter_dim=32,
        taps=(1, 2),
        layers=2,
        heads=4,
        feedforward=128,
        dropout=dropout,
        train_encoders=train_encoders,
    )


def _dinov2_large() -> DINOv2:
    return DINOv2(embed_dim=1024, depth=24, num_heads=16)


def _encoders(
    vision: DINOv2, text: CLIPText, vision_weights: str | None, text_weights: str | None
) -> tuple[DINOv2, CLIPText]:
    if vision_weights is not None:
        load_dinov2(vision, vision_weights)
    if text_weights is not None:
        load_clip_text(text, text_weights)
    return vision, text
