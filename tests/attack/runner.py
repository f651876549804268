"""Run cases, each in a process of its own that is forked from this one, so that a crash or a hang is that case's."""

import os
import pickle
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from amltrain.errors import UserError
from tests.attack.cases import Case, Place, build

LONGEST = 60.0
"""Seconds after which a case hangs; more on a machine that does other things as well."""
MEMORY = 4 * 2**30
"""Bytes that a case may take beyond what this process has."""
SECRET = b"nobody may read this"


class Outcome(NamedTuple):
    """found: rejected, used, or what went wrong. said: the error, of one line where it is right."""

    case: Case
    found: str
    said: str
    seconds: float

    @property
    def right(self) -> bool:
        return self.found in {"either": ("rejected", "used")}.get(self.case.expected, (self.case.expected,))


@contextmanager
def grounds() -> Iterator[Place]:
    """The shared files, in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, root, prepared = build(folder)
        (folder / "secret").write_bytes(SECRET)
        (folder / "work").mkdir()
        yield Place(folder / "work", model, root, prepared, folder / "executed", folder / "secret")


def run(case: Case, shared: Place) -> Outcome:
    """Run one case and judge it."""
    folder = shared.folder / "case"
    folder.mkdir()
    start = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _attack(case, shared._replace(folder=folder), writing)
    os.close(writing)
    found, said = _wait(child, reading)
    os.close(reading)
    if shared.marker.exists():
        found, said = "code executed", f"{found}: {said}"
        shutil.rmtree(shared.marker)
    shutil.rmtree(folder, ignore_errors=True)
    return Outcome(case, found, said, time.monotonic() - start)


def _attack(case: Case, place: Place, writing: int) -> None:
    """In the child; never returns."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.chdir(place.folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        case.attack(place)
        answer = ("used", "")
    except UserError as error:
        said = str(error)
        short = len(said) < 3000 and "\n" not in said.strip()
        answer = ("rejected" if short else "a long message", said)
    except BaseException:
        answer = ("traceback", traceback.format_exc())
    os.write(writing, pickle.dumps((answer[0], answer[1].encode(errors="replace").decode()[-30_000:])))
    os._exit(0)


def _wait(child: int, reading: int) -> tuple[str, str]:
    content = b""
    deadline = time.monotonic() + LONGEST * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
        piece = os.read(reading, 65536)
        if not piece:
            break
        content += piece
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hang", f"no answer after {LONGEST:g} s"
    _, status = os.waitpid(child, 0)
    if status:
        return "crash", f"wait status {status}"
    return pickle.loads(content)


def table(outcomes: Sequence[Outcome]) -> str:
    """Tried and right, by category."""
    tried, right = Counter[str](), Counter[str]()
    longest: dict[str, float] = {}
    for outcome in outcomes:
        tried[outcome.case.category] += 1
        right[outcome.case.category] += outcome.right
        longest[outcome.case.category] = max(longest.get(outcome.case.category, 0), outcome.seconds)
    rows = ["| category | tried | right | longest, s |", "| --- | --: | --: | --: |"]
    rows += [f"| {name} | {count} | {right[name]} | {longest[name]:.1f} |" for name, count in tried.items()]
    rows.append(f"| all | {tried.total()} | {right.total()} | {max(longest.values(), default=0):.1f} |")
    return "\n".join(rows)
