"""One run per output folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from amltrain.checkpoints import lock as locks
from amltrain.checkpoints.lock import OutputLock
from amltrain.checkpoints.resume import prepare_output
from amltrain.commands.train import read_run
from amltrain.errors import UserError
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
