"""What a user may get wrong. The command lines print it in one line; anything else is our bug and keeps its trace."""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input. The message is one sentence or two: what is wrong, in which file, row, flag or key, and the fix."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """For a command line: a UserError ends the program with its message alone on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        message = str(error).rsplit(f"{UserError.__name__}: ", 1)[-1]  # a loader's worker wraps it in its own trace
        print(f"error: {message.strip()}", file=sys.stderr)
        raise SystemExit(2) from None


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a name that is not in a table: lists close matches, or everything when nothing is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(names)}."
    return UserError(f"unknown {kind} {name!r}; {hint}")
