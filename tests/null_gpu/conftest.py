"""The null GPU, built once per test process."""

import pytest

from tests.null_gpu.device import NullGPU, missing


@pytest.fixture(scope="session")
def null_gpu(tmp_path_factory: pytest.TempPathFactory) -> NullGPU:
    if reason := missing():
        pytest.skip(reason)
    return NullGPU(tmp_path_factory.mktemp("null_gpu"))
