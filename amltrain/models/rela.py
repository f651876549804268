"""ReLA (GRES): generalised referring expressions, which may mean several things, one or none.

Paper: Liu, Ding, Jiang, GRES: Generalized Referring Expression Segmentation, CVPR 2023 (arXiv 2306.00968).
Official code: henghuiding/ReLA, branch main, commit 3ca9551, MIT; its Swin backbone from LAVT, GPL-3.0. Reimplemented;
no code is copied. Its weights score above its README (gRefCOCO val gIoU 66.3, cIoU 63.1 against 63.60, 62.42), because
the README's numbers belong to another version of the decoder.

What AML scores: a second look at the image without words (see `early_fusion`). In the official weights the gates stay
closed, so the trunk is the same with and without words. ResNet-50 does not read the words: AML scores the encoder's own
last map.

Kept from the official code on purpose:
- the gates' weights start at 0, where both of their gradients are 0: they never open. They are trainable all the same;
- BERT's embeddings and layers 10 and 11 are never updated: they are frozen here, where the official code leaves them
  out of the optimizer;
- padded tokens are read by the regions, and biases and BERT's LayerNorms decay.
Not kept: the official loader never loads `predictor.lang_weight`, so its evaluation runs with 0 in its place. Our
conversion keeps the trained value; set `region_decoder.layers.0.read_words.weight` to 0 to repeat that evaluation. The
official code scales polygons to 480 and draws them there; here a full-size mask is resized to the nearest pixel, for
training and for scores. They agree except at edges: docs/evaluation.md has the figures.

Dimensions: B batch, H W network input, C width, L text tokens, D text width, Q regions.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertModel

from amltrain.config.schema import Preprocess
from amltrain.models.backbones.resnet import ResNet50, load_resnet
from amltrain.models.backbones.swin import OFFICIAL_NAMES, LanguageSwin, Swin
from amltrain.models.backbones.text import build_bert
from amltrain.models.backbones.weights import load_bert, load_encoders
from amltrain.models.base import Conversion, convert
from amltrain.models.families import EarlyFusionModel
from amltrain.models.layers.deformable import PixelDecoder
from amltrain.models.layers.region_decoder import RegionDecoder
from amltrain.models.registry import NETWORK_FRAME, ModelInfo, register_model
from amltrain.records import Batch, Features, ModelOutput

STRIDE = 32

_DECODER = r"^sem_seg_head\.pixel_decoder\."
_PREDICTOR = r"^sem_seg_head\.predictor\."
_OURS = "region_decoder."
RENAMES = [
    (_DECODER + r"transformer\.encoder\.layers\.", "pixel_decoder.layers."),
    (_DECODER + r"transformer\.level_embed", "pixel_decoder.level_embed"),
    (_DECODER + r"adapter_1\.norm\.", "pixel_decoder.lateral.1."),
    (_DECODER + r"adapter_1\.", "pixel_decoder.lateral.0."),
    (_DECODER + r"layer_1\.norm\.", "pixel_decoder.merge.1."),
    (_DECODER + r"layer_1\.", "pixel_decoder.merge.0."),
    (_DECODER, "pixel_decoder."),
    (_PREDICTOR + r"RIA_layers\.(\d+)\.multihead_attn\.", _OURS + r"layers.\1.read_image.attention."),
    (_PREDICTOR + r"RIA_layers\.(\d+)\.", _OURS + r"layers.\1.read_image."),
    (_PREDICTOR + r"RLA_vision\.(\d+)\.self_attn\.", _OURS + r"layers.\1.read_regions.attention."),
    (_PREDICTOR + r"RLA_vision\.(\d+)\.", _OURS + r"layers.\1.read_regions."),
    (_PREDICTOR + r"RLA_lang_att\.multihead_attn\.", _OURS + "layers.0.read_words.attend.attention."),
    (_PREDICTOR + r"RLA_lang_att\.", _OURS + "layers.0.read_words.attend."),
    (_PREDICTOR + r"lang_proj\.", _OURS + "layers.0.read_words.project."),
    (_PREDICTOR + r"lang_weight$", _OURS + "layers.0.read_words.weight"),
    (_PREDICTOR + r"transformer_ffn_layers\.(\d+)\.", _OURS + r"layers.\1.feedforward."),
    (_PREDICTOR + r"(query_feat|query_embed|level_embed)\.weight", _OURS + r"\1"),
    (_PREDICTOR + r"decoder_norm\.", _OURS + "norm."),
    (_PREDICTOR + r"minimap_embed\.", _OURS + "minimap."),
    (_PREDICTOR + r"nt_embed\.layers\.0\.", _OURS + "no_target.0."),
    (_PREDICTOR + r"nt_embed\.layers\.1\.", _OURS + "no_target.2."),
    (_PREDICTOR + r"mask_embed\.layers\.0\.", _OURS + "mask_embed.0."),
    (_PREDICTOR + r"mask_embed\.layers\.1\.", _OURS + "mask_embed.2."),
    (_PREDICTOR + r"mask_embed\.layers\.2\.", _OURS + "mask_embed.4."),
]
RESNET_NAMES = [
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.bn1."),
    (r"^backbone\.stem\.conv1\.", "backbone.conv1."),
    (r"^backbone\.res2\.", "backbone.layer1."),
    (r"^backbone\.res3\.", "backbone.layer2."),
    (r"^backbone\.res4\.", "backbone.layer3."),
    (r"^backbone\.res5\.", "backbone.layer4."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
]
DROPS = [
    (r"backbone\..*\.relative_position_index", "an index table, recomputed from the window size"),
    (r"text_encoder\.embeddings\.position_ids", "an index table of older transformers versions"),
]


class ReLA(EarlyFusionModel):
    """Region queries over a pixel decoder over fused (Swin) or purely visual (ResNet-50) maps."""

    mask_channels = 2
    supports_suppression = True

    def __init__(
        self,
        *,
        backbone: LanguageSwin | ResNet50,
        text_encoder: BertModel,
        pixel_decoder: PixelDecoder,
        region_decoder: RegionDecoder,
        trained_text_layers: int | None = 10,
    ) -> None:
        super().__init__(backbone=backbone, text_encoder=text_encoder, trained_text_layers=trained_text_layers)
        self.pixel_decoder = pixel_decoder
        self.region_decoder = region_decoder
        self.fused_dims = (region_decoder.query_feat.shape[-1], text_encoder.config.hidden_size)

    def prepare_image(self, image: Tensor) -> Tensor:
        """Zeros at the right and bottom up to multiples of 32."""
        height, width = image.shape[-2:]
        return F.pad(image, (0, -width % STRIDE, 0, -height % STRIDE))

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        """Logits [B, 2, H, W]: the official code upsamples to the input size itself, with align_corners=False."""
        mask_features, scales = self.pixel_decoder(features.visual)
        prediction = self.region_decoder(mask_features, scales, features.text, features.suppressed)
        height, width = batch.image.shape[-2:]
        padded = (height + -height % STRIDE, width + -width % STRIDE)
        masks = prediction.masks.to(torch.promote_types(prediction.masks.dtype, torch.float32))
        logits = F.interpolate(masks, size=padded, mode="bilinear", align_corners=False)
        aux = {
            "no_target": prediction.no_target,
            "minimap": prediction.minimap,
            "fused_visual": scales[0],
            "fused_text": features.text,  # the regions read the words, nothing rewrites them
        }
        return ModelOutput(logits[..., :height, :width], aux)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """One learning rate. Norms, position bias tables and learned queries do not decay; all of BERT does."""
        text = {id(p) for p in self.text_encoder.parameters()}
        decoder = self.region_decoder
        plain = {id(p) for p in (decoder.query_feat, decoder.query_embed, decoder.level_embed)}
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                plain.update(id(p) for p in module.parameters(recurse=False))
        named: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "text": []}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) in text:
                named["text"].append(parameter)
            elif id(parameter) in plain or name.endswith("relative_position_bias_table"):
                named["no_decay"].append(parameter)
            else:
                named["decay"].append(parameter)
        return [
            {"name": name, "params": params, "lr": lr, "weight_decay": 0.0 if name == "no_decay" else weight_decay}
            for name, params in named.items()
            if params
        ]

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        backbone_names = RESNET_NAMES if isinstance(self.backbone, ResNet50) else OFFICIAL_NAMES
        return convert(official, self.state_dict(), renames=[*backbone_names, *RENAMES], drops=DROPS)


def build_rela(
    backbone: LanguageSwin | ResNet50,
    text_encoder: BertModel,
    *,
    dim: int = 256,
    mask_dim: int = 256,
    heads: int = 8,
    encoder_layers: int = 6,
    encoder_feedforward: int = 1024,
    decoder_layers: int = 9,
    decoder_feedforward: int = 2048,
    trained_text_layers: int | None = 10,
) -> ReLA:
    """A ReLA of any size around its encoders; the defaults are the official ones, always with 10 x 10 regions."""
    return ReLA(
        backbone=backbone,
        text_encoder=text_encoder,
        pixel_decoder=PixelDecoder(
            backbone.channels,
            dim=dim,
            mask_dim=mask_dim,
            layers=encoder_layers,
            heads=heads,
            feedforward=encoder_feedforward,
        ),
        region_decoder=RegionDecoder(
            dim=dim,
            mask_dim=mask_dim,
            text_dim=text_encoder.config.hidden_size,
            layers=decoder_layers,
            heads=heads,
            feedforward=decoder_feedforward,
        ),
        trained_text_layers=trained_text_layers,
    )


SWIN_SCORES = "last Swin blocks without fusion x BERT tokens"
SWIN_LICENCE = "MIT; its Swin backbone from LAVT, GPL-3.0"


def _info(
    size: int, tokenizer: str, aml_scores: str, *, max_tokens: int = 20, licence: str = SWIN_LICENCE
) -> ModelInfo:
    return ModelInfo(
        paper="GRES: Generalized Referring Expression Segmentation (CVPR 2023)",
        official_code="github.com/henghuiding/ReLA, branch main, commit 3ca9551",
        licence=licence,
        aml_scores=aml_scores,
        preprocess=Preprocess(
            size=size,
            resize="square",
            normalization="imagenet",
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            sentence_field="raw",
        ),
        protocol=NETWORK_FRAME,
        loss="rela",
    )


@register_model(_info(480, "bert-base-uncased", SWIN_SCORES))
def rela_swin_base(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 30522,
    drop_path_rate: float = 0.3,
    text_dropout: float = 0.1,
) -> ReLA:
    """The official model: Swin-B with window 12 and BERT-base, 225.5 M parameters.

    vision_weights, text_weights: where pretrained encoders come from, see `amltrain.models.backbones.weights`.
    """
    swin = Swin(window_size=12, drop_path_rate=drop_path_rate)
    text = build_bert(vocab_size=vocab_size, dropout=text_dropout)
    load_encoders(swin, text, vision_weights, text_weights)
    return build_rela(LanguageSwin(swin, gate_std=0.0), text)


@register_model(_info(480, "bert-base-uncased", SWIN_SCORES))
def rela_swin_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 30522,
    drop_path_rate: float = 0.3,
    text_dropout: float = 0.1,
) -> ReLA:
    """The official smaller model: Swin-T with window 7 and BERT-base, 162.6 M parameters."""
    swin = Swin(
        embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=7, drop_path_rate=drop_path_rate
    )
    text = build_bert(vocab_size=vocab_size, dropout=text_dropout)
    load_encoders(swin, text, vision_weights, text_weights)
    return build_rela(LanguageSwin(swin, gate_std=0.0), text)


@register_model(_info(480, "bert-base-uncased", "stride-32 ResNet map x BERT tokens", licence="MIT"))
def rela_r50(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 30522,
    text_dropout: float = 0.1,
) -> ReLA:
    """The official model on ResNet-50 with frozen batch norm, 153.4 M parameters; no fusion in the backbone.

    vision_weights: a torchvision ResNet-50 file, or a timm name such as resnet50.tv_in1k.
    """
    backbone = ResNet50()
    text = build_bert(vocab_size=vocab_size, dropout=text_dropout)
    if vision_weights is not None:
        load_resnet(backbone, vision_weights)
    if text_weights is not None:
        load_bert(text, text_weights)
    return build_rela(backbone, text)


@register_model(_info(96, "wordpiece", SWIN_SCORES, max_tokens=24))
def rela_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    drop_path_rate: float = 0.0,
    text_dropout: float = 0.0,
) -> ReLA:
    """Small enough to learn synthetic scenes on two CPU cores. All of BERT trains, because it starts at random."""
    swin = Swin(embed_dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=3, drop_path_rate=drop_path_rate)
    text = build_bert(vocab_size=vocab_size, hidden_size=128, layers=2, heads=4, max_positions=64, dropout=text_dropout)
    load_encoders(swin, text, vision_weights, text_weights)
    model = build_rela(
        LanguageSwin(swin, text_dim=128, gate_std=0.0),
        text,
        dim=128,
        mask_dim=128,
        heads=4,
        encoder_layers=2,
        encoder_feedforward=256,
        decoder_layers=3,
        decoder_feedforward=256,
        trained_text_layers=None,
    )
    # a mask is a sum over 100 regions: without pretrained weights it would start, and stay, far from zero
    last = model.region_decoder.mask_embed[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.mul_(0.02)
        last.bias.zero_()
    return model
