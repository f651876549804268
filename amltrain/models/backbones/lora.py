"""How an encoder is trained: whole, by low-rank updates (LoRA, Hu et al., ICLR 2022; on `peft`, an extra), or not."""

from typing import Literal

from torch import nn

from amltrain.errors import UserError

Tuning = Literal["full", "lora", "frozen"]
HEADS = ("head", "attn_pool", "text_projection")


def tune(encoder: nn.Module, tuning: Tuning, rank: int) -> None:
    """Freeze an encoder, or all of it but low-rank updates of its linear layers; `full` changes nothing.

    rank: width of the updates. The state's keys get `base_layer`, `lora_A` and `lora_B`. Weights are loaded before.
    Raises UserError for lora without peft, or with an encoder that has no linear layers.
    """
    if tuning == "full":
        return
    encoder.requires_grad_(False)
    if tuning == "frozen":
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("tuning=lora needs peft; pip install amltrain[lora], or set it to full or frozen") from error
    targets = [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and not any(part in HEADS for part in name.split("."))
    ]
    if not targets:
        raise UserError(
            f"tuning=lora updates linear layers and this {type(encoder).__name__} has none; use full or frozen"
        )
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), encoder)
