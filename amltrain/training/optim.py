"""Optimizer and learning rate. The rate is a function of the step alone, so there is nothing to save.

torch.compile in bounded time: only the blocks that a model repeats are compiled.

A whole step is one graph of thousands of operators, whose kernels take very long to build. A model is mostly blocks of
a few kinds, each of which is compiled once for every shape that it gets; the rest runs as it is. Shapes are static:
tracing a window partition with unknown sizes costs more than tracing it again for every stage.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from amltrain.config.schema import OptimConfig
from amltrain.errors import UserError, unknown_name
from amltrain.methods.base import Method
from amltrain.models.base import RISModel, eval_mode
from amltrain.models.tuning import depths_of, repeated_blocks
from amltrain.records import Batch

FUSED_DEVICES = {"cuda"}
"""Devices whose fused Adam kernel is used: one kernel for all tensors, several times faster."""
ADAM: dict[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
OPTIMIZERS = (
    "adabelief", "adadelta", "adafactor", "adagrad", "adamax", "adamc", "adamp", "adamuon", "adan", "adanw", "adopt",
    "adoptc", "adoptw", "cadafactor", "cadamc", "cadamp", "cadamw", "cadan", "cadanw", "cadopt", "cadoptc", "cadoptw",
    "clamb", "clambw", "claprop", "clion", "clionc", "cmars", "cnadamc", "cnadamw", "crmsproptf", "csgdc", "csgdp",
    "csgdw", "lamb", "lambc", "lambcd", "lambcw", "lambw", "laprop", "lapropc", "larc", "lars", "lion", "lionc",
    "madgrad", "madgradw", "mars", "momentum", "muon", "nadam", "nadamc", "nadamuon", "nadamw", "nesterov",
    "nesterovw", "nlarc", "nlars", "nmuon", "radabelief", "radam", "radamw", "rmsprop", "rmsproptf", "rmsproptfc",
    "rmsproptfw", "sgd", "sgdc", "sgdp", "sgdw",
)  # fmt: skip
"""timm's whose state is tensors and numbers, so that a run resumes exactly, and which need no second gradient and no
further package."""
Schedule = Literal["poly", "poly_caris", "multistep", "cosine", "constant", "warmup_decay"]


def lr_factor(
    step: int,
    total_steps: int,
    schedule: Schedule = "poly",
    *,
    power: float = 0.9,
    warmup_steps: int = 0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
) -> float:
    """Return the factor of every group's base rate at optimizer step `step` (0-based), 0..1.

    poly        (1 - step / total)^power, counted from step 0 also behind a warm-up (LAVT, CARIS)
    poly_caris  as poly, with the warm-up of the official CARIS code: step 0 at the full rate, then from a
                thousandth of it linearly up to and including step `warmup_steps`
    multistep   times gamma at every milestone, a share of the run (CRIS, ETRIS, DETRIS, ReLA)
    cosine      half a cosine down to 0
    warmup_decay  DeepSpeed 0.15's, of GSVA and LISA: step 0 at the full rate, step 1 at 0, from there linearly up and,
                after the warm-up, linearly down to 0
    """
    if schedule == "warmup_decay":
        passed = step - 1
        if step == 0:
            return 1.0
        return (
            passed / warmup_steps
            if passed < warmup_steps
            else max(0.0, (total_steps - passed) / (total_steps - warmup_steps))
        )
    if schedule == "poly_caris":
        if step == 0:
            return 1.0
        if step <= warmup_steps:
            return 1 - (1 - step / warmup_steps) * (1 - 1e-3)
    elif step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule in ("poly", "poly_caris"):
        return max(0.0, 1 - step / total_steps) ** power
    if schedule == "multistep":
        return gamma ** sum(step >= share * total_steps for share in milestones)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))
    return 1.0


def epoch_factor(
    step: int,
    total_steps: int,
    steps_per_epoch: int,
    schedule: Schedule = "poly",
    *,
    per_epoch: bool = False,
    epoch_lag: int = 0,
    first_epochs: Sequence[float] = (),
    **options: Any,
) -> float:
    """`lr_factor` by epochs: of whole epochs where the schedule moves once per epoch, and with factors of the first.

    epoch_lag: epochs by which a schedule per epoch is late. options: of `lr_factor`.
    """
    epoch = step // steps_per_epoch
    if per_epoch:
        step, total_steps = max(0, epoch - epoch_lag), math.ceil(total_steps / steps_per_epoch)
    first = first_epochs[epoch] if epoch < len(first_epochs) else 1.0
    return first * lr_factor(step, total_steps, schedule, **options)


def build_optimizer(
    groups: list[dict[str, Any]],
    name: str,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    amsgrad: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Optimizer:
    """groups: of `param_groups`, each with its own lr and weight_decay, which is kept as `base_lr` for the schedule.

    name: adamw or adam, which are torch's, or one of timm's OPTIMIZERS. betas, eps, amsgrad: of the first two. options:
    further arguments of the optimizer. Raises UserError for arguments that it does not take.
    """
    groups = [{**group, "base_lr": group["lr"]} for group in groups]
    given = dict(options or {})
    try:
        if name in ADAM:
            devices = {parameter.device.type for group in groups for parameter in group["params"]}
            fused = devices <= FUSED_DEVICES or None  # None: torch chooses; a CPU's fused kernel sums in another order
            return ADAM[name](groups, lr=lr, betas=betas, eps=eps, amsgrad=amsgrad, **{"fused": fused, **given})
        return create_optimizer_v2(groups, name, lr=lr, **given)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"optim.optimizer {name} cannot be built with optim.options {given}: {error}") from error


def optimizer_groups(method: Method, config: OptimConfig) -> list[dict[str, Any]]:
    """The method's parameter groups without what is frozen, with rates that fall towards the encoders' inputs.

    Raises UserError for `optim.layer_decay` of a model that names no encoder, or trains none.
    """
    groups = method.param_groups(config.lr, config.weight_decay)
    groups = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups]
    groups = [group for group in groups if group["params"]]
    return groups if config.layer_decay is None else decayed(groups, method.model, config.layer_decay)


def decayed(groups: list[dict[str, Any]], model: RISModel, decay: float) -> list[dict[str, Any]]:
    """Groups split by depth: the rate of a parameter of depth d of n + 1 is multiplied by decay^(n + 1 - d)."""
    factors: dict[int, float] = {}
    for depths, last in depths_of(model):
        factors |= {parameter: decay ** (last - depth) for parameter, depth in depths.items()}
    if all(factor == 1 for factor in factors.values()):
        raise UserError(
            f"optim.layer_decay: {type(model).__name__} "
            + ("trains no block of an encoder" if model.encoders else "names no encoders (its class sets `encoders`)")
            + "; leave it out"
        )
    split = []
    for group in groups:
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
        for factor, parameters in sorted(parts.items()):
            name = group["name"] if len(parts) == 1 else f"{group['name']} x{factor:.4g}"
            split.append({**group, "name": name, "params": parameters, "lr": group["lr"] * factor})
    return split


def check_optimizer(config: OptimConfig) -> None:
    """Raise UserError for an optimizer that cannot be built with these values, before anything else is."""
    name = config.optimizer
    if name not in (*ADAM, *OPTIMIZERS):
        raise unknown_name("optim.optimizer", name, (*ADAM, *OPTIMIZERS))
    if name not in ADAM:
        for key in ("betas", "eps", "amsgrad"):
            if getattr(config, key) != getattr(OptimConfig(), key):
                raise UserError(f"optim.{key} belongs to adam and adamw; for {name} give optim.options.{key}")
    for key in ("lr", "weight_decay", "params"):
        if key in config.options:
            raise UserError(f"optim.options.{key}: parameter groups have their own; give optim.{key}")
    parameter = nn.Parameter(torch.zeros(2, 2))
    build_optimizer(
        [{"params": [parameter], "lr": config.lr, "weight_decay": config.weight_decay}], **arguments(config)
    )


def arguments(config: OptimConfig) -> dict[str, Any]:
    """What `build_optimizer` takes besides the groups."""
    o = config
    return {
        "name": o.optimizer, "lr": o.lr, "betas": o.betas, "eps": o.eps, "amsgrad": o.amsgrad, "options": o.options,
    }  # fmt: skip


class WeightAverage(AveragedModel):
    """A copy of a model that follows its weights; see `average_weights`.

    Its update replaces torch's, which copies the count of updates to the device for every dtype: a synchronisation.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Follow `model`, on the same device; the first update copies."""
        own = chain(self.module.parameters(), self.module.buffers())
        kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for averaged, current in zip(own, chain(model.parameters(), model.buffers()), strict=True):
            into, values = kinds.setdefault(averaged.dtype, ([], []))
            into.append(averaged)
            values.append(current)
        for kind, (into, values) in kinds.items():
            if kind.is_floating_point and self.n_averaged > 0:
                torch._foreach_lerp_(into, values, 1 - self.decay)
            else:
                torch._foreach_copy_(into, values)
        self.n_averaged += 1


def average_weights(model: nn.Module, decay: float) -> WeightAverage:
    """Return a copy of a model that follows its weights: average = decay x average + (1 - decay) x weights.

    Buffers follow too. Integer buffers are copied: they are counts and tables, whose average has no meaning.
    """
    return WeightAverage(model, decay)


def set_lr(optimizer: Optimizer, factor: float, base_lr: float | None = None, min_lr: float = 0.0) -> None:
    """Put every group at its own base rate times `factor`, or all of them at the one base rate that is given.

    min_lr: where factor 0 leads, instead of 0; a group whose base rate is lower keeps that.
    """
    for group in optimizer.param_groups:
        base = group["base_lr"] if base_lr is None else base_lr
        least = min(min_lr, base)
        group["lr"] = least + (base - least) * factor if least else base * factor


VERSIONS = 64
"""Versions of one kind of block: stages of several widths, with and without a shift, at both sizes of AML."""


@torch.no_grad()
def blocks_called_whole(method: nn.Module, batch: Batch) -> list[nn.Module]:
    """Repeated blocks of a method's model whose parts run only inside the block's own forward.

    Some encoders call a block's attention or norms by themselves; FSDP2 would not gather those. One pass in evaluation
    mode shows which. batch: the same on every process.
    """
    blocks = list(repeated_blocks(method))
    running, ran, torn = dict.fromkeys(blocks, 0), set(), set()
    handles: list[Any] = []

    def watch(block: nn.Module) -> None:
        def enter(*_: Any) -> None:
            running[block] += 1
            ran.add(block)

        def leave(*_: Any) -> None:
            running[block] -= 1

        def part(*_: Any) -> None:
            if not running[block]:
                torn.add(block)

        handles.extend([block.register_forward_pre_hook(enter), block.register_forward_hook(leave)])
        handles.extend(inner.register_forward_pre_hook(part) for inner in block.modules() if inner is not block)

    for block in blocks:
        watch(block)
    try:
        with eval_mode(method):
            method(batch)
    finally:
        for handle in handles:
            handle.remove()
    return [block for block in blocks if block in ran - torn]


def compile_blocks(module: nn.Module, backend: str = "inductor") -> int:
    """Compile the repeated blocks in place, which keeps names, hooks and wrappers; return how many there are."""
    torch._dynamo.config.recompile_limit = max(VERSIONS, torch._dynamo.config.recompile_limit)
    blocks = list(repeated_blocks(module))
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    return len(blocks)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled blocks as they are: an evaluation has other modes and batches, which would be compiled as well."""
    with torch.compiler.set_stance("force_eager"):
        yield
