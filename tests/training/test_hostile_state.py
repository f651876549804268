"""No file of a checkpoint can run code when a run resumes."""

import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from amltrain.checkpoints import run_folder as checkpoints
from amltrain.checkpoints.harmless import check_harmless
from amltrain.errors import UserError
from amltrain.files import sha256
from amltrain.hub.model_folder import load_pretrained
from tests.training import runs
from tests.traps import Touch


def reseal(checkpoint: Path) -> None:
    """Make the manifest fit again, as an attacker would."""
    manifest = json.loads((checkpoint / checkpoints.MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        path = checkpoint / name
        entry |= {"size": path.stat().st_size, "sha256": sha256(path)}
    (checkpoint / checkpoints.MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def averaged(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with averaged weights."""
    output = tmp_path_factory.mktemp("averaged")
    runs.run(shapes, output, "--train.max_steps", "1", "--train.ema_decay", "0.5")
    return output


def test_the_state_holds_no_pickle_but_the_optimizer(averaged: Path) -> None:
    names = {path.name for path in (averaged / "last" / "state").iterdir()}
    assert names == {"method.safetensors", "optimizer.bin", "trainer.json", "evaluated.json"}


def test_a_planted_pickle_is_never_run(averaged: Path, shapes: Path, tmp_path: Path) -> None:
    """In every file of `state/` and `model/`, in turn, as a bare pickle and as torch.save writes it."""
    marker = tmp_path / "executed"
    whole = (averaged / "last").resolve()
    files = [p.relative_to(whole) for p in sorted(whole.rglob("*")) if p.is_file() and p.name != checkpoints.MANIFEST]
    assert len(files) > 6
    for file in files:
        checkpoint = tmp_path / "step-000001"
        shutil.copytree((averaged / "last").resolve(), checkpoint)
        if file.suffix == ".bin":
            torch.save({"optimizer": Touch(marker)}, checkpoint / file)
        else:
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


@pytest.mark.parametrize("as_zip", [True, False])
def test_engine_files_are_looked_at_before_they_are_loaded(tmp_path: Path, as_zip: bool) -> None:
    marker = tmp_path / "executed"
    folder = tmp_path / "state"
    folder.mkdir()
    path = folder / "mp_rank_00_model_states.pt"
    if as_zip:
        torch.save({"weights": torch.zeros(2), "more": Touch(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(UserError, match=r"would run (posix|nt)\.mkdir"):
        check_harmless(folder)
    assert not marker.exists()
    torch.save({"weights": torch.zeros(2), "shape": torch.Size([2]), "type": torch.float32}, path)
    check_harmless(folder)
