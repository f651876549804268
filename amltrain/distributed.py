"""What differs between Accelerate's engines (one process, DDP, FSDP2, DeepSpeed), so that the loop need not know.

Whatever the engine, the recipe decides: samples per step, precision, clipping. Weights and optimizer stay float32;
`mixed_precision` is autocast everywhere, under DeepSpeed too, so that engines can be compared.
"""

import os
from collections.abc import Callable, Iterable, Set
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    LoggerType,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from amltrain.config.schema import RunConfig, TrainConfig
from amltrain.environment import hush_deepspeed
from amltrain.errors import UserError, cure, first_line, shared_error, unknown_name
from amltrain.run_folder import LOGS

PREPARATION = timedelta(hours=6)  # that data sets may take on the main process while the others wait


class BatchPlan(NamedTuple):
    """How a global batch is shared: processes x micro x accumulation = samples per optimizer step."""

    processes: int
    micro: int
    accumulation: int

    @property
    def samples(self) -> int:
        return self.processes * self.micro * self.accumulation

    def __str__(self) -> str:
        unit = "process" if self.processes == 1 else "processes"
        return f"{self.samples} = {self.processes} {unit} x {self.micro} x {self.accumulation} accumulated"


def plan_batches(train: TrainConfig, processes: int) -> BatchPlan:
    """Keep the global batch size for any number of processes. Raises UserError if it does not divide."""
    total = train.global_batch_size
    micro = train.micro_batch_size or max(1, total // processes)
    if processes > total:
        raise UserError(
            f"train.global_batch_size={total} takes at most {total} processes, not {processes}; "
            f"start fewer, as many as divide {total}"
        )
    if total % processes:
        raise UserError(
            f"train.global_batch_size={total} is not a multiple of {processes} processes; "
            f"start as many as divide {total}"
        )
    if total % (micro * processes):
        raise UserError(
            f"train.global_batch_size={total} is not a multiple of {processes} processes x "
            f"train.micro_batch_size={micro}; leave the latter out, or choose one that divides {total // processes}"
        )
    return BatchPlan(processes, micro, total // (micro * processes))


def check_trackers(names: list[str]) -> None:
    """Raise UserError for a tracker that Accelerate does not know, or would leave out because it is not installed."""
    known = [tracker.value for tracker in LoggerType if tracker != LoggerType.ALL]
    available = [LoggerType(tracker).value for tracker in get_available_trackers()]
    for name in names:
        if name not in known:
            raise unknown_name("tracker (tracking.trackers)", name, known)
        if name not in available:
            raise UserError(f"tracking.trackers: {name} is not installed; pip install {name}, or leave it out")


def build_accelerator(config: RunConfig) -> tuple[Accelerator, BatchPlan]:
    """Accelerate with what this trainer relies on: the schedule is ours, accumulation ignores where an epoch ends."""
    told_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    on_cpu = told_cpu or not torch.accelerator.is_available()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if deepspeed and told_cpu:
        raise UserError("ACCELERATE_USE_CPU turns DeepSpeed off; leave it out: without a GPU the CPU is used anyway")
    if not deepspeed:
        hush_deepspeed()
    precision = config.train.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if deepspeed and precision == "fp16":
        raise UserError(
            "fp16 is not offered under DeepSpeed, whose loss scaling is its own; "
            "add --train.mixed_precision bf16, or use DDP for fp16"
        )
    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed,  # DDP over CPUs must be requested, and DeepSpeed is then not used
        mixed_precision="no" if deepspeed else config.train.mixed_precision,
        log_with=config.tracking.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(config.folder), logging_dir=str(config.folder / LOGS)),
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False, non_blocking=True),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            InitProcessGroupKwargs(
                backend="gloo" if on_cpu and several else None,
                timeout=timedelta(minutes=config.train.collective_timeout),
            )
        ],
    )
    plan = plan_batches(config.train, accelerator.num_processes)  # how many there are is known only now
    accelerator.gradient_accumulation_steps = plan.accumulation
    if accelerator.state.deepspeed_plugin is not None:
        _fit_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config, plan, config.optim.clip_norm, precision)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError(
            "FSDP version 1 is not supported; set fsdp_version: 2, as `amltrain list configs accelerate/fsdp2`"
        )
    return accelerator, plan


def _fit_deepspeed(settings: dict[str, Any], plan: BatchPlan, clip_norm: float | None, precision: str) -> None:
    """Set what DeepSpeed would otherwise take from a loader or from its defaults."""
    settings["train_micro_batch_size_per_gpu"] = plan.micro
    settings["gradient_accumulation_steps"] = plan.accumulation
    settings["gradient_clipping"] = clip_norm or 0.0
    if precision == "bf16":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}


def precision_of(accelerator: Accelerator) -> str:
    """no, fp16 or bf16."""
    plugin = accelerator.state.deepspeed_plugin
    return "bf16" if plugin is not None and "torch_autocast" in plugin.deepspeed_config else accelerator.mixed_precision


def shard(accelerator: Accelerator, method: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Shard a method with FSDP2: each of `blocks` alone, so that one of them is whole at a time, and the rest last.

    Parameters without dimensions, which FSDP2 cannot shard
    (https://github.com/pytorch/pytorch/blob/main/torch/distributed/fsdp/_fully_shard/_fsdp_param.py), stay whole, and
    their gradients are averaged by themselves. Accelerate takes a method that is sharded already as it is.
    """
    plugin = accelerator.state.fsdp_plugin
    scalars = {parameter for parameter in method.parameters() if parameter.ndim == 0}
    settings = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "offload_policy": plugin.cpu_offload,
        **({"ignored_params": scalars} if scalars else {}),
    }
    for block in blocks:
        fully_shard(block, reshard_after_forward=plugin.reshard_after_forward, **settings)
    fully_shard(method, **settings)
    for parameter in scalars:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average_gradient)


def prepare(accelerator: Accelerator, method: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Wrap a method and its optimizer for the engine.

    For FSDP2, Accelerate looks parameters up by the address of their rows, and all parameters without a row on this
    process have the same one, 0. The groups are put back as they were: `shard` has sharded the parameters already.
    (https://github.com/huggingface/accelerate/blob/main/src/accelerate/utils/fsdp_utils.py)
    """
    groups = [list(group["params"]) for group in optimizer.param_groups]
    wrapped, prepared = accelerator.prepare(method, optimizer)
    if accelerator.distributed_type == DistributedType.FSDP:
        for group, parameters in zip(prepared.param_groups, groups, strict=True):
            group["params"] = parameters
    return wrapped, prepared


def _average_gradient(parameter: Tensor) -> None:
    """Average what has accumulated; averaging the same sum again later changes nothing."""
    assert parameter.grad is not None
    torch.distributed.all_reduce(parameter.grad)
    parameter.grad /= torch.distributed.get_world_size()


def set_tf32(allowed: bool) -> None:
    """Choose how float32 matrix products and convolutions compute on GPUs that have TensorFloat-32."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a process holds only a share of the weights between steps (FSDP, ZeRO-3)."""
    return accelerator.distributed_type == DistributedType.FSDP or _zero_stage(accelerator) == 3


def _zero_stage(accelerator: Accelerator) -> int:
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else plugin.zero_stage


def model_weights(
    accelerator: Accelerator, method: nn.Module, *, keep: bool = True, left_out: Set[str] = frozenset()
) -> dict[str, Tensor]:
    """Whole weights of the prepared method's model, without loss and buffers; every process must call.

    left_out: names not to gather. keep: whether this process wants them; {} otherwise. A sharded tensor is gathered
    alone, so that no process ever has more than one whole tensor besides those that it keeps.
    """
    inner = accelerator.unwrap_model(method)
    if _zero_stage(accelerator) == 3:
        from deepspeed.runtime.zero import GatheredParameters  # an extra

        wanted = [p for name, p in inner.named_parameters() if name.removeprefix("model.") not in left_out]
        with GatheredParameters(wanted):
            gathered_now = inner.model.state_dict()
            return {key: t.detach().clone() for key, t in gathered_now.items() if key not in left_out}
    whole = {}
    for key, tensor in inner.model.state_dict().items():
        if key in left_out:
            continue
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[key] = gathered
    return whole


def skip_bad_steps(accelerator: Accelerator, optimizer: Optimizer) -> None:
    """Let DeepSpeed, which steps inside its backward, look for NaN and Inf in full precision as well."""
    if _zero_stage(accelerator):
        optimizer.optimizer.check_grad_overflow = True  # type: ignore[attr-defined]  # DeepSpeed's own optimizer


def agree(accelerator: Accelerator, facts: dict[str, str]) -> None:
    """Compare facts between all processes. Raises UserError on each of them for the first that differs.

    Machines of a cluster may see different copies of the data, or other versions of a library.
    """
    if accelerator.num_processes == 1:
        return
    every = gather_object([facts])
    for rank, other in enumerate(every):
        for key in sorted(every[0].keys() | other.keys()):
            first, mine = every[0].get(key), other.get(key)
            if first != mine:
                shown = [str(value)[:12] for value in (first, mine)]
                raise shared_error(
                    f"process {rank} has another {key} than process 0 ({shown[1]} and {shown[0]}); give every machine "
                    f"the same data and the same environment"
                )


def on_main_process(accelerator: Accelerator, action: Callable[[], Any], *, wait: timedelta | None = None) -> Any:
    """Run on the main process while the others wait; all get its result, or its UserError.

    wait: how long the others do; None = as long as for any exchange between processes.
    """
    alone = wait is None or accelerator.num_processes == 1
    waiting = None if alone else torch.distributed.new_group(backend="gloo", timeout=wait)
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [action(), None]
        except UserError as error:
            outcome = [None, str(error)]
        except OSError as error:  # raised here alone, it would leave the others waiting
            name = error.filename or "a file of the run"
            why = f"{error.strerror or first_line(error)}; {cure(error, 'run again to resume')}"
            outcome = [None, f"cannot write {name}: {why}"]
    if waiting is None:
        broadcast_object_list(outcome)
    else:
        assert not isinstance(waiting, int)  # a number stands for a process outside the group, and all are inside
        torch.distributed.broadcast_object_list(outcome, src=0, group=waiting)
        torch.distributed.destroy_process_group(waiting)
    if outcome[1] is not None:
        raise shared_error(outcome[1])
    return outcome[0]
