"""Synthetic data, drawn and prepared once by the code that prepares real data."""

from pathlib import Path

import datasets
import pytest

from amltrain.data.prepare import prepare
from amltrain.data.sources.shapes import write_refshapes

SPLITS = {"train": 150, "val": 7, "testA": 3, "testB": 3, "test": 3}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with prepared refshapes and refshapes+: 150 training scenes in three row groups."""
    root = tmp_path_factory.mktemp("shapes")
    cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, Path(root / "cache")
    for seed, name in enumerate(("refshapes", "refshapes+")):
        write_refshapes(root / name, name, split_sizes=SPLITS, size=48, seed=seed, progress=False)
        prepare(name, root / name, root / "prepared", progress=False)
    yield str(root / "prepared")
    datasets.config.HF_DATASETS_CACHE = cache
