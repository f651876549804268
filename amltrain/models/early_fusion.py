"""What LAVT, ReLA and CGFormer share: the sentence is fused inside the vision backbone, and AML must look before that.

What AML scores is a second look at the image without words: the last stage's blocks with fusion left out, and BERT's
tokens. AML's first pass encodes the original image anyway, so this costs nothing more.

Dimensions: B batch, C width of the last stage, L text tokens, D text width.
"""

from torch import Tensor
from transformers import BertModel

from amltrain.models.backbones.bert import encode_tokens, set_bert_gradient_checkpointing, train_first_layers
from amltrain.models.backbones.language_swin import LanguageSwin
from amltrain.models.backbones.resnet import ResNet50
from amltrain.models.base import RISModel
from amltrain.records import AlignmentFeatures, Batch, Features


class EarlyFusionModel(RISModel):
    """BERT and a backbone that reads it; a subclass adds `decode`. `Features.visual` are fused maps."""

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
