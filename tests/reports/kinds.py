"""Inputs by kind of fault, each with its right value: what is read, or the reason why it is rejected.

`python -m tests.reports.kinds` tries them all and prints a table: kind, tried, right, wrong without a word.
"""

import contextlib
import io
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tests.reports.inputs_pictures import FORMS, FRAMES, NAMES, SPLITS_AND_IDS
from tests.reports.inputs_text import CELLS, ENCODINGS, QUOTING
from tests.reports.making import Input

INPUTS = [*QUOTING, *ENCODINGS, *CELLS, *FORMS, *FRAMES, *NAMES, *SPLITS_AND_IDS]


def outcome(given: Input, folder: Path) -> tuple[list[tuple[Any, ...]] | None, str]:
    """The prepared rows (sentence, area, split), None where it was rejected, and what was said."""
    from amltrain.commands.prepare import main

    said = io.StringIO()
    try:
        arguments = given.write(folder)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main([*arguments, "--name", "mine", "--output", str(folder / "prepared"), "--workers", "1"])
    except SystemExit:
        return None, said.getvalue()
    except Exception as error:  # a fault of ours, which is never right
        return None, f"CRASH {type(error).__name__}: {error}"
    return _prepared(folder / "prepared/mine"), said.getvalue()


def _prepared(folder: Path) -> list[tuple[Any, ...]]:
    from amltrain.data.images import decode_image
    from amltrain.data.segmentation import decode_mask

    found = []
    for path in sorted(folder.glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            pixels = np.asarray(decode_image(row["image"]["bytes"], "x", (row["height"], row["width"])))
            for referent in row["referents"]:
                made = decode_mask(referent["mask"])
                red = bool(made.any()) and float(pixels[made > 0][:, 0].mean()) > 190
                for sentence in referent["sentences"]:
                    split = path.name.partition("-")[0]
                    found.append((sentence["raw"], int(made.sum()), split, "red" if red else "elsewhere"))
    return found


def is_right(given: Input, found: list[tuple[Any, ...]] | None, said: str) -> bool:
    """Whether an outcome is the right one: the rows, or a message that has the reason, and never a crash."""
    if "CRASH" in said or "Traceback" in said:
        return False
    if isinstance(given.right, str):
        return given.right in said and (found is None or given.right.startswith("note:"))
    return found is not None and sorted(row[: len(given.right[0])] for row in found) == sorted(given.right)


def main_table() -> None:
    """Try every input, and print the table and what is wrong."""
    tried, right, silent = Counter[str](), Counter[str](), Counter[str]()
    for given in INPUTS:
        with tempfile.TemporaryDirectory() as folder:
            found, said = outcome(given, Path(folder))
        fits = is_right(given, found, said)
        tried[given.kind] += 1
        right[given.kind] += fits
        silent[given.kind] += not fits and found is not None
        if not fits:
            print(f"wrong: {given.kind}: {given.name}: {found} {said.strip()[-160:]!r}", file=sys.stderr)
    for kind, count in tried.items():
        print(f"| {kind} | {count} | {right[kind]} | {silent[kind]} |")
    print(f"| all | {tried.total()} | {right.total()} | {silent.total()} |")


if __name__ == "__main__":
    main_table()
