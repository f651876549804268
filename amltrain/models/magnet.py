"""MagNet: Swin and BERT that read each other stage by stage, and a Mask2Former head with a single query.

Paper: Chng et al., Mask Grounding for Referring Image Segmentation, CVPR 2024 (arXiv 2312.12198).
Official code: yxchng/mask-grounding, commit 2debc7e, AGPL-3.0. Reimplemented from facts about it; nothing is copied.
It holds the network and its evaluation only. The losses, the mask grounding branch and the optimizer are not public.

What AML scores: the image without words (Swin with every gate shut) against BERT without the image.
`visual="conditioned"` takes both encoders' last stages as the trained network has them, before their own
fusion.

Kept from the official code on purpose:
- the words' attention to the image gets BERT's additive mask (0 and -10000) where it expects 0 and 1. Real tokens then
  all read the same vector, and padded tokens change it. Set `text_fusion="corrected"` for the attention that was meant;
- the words' gates start at 0, where both of their gradients are 0: they never open. They are trainable all the same.
  `text_fusion="corrected"` starts them at a standard deviation of 0.02;
- every stage's map is read before its gate: the image's and the words' fusion both read the unfused stage outputs.
Not kept: layers without effect on the mask (the last stage's gates, the last fusion of the words, the class head, all
output norms, `lang_proj`). The training set-up is LAVT's, on whose code the official code is built, with binary
cross-entropy and Dice; it is our choice.

Dimensions: B batch, H W a map's size, N = H W, C its width, L text tokens, D text width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertModel

from amltrain.config.schema import Preprocess
from amltrain.models.backbones.swin import Swin
from amltrain.models.backbones.text import build_bert, set_bert_gradient_checkpointing
from amltrain.models.backbones.weights import load_encoders
from amltrain.models.base import Conversion, RISModel, convert
from amltrain.models.layers.cris_decoder import at_image_size
from amltrain.models.layers.deformable import DeformableEncoder
from amltrain.models.layers.pwam import LanguageGate, PixelWordAttention, instance_norm
from amltrain.models.layers.region_decoder import QueryDecoder
from amltrain.models.registry import NETWORK_FRAME_EXCLUSIVE, ModelInfo, register_model
from amltrain.records import AlignmentFeatures, Batch, Features, ModelOutput

TextFusion = Literal["official", "corrected"]
POOL_SIZES = (1, 2, 3, 6)

_FUSION = r"^image_model\.layers\.(\d)\.fusion"
_PREDICTOR = r"^classifier\.predictor\."
_OURS = r"image_fusion.\1."
_ATTENTION = [
    (r"\.vis_project\.0\.", ".visual."),
    (r"\.project_mm\.0\.", ".project."),
    (r"\.image_lang_att\.W\.0\.", ".output."),
    (r"\.image_lang_att\.W\.1\.", ".output_norm."),
    (r"\.image_lang_att\.f_(query|key|value)\.0\.", r".\1."),
    (r"\.image_lang_att\.f_query\.1\.", ".query_norm."),
]
RENAMES = [
    *_ATTENTION,
    (_FUSION + r"\.", _OURS + "whole."),
    (_FUSION + r"s\.(\d)\.", _OURS + r"pools.\2.attention."),
    (r"^image_model\.layers\.(\d)\.pyramids\.(\d)\.1\.", _OURS + r"pools.\2.expand."),
    (r"^image_model\.layers\.(\d)\.pyramids\.(\d)\.2\.", _OURS + r"pools.\2.norm."),
    (r"^image_model\.layers\.(\d)\.pyramids\.(\d)\.3\.", _OURS + r"pools.\2.contract."),
    (r"^image_model\.layers\.(\d)\.pyramids\.(\d)\.5\.", _OURS + r"pools.\2.reduce."),
    (r"^image_model\.layers\.(\d)\.mixer\.", _OURS + "mixer."),
    (r"^image_model\.layers\.(\d)\.res_gate\.0\.", r"image_gates.\1.reduce."),
    (r"^image_model\.layers\.(\d)\.res_gate\.2\.", r"image_gates.\1.expand."),
    (r"^image_model\.", "swin."),
    (r"^language_model\.pwams\.", "text_fusion."),
    (r"^language_model\.res_gates\.(\d)\.0\.", r"text_gates.\1.reduce."),
    (r"^language_model\.res_gates\.(\d)\.2\.", r"text_gates.\1.expand."),
    (r"^language_model\.", "text_encoder."),
    (r"^classifier\.pixel_decoder\.transformer\.(?:encoder\.)?", "pixel_decoder."),
    (r"^classifier\.pixel_decoder\.", "pixel_decoder."),
    (
        _PREDICTOR + r"transformer_cross_attention_layers\.(\d)\.multihead_attn\.",
        r"query.layers.\1.read_image.attention.",
    ),
    (_PREDICTOR + r"transformer_cross_attention_layers\.(\d)\.", r"query.layers.\1.read_image."),
    (_PREDICTOR + r"transformer_self_attention_layers\.(\d)\.self_attn\.", r"query.layers.\1.read_regions.attention."),
    (_PREDICTOR + r"transformer_self_attention_layers\.(\d)\.", r"query.layers.\1.read_regions."),
    (_PREDICTOR + r"transformer_ffn_layers\.(\d)\.", r"query.layers.\1.feedforward."),
    (_PREDICTOR + r"(query_feat|query_embed|level_embed)\.weight", r"query.\1"),
    (_PREDICTOR + r"decoder_norm\.", "query.norm."),
    (_PREDICTOR + r"mask_embed\.layers\.0\.", "query.mask_embed.0."),
    (_PREDICTOR + r"mask_embed\.layers\.1\.", "query.mask_embed.2."),
    (_PREDICTOR + r"mask_embed\.layers\.2\.", "query.mask_embed.4."),
]
"""Official key names to ours, as rules for `re.sub`, applied in this order."""
DROPS = [
    (r".*\.relative_position_index", "an index table, recomputed from the window size"),
    (r"language_model\.embeddings\.position_ids", "an index table of older transformers versions"),
    (r"image_model\.layers\.3\.res_gate\.[02]\.weight", "the last stage's image gate, whose output is never used"),
    (r"language_model\.(pwams|res_gates)\.3\..*", "the last stage's fusion of the words, whose output is never used"),
    (r"image_model\.norm[0-3]\..*|language_model\.norms\..*", "an output norm that is never used"),
    (r"classifier\.predictor\.class_embed\..*", "the class head: its softmax runs over one query and is always 1"),
    (r"lang_proj\..*", "a projection that the official training code used; it is not public"),
]


class PooledReading(nn.Module):
    """One level of the pyramid: a map pooled to p x p cells, which read the words; back at the map's size."""

    def __init__(self, dim: int, text_dim: int, cells: int) -> None:
        super().__init__()
        self.cells = cells
        self.expand = nn.Linear(dim, 4 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim, eps=1e-6)
        self.contract = nn.Linear(4 * dim, dim, bias=False)
        self.reduce = nn.Linear(dim, dim // 4, bias=False)
        self.attention = PixelWordAttention(dim // 4, text_dim, layer_norm=True)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """X [B, H, W, C], text [B, L, D], text_mask [B, L] bool -> [B, H, W, C / 4]."""
        pooled = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), self.cells).flatten(2).transpose(1, 2)
        pooled = self.reduce(F.gelu(self.contract(self.norm(self.expand(pooled)))))
        read = self.attention(pooled, text, text_mask).transpose(1, 2).unflatten(2, (self.cells, self.cells))
        return F.interpolate(read, size=x.shape[1:3], mode="bilinear", align_corners=True).permute(0, 2, 3, 1)


class ImageFusion(nn.Module):
    """The words as read by every position and by a pyramid of pooled cells, mixed into one map."""

    def __init__(self, dim: int, text_dim: int) -> None:
        super().__init__()
        self.whole = PixelWordAttention(dim, text_dim, layer_norm=True)
        self.pools = nn.ModuleList(PooledReading(dim, text_dim, cells) for cells in POOL_SIZES)
        self.mixer = nn.Sequential(nn.Linear(2 * dim, dim), nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """X [B, H, W, C] -> the mixed map for the head and the whole map for the gate, both [B, H, W, C]."""
        whole = self.whole(x.flatten(1, 2), text, text_mask).unflatten(1, x.shape[1:3])
        pooled = [pool(x, text, text_mask) for pool in self.pools]
        return self.mixer(torch.cat([*pooled, whole], dim=-1)), whole


class WordPixelAttention(nn.Module):
    """Attend from words to image, and multiply by the words' projection. Always computes outside of autocast."""

    def __init__(self, dim: int, text_dim: int, *, corrected: bool) -> None:
        """dim: width of the map. corrected: see `text_fusion` of `MagNet`."""
        super().__init__()
        self.corrected = corrected
        self.visual = nn.Linear(text_dim, text_dim)
        self.query = nn.Linear(text_dim, text_dim)
        self.key = nn.Linear(dim, text_dim)
        self.value = nn.Linear(dim, text_dim)
        self.output = nn.Linear(text_dim, text_dim)
        self.project = nn.Linear(text_dim, text_dim)

    def forward(self, text: Tensor, x: Tensor, text_mask: Tensor) -> Tensor:
        """Text [B, L, D], x [B, N, C], text_mask [B, L] bool (True = a real token) -> [B, L, D]."""
        dtype = self.query.weight.dtype
        with torch.autocast(text.device.type, enabled=False):
            text, x = text.to(dtype), x.to(dtype)
            read = self.output(self.read(text, x, text_mask))
            read = _norm_over(read, text_mask) if self.corrected else instance_norm(read)
            return F.gelu(self.project(F.gelu(self.visual(text)) * read))

    def read(self, text: Tensor, x: Tensor, text_mask: Tensor) -> Tensor:
        """Attention of the words over the positions, [B, L, D]."""
        query = self.query(text)
        key, value = instance_norm(self.key(x)), instance_norm(self.value(x))
        scale = query.shape[-1] ** -0.5
        if self.corrected:
            scores = query @ key.transpose(1, 2) * scale
        else:  # the additive mask in the place of a mask of ones and zeros; its rounding is part of the function
            additive = (text_mask[..., None].to(query.dtype) - 1) * 1e4  # [B, L, 1]
            scores = (query * additive) @ key.transpose(1, 2) * scale + (1e4 * additive - 1e4)
        return scores.softmax(dim=-1) @ value


def _norm_over(x: Tensor, mask: Tensor) -> Tensor:
    """Instance norm over the marked tokens only. x [B, L, D], mask [B, L] bool -> [B, L, D]."""
    real = mask[..., None].to(x.dtype)
    count = real.sum(dim=1, keepdim=True).clamp(min=1)
    centred = x - (x * real).sum(dim=1, keepdim=True) / count
    variance = (centred.square() * real).sum(dim=1, keepdim=True) / count
    return centred * (variance + 1e-5).rsqrt()


class FourLevelPixelDecoder(DeformableEncoder):
    """Mask features at stride 4 and the maps of strides 32, 16 and 8, after all four have read each other.

    Always computes outside of autocast.
    """

    def __init__(self, in_dims: Sequence[int], *, dim: int, layers: int, heads: int, feedforward: int) -> None:
        """in_dims: widths of the maps at strides 4, 8, 16, 32."""
        super().__init__(in_dims[::-1], dim=dim, layers=layers, heads=heads, feedforward=feedforward)
        self.mask_features = nn.Conv2d(dim, dim, 1)
        self.reset_parameters()

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Maps [B, C_i, h_i, w_i], fine to coarse -> [B, M, h, w] at stride 4, and [B, M, h_i, w_i], coarse to fine."""
        with torch.autocast(maps[0].device.type, enabled=False):
            *scales, finest = self.encode([m.to(self.mask_features.weight.dtype) for m in maps[::-1]])
            return self.mask_features(finest), scales


class MagNet(RISModel):
    """Swin and BERT in lockstep, fused after each of four stages, and the head; one-channel logits at stride 4."""

    encoders = ("swin", "text_encoder")
    mask_channels = 1
    supports_suppression = True
    alignment_visuals = ("unimodal", "conditioned")
    encodes_image_alone = True

    def __init__(
        self,
        *,
        swin: Swin,
        text_encoder: BertModel,
        dim: int = 256,
        heads: int = 8,
        encoder_layers: int = 4,
        encoder_feedforward: int = 1024,
        decoder_layers: int = 9,
        decoder_feedforward: int = 2048,
        text_fusion: TextFusion = "official",
    ) -> None:
        """swin: without output norms. text_encoder: its number of layers is a multiple of four.

        dim, heads and the rest: of the head. text_fusion: see the head of this file.
        """
        super().__init__()
        text_dim = text_encoder.config.hidden_size
        self.swin, self.text_encoder = swin, text_encoder
        self.image_fusion = nn.ModuleList(ImageFusion(width, text_dim) for width in swin.channels)
        self.image_gates = nn.ModuleList(LanguageGate(width, gelu=True) for width in swin.channels[:-1])
        corrected = text_fusion == "corrected"
        self.text_fusion = nn.ModuleList(
            WordPixelAttention(width, text_dim, corrected=corrected) for width in swin.channels[:-1]
        )
        self.text_gates = nn.ModuleList(
            LanguageGate(text_dim, std=0.02 if corrected else 0.0) for _ in swin.channels[:-1]
        )
        self.pixel_decoder = FourLevelPixelDecoder(
            swin.channels, dim=dim, layers=encoder_layers, heads=heads, feedforward=encoder_feedforward
        )
        self.query = QueryDecoder(
            dim=dim, mask_dim=dim, queries=1, layers=decoder_layers, heads=heads, feedforward=decoder_feedforward
        )
        self.alignment_dims = (swin.channels[-1], text_dim)
        self.fused_dims = (dim, text_dim)

    def encode(self, batch: Batch) -> Features:
        """Four mixed maps; `text` is BERT's output with the image in it."""
        return self.encode_with_image(batch, self.encode_image(batch.image))

    def encode_image(self, image: Tensor) -> tuple[Tensor, ...]:
        """Encode the first Swin stage's blocks, before the words and the image read each other: [B, h, w, C]."""
        return (self.swin.layers[0](self.swin.patch_embed(image)),)

    def encode_with_image(self, batch: Batch, image: tuple[Tensor, ...]) -> Features:
        maps: list[Tensor] = []
        _, text = self._stages(batch, image[0], maps)
        return Features(tuple(maps), text, batch.text_mask)

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        """Logits [B, 1, H / 4, W / 4]; at the image's own size if that is not a multiple of 4."""
        mask_features, scales = self.pixel_decoder(features.visual)
        query = self.query.read(mask_features, scales, features.text, features.suppressed)
        kernel = self.query.mask_embed(self.query.norm(query))  # [B, 1, M]
        logits = torch.einsum("bqm,bmhw->bqhw", kernel, mask_features)
        logits = at_image_size(logits, (batch.image.shape[-2], batch.image.shape[-1]), 4)
        return ModelOutput(logits, {"fused_visual": scales[0], "fused_text": features.text})

    def alignment_features(
        self, batch: Batch, features: Features | None = None, *, text: str | None = None, visual: str | None = None
    ) -> AlignmentFeatures:
        """Last Swin stage [B, C, h, w] at stride 32 and BERT's tokens [B, L, D]; neither has seen the other's input.

        One more pass of both encoders, so `features` serve nothing here.
        visual="conditioned": both as the trained network has them, before the last stage's own fusion.
        """
        if visual == "conditioned":
            x, tokens = self._stages(batch, self.encode_image(batch.image)[0], None)
        else:
            x, tokens = self._image_alone(batch), self._text_alone(batch)
        return AlignmentFeatures(x.permute(0, 3, 1, 2), tokens, batch.text_mask)

    def reencode_image(self, batch: Batch, features: Features) -> Features:
        """The words are conditioned on the image; the text features given are kept."""
        return features._replace(visual=self.encode(batch).visual)

    def _stages(self, batch: Batch, x: Tensor, maps: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """Run the rest of both encoders, given the first Swin stage; collect the mixed map of every stage in `maps`.

        Returns the last stages' outputs before their own fusion, [B, h, w, C] and [B, L, D].
        """
        mask = batch.text_mask
        text = self.text_encoder.embeddings(input_ids=batch.input_ids)
        last = len(self.swin.layers) - 1
        for i, stage in enumerate(self.swin.layers):
            x, text = stage(x) if i else x, self._text_stage(i, text, mask)
            if i < last or maps is not None:
                mixed, whole = self.image_fusion[i](x, text, mask)
                if maps is not None:
                    maps.append(mixed.permute(0, 3, 1, 2))
            if i < last:
                read = self.text_fusion[i](text, x.flatten(1, 2), mask)
                assert stage.downsample is not None  # only the last stage has none
                x = stage.downsample(self.image_gates[i](x, whole))
                text = self.text_gates[i](text, read)
        return x, text

    def _text_stage(self, stage: int, text: Tensor, text_mask: Tensor) -> Tensor:
        """A quarter of BERT's layers, [B, L, D] -> [B, L, D]."""
        layers = self.text_encoder.encoder.layer
        count = len(layers) // len(self.swin.layers)
        bias = (1.0 - text_mask[:, None, None, :].to(text.dtype)) * -1e4
        for layer in layers[stage * count : (stage + 1) * count]:
            text = layer(text, bias)
        return text

    def _image_alone(self, batch: Batch) -> Tensor:
        x = self.swin.patch_embed(batch.image)
        for stage in self.swin.layers:
            x = stage(x)
            x = x if stage.downsample is None else stage.downsample(x)
        return x

    def _text_alone(self, batch: Batch) -> Tensor:
        text = self.text_encoder.embeddings(input_ids=batch.input_ids)
        for i in range(len(self.swin.layers)):
            text = self._text_stage(i, text, batch.text_mask)
        return text

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """One learning rate, as LAVT's: norms and position bias tables of the image side do not decay."""
        undecayed = ("norm", "relative_position_bias_table")
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            part = name.split(".")[0]
            plain = part in ("swin", "image_fusion") and any(word in name for word in undecayed)
            groups.setdefault(f"{part}_no_decay" if plain else part, []).append(parameter)
        return [
            {"name": name, "params": p, "lr": lr, "weight_decay": 0.0 if name.endswith("no_decay") else weight_decay}
            for name, p in groups.items()
        ]

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        return convert(official, self.state_dict(), renames=RENAMES, drops=DROPS)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.swin.set_gradient_checkpointing(enabled)
        set_bert_gradient_checkpointing(self.text_encoder, enabled)


def _info(size: int, tokenizer: str, max_tokens: int) -> ModelInfo:
    return ModelInfo(
        paper="Mask Grounding for Referring Image Segmentation (CVPR 2024)",
        official_code="github.com/yxchng/mask-grounding, commit 2debc7e",
        licence="AGPL-3.0",
        aml_scores="last Swin blocks without words x BERT tokens without the image",
        preprocess=Preprocess(
            size=size,
            resize="square",
            normalization="imagenet",
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            sentence_field="raw",
        ),
        protocol=NETWORK_FRAME_EXCLUSIVE,
        loss="cross_entropy_dice",
    )


@register_model(_info(480, "bert-base-uncased", max_tokens=20))
def magnet_swin_base(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 30522,
    drop_path_rate: float = 0.3,
    text_dropout: float = 0.1,
    text_fusion: TextFusion = "official",
) -> MagNet:
    """Build the official size: Swin-B with windows of 12 and BERT-base, 289.6 M parameters.

    vision_weights, text_weights: where pretrained encoders come from, see `amltrain.models.backbones.weights`.
    """
    swin = Swin(window_size=12, drop_path_rate=drop_path_rate, output_norms=False)
    text = build_bert(vocab_size=vocab_size, dropout=text_dropout)
    load_encoders(swin, text, vision_weights, text_weights)
    return MagNet(swin=swin, text_encoder=text, text_fusion=text_fusion)


@register_model(_info(96, "wordpiece", max_tokens=24))
def magnet_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    drop_path_rate: float = 0.0,
    text_dropout: float = 0.0,
    text_fusion: TextFusion = "official",
) -> MagNet:
    """Build a model small enough to learn synthetic scenes from scratch on two CPU cores."""
    swin = Swin(
        embed_dim=32,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=6,
        drop_path_rate=drop_path_rate,
        output_norms=False,
    )
    text = build_bert(vocab_size=vocab_size, hidden_size=128, layers=4, heads=4, max_positions=64, dropout=text_dropout)
    load_encoders(swin, text, vision_weights, text_weights)
    return MagNet(
        swin=swin,
        text_encoder=text,
        dim=64,
        heads=4,
        encoder_layers=1,
        encoder_feedforward=128,
        decoder_layers=3,
        decoder_feedforward=256,
        text_fusion=text_fusion,
    )
