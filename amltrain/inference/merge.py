"""Make a model whole: low-rank updates added to the weights that they update, and nothing left out.

For inference elsewhere, and for the Hub: the folder needs neither peft nor the weights that training started from.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amltrain.errors import UserError
from amltrain.hub.model_folder import Pretrained, load_weights, save_pretrained
from amltrain.inference.export import TOLERANCE, Exportable, example_inputs, largest_difference
from amltrain.models.registry import create_model, model_builder


def merge_folder(pretrained: Pretrained, folder: Path) -> int:
    """Write a model folder with everything in it; returns the number of updates that were added.

    Its outputs are compared with the model's first. Raises UserError for a folder that holds something else, and where
    the outputs differ by more than `TOLERANCE` of the largest.
    """
    state, count = merged_state(pretrained.model)
    kwargs = _without_updates(pretrained.name, pretrained.kwargs)
    whole = create_model(pretrained.name, **kwargs).eval()
    load_weights(whole, state, pretrained.folder)
    vocabulary = 40 if pretrained.tokenizer is None else pretrained.tokenizer.vocab_size
    inputs = example_inputs(pretrained.preprocess, 2, vocabulary=vocabulary)
    with torch.no_grad():
        before, after = (Exportable(model)(*inputs) for model in (pretrained.model.eval(), whole))
    difference = largest_difference(before, after)
    if not difference <= TOLERANCE:
        raise UserError(
            f"{pretrained.folder}: the merged model differs by {difference:.2g} of its largest output, more than "
            f"{TOLERANCE:g}; nothing was written, use the model with its updates"
        )
    save_pretrained(
        folder,
        name=pretrained.name,
        kwargs=kwargs,
        state_dict=state,
        preprocess=pretrained.preprocess,
        protocol=pretrained.protocol,
        tokenizer=pretrained.tokenizer,
    )
    return count


def merged_state(model: nn.Module) -> tuple[dict[str, Tensor], int]:
    """A model's tensors as if it had no low-rank updates, and how many were added."""
    state = {
        key.replace(".base_layer.", "."): tensor
        for key, tensor in model.state_dict().items()
        if ".lora_A." not in key and ".lora_B." not in key
    }
    count = 0
    for name, module in model.named_modules():
        update: Any = getattr(module, "get_delta_weight", None)
        if update is not None and hasattr(module, "base_layer"):
            state[f"{name}.weight"] = state[f"{name}.weight"] + sum(update(key) for key in module.lora_A)
            count += 1
    return state, count


def _without_updates(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A builder's arguments with `lora` as `frozen`, its defaults among them."""
    defaults = {key: entry.default for key, entry in inspect.signature(model_builder(name)).parameters.items()}
    tuned = {key for key, value in (defaults | kwargs).items() if value == "lora"}
    return {key: value for key, value in kwargs.items() if key != "lora"} | dict.fromkeys(tuned, "frozen")
