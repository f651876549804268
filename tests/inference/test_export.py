"""Exported files give the model's outputs, and run without amltrain."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from amltrain.config.schema import Preprocess
from amltrain.data.text import SentenceTokenizer
from amltrain.data.transforms import MEAN_STD, ImageTransform, View, normalise
from amltrain.errors import UserError
from amltrain.evaluation.masks import original_probability
from amltrain.evaluation.results import named_protocol
from amltrain.hub.model_folder import Pretrained
from amltrain.inference import run_onnx
from amltrain.inference.export import example_inputs, export_folder, export_program, table
from amltrain.inference.predictor import Predictor
from amltrain.models import create_model, list_models, model_info
from amltrain.models.base import RISModel
from amltrain.records import Batch, ModelOutput

NO_ONNX = {"remamber_tiny": "linear_recurrence"}
"""Models without an ONNX form, and what the reason names."""
TINY = [name for name in list_models() if name.endswith("_tiny") and "swin" not in name]


class Small(RISModel):
    """Bright where the image is bright, shifted by the sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(60, 1)
        nn.init.constant_(self.words.weight, 0.1)

    def forward(self, batch: Batch) -> ModelOutput:
        shift = (self.words(batch.input_ids)[..., 0] * batch.text_mask).sum(1)[:, None, None, None]
        margin = 5 * batch.image.mean(1, keepdim=True) + shift
        return ModelOutput(torch.cat([-margin, margin], 1))


class Shrinks(Small):
    """Its output depends on the size of the batch, so the size cannot be left open."""

    def forward(self, batch: Batch) -> ModelOutput:
        count = int(batch.image.shape[0])
        return ModelOutput(super().forward(batch).logits * torch.tensor([float(i + 1) for i in range(count)]).sum())


def pretrained(model: RISModel, resize: str = "square") -> Pretrained:
    tokenizer = SentenceTokenizer.train_wordpiece(["the bright square on the left"], 8)
    preprocess = Preprocess(
        size=48, resize=resize, normalization="half", tokenizer="wordpiece", max_tokens=8, sentence_field="sent"
    )
    return Pretrained(model, preprocess, named_protocol("caris"), tokenizer, "small", {})


def test_a_program_takes_any_batch(tmp_path: Path) -> None:
    rows = export_folder(pretrained(Small()), tmp_path / "out", ["torch"], runs=1)
    assert [r.format for r in rows] == ["PyTorch", "torch.export"]
    assert rows[1].dynamic_batch and rows[1].difference is not None and rows[1].difference < 1e-6
    settings = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (settings["size"], settings["max_tokens"], settings["threshold"]) == (48, 8, 0.5)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert "| torch.export |" in table(rows)
    module = torch.export.load(tmp_path / "out" / "model.pt2").module()
    inputs = example_inputs(pretrained(Small()).preprocess, 5, vocabulary=20)
    assert module(*inputs)[0].shape == (5, 2, 48, 48)


def test_a_batch_size_that_cannot_be_left_open_is_said() -> None:
    program = export_program(Shrinks(), example_inputs(pretrained(Small()).preprocess, 2))
    assert not program.dynamic
    assert program.reason


def test_a_file_that_differs_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amltrain.inference.export.largest_difference", lambda a, b: 0.1)
    with pytest.raises(UserError, match=r"model\.pt2 differs from the model by 0\.1"):
        export_folder(pretrained(Small()), tmp_path / "out", ["torch"], runs=1)


@pytest.mark.parametrize("resize", [pytest.param("square", marks=pytest.mark.slow), "letterbox"])
def test_onnx_runs_with_onnxruntime_alone(tmp_path: Path, resize: str) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    whole = pretrained(Small(), resize)
    rows = export_folder(whole, tmp_path / "out", runs=1)
    assert rows[2].format == "ONNX" and rows[2].difference is not None and rows[2].difference < 1e-5
    scene = np.zeros((60, 100), np.uint8)
    scene[10:40, 20:70] = 255
    Image.fromarray(scene).save(tmp_path / "scene.png")
    command = [sys.executable, "-P", str(tmp_path / "out" / "run_onnx.py"), str(tmp_path / "scene.png"), "the square"]
    command.append(str(tmp_path / "mask.png"))
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": ""}, timeout=60)
    assert run.returncode == 0, run.stderr
    expected = Predictor(whole)(tmp_path / "scene.png", "the square")[0].mask
    found = np.asarray(Image.open(tmp_path / "mask.png")) > 0
    assert expected.any() and found.shape == expected.shape
    assert (found & expected).sum() / (found | expected).sum() > 0.99


@pytest.mark.parametrize(
    ("resize", "interpolation"),
    [
        ("square", "bilinear"),
        ("square", "nearest"),
        ("square", "bicubic"),
        ("square_aliased", "bilinear"),
        ("letterbox", "bicubic"),
        ("longest", "cropped"),
    ],
)
@pytest.mark.parametrize("sides", [(97, 61), (40, 150), (30, 30)])
def test_the_script_prepares_images_and_brings_maps_back_as_the_package_does(
    resize: str, interpolation: str, sides: tuple[int, int]
) -> None:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (*sides, 3), dtype=np.uint8)
    mean, std = (255 * np.array(values) for values in MEAN_STD["clip"])
    settings = {"size": 48, "resize": resize, "interpolation": interpolation, "mean": mean, "std": std}
    pixels, back = run_onnx.prepare(image, settings)
    transform = ImageTransform(48, resize, "clip")
    wanted = transform(Image.fromarray(image))
    levels = (torch.from_numpy(pixels)[0] - normalise(wanted.image, "clip")).abs() * torch.tensor(std)[:, None, None]
    assert (levels > 0.5).float().mean() < 0.002 and levels.max() < 1.5  # a rounding of one level here and there
    logits = torch.from_numpy(generator.standard_normal((2, 12, 12), dtype=np.float32))
    (expected,) = original_probability(logits[None], (48, 48), [wanted.geometry.tolist()], interpolation)
    found = run_onnx.probability(logits.numpy(), back, settings)
    assert np.abs(found - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_the_script_makes_the_second_picture_as_the_package_does(kind: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (97, 61, 3), dtype=np.uint8)
    found = run_onnx.second(image, {"view": [kind, 32]})
    expected = normalise(View(32, kind)(Image.fromarray(image))[0], "clip")
    levels = np.abs(found[0] - expected.numpy()) * 68.5
    assert (levels > 0.5).mean() < 0.002 and levels.max() < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_model_is_exported(name: str, tmp_path: Path) -> None:
    """Both formats, any batch size, the same mask from onnxruntime alone. With `-s`: the rows of docs/export.md."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    info = model_info(name)
    assert info.preprocess.max_tokens is not None
    tokenizer = SentenceTokenizer.train_wordpiece(["the bright square on the left"], info.preprocess.max_tokens)
    whole = Pretrained(create_model(name), info.preprocess, info.protocol, tokenizer, name, {})
    rows = export_folder(whole, tmp_path / "out", runs=10)
    print(f"\n{name}\n{table(rows)}")
    assert [row.format for row in rows] == ["PyTorch", "torch.export", "ONNX"]
    if name in NO_ONNX:
        assert NO_ONNX[name] in rows.pop().note
    for row in rows:
        assert row.difference is not None, row.note
        assert row.difference < 1e-4
        assert row.dynamic_batch, row.note
