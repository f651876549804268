"""ETRIS: frozen CLIP towers that run in parallel and exchange features at three levels.

Paper: Xu et al., Bridging Vision and Language Encoders: Parameter-Efficient Tuning for Referring Image Segmentation,
ICCV 2023. Official code: kkakkkka/ETRIS, commit cdc6d8e, MIT. Reimplemented on CLIP's towers in `backbones/` and
torch's attention; the decoder and the head are CRIS', the neck is the one of DETRIS.

Kept from the official code on purpose: bridges read the padding, so that all sentences must be padded to one length;
both sides of a bridge read the other as it was before; the neck's attention has a single key, so that its query and key
weights never learn; position tables are the only part of CLIP that trains; the ResNet's batch norms keep averaging
although frozen, and its pool adds a frozen random projection that CLIP does not have, so that a trained model's
encoder is its own and must be kept with its weights.
Not kept: the option of fewer bridges, which no configuration uses.

What AML scores: CLIP without bridges, every cell's answer (the ResNet's pool without that random projection) against
the tokens, both in CLIP's shared space, because words are in the image from the first bridge on; what comes before it
are edges and spelling. It costs one more pass of both encoders. Scores change in training as far as position tables
and batch norms do, so they cannot be cached.

Dimensions: B batch, L text tokens, W text width, E width of CLIP's shared space, C width of an image stream, d bridge
width, h w a map's size, n cells of the bridge's map.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from amltrain.config.schema import Preprocess
from amltrain.models.backbones.clip import (
    OFFICIAL_NAMES,
    OFFICIAL_VIT_NAMES,
    CLIPText,
    CLIPViT,
    load_clip_text,
    load_clip_vit,
)
from amltrain.models.backbones.resnet import OFFICIAL_VISION_NAMES, CLIPResNet, load_clip_resnet
from amltrain.models.base import Conversion, convert
from amltrain.models.families import PixelTextModel
from amltrain.models.layers.cris_decoder import OFFICIAL_DECODER_NAMES, OFFICIAL_NECK_NAMES, GatedNeck
from amltrain.models.registry import LETTERBOX_UNDONE, ModelInfo, register_model
from amltrain.records import AlignmentFeatures, Batch, Features

BRIDGES = 3

RENAMES = [
    *((rf"^bridger\.ln_v\.{i}\.", f"bridges.{i + 1}.image_norm.") for i in range(BRIDGES - 1)),
    *((rf"^bridger\.ln_t\.{i}\.", f"bridges.{i + 1}.text_norm.") for i in range(BRIDGES - 1)),
    (r"^bridger\.zoom_in\.(\d)\.", r"bridges.\1.reduce_image."),
    (r"^bridger\.zoom_out\.(\d)\.", r"bridges.\1.expand_image."),
    (r"^bridger\.linear1\.(\d)\.", r"bridges.\1.reduce_text."),
    (r"^bridger\.linear2\.(\d)\.", r"bridges.\1.expand_text."),
    (r"^bridger\.fusion_v\.(\d)\.", r"bridges.\1.image_reads."),
    (r"^bridger\.fusion_t\.(\d)\.", r"bridges.\1.text_reads."),
    *OFFICIAL_NECK_NAMES,
    *OFFICIAL_DECODER_NAMES,
]
"""The official key names to ours, except CLIP's, as rules for `re.sub`."""


class AttentionGate(nn.Module):
    """Multiply the input by its attention over the other modality."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """X [B, n, d], other [B, L, d] -> [B, n, d]."""
        return x * self.multihead_attn(x, other, other, need_weights=False)[0]


class Bridge(nn.Module):
    """Reduce image and text, let them attend to each other, and add the results to both towers' streams."""

    def __init__(
        self,
        level: int,
        channels: int,
        text_dim: int,
        dim: int,
        *,
        stride: int,
        gated: bool,
        heads: int,
        dropout: float,
    ) -> None:
        """level: 0, 1 or 2; the last one's map is the coarse one. stride: by how much this map is finer or coarser.
        gated: True for a ViT's bridges (batch norms, a gate), False for a ResNet's (a transformer layer).
        """
        super().__init__()
        coarse = level == BRIDGES - 1
        self.reduce_image = _resize(channels, dim, stride, finer=coarse, normed=gated)
        self.reduce_text = nn.Linear(text_dim, dim)
        if level > 0:
            self.image_norm, self.text_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.image_reads, self.text_reads = (
            AttentionGate(dim, heads)
            if gated
            else nn.TransformerDecoderLayer(dim, heads, dim_feedforward=128, dropout=dropout, batch_first=True)
            for _ in range(2)
        )
        self.expand_image = _resize(dim, channels, stride, finer=not coarse, normed=gated)
        self.expand_text = nn.Linear(dim, text_dim)
        self.apply(_init_bridge)

    def forward(
        self, image: Tensor, text: Tensor, before: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Image [B, C, h, w], text [B, L, W], before: what the bridge before this one gave last -> both streams, and
        for the next bridge what the two sides were before they read, [B, n, d] and [B, L, d].
        """
        reduced = self.reduce_image(image)
        image_tokens, text_tokens = reduced.flatten(2).transpose(1, 2), self.reduce_text(text)
        if before is not None:
            image_tokens, text_tokens = (
                self.image_norm(image_tokens + before[0]),
                self.text_norm(text_tokens + before[1]),
            )
        read = self.image_reads(image_tokens, text_tokens).transpose(1, 2).unflatten(2, reduced.shape[-2:])
        image = image + self.expand_image(read)
        text = text + self.expand_text(self.text_reads(text_tokens, image_tokens))
        return image, text, (image_tokens, text_tokens)


def _resize(in_dim: int, dim: int, stride: int, *, finer: bool, normed: bool) -> nn.Module:
    conv = (nn.ConvTranspose2d if finer else nn.Conv2d)(in_dim, dim, stride, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(dim), nn.ReLU()) if normed else conv


def _init_bridge(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ETRIS(PixelTextModel):
    """CLIP's two towers with bridges, the neck and CRIS' decoder; one-channel logits at stride 4."""

    vision: CLIPResNet | CLIPViT
    encodes_image_alone = True

    def __init__(
        self,
        *,
        vision: CLIPResNet | CLIPViT,
        text: CLIPText,
        bridge_dim: int = 64,
        bridge_heads: int = 4,
        layers: int = 3,
        heads: int = 8,
        feedforward: int = 512,
        dropout: float = 0.1,
        train_encoders: bool = False,
    ) -> None:
        """vision, text: built encoders of one shared space; the text's blocks are a multiple of three.

        layers, heads, feedforward: of the decoder. dropout: of the decoder and of a ResNet's bridges.
        train_encoders: False freezes the encoders except their position tables, as the official code does.
        """
        super().__init__()
        self.vision, self.text = vision, text
        residual_net = isinstance(vision, CLIPResNet)
        if not train_encoders:
            vision.requires_grad_(False)
            text.requires_grad_(False)
            table = vision.pool.pos_embed if isinstance(vision, CLIPResNet) else vision.positional_embedding
            table.requires_grad_(True)
            text.positional_embedding.requires_grad_(True)
        strides = (2, 1, 2) if residual_net else (1, 1, 1)
        self.bridges = nn.ModuleList(
            Bridge(
                level,
                vision.stream_channels[level],
                text.width,
                bridge_dim,
                stride=strides[level],
                gated=not residual_net,
                heads=bridge_heads,
                dropout=dropout,
            )
            for level in range(BRIDGES)
        )
        neck = GatedNeck(vision.channels, text.embed_dim, text.width, strides=strides, residual=False)
        self.add_decoder(neck, layers=layers, heads=heads, feedforward=feedforward, dropout=dropout)
        self.alignment_dims = (text.embed_dim, text.embed_dim)

    @property
    def frame_stride(self) -> int:
        return self.vision.stride

    def encode(self, batch: Batch) -> Features:
        """Three maps of the image padded to multiples of the encoder's stride; `extra["sentence"]` is [B, E]."""
        return self.encode_with_image(batch, self.encode_image(batch.image))

    def encode_image(self, image: Tensor) -> tuple[Tensor, ...]:
        """Encode what comes before the first bridge: two stages of a ResNet, the first third of a ViT."""
        return self.vision.encode_start(self.padded(image))

    def encode_with_image(self, batch: Batch, image: tuple[Tensor, ...]) -> Features:
        words = self.text.embed(batch.input_ids, batch.text_mask)
        third = len(self.text.blocks) // BRIDGES
        before = None

        def bridge(level: int, seen: Tensor) -> Tensor:
            nonlocal words, before
            words = self.text.run(words, level * third, (level + 1) * third)
            seen, words, before = self.bridges[level](seen, words, before)
            return seen

        maps = self.vision.encode_rest(image, bridge)
        tokens, sentence = self.text.finish(words, batch.text_mask)
        return Features(maps, tokens, batch.text_mask, {"sentence": sentence})

    def alignment_features(
        self, batch: Batch, features: Features | None = None, *, text: str | None = None, visual: str | None = None
    ) -> AlignmentFeatures:
        """Both towers without bridges, so `features` serve nothing here: [B, E, h, w] and [B, L, E]."""
        tokens, _ = self.text(batch.input_ids, batch.text_mask)
        shared = tokens @ self.text.text_projection
        return AlignmentFeatures(self.vision.shared(self.padded(batch.image)), shared, batch.text_mask)

    def reencode_image(self, batch: Batch, features: Features) -> Features:
        """The words are conditioned on the image; tokens and sentence of the features given are kept together."""
        return features._replace(visual=self.encode(batch).visual)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Bridges and the rest, both at the full rate as in the official code."""
        bridges = list(self.bridges.parameters())
        parts = (self.vision, self.text, self.neck, self.decoder, self.head)
        rest = [p for part in parts for p in part.parameters() if p.requires_grad]
        return [
            {"name": "bridges", "params": bridges, "lr": lr, "weight_decay": weight_decay},
            {"name": "rest", "params": rest, "lr": lr, "weight_decay": weight_decay},
        ]

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        tower = OFFICIAL_VISION_NAMES if isinstance(self.vision, CLIPResNet) else OFFICIAL_VIT_NAMES
        towers = [(r"^backbone\.visual\.", "vision."), (r"^backbone\.", "text."), *tower, *OFFICIAL_NAMES]
        return convert(official, self.state_dict(), renames=[*towers, *RENAMES])


def _info(size: int, tokenizer: str, max_tokens: int = 17) -> ModelInfo:
    return ModelInfo(
        paper="Bridging Vision and Language Encoders: Parameter-Efficient Tuning for RIS (ICCV 2023)",
        official_code="github.com/kkakkkka/ETRIS, commit cdc6d8e",
        licence="MIT",
        aml_scores="CLIP's map x tokens in their shared space, towers without bridges",
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


@register_model(_info(416, CLIP_TOKENIZER))
def etris_r101(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 49408,
    dropout: float = 0.1,
) -> ETRIS:
    """CLIP RN101: 146.9 M parameters, 26.3 M trained.

    Both weights: RN101.pt; vision_weights also timm's resnet101_clip.openai.
    """
    vision, text = CLIPResNet(depths=(3, 4, 23, 3), embed_dim=512), CLIPText(vocab_size=vocab_size, embed_dim=512)
    _load(vision, text, vision_weights, text_weights)
    return ETRIS(vision=vision, text=text, dropout=dropout)


@register_model(_info(416, CLIP_TOKENIZER))
def etris_r50(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 49408,
    dropout: float = 0.1,
) -> ETRIS:
    """CLIP RN50: 132.8 M parameters, 28.8 M trained.

    Both weights: RN50.pt; vision_weights also timm's resnet50_clip.openai.
    """
    vision, text = CLIPResNet(depths=(3, 4, 6, 3), embed_dim=1024), CLIPText(vocab_size=vocab_size, embed_dim=1024)
    _load(vision, text, vision_weights, text_weights)
    return ETRIS(vision=vision, text=text, dropout=dropout)


@register_model(_info(416, CLIP_TOKENIZER))
def etris_vit_base(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 49408,
    dropout: float = 0.1,
) -> ETRIS:
    """CLIP ViT-B/16: 173.3 M parameters, 23.8 M trained.

    Both weights: ViT-B-16.pt; vision_weights also timm's vit_base_patch16_clip_quickgelu_224.openai, text_weights also
    openai/clip-vit-base-patch16.
    """
    vision, text = CLIPViT(), CLIPText(vocab_size=vocab_size)
    _load(vision, text, vision_weights, text_weights)
    return ETRIS(vision=vision, text=text, bridge_heads=8, dropout=dropout)


@register_model(_info(96, "wordpiece", max_tokens=24))
def etris_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    dropout: float = 0.0,
    train_encoders: bool = True,
) -> ETRIS:
    """Small enough to learn synthetic scenes from scratch on two CPU cores, on a ResNet.

    train_encoders: frozen encoders that start at random would teach nothing, so here they train; False freezes them as
    at full size.
    """
    vision = CLIPResNet(width=16, depths=(1, 2, 2, 1), embed_dim=128, table_size=3)
    text = CLIPText(width=64, layers=3, heads=4, vocab_size=vocab_size, max_positions=64, embed_dim=128)
    _load(vision, text, vision_weights, text_weights)
    return ETRIS(
        vision=vision,
        text=text,
        bridge_dim=32,
        layers=2,
        heads=4,
        feedforward=128,
        dropout=dropout,
        train_encoders=train_encoders,
    )


def _load(vision: CLIPResNet | CLIPViT, text: CLIPText, vision_weights: str | None, text_weights: str | None) -> None:
    if vision_weights is not None and isinstance(vision, CLIPResNet):
        load_clip_resnet(vision, vision_weights)
    elif vision_weights is not None and isinstance(vision, CLIPViT):
        load_clip_vit(vision, vision_weights)
    if text_weights is not None:
        load_clip_text(text, text_weights)
