"""Files of FSDP and DeepSpeed that hold code, wherever it is hidden, are refused before anything unpickles them."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from amltrain.checkpoints.harmless import check_harmless
from amltrain.errors import UserError
from tests.traps import Touch, old_format, saved, tar_that_starts_as_a_pickle

WEIGHTS = {"weights": torch.arange(3.0), "shape": torch.Size([2]), "type": torch.float32, "step": np.float64(2)}


def archive_before_archive(trap: Any) -> bytes:
    return saved(trap) + saved(WEIGHTS)


def pickle_before_archive(trap: Any) -> bytes:
    return pickle.dumps(trap) + saved(WEIGHTS)


def entry_twice(trap: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for content in (trap, {"a": 1}):
            archive.writestr("archive/data.pkl", pickle.dumps(content))
            archive.writestr("archive/version", "3")
    return file.getvalue()


def object_array(_: Any) -> bytes:
    return saved(np.array([1, "a"], dtype=object))


def record_array(_: Any) -> bytes:
    return saved(np.zeros(1, dtype=[("a", "O")]))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "random_states_0.pkl", "x/__0_0.distcp", "x/.metadata"])
@pytest.mark.parametrize(
    "make",
    [
        saved, pickle.dumps, archive_before_archive, pickle_before_archive, old_format, tar_that_starts_as_a_pickle,
        entry_twice, object_array, record_array,
    ],
)  # fmt: skip
def test_code_is_found_wherever_it_hides(name: str, make: Callable[[Any], bytes], tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / "state" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(make(Touch(marker)))
    try:
        check_harmless(tmp_path / "state")
    except UserError as error:
        refused = str(error)
        assert any(why in refused for why in ("would run posix.mkdir", "is damaged"))
    else:  # torch reads the other entry
        assert make is entry_twice and torch.load(path, weights_only=False) == {"a": 1}
    assert not marker.exists()


def test_plain_files_pass(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("pytorch_model")
    (tmp_path / "zero_to_fp32.py").write_text("never run")
    check_harmless(tmp_path)


def test_every_piece_of_a_distributed_checkpoint_is_looked_at(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    dcp.save({"a": torch.ones(2), "lr": 0.1, "b": torch.ones(3)}, checkpoint_id=tmp_path / "plain", no_dist=True)
    check_harmless(tmp_path / "plain")
    dcp.save({"trap": Touch(marker), "b": torch.ones(3)}, checkpoint_id=tmp_path / "code", no_dist=True)
    with pytest.raises(UserError, match=r"would run posix\.mkdir"):
        check_harmless(tmp_path / "code")
    assert not marker.exists()
