"""What a user may get wrong. The command lines print it in one line; anything else is our bug and keeps its trace."""

import difflib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
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
    """End the program with one line on stderr: a UserError with code 2, Ctrl-C with 130, SIGTERM and SIGHUP with 143.

    Of several processes the first prints what a signal did to all. An error of a disk is a sentence too.
    """
    try:
        with _ended_by_signals():
            yield
    except UserError as error:
        message = str(error).rsplit(f"{UserError.__name__}: ", 1)[-1]  # a loader's worker wraps it in its own trace
        if not _is_said_elsewhere(error):
            print(f"error: {plain(message.strip())}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        sentence = disk_sentence(error)
        if sentence is None:
            raise
        print(f"error: {plain(sentence)}", file=sys.stderr)
        raise SystemExit(2) from None
    except _EndedError as end:
        _say_once(f"ended by {signal.Signals(end.number).name}; run again")
        raise SystemExit(128 + end.number) from None
    except KeyboardInterrupt:
        _say_once("interrupted")
        raise SystemExit(CTRL_C_EXIT_CODE) from None


class _EndedError(BaseException):
    """A signal asked to end. Not a SystemExit, which argument parsers and libraries raise and catch."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Leave by an exception on SIGTERM and SIGHUP, so that loader processes and temporary files end with us."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise _EndedError(number)

    with _handling([n for n in ENDING if signal.getsignal(n) is signal.SIG_DFL], leave):
        yield


@contextmanager
def _handling(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle signals inside the block; only the main thread can."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers} if main else {}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def signals_held() -> Iterator[None]:
    """Let signals wait for the end of the block, which forks: an exception in a hook of a fork is printed and lost.

    A process that is forked inside takes none of them for its own.
    """
    held: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        held.append(number)

    with _handling([n for n in SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)], note):
        yield
    for number in held[:1]:
        signal.raise_signal(number)


def _say_once(line: str) -> None:
    """Print what all processes of a run have to say."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


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
ENDING = tuple(n for n in SIGNALS if n.name in ("SIGTERM", "SIGHUP"))


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Leave with the requeue exit code on SIGTERM, SIGUSR1 and SIGHUP: for a start-up that has nothing to save."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(REQUEUE_EXIT_CODE)

    with _handling([n for n in SIGNALS if n != signal.SIGINT and signal.getsignal(n) is not signal.SIG_IGN], leave):
        yield


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_NAMES = ("EIO", "ESTALE", "ETIMEDOUT", "ENXIO", "EREMOTEIO", "EHOSTDOWN")
FAILING = tuple(getattr(errno, name) for name in _NAMES if hasattr(errno, name))
"""What a disk or a network file system answers that is broken or out of reach."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What a file system without file locks (some network file systems) answers to one that asks for a lock."""


def cure(error: OSError, otherwise: str = "choose another folder") -> str:
    """What to do about a file that could not be written, by the cause. Nothing is ever advised to be deleted."""
    if error.errno in NO_LOCKS:
        return f"this file system has no file locks: choose a folder on a disk that has them ({otherwise})"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"free up space, or {otherwise}"
    if error.errno in FORBIDDEN:
        return f"make it writable, or {otherwise}"
    if error.errno in FAILING:
        return f"the disk or the network file system fails: check it, or {otherwise}"
    return otherwise


def disk_sentence(error: OSError) -> str | None:
    """One sentence for an error of a disk that no reader or writer has named; None for another error."""
    if error.errno not in (*NO_ROOM, *FAILING, errno.EROFS):
        return None
    name = error.filename or "a file, or what the output goes to"
    return f"cannot read or write {name}: {error.strerror}; {cure(error, 'run again')}"
