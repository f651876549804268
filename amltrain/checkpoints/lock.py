"""One run per output folder: a lock file that names its owner.

The lock is stale, and the next run takes it over, when its process has ended (same host) or when it was not renewed for
`STALE_AFTER` seconds (another host or container, whose processes cannot be seen from here).
"""

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from amltrain.errors import UserError
from amltrain.files import write_text
from amltrain.run_folder import LOCK_FILE

RENEW_EVERY = 15.0
STALE_AFTER = 120.0


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
            with self.path.open("x") as file:
                file.write(own)
        except FileExistsError:
            owner = _read(self.path)
            if owner is not None and _alive(owner, self.path):
                raise UserError(
                    f"{self.path.parent} is in use by process {owner.get('pid')} on {owner.get('host')}; wait until it "
                    f"ends, stop it, or choose another --output (if no such run exists, remove {self.path})"
                ) from None
            write_text(self.path, own)
            time.sleep(0.05)  # another run may have taken it over at the same moment: the last one has it
            if self.path.read_text(encoding="utf-8") != own:
                raise UserError(f"{self.path.parent} was just taken by another run; choose another --output") from None
        self._held = True
        threading.Thread(target=self._renew, name="lock", daemon=True).start()

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


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pids": _pid_space(), "pid": pid, "started": _started(pid)}


def _read(path: Path) -> dict[str, Any] | None:
    """The owner; None for a lock that is truncated or missing."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
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
