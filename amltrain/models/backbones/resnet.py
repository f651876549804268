"""ResNet-50 with frozen batch norm, on torchvision; the ReLA release's smallest backbone. It reads no words.

Paper: He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
"""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet50
from torchvision.ops import FrozenBatchNorm2d


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
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(stage, x, use_reentrant=False)
            else:
                x = stage(x)
            maps.append(x)
        return tuple(maps)

    def without_words(self, image: Tensor) -> Tensor:
        """The last map, [B, 2048, H / 32, W / 32]."""
        return self(image)[-1]

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.gradient_checkpointing = enabled
