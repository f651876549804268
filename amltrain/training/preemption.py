"""Requests to stop: SIGTERM, SIGUSR1 or SIGHUP from a scheduler or terminal, a time limit, a lost launcher, or Ctrl-C.

A request is only noted. The loop looks at it together with all other processes, saves, and leaves with exit code 75
(EX_TEMPFAIL: try again later), so that the next start resumes there. While there is nothing to save (start-up,
evaluation) a run leaves at once. Launchers of several processes turn every exit code into 1, so the file `requeue` in
the output folder carries the same message. Ctrl-C saves too and leaves with 130, which no scheduler takes for a request
to queue the run again; a second Ctrl-C ends the run immediately.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from amltrain.run_folder import mark_requeue

REQUEUE_EXIT_CODE = 75
CTRL_C, CTRL_C_EXIT_CODE = signal.SIGINT.name, 130
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
LAUNCHER_CHECK = 1.0
"""Seconds between looks at whether the launcher still lives."""


class Preemption:
    """Whether this process was asked to stop, while it listens. `reason` is None until it was."""

    def __init__(self, time_limit_hours: float | None = None) -> None:
        self.reason: str | None = None
        self.deadline = None if time_limit_hours is None else time.monotonic() + time_limit_hours * 3600
        self._leave: Callable[[], None] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals instead of dying from them; afterwards they do what they did before.

        A signal that is ignored stays ignored: `nohup` starts programs so.
        """
        wanted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in wanted}
        ended = threading.Event()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=self._watch_launcher, args=(os.getppid(), ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def leaving_at_once(self, leave: Callable[[], None], *, time_limit: bool = False) -> Iterator[None]:
        """Call `leave`, which raises, as soon as there is a request, without waiting for the next step.

        time_limit: a time that is over counts too. It does not before the first step: every start must make progress.
        """
        outer, self._leave = self._leave, leave
        try:
            if self.reason is not None or (time_limit and self.requested()):
                leave()
            yield
        finally:
            self._leave = outer

    def leave(self, output: Path) -> NoReturn:
        """End this process with the exit code of the reason."""
        if self.reason == CTRL_C:
            raise SystemExit(CTRL_C_EXIT_CODE)
        mark_requeue(output, True)  # by whichever process leaves: another may not get that far
        raise SystemExit(REQUEUE_EXIT_CODE)

    def requested(self) -> bool:
        """Whether this process was asked to stop, or its time is over."""
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = "the time limit"
        return self.reason is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == CTRL_C:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
        if self._leave is not None:
            self._leave()

    def _watch_launcher(self, launcher: int, ended: threading.Event) -> None:
        """Request a stop when torchrun has ended: its processes would outlive it and block the next start."""
        while not ended.wait(LAUNCHER_CHECK):
            if os.getppid() != launcher:
                self.reason = self.reason or "the launcher is gone"
                return


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Leave with the requeue exit code on SIGTERM, SIGUSR1 and SIGHUP: for a start-up that has nothing to save."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(REQUEUE_EXIT_CODE)

    wanted = [n for n in SIGNALS if n != signal.SIGINT and signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
