"""An `nn.ModuleList` whose element type a type checker knows; torch's own gives plain modules.

While the program runs, `ModuleListOf` is `nn.ModuleList` itself: the same key names, the same behaviour when compiled.

Where things are: sine codes of map positions and the cells' own centres.

Gradient checkpointing of a module with batch norms.

How an encoder is trained: whole, by low-rank updates (LoRA, Hu et al., ICLR 2022; on `peft`, an extra), or not.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from amltrain.errors import UserError

if TYPE_CHECKING:
    M = TypeVar("M", bound=nn.Module)

    class ModuleListOf(nn.ModuleList, Generic[M]):
        """A ModuleList whose entries have a known type."""

        def __init__(self, modules: Iterable[M] | None = None) -> None: ...

        @overload
        def __getitem__(self, idx: slice) -> "ModuleListOf[M]": ...

        @overload
        def __getitem__(self, idx: int) -> M: ...

        def __getitem__(self, idx: int | slice) -> Any: ...

        def __iter__(self) -> Iterator[M]: ...

else:
    ModuleListOf = nn.ModuleList


def sine_position(height: int, width: int, dim: int, *, device: torch.device | None = None) -> Tensor:
    """DETR's normalised 2-D sine code, [height * width, dim] float32: first half rows, second half columns.

    Coordinates 1..n are scaled to (0, 2 pi]; feature pairs 2k, 2k + 1 are sine and cosine at frequency
    10000^(-4k / dim). Source: Carion et al., DETR, ECCV 2020; Cheng et al., Mask2Former, CVPR 2022.
    """
    half = dim // 2
    pairs = torch.arange(half, device=device, dtype=torch.float32) // 2
    period = 10000 ** (2 * pairs / half)

    def axis(count: int) -> Tensor:
        steps = torch.arange(1, count + 1, device=device, dtype=torch.float32)
        angle = (steps / (count + 1e-6) * 2 * math.pi)[:, None] / period
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=-1).flatten(1)  # [count, half]

    rows = axis(height)[:, None].expand(height, width, half)
    columns = axis(width)[None].expand(height, width, half)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


def cell_centres(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Centre (x, y) of every cell in units of the map, in row-major order: [height * width, 2] float32 in (0, 1)."""
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
    grid = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid[1], grid[0]), dim=-1).flatten(0, 1)


@contextmanager
def _running_statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)


def recompute(module: nn.Module, *inputs: Any) -> Any:
    """`module(*inputs)`, computed again in the backward pass instead of kept.

    Running statistics move once, in the first computation; plain checkpointing would move them twice. The non-reentrant
    kind, which DDP and compile need.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _running_statistics_kept(norms)

    return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)


Tuning = Literal["full", "lora", "frozen"]
HEADS = ("head", "attn_pool", "text_projection")


def tune(
    encoder: nn.Module,
    tuning: Tuning,
    rank: int,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
) -> None:
    """Freeze an encoder, or all of it but low-rank updates of its linear layers; `full` changes nothing.

    rank: width of the updates; they are scaled by alpha / rank, by default 2. dropout: on their input. targets: ends
    of the names of the layers; None = all linear layers that are no head. The state's keys get `base_layer`, `lora_A`
    and `lora_B`. Weights are loaded before.
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
        raise UserError("tuning=lora needs peft; pip install peft, or set it to full or frozen") from error
    found = [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear)
        and (name.endswith(tuple(targets)) if targets else not any(part in HEADS for part in name.split(".")))
    ]
    if not found:
        raise UserError(
            f"tuning=lora updates linear layers and this {type(encoder).__name__} has none; use full or frozen"
        )
    scale: Any = 2 * rank if alpha is None else alpha
    settings = LoraConfig(r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=found)
    inject_adapter_in_model(settings, encoder)
