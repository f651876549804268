"""Every input of `kinds` gives its right value."""

from pathlib import Path

import pytest

from tests.reports.kinds import INPUTS, is_right, outcome
from tests.reports.making import Input


@pytest.mark.parametrize("given", INPUTS, ids=lambda given: f"{given.kind}: {given.name}")
def test_an_input_is_read_rightly_or_rejected_by_name(given: Input, tmp_path: Path) -> None:
    found, said = outcome(given, tmp_path)
    assert is_right(given, found, said), (found, said)
