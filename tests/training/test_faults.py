"""A few of the faults of `python -m tests.training.faults`, once each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import failing_calls, fuzz
from tests.training.faults import FAULTS, table, try_faults

SOME = (
    "kill -9 in a save: manifest written",
    "SIGUSR1",
    "disk full in a save",
    "loader process killed",
    "unreadable image",
)


def test_runs_end_as_if_nothing_had_happened(shapes: Path, tmp_path: Path) -> None:
    outcomes = try_faults(SOME, 1, shapes, tmp_path)
    found = {name: (outcome.struck, outcome.equal, outcome.wrong) for name, outcome in outcomes.items()}
    assert found == dict.fromkeys(SOME, (1, 1, []))
    assert len(table(outcomes).splitlines()) == len(SOME) + 3
    assert len(FAULTS) > 12


@pytest.mark.parametrize("only", ["rename", "log.jsonl", pytest.param("", marks=pytest.mark.slow)])
def test_a_call_that_fails_is_a_sentence_and_the_run_goes_on(tmp_path: Path, only: str) -> None:
    """Every call that writes, by a library that the system loads before its own; `only` some of them."""
    library = failing_calls.build(tmp_path)
    if library is None:
        pytest.skip("there is no C compiler to build the library with")
    environment = {**os.environ, failing_calls.LIBRARY: str(library), "LD_PRELOAD": str(library)}
    command = [sys.executable, "-m", "tests.training.failing_calls", "--only", only]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 answered wrongly" in done.stdout and "right" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "count"), [(1, 200), (2, 100)])
def test_random_faults_that_nobody_chose(shapes: Path, tmp_path: Path, processes: int, count: int) -> None:
    counts = fuzz.rounds(shapes, tmp_path, seed=0, count=count, processes=processes)
    assert (counts["right"], counts["wrong"]) == (count, 0)
