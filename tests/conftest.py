"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

REPOSITORY = Path(__file__).resolve().parents[1]


FULL_LANE = (
    "attack",
    "benchmarks",
    "checkpoints/test_resume.py",
    "checkpoints/test_state.py",
    "commands/test_demo.py",
    "commands/test_rank.py",
    "commands/test_report.py",
    "data/sources/test_trained.py",
    "data/test_download.py",
    "data/test_fuzz.py",
    "data/test_hostile.py",
    "data/test_integrity.py",
    "docs/test_doors.py",
    "docs/test_first_hour.py",
    "docs/test_notebooks.py",
    "docs/test_tables.py",
    "e2e",
    "evaluation/test_evaluator.py",
    "evaluation/test_image_cache.py",
    "evaluation/test_one_decision.py",
    "evaluation/test_perturbations.py",
    "hub/test_base_weights.py",
    "hub/test_push.py",
    "hub/test_push_data.py",
    "inference/test_export.py",
    "inference/test_merge.py",
    "launch",
    "methods/aml/test_calibration.py",
    "methods/aml/test_scorers.py",
    "methods/aml/test_step.py",
    "models",
    "null_gpu",
    "paper",
    "parity",
    "report",
    "training",
)
"""Files and folders that only `make test-all` runs: they train, start programs, or repeat a check for every model."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the full lane; files that start programs run first, so that no worker waits at the end."""
    for item in items:
        place = item.path.relative_to(REPOSITORY / "tests").as_posix()
        if any(place == entry or place.startswith(f"{entry}/") for entry in FULL_LANE):
            item.add_marker(pytest.mark.full)
    items.sort(key=lambda item: item.path.parent.name not in ("training", "e2e") and item.path.name != "test_smoke.py")


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
