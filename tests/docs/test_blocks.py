"""Every block of code on a page runs, or is named here with the reason why it cannot."""

import importlib
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from amltrain.commands.train import read_run
from amltrain.data import augment
from amltrain.data.catalog import DATASETS, DatasetSpec
from amltrain.data.text import SentenceTokenizer
from amltrain.hub.model_folder import save_pretrained
from amltrain.losses import create_loss
from amltrain.methods import METHODS
from amltrain.methods import registry as methods
from amltrain.models import create_model, model_info
from amltrain.records import Draw
from tests.methods.aml.test_method import make_batch

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "BENCHMARKS.md", "docker/README.md"]
PAGES += [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {
    "bash": "tests/test_documented_commands.py takes every command; tests/e2e runs them",
    "docs/adding-a-metric.md python 0": "tests/evaluation/test_metrics.py runs it",
    "docs/adding-a-baseline.md python 0": "a sketch: its bodies are left out",
    "docs/adding-an-augmentation.md python 1": "the line that a user adds to amltrain/data/__init__.py",
}


def blocks(language: str) -> list[tuple[str, int, str]]:
    """(page, number on the page, code) of every fenced block in a language."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        codes = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        found += [(page, number, code) for number, code in enumerate(codes)]
    return found


def block(page: str, number: int = 0) -> str:
    return next(code for name, index, code in blocks("python") if (name, index) == (page, number))


def test_every_block_has_a_language_and_a_test() -> None:
    """A new block needs a test below, or a line in ELSEWHERE."""
    for page in PAGES:
        opened = re.findall(r"^```(\w*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert set(opened) <= {"", "bash", "python", "yaml"}, page
        assert opened[::2].count("") == 0, f"{page} has a block without a language"
    ours = Path(__file__).read_text()
    for page, number, _ in blocks("python"):
        assert f"{page} python {number}" in ELSEWHERE or f'("{page}"' in ours, (page, number)


@pytest.mark.parametrize(("page", "number", "code"), blocks("yaml"))
def test_a_config_is_taken(page: str, number: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "mirror" in code:  # the augmentation that its page writes
        code = code.replace("mirror", "mosaic")
    (tmp_path / "mine.yaml").write_text(code)
    monkeypatch.chdir(tmp_path)
    run = read_run(["--config", "mine.yaml"])
    assert run.output is not None


def test_the_predictor_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, info = tmp_path / "runs/NAME/best/model", model_info("lavt_tiny")
    tokenizer = SentenceTokenizer.train_wordpiece(["the man in the red shirt"], max_tokens=8)
    model = create_model("lavt_tiny", vocab_size=tokenizer.vocab_size)
    save_pretrained(
        folder,
        name="lavt_tiny",
        kwargs={"vocab_size": tokenizer.vocab_size},
        state_dict=model.state_dict(),
        preprocess=info.preprocess,
        protocol=info.protocol,
        tokenizer=tokenizer,
    )
    Image.new("RGB", (90, 60), "red").save("photo.jpg")
    names: dict[str, Any] = {}
    exec(compile(block("README.md"), "README.md", "exec"), names)
    assert names["found"].mask.shape == (60, 90)


def test_the_rows_of_the_page_on_data(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RefShapes in the place of RefCOCO."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shapes, tmp_path / "prepared")
    names: dict[str, Any] = {}
    exec(compile(block("docs/data.md").replace('"refcoco"', '"refshapes"'), "data.md", "exec"), names)
    mask = names["decode_mask"](names["rows"][0]["referents"][0]["mask"])
    assert mask.any() and mask.shape == names["rows"][0]["image"].size[::-1]


def import_page(page: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the first block of a page as a file NAME.py."""
    (folder / f"{name}.py").write_text(block(page))
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    del sys.modules[name]
    monkeypatch.setitem(sys.modules, name, module)  # until the test ends
    return module


def test_the_method_of_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in methods.list_methods():
        methods.method_info(name)  # register all before the tables are copied
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    monkeypatch.setattr(methods, "_OPTIONS", dict(methods._OPTIONS))
    monkeypatch.setitem(METHODS, "my_method", "my_method")
    options = import_page("docs/adding-a-method.md", "my_method", tmp_path, monkeypatch).MyOptions
    info = model_info("lavt_tiny")
    loss = create_loss(info.loss, **info.loss_kwargs)
    batch, model = make_batch(), create_model("lavt_tiny")
    whole = methods.build_method("my_method", model, loss, options(weight=1.0)).eval()(batch)["loss"]
    half = methods.build_method("my_method", model, loss, options(weight=0.5)).eval()(batch)["loss"]
    torch.testing.assert_close(half, whole / 2)
    run = read_run(["--config", "quickstart", "--method", "my_method", "--my_method.weight", "0.3"])
    assert run.method_options.weight == 0.3


def test_the_augmentation_of_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "_AUGMENTATIONS", dict(augment._AUGMENTATIONS))
    import_page("docs/adding-an-augmentation.md", "mirror", tmp_path, monkeypatch)
    run = read_run(["--config", "quickstart", "--data.augment", "[mirror]", "--mirror.probability", "0.3"])
    assert run.augment_options["mirror"].probability == 0.3
    image, mask = Image.new("RGB", (4, 2)), np.eye(2, 4, dtype=np.uint8)
    image.putpixel((0, 0), (255, 0, 0))
    options = type(run.augment_options["mirror"])(probability=1.0)
    [apply] = augment.build_augmentations(["mirror"], {"mirror": options})
    dataset = SimpleNamespace(seed=0)
    mirrored = apply(augment.RawSample(image, mask, "the red one", None), Draw(0, 0), dataset)
    kept = apply(augment.RawSample(image, mask, "the left one", None), Draw(0, 0), dataset)
    assert mirrored.image.getpixel((3, 0)) == (255, 0, 0) and (mirrored.mask == mask[:, ::-1]).all()
    assert kept.image is image


def test_the_line_of_the_page_on_data_sets() -> None:
    names: dict[str, Any] = {"DatasetSpec": DatasetSpec}
    table = eval("{" + block("docs/adding-a-dataset.md") + "}", names)
    assert isinstance(table["my-refer"], type(DATASETS["refcoco"]))
    assert table["my-refer"].splits == ("train", "val", "test")
