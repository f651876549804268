"""launch/predict.py as a user runs it, on a model folder written here."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amltrain.data.text import SentenceTokenizer
from amltrain.hub.model_folder import save_pretrained
from amltrain.models import create_model, model_info


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    info = model_info("caris_tiny")
    tokenizer = SentenceTokenizer.train_wordpiece(["red square", "the blue circle on the left"], 24)
    kwargs = {"vocab_size": tokenizer.vocab_size}
    return save_pretrained(
        tmp_path_factory.mktemp("run") / "model",
        name="caris_tiny",
        kwargs=kwargs,
        state_dict=create_model("caris_tiny", **kwargs).state_dict(),
        preprocess=info.preprocess,
        protocol=info.protocol,
        tokenizer=tokenizer,
    )


def predict(repository: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, repository / "launch" / "predict.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    return subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.e2e
def test_masks_and_overlays_at_the_images_own_size(repository: Path, checkpoint: Path, tmp_path: Path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 130, 3), np.uint8)).save(tmp_path / "scene.jpg")
    run = predict(
        repository, "--checkpoint", checkpoint.parent, "--image", tmp_path / "scene.jpg",
        "--sentence", "red square", "The blue circle!", "the blue circle", "--output", tmp_path / "out",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("probability") == 3
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    stems = {"scene-red-square", "scene-the-blue-circle", "scene-the-blue-circle-2"}
    pictures = {f"{kind}/{s}.png" for kind in ("masks", "overlays") for s in stems}
    assert written == pictures | {"predictions.jsonl"}
    mask = Image.open(tmp_path / "out" / "masks" / "scene-red-square.png")
    assert mask.size == (130, 70)
    assert set(np.unique(np.asarray(mask))) <= {0, 255}


@pytest.mark.e2e
def test_mistakes_get_one_line(repository: Path, checkpoint: Path, tmp_path: Path):
    run = predict(repository, "--checkpoint", checkpoint, "--image", tmp_path / "none.jpg", "--sentence", "x")
    assert run.returncode == 2
    assert run.stderr == f"error: there is no image {tmp_path / 'none.jpg'}\n"
    assert run.stdout == ""
