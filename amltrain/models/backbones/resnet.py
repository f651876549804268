"""ResNet-50 with frozen batch norm, on torchvision: the smallest backbone of the official ReLA code.

It does not read the sentence.

Paper: He et al., Deep Residual Learning for Image Recognition, CVPR 2016.

CLIP's ResNet with CRIS' attention pool, which keeps the map that CLIP pools away.

Papers: Radford et al., CLIP, ICML 2021; Wang et al., CRIS, CVPR 2022. Stem and stages are timm's. The pool is CRIS': no
mean token, and a projection past the attention that CLIP does not have.

Dimensions: B batch, h w map size, C width of the last stage, E width of CLIP's shared space.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet50
from torchvision.ops import FrozenBatchNorm2d

from amltrain.models.backbones.clip import Between
from amltrain.models.backbones.weights import (
    fill,
    is_file,
    is_torchscript,
    read_state_dict,
    read_torchscript,
    timm_state,
)
from amltrain.models.layers.basic import recompute


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
        """Image [B, 3, H, W] -> maps [B, C_i, H / 2**(i + 2), ...], fine to coarse; the words are not read."""
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


OFFICIAL_VISION_NAMES = [
    (r"^vision\.(conv|bn)([123])\.", r"vision.stem.conv\2.\1."),
    *((rf"^vision\.layer{i + 1}\.", f"vision.stages.{i}.") for i in range(4)),
    (r"^(vision\.stages\.\d\.\d+)\.(conv|bn)([13])\.", r"\1.conv\3_1x1.\2."),
    (r"^(vision\.stages\.\d\.\d+)\.(conv|bn)2\.", r"\1.conv2_kxk.\2."),
    (r"^(vision\.stages\.\d\.\d+)\.downsample\.0\.", r"\1.shortcut.conv.conv."),
    (r"^(vision\.stages\.\d\.\d+)\.downsample\.1\.", r"\1.shortcut.conv.bn."),
    (r"^vision\.attnpool\.positional_embedding$", "vision.pool.pos_embed"),
    (r"^vision\.attnpool\.([qkv])_proj\.", r"vision.pool.\1."),
    (r"^vision\.attnpool\.c_proj\.", "vision.pool.proj."),
    (r"^vision\.attnpool\.connect\.", "vision.pool.connect."),
]
"""OpenAI's and CRIS' key names, after "visual." became "vision.", to ours: rules for `re.sub`."""


class MapAttentionPool(nn.Module):
    """Self-attention over a map's cells into CLIP's shared space, with a projection past it."""

    def __init__(self, dim: int, embed_dim: int, heads: int, table_size: int) -> None:
        super().__init__()
        self.heads, self.table_size = heads, table_size
        # row 0 belonged to CLIP's mean token; read by nothing here
        self.pos_embed = nn.Parameter(torch.randn(1 + table_size**2, dim) / dim**0.5)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, embed_dim)
        self.connect = nn.Sequential(nn.Conv2d(dim, embed_dim, 1, bias=False), nn.BatchNorm2d(embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        """X [B, C, h, w] -> [B, E, h, w]."""
        return F.relu(self.attend(x) + self.connect(x))

    def attend(self, x: Tensor) -> Tensor:
        """Apply CLIP's attention pooling to every cell, [B, C, h, w] -> [B, E, h, w]."""
        height, width = x.shape[-2:]
        table = self.pos_embed[1:].T.unflatten(1, (self.table_size, self.table_size))[None]
        position = F.interpolate(table.float(), size=(height, width), mode="bicubic").to(x.dtype)
        tokens = (x + position).flatten(2).transpose(1, 2)
        q, k, v = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        read = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return read.transpose(1, 2).unflatten(2, (height, width))


class CLIPResNet(nn.Module):
    """Maps at strides 8 and 16, and the pooled map at stride 32. The defaults are RN50."""

    stride = 32

    def __init__(
        self,
        *,
        width: int = 64,
        depths: Sequence[int] = (3, 4, 6, 3),
        embed_dim: int = 1024,
        table_size: int = 7,
    ) -> None:
        """width: of the stem; stage i is `width * 4 * 2**i` wide. table_size: of the pool's positions (224 px: 7)."""
        super().__init__()
        dims = [width * 4 * 2**i for i in range(4)]
        blocks = tuple(
            ByoBlockCfg(type="bottle", d=depth, c=dim, s=1 if i == 0 else 2, br=0.25)
            for i, (depth, dim) in enumerate(zip(depths, dims, strict=True))
        )
        body = ByobNet(
            ByoModelCfg(
                blocks=blocks,
                stem_chs=(width // 2, width // 2, width),
                stem_type="",
                stem_pool="avg2",
                downsample="avg",
                aa_layer="avg",
            ),
            num_classes=0,
            global_pool="",
        )
        self.stem, self.stages = body.stem, body.stages
        self.pool = MapAttentionPool(dims[-1], embed_dim, heads=width // 2, table_size=table_size)
        self.channels = (dims[1], dims[2], embed_dim)
        self.stream_channels = (dims[1], dims[2], dims[3])
        self.gradient_checkpointing = False

    def forward(self, image: Tensor, between: Between | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Image [B, 3, H, W], sides multiples of 32 -> maps at strides 8, 16 and 32, `channels` wide.

        between: what works on the maps of the last three stages, `stream_channels` wide, before anything reads them.
        """
        return self.encode_rest(self.encode_start(image), between)

    def encode_start(self, image: Tensor) -> tuple[Tensor, ...]:
        """Stem and two stages, which `between` does not reach: ([B, C, H / 8, W / 8],)."""
        x = self.stem(image)
        for stage in self.stages[:2]:
            x = self._run(stage, x)
        return (x,)

    def encode_rest(self, start: tuple[Tensor, ...], between: Between | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The rest of `forward`, given what `encode_start` returned."""
        fine, middle, coarse = self._later_stages(start, between)
        return fine, middle, self.pool(coarse)

    def shared(self, image: Tensor) -> Tensor:
        """CLIP's own answer at every cell, in the space that it shares with the text: [B, E, H / 32, W / 32]."""
        return self.pool.attend(self._later_stages(self.encode_start(image))[2])

    def _later_stages(self, start: tuple[Tensor, ...], between: Between | None = None) -> list[Tensor]:
        [x] = start
        maps = []
        for i, stage in enumerate(self.stages[1:]):
            x = self._run(stage, x) if i else x
            x = x if between is None else between(i, x)
            maps.append(x)
        return maps

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        return recompute(stage, x) if self.gradient_checkpointing and self.training else stage(x)


def load_clip_resnet(vision: CLIPResNet, weights: str) -> None:
    """Fill a ResNet from OpenAI's archive (RN50.pt), a state dict of it, or a timm name (resnet50_clip.openai) or file.

    The pool's `connect` is not CLIP's and starts at random. Raises UserError for a source that is missing or of another
    size.
    """
    if not is_file(weights):
        state = timm_state(weights)
    elif is_torchscript(Path(weights)):
        state = read_torchscript(Path(weights))
    else:
        state = read_state_dict(Path(weights))
    fill(vision, _image_tower(state), weights, may_be_missing=("pool.connect.",))


def _image_tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image part of a CLIP state dict under OpenAI's or timm's names, under ours and in float32."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("visual."):
            key = "vision." + key.removeprefix("visual.")
            for pattern, replacement in OFFICIAL_VISION_NAMES:
                key = re.sub(pattern, replacement, key)
            renamed[key.removeprefix("vision.")] = value
        elif key.startswith(("stem.", "stages.", "head.")):
            renamed[re.sub(r"^head\.", "pool.", key)] = value
    return {key: value.float() if value.is_floating_point() else value for key, value in renamed.items()}
