"""ResNet-50 with frozen batch norm, on torchvision: the smallest backbone of the official ReLA code.

It does not read the sentence.

Paper: He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
"""

from pathlib import Path

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet50
from torchvision.ops import FrozenBatchNorm2d

from amltrain.models.backbones.weights import fill, is_file, read_state_dict, timm_state


class ResNet50(nn.Module):
    """Four maps at strides 4, 8, 16 and 32. The arguments and methods are those of `LanguageSwin`."""

    channels = (256, 512, 1024, 2048)

    def __init__(self) -> None:
        super().__init__()
        body = resnet50(norm_layer=FrozenBatchNorm2d)
        self.conv1, self.bn1, self.relu, self.maxpool = body.conv1, body.bn1, body.relu, body.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = body.layer1, body.layer2, body.layer3, body.layer4
        self.gradient_checkpointing = False

    def forward(self, image: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """image [B, 3, H, W] -> maps [B, C_i, H / 2**(i + 2), ...], fine to coarse; the words are not read."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        maps = []
        recompute = self.gradient_checkpointing and self.training
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = checkpoint(stage, x, use_reentrant=False) if recompute else stage(x)
            maps.append(x)
        return tuple(maps)

    def without_words(self, image: Tensor) -> Tensor:
        """The last map, [B, 2048, H / 32, W / 32]."""
        return self(image)[-1]

    def before_words(self, image: Tensor) -> tuple[Tensor, ...]:
        """All maps: nothing here reads the words."""
        return self(image)

    def read_words(self, start: tuple[Tensor, ...], text: Tensor, text_mask: Tensor) -> tuple[Tensor, ...]:
        """The maps as they are."""
        return start

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.gradient_checkpointing = enabled


def load_resnet(resnet: ResNet50, weights: str) -> None:
    """Fill a ResNet-50 from a torchvision file (resnet50-0676ba61.pth) or a timm name (resnet50.tv_in1k)."""
    state = read_state_dict(Path(weights)) if is_file(weights) else timm_state(weights)
    state = {
        key: v for key, v in state.items() if not key.startswith("fc.") and not key.endswith("num_batches_tracked")
    }
    fill(resnet, state, weights)
