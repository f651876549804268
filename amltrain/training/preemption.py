"""Being asked to stop: SIGTERM or SIGUSR1 from a scheduler, the run's own time limit, or Ctrl-C.

A request is only noted here. The loop looks at it once a step, together with all other processes, saves and leaves with
exit code 75 (EX_TEMPFAIL: try again later), so that the next start goes on exactly there. While there is
nothing to save, which is while it evaluates, a run leaves at once. Launchers of several processes turn every exit code
into 1; the file `requeue` in the output folder says the same to them. Ctrl-C saves too, and leaves with 130, which no
scheduler takes for a wish to go on; a second one ends the run where it stands.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

REQUEUE_EXIT_CODE = 75
REQUEUE_FILE = "requeue"
CTRL_C, CTRL_C_EXIT_CODE = signal.SIGINT.name, 130
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption:
    """Whether this process was asked to stop, while it listens. `reason` is None until it was."""

    def __init__(self, time_limit_hours: float | None = None) -> None:
        self.reason: str | None = None
        self.deadline = None if time_limit_hours is None else time.monotonic() + time_limit_hours * 3600
        self._leave: Callable[[], None] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals instead of dying of them; afterwards they do what they did before."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def leaving_at_once(self, leave: Callable[[], None]) -> Iterator[None]:
        """Call `leave`, which raises, as soon as there is a request, without waiting for the next step."""
        self._leave = leave
        try:
            if self.requested():
                leave()
            yield
        finally:
            self._leave = None

    def leave(self, output: Path) -> NoReturn:
        """End this process with the exit code that says why."""
        if self.reason == CTRL_C:
            raise SystemExit(CTRL_C_EXIT_CODE)
        mark_requeue(output, True)  # by whichever process leaves: another may not get that far
        raise SystemExit(REQUEUE_EXIT_CODE)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == CTRL_C:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
        if self._leave is not None:
            self._leave()

    def requested(self) -> bool:
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = "the time limit"
        return self.reason is not None


def mark_requeue(output: Path, wanted: bool) -> None:
    """Tell a job script whether to queue the run again."""
    if wanted:
        (output / REQUEUE_FILE).touch()
    else:
        (output / REQUEUE_FILE).unlink(missing_ok=True)
