"""One run per output folder: a lock file that names its owner.

The lock is stale, and the next run takes it over, when its process has ended (same host) or when it was not renewed for
`STALE_AFTER` seconds (another host or container, whose processes cannot be seen from here).

Starts at the same time look at the lock one after the other: the folder is locked, or, where the file system cannot do
that, another folder is made inside it, which only one start can. A lock appears with its content in one moment: it is
written under another name and linked. A stale lock is renamed by whoever takes it. Then the lock is read back.
"""

import errno
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from amltrain.errors import NO_LOCKS, UserError
from amltrain.files import lock_file
from amltrain.run_folder import LOCK_FILE

RENEW_EVERY = 15.0
STALE_AFTER = 120.0
TURN_TAKES = 30.0
"""Seconds after which the folder of a start's turn counts as left behind by one that was killed; a turn takes a few
milliseconds."""


class OutputLock:
    """Holds OUTPUT/.lock from `acquire` to `release`, and renews it in the background."""

    def __init__(self, output: Path) -> None:
        self.path = output / LOCK_FILE
        self._released = threading.Event()
        self._held = False

    def acquire(self) -> None:
        """Take the lock, which may be a stale one. Raises UserError, naming the owner, if another run holds it."""
        own = json.dumps(_identity())
        try:
            with _one_at_a_time(self.path.parent):
                if not _link(self.path, own):
                    self._take_over(own)
                if self.path.read_text(encoding="utf-8") != own:
                    raise UserError(f"{self.path.parent} was just taken by another run; choose another --output")
        except OSError as error:
            where = error.filename or self.path
            raise UserError(
                f"cannot lock the run's folder with {where}: {error.strerror or error}; choose another --output"
            ) from error
        self._held = True
        threading.Thread(target=self._renew, name="lock", daemon=True).start()

    def _take_over(self, own: str) -> None:
        """Replace a stale lock; one of those who try at the same moment can. Raises UserError for all others."""
        taken = UserError(f"{self.path.parent} was just taken by another run; choose another --output")
        judged = _content(self.path)
        owner = _parse(judged)
        if owner is not None and _alive(owner, self.path):
            raise UserError(
                f"{self.path.parent} is in use by process {owner.get('pid')} on {owner.get('host')}; wait until it "
                f"ends, stop it, or choose another --output (if no such run exists, remove {self.path})"
            )
        aside = self.path.with_name(f"{LOCK_FILE}.{socket.gethostname()}.{os.getpid()}.old")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            raise taken from None
        try:
            if _content(aside) != judged:  # a new lock, of a run that was faster
                with suppress(OSError):
                    os.link(aside, self.path)
                raise taken
        finally:
            aside.unlink(missing_ok=True)
        if not _link(self.path, own):
            raise taken

    def release(self) -> None:
        """Give the lock back; does nothing if this run does not hold it."""
        self._released.set()
        if self._held and _read(self.path) == _identity():
            with suppress(OSError):  # the folder became read-only, which the run has reported
                self.path.unlink()
        self._held = False

    def _renew(self) -> None:
        while not self._released.wait(RENEW_EVERY):
            with suppress(OSError):  # the folder is missing or read-only: the next save reports it
                os.utime(self.path)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one start at a time look at the lock; others wait here."""
    if sys.platform == "win32":  # a folder cannot be opened there
        with _turn(folder):
            yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            lock_file(descriptor)
        except OSError as error:
            if error.errno not in (*NO_LOCKS, errno.EBADF, errno.EINVAL):  # EBADF: NFS locks only what may be written
                raise
            with _turn(folder):
                yield
        else:
            yield
    finally:
        os.close(descriptor)


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """The same where the file system has no locks: a folder that only one start can make."""
    turn, end = folder / f"{LOCK_FILE}.turn", time.monotonic() + 2 * TURN_TAKES
    while True:
        try:
            turn.mkdir()
            break
        except FileExistsError as error:
            if TURN_TAKES < _age(turn) < math.inf:
                with suppress(OSError):
                    turn.rmdir()
            if time.monotonic() > end:
                raise OSError(errno.EBUSY, "another start does not end; remove this folder", str(turn)) from error
            time.sleep(0.02)
    try:
        yield
    finally:
        with suppress(OSError):
            turn.rmdir()


def _link(path: Path, text: str) -> bool:
    """Create a lock with its content in one moment; False if there is one already."""
    aside = path.with_name(f"{LOCK_FILE}.{socket.gethostname()}.{os.getpid()}.new")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)
        except FileExistsError:
            return _content(path) == text  # NFS may answer so after it has made the link
        except OSError as error:
            if error.errno not in (*NO_LOCKS, errno.EPERM, errno.EMLINK):  # file systems without links
                raise
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                return False
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
        return True
    finally:
        aside.unlink(missing_ok=True)


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pids": _pid_space(), "pid": pid, "started": _started(pid)}


def _read(path: Path) -> dict[str, Any] | None:
    """The owner; None for a lock that is truncated or missing."""
    return _parse(_content(path))


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _parse(text: str) -> dict[str, Any] | None:
    try:
        owner = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return owner if isinstance(owner, dict) else None


def _alive(owner: dict[str, Any], path: Path) -> bool:
    own = _identity()
    if (owner.get("host"), owner.get("pids")) == (own["host"], own["pids"]):
        pid = owner.get("pid")
        return isinstance(pid, int) and pid != own["pid"] and _started(pid) == owner.get("started") is not None
    return _age(path) < STALE_AFTER


def _age(path: Path) -> float:
    """Seconds since a file or folder was changed, by the clock of its file system; infinite for a missing one."""
    probe = path.with_name(f"{LOCK_FILE}.{socket.gethostname()}.{os.getpid()}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return math.inf
    finally:
        probe.unlink(missing_ok=True)


def _pid_space() -> str:
    """Identify the container on a host: process numbers differ between containers."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _runs(pid: int) -> bool:
    """Whether a process of that number is there. On Windows, `os.kill(pid, 0)` would end it."""
    if sys.platform == "win32":
        import ctypes

        process = ctypes.windll.kernel32.OpenProcess(0x1000, False, pid)  # the right to ask, and nothing else
        if process:
            ctypes.windll.kernel32.CloseHandle(process)
        return bool(process)
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # it is there, and another user's
    return True


def _started(pid: int) -> str | None:
    """When a process started; None if it has ended. Where there is no /proc, any process of that number counts."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        return "running" if _runs(pid) else None
    return None if fields[0] in "ZX" else fields[19]
