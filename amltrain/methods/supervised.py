"""Supervised training: the plain baseline, `loss(model(batch), batch)`."""

from torch import Tensor, nn

from amltrain.methods.base import Method
from amltrain.methods.registry import NoOptions, register_method
from amltrain.models.base import RISModel
from amltrain.records import Batch, Vocabulary


class Supervised(Method):
    """The model's own loss on the batch as it is."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.loss(self.model(batch), batch)


@register_method(summary="the model's own loss, nothing else")
def supervised(model: RISModel, loss: nn.Module, options: NoOptions, vocabulary: Vocabulary | None) -> Supervised:
    return Supervised(model, loss)
