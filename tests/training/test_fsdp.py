"""FSDP2 as configured in configs/accelerate/fsdp2.yaml, on one CPU process; several GPUs were not available."""

import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel

from amltrain.checkpoints.harmless import check_harmless
from amltrain.checkpoints.state import is_own_state, write_averaged
from amltrain.losses import create_loss
from amltrain.methods.aml.options import AMLOptions
from amltrain.methods.registry import build_method
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


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_what_accelerate_writes_is_not_taken_for_our_own_state(kind: str, tmp_path: Path) -> None:
    process = FORKS.Process(target=_save_sharded, args=(kind, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "state" / "optimizer.bin").is_file() == (kind == "FULL_STATE_DICT")
    assert not is_own_state(tmp_path / "state")
    check_harmless(tmp_path / "state")


def _save_sharded(kind: str, folder: Path) -> None:
    """Save a sharded model and its optimizer as `Accelerator.save_state` does, with weight averaging on top."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    model = torch.nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = folder / "state"
    save_fsdp_model(plugin, PartialState(), model, state)
    save_fsdp_optimizer(plugin, PartialState(), optimizer, model, state)
    write_averaged(state, AveragedModel(torch.nn.Linear(4, 4)))


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
