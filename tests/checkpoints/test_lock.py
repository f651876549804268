"""One run per output folder."""

import errno
import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from amltrain.checkpoints import lock as locks
from amltrain.checkpoints.lock import OutputLock
from amltrain.checkpoints.resume import prepare_output
from amltrain.commands.train import read_run
from amltrain.errors import UserError
from amltrain.files import locked
from amltrain.run_folder import LOCK_FILE


def test_a_second_run_is_rejected_and_told_who_has_the_folder(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = locks._identity() | {"pid": owner.pid, "started": locks._started(owner.pid)}
    (tmp_path / LOCK_FILE).write_text(json.dumps(identity))
    with pytest.raises(UserError, match=rf"in use by process {owner.pid} on {identity['host']}"):
        OutputLock(tmp_path).acquire()
    owner.kill()
    owner.wait()
    lock = OutputLock(tmp_path)
    lock.acquire()  # its owner has ended
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("age", "rejected"), [(10, True), (1000, False)])
def test_a_lock_of_another_host_holds_while_it_is_renewed(tmp_path: Path, age: float, rejected: bool) -> None:
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps({"host": "elsewhere", "pids": "", "pid": 1, "started": "1"}))
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))
    lock = OutputLock(tmp_path)
    if rejected:
        with pytest.raises(UserError, match="process 1 on elsewhere"):
            lock.acquire()
    else:
        lock.acquire()
        lock.release()


def test_a_lock_that_was_cut_off_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("{")
    lock = OutputLock(tmp_path)
    lock.acquire()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_rejected_start_leaves_no_folder_but_an_older_one_as_it_was(tmp_path: Path) -> None:
    for output in (tmp_path / "new", tmp_path / "old"):
        config = read_run(["--output", str(output), "--resume", str(tmp_path / "nowhere")])
        if output.name == "old":
            output.mkdir()
            (output / "notes.txt").write_text("mine")
        with pytest.raises(UserError, match="not a checkpoint"):
            prepare_output(config, print, OutputLock(output))
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "notes.txt").read_text() == "mine"


def try_to_take(output: Path, start: str, results: Any, fails: str) -> None:
    if fails:
        deny(fails)
    while not Path(start).exists():
        pass
    try:
        OutputLock(output).acquire()
    except UserError as error:
        results.put(str(error))
    else:
        results.put("held")
    time.sleep(0.6)  # alive until all others have tried


def deny(name: str) -> None:
    """The file system has no file locks, or no links, or neither."""
    for what in name.split("+"):
        owner = {"flock": fcntl, "link": os}[what]
        error = {"flock": errno.ENOLCK, "link": errno.EPERM}[what]

        def no(*_: Any, error: int = error, **__: Any) -> None:
            raise OSError(error, os.strerror(error))

        setattr(owner, what, no)


@pytest.mark.parametrize("fails", ["", "flock", "link", "flock+link"])
@pytest.mark.parametrize("stale", ["none", "dead owner", "cut off", "empty", "of long ago"])
def test_of_many_starts_at_once_one_holds_the_lock(tmp_path: Path, stale: str, fails: str) -> None:
    forks = multiprocessing.get_context("fork")
    for number in range(3):
        output = tmp_path / str(number)
        output.mkdir()
        dead = {**locks._identity(), "pid": 2**22 + 7}
        text = {"dead owner": json.dumps(dead), "cut off": '{"host": ', "empty": "", "of long ago": '{"host": "x"}'}
        if stale in text:
            (output / LOCK_FILE).write_text(text[stale])
            os.utime(output / LOCK_FILE, (1, 1))
        results, start = forks.Queue(), tmp_path / f"start{number}"
        tries = [forks.Process(target=try_to_take, args=(output, str(start), results, fails)) for _ in range(6)]
        for process in tries:
            process.start()
        start.touch()
        found = sorted(results.get(timeout=60) for _ in tries)
        for process in tries:
            process.join()
        assert found.count("held") == 1, found
        assert all("is in use by process" in text or "was just taken" in text for text in found if text != "held")
        assert [path.name for path in output.iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize("left_behind", [True, False])
def test_where_folders_cannot_be_locked_a_start_waits_for_another_but_not_for_a_killed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_behind: bool
) -> None:
    def no(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no)
    turn = tmp_path / f"{LOCK_FILE}.turn"
    turn.mkdir()
    if left_behind:
        os.utime(turn, (1, 1))
        lock = OutputLock(tmp_path)
        lock.acquire()
        lock.release()
        assert not list(tmp_path.iterdir())
    else:
        monkeypatch.setattr(locks, "TURN_TAKES", 0.2)
        os.utime(turn, (2**32, 2**32))  # as of one that is still making its turn
        with pytest.raises(UserError, match=r"\.lock\.turn: another start does not end; remove this folder; choose"):
            OutputLock(tmp_path).acquire()
        assert [path.name for path in tmp_path.iterdir()] == [turn.name]


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EDQUOT, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("call", ["link", "rename", "fsync", "open"])
def test_a_lock_that_cannot_be_written_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(error, os.strerror(error), str(tmp_path / LOCK_FILE))

    (tmp_path / LOCK_FILE).write_text("")
    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(UserError, match=r"cannot lock the run's folder with .*; choose another --output"):
            OutputLock(tmp_path).acquire()
    assert {path.name for path in tmp_path.iterdir()} <= {LOCK_FILE}


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO, errno.ESTALE])
def test_a_lock_between_commands_is_named_where_it_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", fail)
    with (
        pytest.raises(UserError, match=rf"cannot lock {tmp_path}/\.x\.lock: {os.strerror(error)}; "),
        locked(tmp_path / "x"),
    ):
        pass
