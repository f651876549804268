"""Let every call that writes fail once, each in a run of its own; then the run is started again until it ends.

    python -m tests.training.failing_calls [--every N] [--errors EIO,ENOSPC] [--only TEXT]

A run is right if it ends by itself, or with one sentence and exit code 2, and if the next starts give the weights, the
optimizer and the log of a run in which nothing failed, bit for bit. Needs a C compiler: the calls fail in a library
that is loaded before the system's own (failing_calls.c).
"""

import argparse
import ctypes
import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

SOURCE = Path(__file__).with_suffix(".c")
LIBRARY = "AMLTRAIN_FAILING_CALLS"
ERRORS = ("EIO", "ENOSPC", "EDQUOT", "ESTALE", "ETIMEDOUT", "EROFS", "EACCES")
RUN = (
    *("--train.max_steps", "4", "--train.log_every", "1", "--train.global_batch_size", "4"),
    *("--evaluation.every_steps", "2", "--evaluation.max_samples", "4", "--evaluation.pictures", "1"),
    *("--checkpoint.every_steps", "2", "--checkpoint.keep", "1"),
)
LONGEST = 60.0
"""Seconds that a run of a few steps may take: after that it hangs."""


def build(folder: Path) -> Path | None:
    """Compile the library; None where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "failing_calls.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def preload(module: str, folder: Path) -> None:
    """Start the program again with the library, which must be there before Python starts; nothing where it is."""
    if LIBRARY in os.environ:
        return
    library = build(folder)
    if library is None:
        sys.exit("no C compiler")
    again = [sys.executable, "-m", module, *sys.argv[1:]]
    names = {LIBRARY: str(library), "LD_PRELOAD": str(library)}
    sys.exit(subprocess.run(again, env={**os.environ, **names}, check=False).returncode)


class EndedError(RuntimeError):
    """A run did not end as it should."""


def start(
    prepared: Path,
    output: Path,
    log: Path,
    *,
    number: int = 0,
    error: int = 0,
    stays: bool = False,
    calls: Path | None = None,
) -> int:
    """Train in a fork of this process and return its exit code. number: which call that writes fails (0: none)."""

    def train() -> None:
        from amltrain.commands.train import main
        from tests.training.runs import arguments

        main(arguments(prepared, output, *RUN))

    return forked(train, output, log, number=number, error=error, stays=stays, calls=calls)


def forked(
    action: Callable[[], None],
    below: Path,
    log: Path,
    *,
    number: int = 0,
    error: int = 0,
    stays: bool = False,
    calls: Path | None = None,
) -> int:
    """Call in a fork of this process, in which the N-th call that writes below a folder fails; returns the exit code.

    stays: all later ones fail too. calls: file that gets the list of them. Raises EndedError after `LONGEST` seconds.
    """
    child = os.fork()
    if child == 0:
        _act(action, below, log, number, error, stays, calls)
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise EndedError(f"hangs after {LONGEST:g} s")


def _act(
    action: Callable[[], None], below: Path, log: Path, number: int, error: int, stays: bool, calls: Path | None
) -> None:
    code = 1
    try:
        torch.set_num_threads(1)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        listing = -1 if calls is None else os.open(calls, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        ctypes.CDLL(os.environ[LIBRARY]).amltrain_arm(os.fsencode(below), number, error, int(stays), listing)
        action()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as fault:
        import traceback

        traceback.print_exception(fault)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_state(output: Path) -> dict[str, object]:
    """Weights, optimizer and log of a finished run."""
    from tests.training.runs import logged

    last = output / "last"
    files = {name: load_file(last / name) for name in ("model/model.safetensors", "state/optimizer.safetensors")}
    tensors = {f"{name}:{key}": value for name, content in files.items() for key, value in content.items()}
    return {"tensors": tensors, "numbers": (last / "state/optimizer.json").read_text(), "log": logged(output)}


def same(one: dict, other: dict) -> bool:
    a, b = one["tensors"], other["tensors"]
    equal = a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    return equal and one["numbers"] == other["numbers"] and one["log"] == other["log"]


def places(calls: Path, every: int, only: str) -> list[tuple[int, str]]:
    """One call of each kind (what is called, on which file without its numbers), and every N-th of the others."""
    known: dict[str, int] = {}
    chosen = []
    for line in calls.read_text().splitlines():
        number, call, path = line.split(" ", 2)
        kind = f"{call} {re.sub(r'[0-9]+', 'N', path)}"
        known[kind] = known.get(kind, 0) + 1
        if only in kind and (known[kind] == 1 or (every and int(number) % every == 0)):
            chosen.append((int(number), f"{call} {path}"))
    return chosen


def misanswered(code: int, said: str) -> str:
    """What is wrong with the end of a program in which a call failed: no traceback, one sentence and code 2, or 0."""
    sentences = [line for line in said.splitlines() if line.startswith("error: ")]
    if "Traceback" in said or "Exception ignored" in said:
        return f"traceback: {said[-1500:]}"
    if code not in (0, 2):
        return f"exit code {code}: {said[-500:]}"
    if code == 2 and (len(sentences) != 1 or len(sentences[0]) > 600):
        return f"{len(sentences)} sentences: {said[-500:]}"
    return f"exit code 0 in spite of: {sentences[0]}" if code == 0 and sentences else ""


def judge(prepared: Path, folder: Path, whole: dict, number: int, error: str, stays: bool) -> str:
    """Let one call fail, then go on; what is wrong, or an empty text."""
    output, log = folder / "run", folder / "log"
    try:
        code = start(prepared, output, log, number=number, error=getattr(errno, error), stays=stays)
        if fault := misanswered(code, log.read_text(errors="replace")):
            return fault
        for _ in range(2):
            if code == 0:
                break
            code = start(prepared, output, log)
        if code:
            return f"cannot go on, exit code {code}: {log.read_text(errors='replace')[-500:]}"
        return "" if same(whole, end_state(output)) else "another end state"
    except EndedError as end:
        return str(end)


def walk(prepared: Path, scratch: Path, *, every: int, errors: Sequence[str], only: str) -> Iterator[tuple[str, str]]:
    """Yield (call and error, what is wrong or an empty text) for every chosen call."""
    folder = scratch / "whole"
    folder.mkdir()
    assert start(prepared, folder / "run", folder / "log", calls=folder / "calls") == 0, (folder / "log").read_text()
    whole = end_state(folder / "run")
    for position, (number, place) in enumerate(places(folder / "calls", every, only)):
        error = errors[position % len(errors)]
        folder = scratch / f"{number}"
        folder.mkdir()
        yield f"{error} in {place}", judge(prepared, folder, whole, number, error, stays=position % 3 == 2)
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=0, help="also every N-th of the calls of a kind met before")
    parser.add_argument("--errors", default=",".join(ERRORS))
    parser.add_argument("--only", default="", help="calls whose name or path contains this")
    parser.add_argument("--prepared", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="failing-calls-") as name:
        scratch = Path(name)
        preload("tests.training.failing_calls", scratch)
        prepared = options.prepared or _shapes(scratch)
        from amltrain.training import trainer  # noqa: F401 - once, before the forks

        wrong = count = 0
        for place, fault in walk(
            prepared, scratch, every=options.every, errors=options.errors.split(","), only=options.only
        ):
            count, wrong = count + 1, wrong + bool(fault)
            print(f"{'WRONG' if fault else 'right'}  {place}  {fault}", flush=True)
        print(f"{count} calls failed, {wrong} answered wrongly")
        sys.exit(bool(wrong))


def _shapes(scratch: Path) -> Path:
    from amltrain.data.prepare import prepare
    from amltrain.data.sources.shapes import SPLIT_SIZES, write_refshapes

    write_refshapes(scratch / "source", split_sizes=dict.fromkeys(SPLIT_SIZES, 4) | {"train": 12}, progress=False)
    prepare("refshapes", scratch / "source", scratch / "prepared", progress=False)
    return scratch / "prepared"


if __name__ == "__main__":
    main()
