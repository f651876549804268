"""What LAVT, ReLA and CGFormer share: the sentence is fused inside the vision backbone, and AML must look before that.

What AML scores is a second look at the image without words: the last stage's blocks with fusion left out, and BERT's
tokens. AML's first pass encodes the original image anyway, so this costs nothing more.

Dimensions: B batch, C width of the last stage, L text tokens, D text width.

What CRIS, ETRIS, DETRIS and BarLeRIa share: CLIP-like towers, a neck, CRIS' pixel-text decoder and sentence kernel.

A subclass builds its towers and neck, says how many pixels a padded side is a multiple of (`frame_stride`), and adds
`encode`. Logits have one channel.

Dimensions: B batch, H W image, h w the decoder's map, L text tokens.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertModel

from amltrain.models.backbones.clip import CLIPText
from amltrain.models.backbones.resnet import ResNet50
from amltrain.models.backbones.swin import LanguageSwin
from amltrain.models.backbones.text import encode_tokens, set_bert_gradient_checkpointing, train_first_layers
from amltrain.models.base import RISModel
from amltrain.models.layers.cris_decoder import PixelTextDecoder, SentenceKernel, at_image_size, suppressed_at
from amltrain.records import AlignmentFeatures, Batch, Features, ModelOutput


class EarlyFusionModel(RISModel):
    """BERT and a backbone that reads it; a subclass adds `decode`. `Features.visual` are fused maps."""

    encoders = ("backbone", "text_encoder")
    backbone: LanguageSwin | ResNet50
    text_encoder: BertModel
    encodes_image_alone = True

    def __init__(
        self, *, backbone: LanguageSwin | ResNet50, text_encoder: BertModel, trained_text_layers: int | None
    ) -> None:
        """trained_text_layers: how many of BERT's first layers train, the rest of it frozen; None = all of BERT."""
        super().__init__()
        self.backbone, self.text_encoder = backbone, text_encoder
        self.alignment_dims = (backbone.channels[-1], text_encoder.config.hidden_size)
        if trained_text_layers is not None:
            train_first_layers(text_encoder, trained_text_layers)

    def prepare_image(self, image: Tensor) -> Tensor:
        """Return the backbone's input for an image [B, 3, H, W]; a model that pads overrides this."""
        return image

    def encode(self, batch: Batch) -> Features:
        return self._encode_image(batch, self._encode_text(batch))

    def encode_image(self, image: Tensor) -> tuple[Tensor, ...]:
        """Encode what comes before the first fusion: a Swin's first stage, or all of a ResNet."""
        return self.backbone.before_words(self.prepare_image(image))

    def encode_with_image(self, batch: Batch, image: tuple[Tensor, ...]) -> Features:
        text = self._encode_text(batch)
        return Features(self.backbone.read_words(image, text, batch.text_mask), text, batch.text_mask)

    def reencode_image(self, batch: Batch, features: Features) -> Features:
        return self._encode_image(batch, features.text)

    def alignment_features(
        self, batch: Batch, features: Features | None = None, *, text: str | None = None, visual: str | None = None
    ) -> AlignmentFeatures:
        """Last blocks without any fusion [B, C, h, w] at stride 32, and BERT's tokens [B, L, D].

        features: their text is used; their maps are fused ones.
        """
        tokens = self._encode_text(batch) if features is None else features.text
        return AlignmentFeatures(self.backbone.without_words(self.prepare_image(batch.image)), tokens, batch.text_mask)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.backbone.set_gradient_checkpointing(enabled)
        set_bert_gradient_checkpointing(self.text_encoder, enabled)

    def _encode_text(self, batch: Batch) -> Tensor:
        return encode_tokens(self.text_encoder, batch.input_ids, batch.text_mask)

    def _encode_image(self, batch: Batch, text: Tensor) -> Features:
        maps = self.backbone(self.prepare_image(batch.image), text, batch.text_mask)
        return Features(maps, text, batch.text_mask)


class PixelTextModel(RISModel):
    """`Features.extra["sentence"]` [B, E] gates the neck and makes the kernel of the head."""

    encoders = ("vision", "text")
    mask_channels = 1
    supports_suppression = True

    vision: Any  # CLIP's, DINOv2 or EVA-02: a subclass names its own kind
    text: CLIPText
    neck: nn.Module
    decoder: PixelTextDecoder
    head: SentenceKernel

    def add_decoder(self, neck: nn.Module, *, layers: int, heads: int, feedforward: int, dropout: float) -> None:
        """Add the neck, the decoder and the head; `self.text` is there already. The last statement of a constructor
        that builds modules, so that keys and initial values keep their order.

        layers, heads, feedforward, dropout: of the decoder.
        """
        text = self.text
        self.neck = neck
        self.decoder = PixelTextDecoder(
            text.width, layers=layers, heads=heads, feedforward=feedforward, dropout=dropout
        )
        self.head = SentenceKernel(text.width, text.embed_dim)
        self.fused_dims = (text.width, text.width)

    @property
    def frame_stride(self) -> int:
        """Pixels that a side of the padded image is a multiple of."""
        raise NotImplementedError

    def padded(self, image: Tensor) -> Tensor:
        """The image [B, 3, H, W] with zeros at its right and bottom up to multiples of `frame_stride`."""
        height, width = image.shape[-2:]
        return F.pad(image, (0, -width % self.frame_stride, 0, -height % self.frame_stride))

    def fuse_maps(self, features: Features) -> Tensor:
        """The map [B, D, h, w] that the decoder's pixels start from."""
        return self.neck(features.visual, features.extra["sentence"])

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        """Logits [B, 1, h, w] at four times the decoder's map, or at the image's own size if it had to be padded.

        The decoder writes into the image only: the words stay what the text encoder made of them.
        """
        x = self.fuse_maps(features)
        suppressed = suppressed_at(features.suppressed, (x.shape[-2], x.shape[-1]))
        fused = self.decoder(x, features.text, features.text_mask, suppressed)
        logits = self.head(fused, features.extra["sentence"])
        logits = at_image_size(logits, (batch.image.shape[-2], batch.image.shape[-1]), self.frame_stride)
        return ModelOutput(logits, {"fused_visual": fused, "fused_text": features.text})

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.vision.gradient_checkpointing = enabled
        self.text.gradient_checkpointing = enabled
