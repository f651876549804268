"""What every registered model offers. AML, losses, the trainer and the evaluator know models only through this page.

Official key names to ours: renaming rules in, a `Conversion` that leaves no key unexplained out.

Evaluation mode, temporarily.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from amltrain.errors import UserError
from amltrain.records import AlignmentFeatures, Batch, Features, ModelOutput


class Conversion(NamedTuple):
    """An official checkpoint in our key names.

    state_dict  our key -> tensor, loadable with strict=True
    renamed     official key -> our key
    dropped     official key -> why it has no place here (an unused head, an index buffer that is recomputed, ...)
    unmatched   official keys that nothing is known about: a caller must reject or report them
    missing     our keys that the official file did not give
    """

    state_dict: dict[str, Tensor]
    renamed: dict[str, str]
    dropped: dict[str, str]
    unmatched: list[str]
    missing: list[str]


class RISModel(nn.Module):
    """A referring image segmentation model: `forward` = `decode(encode(batch), batch)`.

    No device, rank, accelerator or config object inside; nothing but dropout, drop-path and batch norm depends on
    `self.training`. Modules that the official code freezes have `requires_grad=False` from construction on.

    mask_channels is the K of its logits [B, K, h, w], 2 for background and referent or 1; a loss is checked against it.

    Attributes for AML. A subclass must set alignment_dims; the others where it has more to offer.
    alignment_dims        (C_v, C_t), the widths of what `alignment_features` returns
    fused_dims            (C_v, C_t), the widths of aux["fused_visual"] and aux["fused_text"]; None = it gives neither
    supports_suppression  `decode` honours Features.suppressed
    alignment_is_frozen   what `alignment_features` returns never changes in training
    alignment_texts       values of its argument `text` that this model offers, the default first
    alignment_visuals     the same of its argument `visual`

    encodes_image_alone   the image encoder, or its first part, does not read the sentence, so an evaluation may run it
                          once for all sentences of an image. Such a model overrides `encode_image` and
                          `encode_with_image`.
    needs_boxes           its loss reads `Batch.box`, which data give to such a model alone
    needs_instances       the same of `Batch.instances`
    encoders              names of the submodules that are pretrained encoders, for `optim.layer_decay`
    frozen_modules        names of the submodules that `model.freeze` matched
    """

    mask_channels: int | None = None
    alignment_dims: tuple[int, int]
    fused_dims: tuple[int, int] | None = None
    supports_suppression: bool = False
    alignment_is_frozen: bool = False
    alignment_texts: tuple[str, ...] = ()
    alignment_visuals: tuple[str, ...] = ()
    encodes_image_alone: bool = False
    needs_boxes: bool = False
    needs_instances: bool = False
    encoders: tuple[str, ...] = ()
    frozen_modules: tuple[str, ...] = ()

    def train(self, mode: bool = True) -> "RISModel":
        """Set the mode of everything but `frozen_modules`, which stay in evaluation mode."""
        super().train(mode)
        for name in self.frozen_modules:
            self.get_submodule(name).train(False)
        return self

    def encode(self, batch: Batch) -> Features:
        """Run the encoders on image and tokens; return features before cross-modal fusion, if the model has any."""
        raise NotImplementedError

    def encode_image(self, image: Tensor) -> tuple[Tensor, ...]:
        """Encode images [B, 3, H, W] as far as no sentence is needed; every tensor returned has B rows.

        Only where `encodes_image_alone`; then `encode(batch)` is `encode_with_image(batch, encode_image(batch.image))`.
        """
        raise NotImplementedError

    def encode_with_image(self, batch: Batch, image: tuple[Tensor, ...]) -> Features:
        """Encode the rest, given what `encode_image` returned for every sample of the batch."""
        raise NotImplementedError

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        """Fuse and segment."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> ModelOutput:
        return self.decode(self.encode(batch), batch)

    def alignment_features(
        self, batch: Batch, features: Features | None = None, *, text: str | None = None, visual: str | None = None
    ) -> AlignmentFeatures:
        """Return the features that AML's stage 1 scores, from the encoders alone. Default: deepest map and tokens.

        features: `encode(batch)`, where the caller has it already; a model that scores anything else ignores it.
        text, visual: which of its features a model gives that offers a choice (`alignment_texts`, `alignment_visuals`);
        None = its default. A model that fuses inside its encoder overrides this; its file header describes what is
        returned.
        """
        features = self.encode(batch) if features is None else features
        return AlignmentFeatures(features.visual[-1], features.text, features.text_mask)

    def reencode_image(self, batch: Batch, features: Features) -> Features:
        """Features of another image with the text features kept (AML preset `released`).

        The default encodes everything again; a late-fusion model overrides it to skip its text encoder.
        """
        return self.encode(batch)._replace(text=features.text, text_mask=features.text_mask)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimizer groups of the official code: dicts with name, params, lr, weight_decay.

        Every trainable parameter in exactly one group (`check_param_groups`), frozen ones in none.
        """
        raise NotImplementedError

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        """Map an official state dict onto this model; never drops a key silently."""
        raise NotImplementedError

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute encoder blocks in the backward pass to save memory; the numbers stay the same."""
        raise NotImplementedError


def check_param_groups(model: nn.Module, groups: Iterable[dict[str, Any]]) -> None:
    """Raise AssertionError unless every trainable parameter is in exactly one group and no frozen one is in any."""
    names = {id(p): n for n, p in model.named_parameters()}
    seen: dict[int, str] = {}
    for group in groups:
        for p in group["params"]:
            if id(p) in seen:
                raise AssertionError(f"{names.get(id(p))} is in two groups: {seen[id(p)]} and {group['name']}")
            if not p.requires_grad:
                raise AssertionError(f"frozen parameter {names.get(id(p))} is in group {group['name']}")
            seen[id(p)] = group["name"]
    left_out = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in seen]
    if left_out:
        raise AssertionError(f"{len(left_out)} trainable parameters are in no group, first: {left_out[0]}")


def convert(
    official: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    *,
    renames: Sequence[tuple[str, str]] = (),
    drops: Sequence[tuple[str, str]] = (),
) -> Conversion:
    """Apply every renaming rule, in order, to every official key.

    own      this model's state dict: which keys exist and in which shapes
    renames  (regular expression, replacement) as in re.sub
    drops    (regular expression that matches a whole official key, why it has no place here)

    A 1x1 convolution's weight [out, in, 1] or [out, in, 1, 1] fits a linear layer's [out, in].
    Raises UserError when a tensor's shape does not fit.
    """
    state: dict[str, Tensor] = {}
    renamed: dict[str, str] = {}
    dropped: dict[str, str] = {}
    unmatched: list[str] = []
    for key, tensor in official.items():
        reason = next((why for pattern, why in drops if re.fullmatch(pattern, key)), None)
        if reason is not None:
            dropped[key] = reason
            continue
        name = key
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name in own:
            state[name] = _shaped(tensor, own[name], key, name)
            renamed[key] = name
        else:
            unmatched.append(key)
    return Conversion(state, renamed, dropped, unmatched, missing=[name for name in own if name not in state])


def _shaped(tensor: Tensor, like: Tensor, key: str, name: str) -> Tensor:
    shape = tuple(tensor.shape)
    while len(shape) > max(like.ndim, 2) and shape[-1] == 1:
        shape = shape[:-1]
    if shape != tuple(like.shape):
        raise UserError(
            f"{key} has shape {list(tensor.shape)}, this model's {name} has {list(like.shape)}; "
            "convert into the model and sizes that the file was trained with"
        )
    return tensor.reshape(shape)


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Put every module in eval mode, then back in its own mode: frozen encoders may have been in eval mode before.

    A plain function is accepted too, and left alone.
    """
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
