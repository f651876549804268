"""What CRIS, ETRIS, DETRIS and BarLeRIa share: CLIP-like towers, a neck, CRIS' pixel-text decoder and sentence kernel.

A subclass builds its towers and neck, says how many pixels a padded side is a multiple of (`frame_stride`), and adds
`encode`. Logits have one channel.

Dimensions: B batch, H W image, h w the decoder's map, L text tokens.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.models.backbones.clip import CLIPText
from amltrain.models.base import RISModel
from amltrain.models.layers.cris_decoder import PixelTextDecoder, SentenceKernel, at_image_size, suppressed_at
from amltrain.records import Batch, Features, ModelOutput


class PixelTextModel(RISModel):
    """`Features.extra["sentence"]` [B, E] gates the neck and makes the kernel of the head."""

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
