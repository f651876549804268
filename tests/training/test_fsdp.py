"""FSDP2 as configured in configs/accelerate/fsdp2.yaml, on one CPU process; several GPUs were not available."""

import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from amltrain.losses import create_loss
from amltrain.methods.aml.options import AMLOptions
from amltrain.methods.base import build_method
from amltrain.models import create_model, model_info
from benchmarks.steps import random_batch
from tests.training.runs import FORKS

PRESETS = {
    "off": ("supervised", None),
    "paper": ("aml", AMLOptions(temperature=0.01)),
    "released": ("aml", AMLOptions(preset="released")),
}


def test_the_task_is_sharded_as_one_whole(repository: Path) -> None:
    settings = yaml.safe_load((repository / "configs" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    assert (settings["fsdp_version"], settings["fsdp_auto_wrap_policy"]) == (2, "NO_WRAP")


@pytest.mark.parametrize("model", ["caris_tiny", "lavt_tiny", "cgformer_tiny"])
def test_a_sharded_task_trains_as_a_whole_one(model: str, tmp_path: Path) -> None:
    """In a process of its own: a process group stays for good."""
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=_train_sharded, args=(model, tmp_path / "store", theirs))
    process.start()
    theirs.close()
    outcome = ours.recv()
    process.join()
    assert isinstance(outcome, dict), outcome
    for preset, (whole, sharded) in outcome.items():
        assert sharded == pytest.approx(whole, rel=1e-5), preset


def _train_sharded(model: str, store: Path, outcome: Connection) -> None:
    """Send (loss and gradient norm) of one step, whole and sharded, by preset; or the trace of what went wrong."""
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        info, found = model_info(model), {}
        batch = random_batch(2, info.preprocess.size, 12, 500, torch.device("cpu"))
        for preset, (method, options) in PRESETS.items():
            steps = []
            for sharded in (False, True):
                torch.manual_seed(0)
                task = build_method(method, create_model(model), create_loss(info.loss, **info.loss_kwargs), options)
                if sharded:
                    fully_shard(task, mesh=init_device_mesh("cpu", (1,)))
                torch.manual_seed(1)
                loss = task(batch)["loss"]
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(task.parameters(), torch.inf)
                steps.append([loss.item(), float(norm.full_tensor() if sharded else norm)])
            found[preset] = steps
        outcome.send(found)
    except BaseException:
        outcome.send(traceback.format_exc())
