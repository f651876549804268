"""The measurement of leaks sees one, and runs at small size."""

import os
from pathlib import Path

import pytest

from benchmarks.command import main
from benchmarks.leaks import Held, held, row


def test_what_is_kept_is_seen() -> None:
    before = held()
    kept = [os.open(os.devnull, os.O_RDONLY) for _ in range(7)]
    memory = bytearray(64 * 2**20)
    memory[:: 2**10] = b"x" * len(memory[:: 2**10])
    after = held()
    for file in kept:
        os.close(file)
    assert after.files - before.files == 7 and after.memory - before.memory > 50
    assert held().files == before.files


def test_the_second_half_counts() -> None:
    seen = [Held(100, 5, 2), Held(180, 6, 2), Held(200, 6, 2), Held(203.5, 6, 3)]
    assert row("x", seen) == "| x | 100 | 200 | 204 | +3.5 | 6 -> 6 | 2 -> 3 |"


def test_at_small_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    main(["leaks", "--steps", "10", "--sentences", "1", "--pictures", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")][2:] == [
        "| 10 training steps",
        "| 349 sentences, 1 evaluations",
        "| 2 pictures",
    ]
