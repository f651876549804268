"""`python -m amltrain` on several null GPUs.

Objects go over gloo: NCCL's way makes their sizes with kernels, which a null GPU skips.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch.distributed as dist

from amltrain.cli import main


@cache
def gloo() -> Any:
    """A group of all processes."""
    return dist.new_group(backend="gloo")


def over_gloo(function: Callable[..., None]) -> Callable[..., None]:
    def call(*arguments: Any, **keywords: Any) -> None:
        function(*arguments, **{**keywords, "group": gloo()})

    return call


if __name__ == "__main__":
    dist.all_gather_object = over_gloo(dist.all_gather_object)
    dist.broadcast_object_list = over_gloo(dist.broadcast_object_list)
    main()
