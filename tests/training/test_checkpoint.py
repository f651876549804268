"""Checkpoints are whole or absent, and damage is noticed."""

from pathlib import Path

import pytest
from accelerate import Accelerator
from torch import nn

from amltrain.errors import UserError
from amltrain.training import checkpoint as checkpoints


@pytest.fixture
def accelerator() -> Accelerator:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(nn.Linear(3, 2))
    return accelerator


def save(accelerator: Accelerator, output: Path, step: int) -> Path:
    def write_model(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(range(100)))

    return checkpoints.save_checkpoint(accelerator, output, step, {"step": step}, write_model)


def say_nothing(text: str) -> None:
    pass


def test_layout_and_last(accelerator: Accelerator, tmp_path: Path) -> None:
    save(accelerator, tmp_path, 4)
    newest = save(accelerator, tmp_path, 10)
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == ["step-000004", "step-000010"]
    assert (tmp_path / "last").resolve() == newest.resolve()
    assert checkpoints.step_of(tmp_path / "last") == 10
    assert checkpoints.load_trainer_state(newest) == {"step": 10}
    assert not list(tmp_path.glob(".*"))


def test_keep_spares_best_and_last(accelerator: Accelerator, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        path = save(accelerator, tmp_path, step)
        if step == 1:
            checkpoints.point(tmp_path, "best", path)
    checkpoints.prune(tmp_path, keep=2)
    assert [checkpoints.step_of(p) for p in checkpoints.checkpoints(tmp_path)] == [1, 3, 4]


@pytest.mark.parametrize("damage", ["shorten", "change", "remove", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_aloud(accelerator: Accelerator, tmp_path: Path, damage: str) -> None:
    good, bad = save(accelerator, tmp_path, 1), save(accelerator, tmp_path, 2)
    victim = bad / "model" / "model.safetensors"
    if damage == "shorten":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "change":
        victim.write_bytes(b"x" + victim.read_bytes()[1:])
    elif damage == "remove":
        victim.unlink()
    elif damage == "no manifest":
        (bad / checkpoints.MANIFEST).unlink()
    else:
        (bad / checkpoints.MANIFEST).write_text("{")
    said: list[str] = []
    assert checkpoints.find_resumable(tmp_path, "auto", said.append) == good
    assert "step-000002" in said[0]
    with pytest.raises(UserError, match=r"damaged|no checkpoint"):
        checkpoints.find_resumable(tmp_path, str(bad), say_nothing)


def test_a_half_written_checkpoint_is_nobody(accelerator: Accelerator, tmp_path: Path) -> None:
    good = save(accelerator, tmp_path, 1)
    (tmp_path / ".step-000002.writing" / "state").mkdir(parents=True)
    assert checkpoints.find_resumable(tmp_path, "auto", say_nothing) == good
    checkpoints.remove_leftovers(tmp_path)
    assert not (tmp_path / ".step-000002.writing").exists()


def test_a_run_is_not_continued_from_its_middle(accelerator: Accelerator, tmp_path: Path) -> None:
    """The later checkpoints would be taken for the new course's own at the next start."""
    early, late = save(accelerator, tmp_path, 1), save(accelerator, tmp_path, 2)
    with pytest.raises(UserError, match=r"goes on after step-000001 to step-000002.*another --output"):
        checkpoints.find_resumable(tmp_path, str(early), say_nothing)
    assert checkpoints.find_resumable(tmp_path, str(tmp_path / "last"), say_nothing) == late.resolve()
    assert checkpoints.find_resumable(tmp_path / "elsewhere", str(early), say_nothing) == early.resolve()


def test_a_step_saved_again_replaces_itself(accelerator: Accelerator, tmp_path: Path) -> None:
    save(accelerator, tmp_path, 1)
    (tmp_path / "step-000001" / "model" / "old").touch()
    again = save(accelerator, tmp_path, 1)
    assert not (again / "model" / "old").exists()
    assert checkpoints.find_fault(again) is None
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_earlier_checkpoints(accelerator: Accelerator, tmp_path: Path) -> None:
    good = save(accelerator, tmp_path, 1)

    def full(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No space left on device.*earlier checkpoints are intact"):
        checkpoints.save_checkpoint(accelerator, tmp_path, 2, {"step": 2}, full)
    assert checkpoints.checkpoints(tmp_path) == [good]
    assert checkpoints.find_fault(good) is None
    assert not list(tmp_path.glob(".*"))


def test_resume_never_refuses_to_mix_runs(accelerator: Accelerator, tmp_path: Path) -> None:
    assert checkpoints.find_resumable(tmp_path, "never", say_nothing) is None
    assert checkpoints.find_resumable(tmp_path, "auto", say_nothing) is None
    save(accelerator, tmp_path, 1)
    with pytest.raises(UserError, match="has checkpoints"):
        checkpoints.find_resumable(tmp_path, "never", say_nothing)
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoints.find_resumable(tmp_path, str(tmp_path / "nowhere"), say_nothing)
