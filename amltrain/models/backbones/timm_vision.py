"""Any image model of timm as an encoder: four maps of it, and its own head on every patch where it has one.

Hierarchical models (Swin, ConvNeXt, EfficientNet) give their last four stages. Plain ones (ViT, EVA-02, DINOv3, SigLIP)
give four evenly spaced blocks at one stride, each after the model's last norm; the last map is what timm's own
`forward_features` returns for the patches. Position tables keep their pretrained size and are resampled in the forward
pass where the model can do that (`dynamic_img_size`).

Dimensions: B batch, H W image size, h w a map's size, C_i a map's width, S width of the head.
"""

from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from amltrain.errors import UserError, first_line, unknown_name
from amltrain.models.backbones.weights import fill, is_file, read_state_dict, timm_state

Normalization = Literal["imagenet", "clip", "half", "none"]
LEVELS = 4
MEAN_STD = {
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "half": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
DEFAULTS = (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD))
ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
"""Options that make timm's families accept any image size; the first that a model knows is used."""


class TimmVision(nn.Module):
    """A timm model without its classifier. `plain`: all maps have one stride. `channels`: widths of the four maps."""

    mean_ratio: Tensor
    mean_shift: Tensor

    def __init__(
        self,
        name: str,
        options: dict[str, Any] | None = None,
        *,
        normalization: Normalization = "imagenet",
        keep_head: bool = False,
    ) -> None:
        """name: as in `timm.list_models()`, with or without the tag of its weights. Nothing is downloaded.

        options: further arguments of `timm.create_model`, such as drop_path_rate or img_size.
        normalization: how images come in; they are changed to what this model was trained with.
        keep_head: keep pool and head for `project`.
        Raises UserError for a name or an option that timm does not know, and a model with fewer than four maps.
        """
        super().__init__()
        model = _create(name, options or {})
        strides = [int(info["reduction"]) for info in model.feature_info]
        self.plain = len(set(strides)) == 1
        count = len(strides)
        if count < LEVELS or not hasattr(model, "forward_intermediates"):
            raise UserError(
                f"timm's {name} gives {count} maps or cannot give them; name a model with at least {LEVELS} stages or "
                f"blocks (model.kwargs.vision)"
            )
        if self.plain:
            self.indices = [count * (i + 1) // LEVELS - 1 for i in range(LEVELS)]
        else:
            self.indices = list(range(count - LEVELS, count))
        self.strides = [strides[i] for i in self.indices]
        self.channels = [int(model.feature_info[i]["num_chs"]) for i in self.indices]
        self.stride = 2 * strides[0] if self.plain else strides[-1]
        """Images are padded to multiples of it; a plain model's patches are paired once by the pyramid after it."""
        self.head_dim: int | None = None
        if keep_head:
            self.head_dim = _head_dim(model, self.channels[-1])
        else:
            model.prune_intermediate_layers(self.indices, prune_norm=not self.plain, prune_head=True)
        self.model = model
        self.has_batch_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
        self._set_normalization(normalization)
        self.freeze_head()

    def _set_normalization(self, normalization: str) -> None:
        """(x * std + mean - own mean) / own std as x * ratio + shift; nothing is done where that changes nothing."""
        mean, std = MEAN_STD[normalization]
        own_mean, own_std = (self.model.pretrained_cfg.get(key, default) for key, default in DEFAULTS)
        ratio = [s / own for s, own in zip(std, own_std, strict=True)]
        shift = [(m - own) / s for m, own, s in zip(mean, own_mean, own_std, strict=True)]
        self.register_buffer("mean_ratio", torch.tensor(ratio)[:, None, None], persistent=False)
        self.register_buffer("mean_shift", torch.tensor(shift)[:, None, None], persistent=False)
        self.converts = (tuple(mean), tuple(std)) != (tuple(own_mean), tuple(own_std))

    def freeze_head(self) -> None:
        """The head's answers enter no loss, so no gradient ever reaches it."""
        for part in ("attn_pool", "fc_norm", "head"):
            module = getattr(self.model, part, None)
            if isinstance(module, nn.Module):
                module.requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Image [B, 3, H, W] of any size -> four maps [B, C_i, h_i, w_i] of the image padded at right and bottom."""
        if self.converts:
            image = image * self.mean_ratio + self.mean_shift
        height, width = image.shape[-2:]
        image = F.pad(image, (0, -width % self.stride, 0, -height % self.stride))
        return tuple(
            self.model.forward_intermediates(image, indices=self.indices, norm=self.plain, intermediates_only=True)
        )

    def project(self, patches: Tensor) -> Tensor:
        """The model's own pool and head on every patch alone: [B, C, h, w] of the last map -> [B, S, h, w]."""
        size = patches.shape[-2:]
        x = patches.flatten(2).transpose(1, 2)
        pool = getattr(self.model, "attn_pool", None)
        if pool is not None:
            x = pool(x.flatten(0, 1)[:, None]).unflatten(0, x.shape[:2])
        for part in ("fc_norm", "head"):
            x = getattr(self.model, part, nn.Identity())(x)
        return x.transpose(1, 2).unflatten(2, size)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute blocks in the backward pass; not with batch norms, whose averages it would move twice."""
        if not self.has_batch_norm:
            self.model.set_grad_checkpointing(enabled)


def load_timm_vision(vision: TimmVision, weights: str) -> None:
    """Fill an encoder from a timm name with its tag, an `hf-hub:` id, or a file with timm's key names.

    What the weights hold besides (a classifier) is left. Raises UserError when a tensor is missing or does not fit.
    """
    state = read_state_dict(Path(weights)) if is_file(weights) else timm_state(weights)
    own = vision.model.state_dict()
    fill(vision.model, {key: value for key, value in state.items() if key in own}, weights)


def load_by_position(vision: TimmVision, official: dict[str, Tensor], name: str, source: str) -> None:
    """Fill an encoder from a file whose tensors come in timm's order under other names; `name`: the timm model.

    Raises UserError unless every one of the file's tensors has the shape of timm's tensor at its place.
    """
    with torch.device("meta"):
        whole = timm.create_model(name).state_dict()
    if [tuple(v.shape) for v in whole.values()] != [tuple(v.shape) for v in official.values()]:
        raise UserError(
            f"{source} does not hold the tensors of timm's {name} in their order; install the package again"
        )
    state = dict(zip(whole, official.values(), strict=True))
    own = vision.model.state_dict()
    fill(vision.model, {key: value for key, value in state.items() if key in own}, source)


def _create(name: str, options: dict[str, Any]) -> Any:
    if not timm.is_model(name):
        error = unknown_name("timm model", name.split(".")[0], timm.list_models())
        raise UserError(f"{error} (model.kwargs.vision)")
    reason = ""
    for any_size in ANY_SIZE:
        try:
            return timm.create_model(name, pretrained=False, **{**any_size, **options})
        except TypeError as error:  # an argument that this family does not take
            reason = first_line(error)
        except RuntimeError as error:
            raise UserError(f"timm cannot build {name}: {first_line(error)} (model.kwargs.vision)") from error
    raise UserError(f"timm cannot build {name} with {options}: {reason} (model.kwargs.vision_options)")


def _head_dim(model: Any, width: int) -> int:
    head = getattr(model, "head", None)
    return int(head.out_features) if isinstance(head, nn.Linear) else width
