"""FSDP2 for real on CPU processes: gloo takes NCCL's place, and Accelerate's rejection of CPUs is lifted."""

from collections.abc import Callable
from typing import Any

import accelerate.state
import torch
from accelerate.utils import DistributedType

from amltrain import distributed

FSDP2 = {
    "ACCELERATE_USE_CPU": "false",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}
"""What `accelerate launch` sets for configs/accelerate/fsdp2.yaml."""


class AllowCPU:
    """Called in each process before its run (`before=` of `runs.launch`), then another action."""

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        self.then = then

    def __call__(self) -> None:
        accelerate.state.PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
        accelerate.state.PartialState.set_device = _use_cpu
        made = distributed.Accelerator

        def accelerator(*arguments: Any, **keywords: Any) -> Any:
            return made(*arguments, **{**keywords, "cpu": False})

        distributed.Accelerator = accelerator  # type: ignore[misc, assignment]
        if self.then is not None:
            self.then()


def _use_cpu(state: Any) -> None:
    state.device = torch.device("cpu")
