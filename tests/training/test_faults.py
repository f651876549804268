"""A few of the faults of `python -m tests.training.faults`, once each."""

from pathlib import Path

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
