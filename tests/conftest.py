"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start programs run first: they take longest, and at the end one worker would wait for the other."""
    items.sort(key=lambda item: item.path.parent.name not in ("training", "e2e"))


def find_shared() -> Path | None:
    """The folder with recorded tensors and real images, which the repository does not hold; None when it is absent."""
    folder = Path(os.environ.get("AMLTRAIN_SHARED", REPOSITORY.parent / "shared"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    folder = find_shared()
    if folder is None:
        pytest.skip("the recorded tensors are not here (set AMLTRAIN_SHARED)")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few prepared RefShapes scenes: 20 for training, 4 in every other split."""
    from amltrain.data.prepare import prepare
    from amltrain.data.sources.shapes import SPLIT_SIZES, write_refshapes

    root = tmp_path_factory.mktemp("shapes")
    sizes = dict.fromkeys(SPLIT_SIZES, 4) | {"train": 20}
    write_refshapes(root / "source", split_sizes=sizes, progress=False)
    prepare("refshapes", root / "source", root / "prepared", progress=False)
    return root / "prepared"
