"""The run that others are compared with."""

from pathlib import Path

import pytest

from tests.training import runs


@pytest.fixture(scope="session")
def whole(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 8 steps, saved every 2."""
    output = tmp_path_factory.mktemp("whole")
    runs.run(shapes, output)
    return output
