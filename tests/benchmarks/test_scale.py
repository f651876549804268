"""The command that measures large data, on small data."""

import numpy as np
import pytest

from benchmarks.scale import deal_rows, main, sampler_rows


@pytest.mark.slow
def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--images", "130", "--draws", "1000", "--step", "70", "--processes", "4", "--steps", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("650 sentences of 130 images") for line in lines[4:6]] == [1, 1]
    assert lines[4].startswith("| index, memory-mapped |") and lines[-1].startswith("| deal, streamed |")


def test_every_process_gets_as_many_samples() -> None:
    mapped, streamed = deal_rows(images=700, processes=64, steps=5)
    assert mapped[1] == "64 processes, 5 steps: 40 samples"
    assert streamed[1].startswith("64 processes, 5 steps: 40 samples, ")


def test_a_resume_orders_one_epoch() -> None:
    order, _, resume = sampler_rows(draws=1000, step=999)
    assert np.isfinite(float(resume[2])) and order[1] == "1,000 draws"
