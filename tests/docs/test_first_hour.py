"""The commands of the tutorial and of the page on own data, run in order, with short runs."""

import importlib
import os
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from amltrain.cli import COMMANDS
from tests.training.runs import FORKS

ROOT = Path(__file__).resolve().parents[2]
SHORT = {
    "train": "--data.shapes.train 16 --data.shapes.evaluation 4 --data.workers 0 --train.max_steps 2 "
    "--train.global_batch_size 4 --evaluation.every_steps 2 --evaluation.pictures 2"
}
"""Flags on top of those of the page."""


def commands(page: str, blocks: slice) -> list[list[str]]:
    """The `amltrain` lines of a page's bash blocks, as words."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[blocks]
    lines = [line for block in found for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("amltrain ")]


def follow(page: str, folder: Path, blocks: slice = slice(None)) -> None:
    """Run every command in a process of its own, in that folder."""
    for words in commands(page, blocks):
        arguments = [*words[2:], *shlex.split(SHORT.get(words[1], ""))]
        process = FORKS.Process(target=run, args=(words[1], arguments, folder))
        process.start()
        process.join()
        assert process.exitcode == 0, f"{' '.join(words)}\n{(folder / 'log').read_text()[-3000:]}"


def run(name: str, arguments: list[str], folder: Path) -> None:
    os.chdir(folder)
    with open("log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    importlib.import_module(COMMANDS[name][0]).main(arguments)


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path) -> None:
    page = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    [config] = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "mine.yaml").write_text(config)
    follow("docs/tutorial.md", tmp_path)
    assert (tmp_path / "runs/first/best/model/model.safetensors").is_file()
    assert "lr: 0.0002" in (tmp_path / "log").read_text()  # of --print_config


@pytest.mark.slow
def test_own_data(tmp_path: Path) -> None:
    photos, rows = tmp_path / "photos", ["image,sentence,mask,split"]
    photos.mkdir()
    for number, split in enumerate(["train"] * 6 + ["val"] * 2 + ["test"] * 2):
        name = "street" if number == 0 else f"{number}"
        image = Image.new("RGB", (80, 60), "white")
        ImageDraw.Draw(image).rectangle((10, 10, 30, 40), fill="red")
        image.save(photos / f"{name}.jpg")
        rows.append(f'{name}.jpg,the red car,"[10, 10, 21, 31]",{split}')
    (tmp_path / "my.csv").write_text("\n".join(rows) + "\n")
    follow("docs/data.md", tmp_path, slice(1))
    assert list(tmp_path.glob("predictions/**/*.png"))
