"""Run cases, each in a process of its own that is forked from this one, so that a crash or a hang is that case's."""

import csv
import json
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
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from amltrain.config.schema import RunConfig
from amltrain.data.rows import StreamedRows
from amltrain.data.segmentation import decode_mask
from amltrain.errors import UserError
from tests.attack.cases import Case, Place, build

LONGEST = 60.0
"""Seconds after which a case hangs; more on a machine that does other things as well."""
MEMORY = 4 * 2**30
"""Bytes that a case may take beyond what this process has."""
LETTERS = 300
"""Of what was read, at most."""
SECRET = b"nobody may read this"


class Outcome(NamedTuple):
    """found: rejected, used, or what went wrong. said: the error, of one line where it is right; of what was used, the
    value that was read.
    """

    case: Case
    found: str
    said: str
    seconds: float

    @property
    def right(self) -> bool:
        if self.case.expected != "decided":
            return self.found == self.case.expected
        return decision(self) == DECIDED.get((self.case.category, written(self.case.name)))


def written(text: str) -> str:
    """Text as a file of letters holds it."""
    return text.encode("ascii", "backslashreplace").decode().replace("\0", "\\x00")


def decision(outcome: Outcome) -> tuple[str, str]:
    """What decided.csv keeps of an outcome: rejected or used, and what was read."""
    return outcome.found, written(outcome.said) if outcome.found == "used" else ""


def read_decisions() -> dict[tuple[str, str], tuple[str, str]]:
    """(category, name) -> (rejected or used, what was read)."""
    with DECISIONS.open(newline="") as file:
        return {(row[0], row[1]): (row[2], row[3]) for row in csv.reader(file)}


def write_decisions(outcomes: Sequence[Outcome]) -> None:
    """Write what was found for every case that is decided by the file; a person reads the difference."""
    with DECISIONS.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerows(
            (o.case.category, written(o.case.name), *decision(o)) for o in outcomes if o.case.expected == "decided"
        )


DECISIONS = Path(__file__).with_name("decided.csv")
DECIDED = read_decisions()


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
        answer = ("used", shown(case.attack(place), place))
    except UserError as error:
        said = str(error)
        short = len(said) < 3000 and "\n" not in said.strip()
        answer = ("rejected" if short else "a long message", said)
    except BaseException:
        answer = ("traceback", traceback.format_exc())
    os.write(writing, pickle.dumps((answer[0], answer[1].encode(errors="replace").decode()[-30_000:])))
    os._exit(0)


def shown(value: Any, place: Place) -> str:
    """What a reader returned, where it is a run, a mask or prepared data: settings that are no defaults; pixels; the
    sentences and pixels of every referent.
    """
    if isinstance(value, RunConfig):
        default = dict(leaves(asdict(RunConfig())))
        return json.dumps({key: left for key, left in leaves(asdict(value)) if left != default.get(key)})[:LETTERS]
    if isinstance(value, np.ndarray):
        return f"{'x'.join(map(str, value.shape))}, sum {int(value.sum())}"
    if isinstance(value, dict) and isinstance(value.get("splits"), dict) and "contents" in value:
        return "; ".join(_prepared(place.folder / "out", value["dataset"], split) for split in value["splits"])[
            :LETTERS
        ]
    return ""


def leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _prepared(folder: Path, dataset: str, split: str) -> str:
    rows = StreamedRows([str(path) for path in sorted((folder / dataset).glob(f"{split}-*.parquet"))])
    told = []
    for row in rows.columns.column("referents").to_pylist():
        for referent in row:
            texts = [sentence["raw"][:20] for sentence in referent["sentences"]]
            told.append(f"{referent['ref_id']} {texts} {int(decode_mask(referent['mask']).sum())}")
    return f"{split}: {', '.join(told)}"


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
