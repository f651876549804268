"""What a user may get wrong. The command lines print it in one line; anything else is our bug and keeps its trace."""

import difflib
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

PLAIN_TYPES = (bool, int, float, str, type(None))
UNIONS = (Union, UnionType)


class UserError(ValueError):
    """Bad input. The message is one sentence or two: what is wrong, in which file, row, flag or key, and the fix.

    raised_by: "one" process; every process of the "machine", or of the "run": then the first of them prints it.
    """

    raised_by: Literal["one", "machine", "run"] = "one"


def shared_error(message: str) -> UserError:
    """An error that every process of a run raises: the main one prints it, so that it is read once."""
    error = UserError(message)
    error.raised_by = "run"
    return error


_CONTROLS = {c: "\N{REPLACEMENT CHARACTER}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\n\r"}
_CONTROLS |= dict.fromkeys(
    (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029), "\N{REPLACEMENT CHARACTER}"
)
_CONTROLS |= dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}")
"""Characters that a terminal or an editor obeys instead of showing: escapes, directions of writing, half characters."""
_CURSOR_UP = "\x1b[A"


def plain(text: str) -> str:
    """One line that anything can show: a file's name, a sentence or a value of a stranger's file inside our text."""
    return " ".join(text.translate(_CONTROLS).replace("\t", " ").splitlines())


class PlainStream:
    """A text stream on which nothing commands the terminal; progress bars may move the cursor up and back."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text without its control characters."""
        parts = text.split(_CURSOR_UP) if set(text) <= _BAR_ONLY else [text]
        self._stream.write(_CURSOR_UP.join(part.translate(_CONTROLS) for part in parts))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_BAR_ONLY = set("\x1b[A\n\r")


@contextmanager
def same_on_every_process() -> Iterator[None]:
    """Mark a UserError as one that the other processes of this machine raise as well: they have the same arguments."""
    try:
        yield
    except UserError as error:
        error.raised_by = "machine"
        raise


def _is_said_elsewhere(error: UserError) -> bool:
    first = {"one": None, "machine": "LOCAL_RANK", "run": "RANK"}[error.raised_by]
    return first is not None and os.environ.get(first, "0") != "0"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program on a UserError with only its message on stderr and code 2, and on Ctrl-C with 130."""
    try:
        yield
    except UserError as error:
        message = str(error).rsplit(f"{UserError.__name__}: ", 1)[-1]  # a loader's worker wraps it in its own trace
        if not _is_said_elsewhere(error):
            print(f"error: {plain(message.strip())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a name that is not in a table: lists close matches, or everything when nothing is close."""
    names = sorted(known)
    close = [known for known in names if name and known.startswith(name)][:5]
    close = close or difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(names)}."
    shown = name if len(name) <= 100 else f"{name[:100]}..."
    return UserError(f"unknown {kind} {shown!r}; {hint}")


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message, or its type if the message is empty."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of a JSON file is of an annotated type: plain types, Literals and unions of them are checked."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in UNIONS:
        return any(fits(value, option) for option in get_args(kind))
    if kind not in PLAIN_TYPES:
        return True
    return type(value) is kind or (kind is float and type(value) is int)


def type_name(kind: Any) -> str:
    """An annotated type in words: "int", "square or letterbox or null"."""
    if get_origin(kind) is Literal or get_origin(kind) in UNIONS:
        return " or ".join(type_name(option) for option in get_args(kind))
    if kind is type(None):
        return "null"
    return kind.__name__ if isinstance(kind, type) else str(kind)


REQUEUE_EXIT_CODE = 75


CTRL_C, CTRL_C_EXIT_CODE = signal.SIGINT.name, 130


SIGNALS = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if hasattr(signal, n))


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
