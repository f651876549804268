"""No file of a checkpoint can run code when a run resumes."""

import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amltrain import run_folder
from amltrain.checkpoints.state import damage_named, plain_data_only
from amltrain.errors import UserError
from amltrain.files import sha256
from amltrain.hub.model_folder import load_pretrained
from tests.training import runs
from tests.traps import Touch


def reseal(checkpoint: Path) -> None:
    """Make the manifest fit again, as an attacker would."""
    manifest = json.loads((checkpoint / run_folder.MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        path = checkpoint / name
        entry |= {"size": path.stat().st_size, "sha256": sha256(path)}
    (checkpoint / run_folder.MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def averaged(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with averaged weights."""
    output = tmp_path_factory.mktemp("averaged")
    runs.run(shapes, output, "--train.max_steps", "1", "--train.ema_decay", "0.5")
    return output


def test_the_state_contains_no_pickle(averaged: Path) -> None:
    names = {path.name for path in (averaged / "last" / "state").iterdir()}
    ours = {"method.safetensors", "optimizer.safetensors", "optimizer.json"}
    assert names == ours | {"trainer.json", "evaluated.json"}


def test_a_planted_pickle_is_never_run(averaged: Path, shapes: Path, tmp_path: Path) -> None:
    """In every file of `state/` and `model/`, in turn, as a bare pickle and as torch.save writes it."""
    marker = tmp_path / "executed"
    whole = (averaged / "last").resolve()
    files = [p.relative_to(whole) for p in sorted(whole.rglob("*")) if p.is_file() and p.name != run_folder.MANIFEST]
    assert len(files) > 6
    for file in files:
        checkpoint = tmp_path / "step-000001"
        shutil.copytree((averaged / "last").resolve(), checkpoint)
        (checkpoint / file).write_bytes(pickle.dumps(Touch(marker)))
        reseal(checkpoint)
        resume = ("--resume", str(checkpoint), "--train.max_steps", "2", "--train.ema_decay", "0.5")
        with suppress(UserError):  # a file that nothing reads is no error
            load_pretrained(checkpoint)
        with suppress(UserError):
            runs.run(shapes, tmp_path / "run", *resume)
        assert not marker.exists(), file
        shutil.rmtree(checkpoint)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_a_pickle_of_version_0_1_is_read_as_plain_data(averaged: Path, shapes: Path, tmp_path: Path) -> None:
    """optimizer.bin in the place of the files of this version, with code in it."""
    marker, checkpoint = tmp_path / "executed", tmp_path / "step-000001"
    shutil.copytree((averaged / "last").resolve(), checkpoint)
    (checkpoint / "state" / "optimizer.json").unlink()
    (checkpoint / "state" / "optimizer.safetensors").unlink()
    torch.save({"optimizer": Touch(marker)}, checkpoint / "state" / "optimizer.bin")
    manifest = json.loads((checkpoint / run_folder.MANIFEST).read_text())
    manifest["files"] = {name: {} for name in manifest["files"] if "/optimizer." not in name}
    manifest["files"]["state/optimizer.bin"] = {}
    (checkpoint / run_folder.MANIFEST).write_text(json.dumps(manifest))
    reseal(checkpoint)
    resume = ("--resume", str(checkpoint), "--train.max_steps", "2", "--train.ema_decay", "0.5")
    with pytest.raises(UserError, match=r"does not fit this run or is damaged"):
        runs.run(shapes, tmp_path / "run", *resume)
    assert not marker.exists()


@pytest.mark.parametrize("as_zip", [True, False])
def test_engine_files_are_read_as_plain_data(tmp_path: Path, as_zip: bool) -> None:
    """What DeepSpeed loads with `weights_only=False`, and every file beside it that it may look at."""
    pytest.importorskip("deepspeed")
    marker = tmp_path / "executed"
    path = tmp_path / "mp_rank_00_model_states.pt"
    if as_zip:
        torch.save({"weights": torch.zeros(2), "more": Touch(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(UserError, match="damaged"), damage_named(tmp_path), plain_data_only():
        torch.load(path, weights_only=False)
    assert not marker.exists()
    torch.save({"weights": torch.zeros(2), "shape": torch.Size([2]), "type": torch.float32}, path)
    with plain_data_only():
        assert torch.load(path, weights_only=False)["shape"] == torch.Size([2])


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "extra/optimizer.json", "rank-00000-of-00001.bin"])
def test_other_files_in_the_state_are_never_read(averaged: Path, shapes: Path, tmp_path: Path, name: str) -> None:
    marker, checkpoint = tmp_path / "executed", tmp_path / "step-000001"
    shutil.copytree((averaged / "last").resolve(), checkpoint)
    trap = checkpoint / "state" / name
    trap.parent.mkdir(exist_ok=True)
    trap.write_bytes(pickle.dumps(Touch(marker)))
    resume = ("--resume", str(checkpoint), "--train.max_steps", "2", "--train.ema_decay", "0.5")
    runs.run(shapes, tmp_path / "run", *resume)
    assert not marker.exists()


@pytest.mark.parametrize("fault", ["shape", "gone"])
def test_a_damaged_moment_of_the_optimizer_is_named_before_a_step(
    averaged: Path, shapes: Path, tmp_path: Path, fault: str
) -> None:
    """Damage that no hash sees: PyTorch would stop at it in the first step, or not at all where it can broadcast."""
    checkpoint = tmp_path / "step-000001"
    shutil.copytree((averaged / "last").resolve(), checkpoint)
    file = checkpoint / "state" / "optimizer.safetensors"
    tensors = load_file(file)
    key = next(name for name, tensor in tensors.items() if name.endswith("/exp_avg") and tensor.ndim > 1)
    if fault == "gone":
        del tensors[key]
    else:
        tensors[key] = tensors[key].reshape(-1)[:1].clone()
    save_file(tensors, file)
    reseal(checkpoint)
    resume = ("--resume", str(checkpoint), "--train.max_steps", "2", "--train.ema_decay", "0.5")
    with pytest.raises(UserError, match="exp_avg has shape" if fault == "shape" else "has no exp_avg of"):
        runs.run(shapes, tmp_path / "run", *resume)


def test_a_run_cannot_be_started_inside_a_checkpoint(averaged: Path, shapes: Path) -> None:
    checkpoint = (averaged / "last").resolve()
    before = sorted(checkpoint.rglob("*"))
    with pytest.raises(UserError, match=f"is a checkpoint; resume its run with --output {checkpoint.parent}"):
        runs.run(shapes, checkpoint)
    assert sorted(checkpoint.rglob("*")) == before


def relist(checkpoint: Path) -> None:
    """Write a manifest that vouches for whatever is there, as somebody who crafts a checkpoint can."""
    (checkpoint / run_folder.MANIFEST).unlink()
    run_folder._write_manifest(checkpoint)


CRAFTED = {
    "torch's distributed metadata": (".metadata", "__0_0.distcp"),
    "metadata in a folder": ("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"),
    "an optimizer's folder": ("optimizer_0/.metadata", "optimizer_0/__1_0.distcp"),
    "a pickle named json": ("index.json", "model.safetensors.index.json"),
    "a pickle named safetensors": ("extra.safetensors", "pytorch_model.safetensors.index.json"),
    "the optimizer of 0.1 beside the new one": ("optimizer.bin", "method.bin"),
    "torch's weights": ("pytorch_model.bin", "model.pt", "model.pth", "scheduler.bin", "sampler.bin"),
    "random states of Accelerate": ("random_states_0.pkl", "scaler.pt", "custom_checkpoint_0.pkl"),
    "DeepSpeed's files": ("latest", "zero_to_fp32.py", "deepspeed/mp_rank_00_model_states.pt"),
    "Python files": ("sitecustomize.py", "__init__.py", "torch.py", "conftest.py"),
}


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", CRAFTED)
def test_no_crafted_file_is_read_in_a_whole_resume(
    whole: Path, shapes: Path, tmp_path: Path, name: str, listed: bool
) -> None:
    """Files that other programs write into such a folder; the run continues as if they were not there."""
    checkpoint, mark = tmp_path / "from" / "step-000006", tmp_path / "code ran"
    shutil.copytree(whole / "step-000006", checkpoint)
    for file in CRAFTED[name]:
        path = checkpoint / "state" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f"open({str(mark)!r}, 'w')".encode()
        path.write_bytes(text if path.suffix == ".py" or file == "latest" else pickle.dumps(Touch(mark)))
    if listed:
        relist(checkpoint)
    runs.run(shapes, tmp_path / "run", "--resume", str(checkpoint))
    assert not mark.exists()
    assert runs.same_weights(whole, tmp_path / "run")


INSTEAD = {
    "optimizer.json": "is not the JSON",
    "method.safetensors": "a pickle",
    "optimizer.safetensors": "a pickle",
    "rank-00000-of-00001.safetensors": "a pickle among the ranks",
    "rank-00001-of-00002.safetensors": "a rank without its first",
}


@pytest.mark.parametrize("how", ["pickle", "pickle after a sound start", "link elsewhere", "folder"])
@pytest.mark.parametrize("name", INSTEAD)
def test_a_crafted_state_ends_a_whole_resume_with_a_sentence(
    whole: Path, shapes: Path, tmp_path: Path, name: str, how: str
) -> None:
    checkpoint, mark = tmp_path / "from" / "step-000006", tmp_path / "code ran"
    shutil.copytree(whole / "step-000006", checkpoint)
    path = checkpoint / "state" / name
    sound = path.read_bytes() if path.exists() else b""
    path.unlink(missing_ok=True)
    if how == "folder":
        path.mkdir()
        (path / "x").write_bytes(pickle.dumps(Touch(mark)))
    elif how == "link elsewhere":
        (tmp_path / "elsewhere").write_bytes(pickle.dumps(Touch(mark)))
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_bytes((sound[:40] if "after" in how else b"") + pickle.dumps(Touch(mark)))
    relist(checkpoint)
    with pytest.raises(UserError) as caught:
        runs.run(shapes, tmp_path / "run", "--resume", str(checkpoint))
    assert not mark.exists()
    assert "resume from another" in str(caught.value) or "cannot resume" in str(caught.value), caught.value
    assert "\n" not in str(caught.value)
