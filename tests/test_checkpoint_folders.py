"""Checkpoints are whole or absent, and damage is noticed."""

import json
from pathlib import Path

import pytest

from amltrain import run_folder as checkpoints
from amltrain.errors import UserError


def save(output: Path, step: int) -> Path:
    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").write_bytes(bytes(range(100)))
        (folder / checkpoints.TRAINER_FILE).write_text(json.dumps({"step": step}))

    return checkpoints.write_checkpoint(output, step, write)


def log_nothing(text: str) -> None:
    pass


def test_layout_and_last(tmp_path: Path) -> None:
    save(tmp_path, 4)
    newest = save(tmp_path, 10)
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == ["step-000004", "step-000010"]
    assert (tmp_path / "last").resolve() == newest.resolve()
    assert checkpoints.step_of(tmp_path / "last") == 10
    assert checkpoints.load_trainer_state(newest) == {"step": 10}
    assert not list(tmp_path.glob(".*"))


def test_keep_spares_best_and_last(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        path = save(tmp_path, step)
        if step == 1:
            checkpoints.point(tmp_path, "best", path)
    checkpoints.prune(tmp_path, keep="all")
    assert len(checkpoints.checkpoints(tmp_path)) == 4
    checkpoints.prune(tmp_path, keep=2)
    assert [checkpoints.step_of(p) for p in checkpoints.checkpoints(tmp_path)] == [1, 3, 4]


@pytest.mark.parametrize("hard", [True, False], ids=["hard links", "copies"])
def test_best_and_last_without_the_right_to_make_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard: bool
) -> None:
    """As on Windows, where a link needs a right of its own."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    if not hard:
        monkeypatch.setattr(checkpoints.os, "link", refuse)
    first = save(tmp_path, 1)
    checkpoints.point(tmp_path, "best", first)
    second = save(tmp_path, 2)
    assert [checkpoints.step_of(tmp_path / name) for name in ("best", "last")] == [1, 2]
    assert checkpoints.find_fault(tmp_path / "best") is None
    weights = Path("model") / "model.safetensors"
    assert (second / weights).samefile(tmp_path / "last" / weights) == hard
    checkpoints.prune(tmp_path, keep=1)  # best stays whole when the folder that it was made from goes
    assert checkpoints.checkpoints(tmp_path) == [second] and checkpoints.find_fault(tmp_path / "best") is None
    assert checkpoints.find_resumable(tmp_path, "auto", log_nothing) == second


@pytest.mark.parametrize("damage", ["shorten", "change", "remove", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path: Path, damage: str) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
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
    with pytest.raises(UserError, match=r"damaged|not a checkpoint"):
        checkpoints.find_resumable(tmp_path, str(bad), log_nothing)


def test_a_half_written_checkpoint_is_ignored(tmp_path: Path) -> None:
    good = save(tmp_path, 1)
    (tmp_path / ".step-000002.writing" / "state").mkdir(parents=True)
    assert checkpoints.find_resumable(tmp_path, "auto", log_nothing) == good
    checkpoints.remove_leftovers(tmp_path)
    assert not (tmp_path / ".step-000002.writing").exists()


def test_a_run_is_not_continued_from_its_middle(tmp_path: Path) -> None:
    """The later checkpoints would be taken for the new course's own at the next start."""
    early, late = save(tmp_path, 1), save(tmp_path, 2)
    with pytest.raises(UserError, match=r"continues after step-000001 up to step-000002.*another --output"):
        checkpoints.find_resumable(tmp_path, str(early), log_nothing)
    assert checkpoints.find_resumable(tmp_path, str(tmp_path / "last"), log_nothing) == late.resolve()
    assert checkpoints.find_resumable(tmp_path / "elsewhere", str(early), log_nothing) == early.resolve()


def test_a_step_saved_again_replaces_itself(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-000001" / "model" / "old").touch()
    again = save(tmp_path, 1)
    assert not (again / "model" / "old").exists()
    assert checkpoints.find_fault(again) is None
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_earlier_checkpoints(tmp_path: Path) -> None:
    good = save(tmp_path, 1)

    def full(folder: Path) -> None:
        (folder / "state" / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No space left on device.*saved checkpoints are intact"):
        checkpoints.write_checkpoint(tmp_path, 2, full)
    assert checkpoints.checkpoints(tmp_path) == [good]
    assert checkpoints.find_fault(good) is None
    assert not list(tmp_path.glob(".*"))


def test_resume_never_rejects_to_mix_runs(tmp_path: Path) -> None:
    assert checkpoints.find_resumable(tmp_path, "never", log_nothing) is None
    assert checkpoints.find_resumable(tmp_path, "auto", log_nothing) is None
    save(tmp_path, 1)
    with pytest.raises(UserError, match="has checkpoints"):
        checkpoints.find_resumable(tmp_path, "never", log_nothing)
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoints.find_resumable(tmp_path, str(tmp_path / "nowhere"), log_nothing)


def test_scores_join_a_finished_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 4)
    checkpoints.add_scores(path, {"step": 4, "best": 1.0}, lambda file: file.write_text("[]"))
    assert checkpoints.find_fault(path) is None
    assert checkpoints.load_trainer_state(path) == {"step": 4, "best": 1.0}
    assert (path / "model" / "results.json").is_file()


def test_scores_that_were_cut_off_leave_the_checkpoint_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 4)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_replace_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.add_scores(path, {"step": 4, "best": 1.0}, lambda file: file.write_text("[]"))
    assert checkpoints.find_fault(path) is None
    assert checkpoints.load_trainer_state(path) == {"step": 4}
    checkpoints.add_scores(path, {"step": 4, "best": 2.0}, lambda file: file.write_text("[1]"))
    assert checkpoints.find_fault(path) is None
    assert checkpoints.load_trainer_state(path) == {"step": 4, "best": 2.0}
