"""A referring model of a few layers with everything that AML must get along with: batch norm, dropout, one width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.models.base import RISModel
from amltrain.records import Batch, Features, ModelOutput


class Toy(RISModel):
    """Patches of 32 pixels and words meet in a dot product. Encodings are counted."""

    fused_dims = (16, 16)

    def __init__(self, *, dropout: float = 0.0, frozen: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 32, 32)
        self.norm = nn.BatchNorm2d(16)
        self.words = nn.Embedding(512, 16)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, 16)
        self.alignment_dims = (16, 16)
        self.alignment_is_frozen = frozen
        self.encoded: list[int] = []
        if frozen:
            for part in (self.patches, self.words, self.norm):
                part.requires_grad_(False)

    def encode(self, batch: Batch) -> Features:
        self.encoded.append(len(batch.image))
        visual = self.dropout(self.norm(self.patches(batch.image)))
        return Features((visual,), self.words(batch.input_ids), batch.text_mask)

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        visual: Tensor = features.visual[-1]
        if features.suppressed is not None:
            visual = visual * ~features.suppressed[:, None]
        fused = torch.einsum("bchw,bc->bhw", visual, self.head(features.text.mean(1)))
        logits = F.pad(fused[:, None], (0, 0, 0, 0, 1, 0))
        return ModelOutput(logits, {"fused_visual": visual, "fused_text": features.text})

    def param_groups(self, lr: float, weight_decay: float) -> list[dict]:
        params = [p for p in self.parameters() if p.requires_grad]
        return [{"name": "all", "params": params, "lr": lr, "weight_decay": weight_decay}]
