"""One run per output folder: a lock file that names its owner.

The lock is stale, and the next run takes it over, when its process has ended (same host) or when it was not renewed for
`STALE_AFTER` seconds (another host or container, whose processes cannot be seen from here).

A lock appears with its content in one moment: it is written under another name and linked. Starts at the same time look
at it one after the other, where the file system can lock a folder; elsewhere a stale lock is renamed by whoever takes
it, which only one can. Then the lock is read back.
"""

import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from amltrain.errors import UserError
from amltrain.files import NO_LOCKS, lock_file
from amltrain.run_folder import LOCK_FILE

RENEW_EVERY = 15.0
STALE_AFTER = 120.0
SETTLE = 0.2
"""Seconds before a lock is read back where starts cannot be put in an order."""


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
            with _one_at_a_time(self.path.parent) as ordered:
                if not _link(self.path, own):
                    self._take_over(own)
                if not ordered:
                    time.sleep(SETTLE)  # whoever renamed this lock by mistake puts it back
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
                with suppress(FileExistsError):
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
def _one_at_a_time(folder: Path) -> Iterator[bool]:
    """Let one process at a time look at the lock; False where the file system cannot lock a folder."""
    if sys.platform == "win32":  # a folder cannot be opened there
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            lock_file(descriptor)
            ordered = True
        except OSError as error:
            if error.errno not in (*NO_LOCKS, errno.EBADF, errno.EINVAL):  # EBADF: NFS locks only what may be written
                raise
            ordered = False
        yield ordered
    finally:
        os.close(descriptor)


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
    probe = path.with_name(f"{LOCK_FILE}.{own['host']}.{own['pid']}")  # its time stamp comes from the same clock
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime < STALE_AFTER
    except OSError:
        return False
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
