"""ReMamber: VMamba whose every stage is twisted by the sentence, with a convolutional or a Mamba head.

Paper: Yang et al., ReMamber: Referring Image Segmentation with Mamba Twister, ECCV 2024 (arXiv 2403.17839).
Official code: yyh-rain-song/ReMamber, commit 9edcf01, no licence file: all rights reserved. Reimplemented from facts
about it; nothing is copied. The scan is `layers/selective_scan.py`; `mamba_ssm`'s CUDA kernel is used where installed.

What AML scores: VMamba without twisters, one more pass of it, against CLIP's token features, which never see the image.
AML level "feature" has no place here: nothing attends to image positions.

Kept from the official code on purpose: the number of tokens is fixed, because they are channels of a convolution;
padded tokens are read; a twister adds the norms of its text maps to themselves; only the scan over channels has a gate,
and two of the three rows of its convolution see zeros only; the map is resized for that scan even to a size that is
almost its own; the Mamba head is guided by the start token, which no sentence changes; everything decays, biases and
norms too.
Not kept: the untwisted map's step to the next stage, which the official code computes and discards.
Our choice where we know no better: sentences as typed, and unions of overlapping polygons.

Dimensions: B batch, H W a map's size, C its width, L text tokens, D text width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.config.schema import Preprocess, Protocol
from amltrain.errors import UserError
from amltrain.models.backbones.clip import CLIPText, huggingface_name, load_clip_text, pack_attention
from amltrain.models.backbones.vmamba import OFFICIAL_VMAMBA_NAMES, VMamba, load_vmamba
from amltrain.models.base import Conversion, RISModel, convert
from amltrain.models.layers.basic import recompute
from amltrain.models.layers.cris_decoder import at_image_size
from amltrain.models.layers.remamber_decoder import ConvDecoder, LocalText, MambaDecoder
from amltrain.models.layers.selective_scan import SelectiveScan
from amltrain.models.registry import ModelInfo, register_model
from amltrain.records import AlignmentFeatures, Batch, Features, ModelOutput

STRIDE = 32
Head = Literal["conv", "mamba"]

_TEXT_MAP = [(r"\.(unsqueeze|vis_proj|text_proj)\.0\.", r".\1.")]
RENAMES = [
    (r"^backbone\.text_guidencee\.(\d)\.0\.", r"twisters.\1.guide."),
    (r"^backbone\.local_text_fusion\.(\d)\.", r"twisters.\1.local."),
    (r"^backbone\.multimodal_blocks\.(\d)\.", r"twisters.\1."),
    (r"^backbone\.", "vision."),
    (r"\.self_attention\.ss1d\.", ".channels."),
    (r"\.self_attention\.ss2d\.", ".positions."),
    (r"^decoder\.mixer3\.", "decoder.mixers.0."),
    (r"^decoder\.mixer2\.", "decoder.mixers.1."),
    (r"^decoder\.mixer1\.", "decoder.mixers.2."),
    (r"^decoder\.text_guidencee\.(\d)\.0\.", r"decoder.levels.\1.guide."),
    (r"^decoder\.local_text_fusion\.(\d)\.", r"decoder.levels.\1.local."),
    (r"^decoder\.in_proj\.(\d)\.", r"decoder.levels.\1.join."),
    (r"^decoder\.multimodal_blocks\.(\d)\.downsample\.proj\.", r"decoder.levels.\1.narrow."),
    (r"^decoder\.multimodal_blocks\.(\d)\.downsample\.norm\.", r"decoder.levels.\1.norm."),
    (r"^decoder\.multimodal_blocks\.(\d)\.", r"decoder.levels.\1."),
    (r"^decoder\.hire_fusion\.(\d)\.fusion\.", r"decoder.fusions.\1."),
    (r"^decoder\.proj_out\.1\.([01])\.", r"decoder.head.\1."),
    (r"^decoder\.proj_out\.2\.", "decoder.head.3."),
    (r"\.join\.0\.", ".join."),
    (r"\.self_attention\.", ".op."),
    (r"\.ln_1\.", ".norm."),
    *_TEXT_MAP,
    *OFFICIAL_VMAMBA_NAMES,
]
"""Official key names but the text encoder's to ours, as rules for `re.sub`, applied in this order."""
DROPS = [(r"text_encoder\..*position_ids", "an index table of older transformers versions")]


def resize(x: Tensor, size: Sequence[int], *, align_corners: bool) -> Tensor:
    """Resize a channels-last map bilinearly: [B, H, W, C] -> [B, h, w, C]."""
    x = F.interpolate(x.permute(0, 3, 1, 2), size=tuple(size), mode="bilinear", align_corners=align_corners)
    return x.permute(0, 2, 3, 1)


class TwisterBlock(nn.Module):
    """Image, sentence and local text mixed over channels and then over positions."""

    def __init__(self, dim: int, resolution: int) -> None:
        """resolution: side of the map during the scan over channels."""
        super().__init__()
        self.resolution = resolution
        self.norm = nn.LayerNorm(dim)
        self.channels = SelectiveScan(resolution**2, resolution**2, gated=True, sequence=True)
        self.positions = SelectiveScan(3 * dim, dim)

    def forward(self, x: Tensor, sentence: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All three [B, H, W, C] -> the same three."""
        normed_sentence, normed_local = self.norm(sentence), self.norm(local)
        cube = torch.cat((self.norm(x), normed_sentence, normed_local), dim=-1)
        mixed = cube + self.over_channels(cube)
        return x + self.positions(mixed), sentence + normed_sentence, local + normed_local

    def over_channels(self, cube: Tensor) -> Tensor:
        """Scan along the channels of a resized map, [B, H, W, 3C] -> [B, H, W, 3C]."""
        side = (self.resolution, self.resolution)
        small = resize(cube, side, align_corners=False).flatten(1, 2).transpose(1, 2)  # [B, 3C, cells]
        mixed = self.channels(small[:, None])[:, 0].transpose(1, 2).unflatten(1, side)
        return resize(mixed, cube.shape[1:3], align_corners=False)


class Twister(nn.Module):
    """Two blocks that write the sentence into a stage's map."""

    def __init__(self, dim: int, text_dim: int, *, hidden: int, tokens: int, resolution: int, blocks: int = 2) -> None:
        super().__init__()
        self.guide = nn.Linear(text_dim, dim)
        self.local = LocalText(dim, text_dim, hidden, tokens)
        self.blocks = nn.ModuleList(TwisterBlock(dim, resolution) for _ in range(blocks))

    def forward(self, x: Tensor, text: Tensor, sentence: Tensor) -> Tensor:
        """X [B, H, W, C], text [B, L, D], sentence [B, D] -> [B, H, W, C]."""
        guidance = F.relu(self.guide(sentence))[:, None, None].expand_as(x)
        local = self.local(x, text)
        for block in self.blocks:
            x, guidance, local = block(x, guidance, local)
        return x


class ReMamber(RISModel):
    """VMamba, CLIP's text tower, a twister after every stage and a head; one-channel logits at the image's size."""

    encoders = ("vision", "text_encoder")
    mask_channels = 1
    encodes_image_alone = True

    def __init__(
        self,
        *,
        vision: VMamba,
        text_encoder: CLIPText,
        head: Head = "conv",
        tokens: int = 20,
        hidden: int = 512,
        resolution: int = 16,
    ) -> None:
        """tokens: length of every padded sentence. hidden: width of the local text maps' matching.

        resolution: side of the map during the twisters' scan over channels.
        """
        super().__init__()
        self.vision, self.text_encoder, self.tokens = vision, text_encoder, tokens
        self.twisters = nn.ModuleList(
            Twister(dim, text_encoder.width, hidden=hidden, tokens=tokens, resolution=resolution)
            for dim in vision.channels
        )
        self.decoder = (
            ConvDecoder(vision.channels)
            if head == "conv"
            else MambaDecoder(vision.channels, text_encoder.width, hidden=hidden, tokens=tokens)
        )
        self.alignment_dims = (vision.channels[-1], text_encoder.width)
        self.fused_dims = self.alignment_dims
        self.gradient_checkpointing = False

    def encode(self, batch: Batch) -> Features:
        """Twisted maps [B, C_i, h_i, w_i] of the image padded to multiples of 32; `extra["sentence"]` is [B, D]."""
        text, sentence = self._encode_text(batch)
        return self._encode_image(batch, text, sentence)

    def encode_image(self, image: Tensor) -> tuple[Tensor, ...]:
        """Encode the first stage, before its twister reads the words: [B, H, W, C]."""
        return (self.vision.layers[0](self.vision.patch_embed(self._padded(image))),)

    def encode_with_image(self, batch: Batch, image: tuple[Tensor, ...]) -> Features:
        text, sentence = self._encode_text(batch)
        return self._twist(batch, image[0], text, sentence)

    def reencode_image(self, batch: Batch, features: Features) -> Features:
        return self._encode_image(batch, features.text, features.extra["sentence"])

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        """Logits [B, 1, H, W]. The words are read in the stages and not rewritten."""
        maps = [m.permute(0, 2, 3, 1) for m in features.visual]
        logits = self.decoder(maps, features.text)
        logits = at_image_size(logits, (batch.image.shape[-2], batch.image.shape[-1]), STRIDE)
        return ModelOutput(logits, {"fused_visual": features.visual[-1], "fused_text": features.text})

    def alignment_features(
        self, batch: Batch, features: Features | None = None, *, text: str | None = None, visual: str | None = None
    ) -> AlignmentFeatures:
        """VMamba without twisters [B, C, h, w] at stride 32, and CLIP's tokens [B, L, D].

        features: their text is used; their maps are twisted ones.
        """
        tokens = self._encode_text(batch)[0] if features is None else features.text
        return AlignmentFeatures(self.vision(self._padded(batch.image)).permute(0, 3, 1, 2), tokens, batch.text_mask)

    def _encode_text(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.input_ids.shape[1] != self.tokens:
            raise UserError(
                f"this model reads sentences of exactly {self.tokens} tokens, not {batch.input_ids.shape[1]}; "
                f"set preprocess.max_tokens to {self.tokens} or model.kwargs.tokens to {batch.input_ids.shape[1]}"
            )
        return self.text_encoder(batch.input_ids, batch.text_mask)

    def _encode_image(self, batch: Batch, text: Tensor, sentence: Tensor) -> Features:
        return self._twist(batch, self.encode_image(batch.image)[0], text, sentence)

    def _twist(self, batch: Batch, x: Tensor, text: Tensor, sentence: Tensor) -> Features:
        """The twisters and the later stages, given the first stage's map x [B, H, W, C]."""
        maps = []
        for i, (stage, twister) in enumerate(zip(self.vision.layers, self.twisters, strict=True)):
            x = stage(x) if i else x
            if self.gradient_checkpointing and self.training:
                x = recompute(twister, x, text, sentence)
            else:
                x = twister(x, text, sentence)
            maps.append(x.permute(0, 3, 1, 2))
            x = x if stage.downsample is None else stage.downsample(x)
        return Features(tuple(maps), text, batch.text_mask, {"sentence": sentence})

    @staticmethod
    def _padded(image: Tensor) -> Tensor:
        return F.pad(image, (0, -image.shape[-1] % STRIDE, 0, -image.shape[-2] % STRIDE))

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Both encoders at half the rate of twisters and head. Everything decays, as in the official code."""
        parts = {"vision": 0.5, "text_encoder": 0.5, "twisters": 1.0, "decoder": 1.0}
        return [
            {
                "name": name,
                "params": list(self.get_submodule(name).parameters()),
                "lr": lr * factor,
                "weight_decay": weight_decay,
            }
            for name, factor in parts.items()
        ]

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        """Rename; query, key and value of the text encoder's layers become one tensor."""
        packed = pack_attention(official)
        named = {
            ("text_encoder." + huggingface_name(key.removeprefix("text_encoder.")) if _is_text(key) else key): key
            for key in packed
        }
        found = convert(
            {name: packed[key] for name, key in named.items()}, self.state_dict(), renames=RENAMES, drops=DROPS
        )
        renamed = {named[name]: ours for name, ours in found.renamed.items()}
        for key in official:
            if key not in packed:
                renamed[key] = renamed[key.replace(".k_proj.", ".q_proj.").replace(".v_proj.", ".q_proj.")]
        dropped = {named[name]: why for name, why in found.dropped.items()}
        return found._replace(renamed=renamed, dropped=dropped, unmatched=[named[name] for name in found.unmatched])

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.gradient_checkpointing = enabled
        self.vision.set_gradient_checkpointing(enabled)
        self.text_encoder.gradient_checkpointing = enabled


def _is_text(key: str) -> bool:
    return key.startswith("text_encoder.") and "position_ids" not in key


def _info(size: int, tokenizer: str, max_tokens: int) -> ModelInfo:
    return ModelInfo(
        paper="ReMamber: Referring Image Segmentation with Mamba Twister (ECCV 2024)",
        official_code="github.com/yyh-rain-song/ReMamber, commit 9edcf01",
        licence="none: all rights reserved",
        aml_scores="VMamba without twisters x CLIP tokens",
        preprocess=Preprocess(
            size=size,
            resize="square",
            normalization="imagenet",
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            sentence_field="raw",
        ),
        protocol=Protocol(
            frame="original",
            threshold=0.5,
            interpolation="nearest",
            sentences="all",
            ties="gt",
            mask_parts="union",
        ),
        loss="cross_entropy_dice",
    )


CLIP_TOKENIZER = "openai/clip-vit-large-patch14"


def _official(
    vision_weights: str | None, text_weights: str | None, vocab_size: int, drop_path: float, head: Head, tokens: int
) -> ReMamber:
    vision = VMamba(drop_path_rate=drop_path)
    text = CLIPText(
        width=768,
        heads=12,
        vocab_size=vocab_size,
        embed_dim=None,
        pad_id=min(49407, vocab_size - 1),
        masks_padding=True,
    )
    if vision_weights is not None:
        load_vmamba(vision, vision_weights)
    if text_weights is not None:
        load_clip_text(text, text_weights)
    return ReMamber(vision=vision, text_encoder=text, head=head, tokens=tokens)


@register_model(_info(480, CLIP_TOKENIZER, max_tokens=20))
def remamber_conv(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 49408,
    drop_path_rate: float = 0.1,
    tokens: int = 20,
) -> ReMamber:
    """Build the official default: VMamba-B, CLIP ViT-L/14's text tower and the convolutional head, 254.6 M parameters.

    vision_weights: the official vssm_base_0229_ckpt_epoch_237.pth. text_weights: openai/clip-vit-large-patch14.
    """
    return _official(vision_weights, text_weights, vocab_size, drop_path_rate, "conv", tokens)


@register_model(_info(480, CLIP_TOKENIZER, max_tokens=20))
def remamber_mamba(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 49408,
    drop_path_rate: float = 0.1,
    tokens: int = 20,
) -> ReMamber:
    """Build the official model with the Mamba head, 281.6 M parameters; weights as for `remamber_conv`."""
    return _official(vision_weights, text_weights, vocab_size, drop_path_rate, "mamba", tokens)


@register_model(_info(96, "wordpiece", max_tokens=24))
def remamber_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    drop_path_rate: float = 0.0,
    head: Head = "conv",
    tokens: int = 24,
) -> ReMamber:
    """Build a model small enough to learn synthetic scenes from scratch on two CPU cores."""
    vision = VMamba(embed_dim=16, depths=(1, 1, 1, 1), drop_path_rate=drop_path_rate)
    text = CLIPText(
        width=96, layers=2, heads=4, vocab_size=vocab_size, max_positions=64, embed_dim=None, masks_padding=True
    )
    if vision_weights is not None:
        load_vmamba(vision, vision_weights)
    if text_weights is not None:
        load_clip_text(text, text_weights)
    return ReMamber(vision=vision, text_encoder=text, head=head, tokens=tokens, hidden=64, resolution=6)
