"""What the pages docs/adding-*.md add, added from outside the package: files in a folder, nothing installed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "my_model": ("baseline", 0),
    "my_method": ("method", 0),
    "mirror": ("augmentation", 0),
    "dice": ("metric", 0),
    "my_refer": ("dataset", 0),
    "my_lines": ("dataset", 1),
    "stop_at": ("callback", 0),
}
"""Name of the file -> page and number of its block."""


def block(page: str, number: int) -> str:
    article = "an" if page[0] in "aeiou" else "a"
    text = (ROOT / "docs" / f"adding-{article}-{page}.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[number]


def amltrain(folder: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """Run the program in a folder that has nothing of the package."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{path}", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-P", "-m", "amltrain", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def done(*arguments: str, folder: Path, path: str = "") -> str:
    ended = amltrain(folder, *arguments, path=path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def imports(*names: str) -> list[str]:
    return [part for name in names for part in ("--import", f"{name}.py")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the pages, and pictures with lines that describe them."""
    folder = tmp_path_factory.mktemp("outside")
    for name, (page, number) in FILES.items():
        (folder / f"{name}.py").write_text(block(page, number))
    data = folder / "data" / "my_lines"
    data.mkdir(parents=True)
    lines, generator = [], np.random.default_rng(0)
    for number in range(8):
        pixels = generator.integers(0, 90, (48, 64, 3), np.uint8)
        mask = np.zeros((48, 64), np.uint8)
        mask[8:30, 4 * number : 4 * number + 20] = 255
        pixels[mask > 0] = (220, 30, 30)
        Image.fromarray(pixels).save(data / f"{number}.jpg")
        Image.fromarray(mask).save(data / f"{number}.png")
        lines.append(f"{number}.jpg\tthe red block\t{number}.png\t{'train' if number < 6 else 'val'}")
    (data / "lines.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """One run with a model, a method, an augmentation, a data set, a metric and a callback from outside."""
    done("data", "prepare", *imports("my_lines"), "--dataset", "my-lines", "--refer_root", "data",
         "--image_root", "data/my_lines", folder=folder)  # fmt: skip
    done(
        "train", *imports(*FILES), "--data.datasets", "[my-lines]", "--model.name", "my_model_tiny", "--method",
        "my_method", "--my_method.weight", "0.3", "--data.augment", "[mirror]", "--mirror.probability", "1",
        "--train.callbacks", "[stop_at]", "--stop_at.loss", "100", "--train.max_steps", "9",
        "--train.global_batch_size", "4", "--data.workers", "0", "--evaluation.best_metric", "Dice",
        "--tracking.trackers", "[]", "--output", "run", "--train.log_every", "1", folder=folder,
    )  # fmt: skip
    return folder / "run"


def test_every_page_has_its_block() -> None:
    pages = {page for page, _ in FILES.values()}
    assert {path.stem.split("-", 2)[2] for path in (ROOT / "docs").glob("adding-*.md")} == pages
    for name, (page, number) in FILES.items():
        compile(block(page, number), f"{name}.py", "exec")


def test_a_run_made_of_them_trains_evaluates_and_records_their_names(trained: Path) -> None:
    config = (trained / "config.yaml").read_text()
    assert all(f"- {name}.py" in config for name in FILES)
    assert (trained / "step-000001").is_dir() and not (trained / "step-000002").exists()  # the callback ended it
    assert float((trained / "lowest_loss.txt").read_text()) < 100
    results = json.loads((trained / "results.json").read_text())["results"]
    assert "Dice" in results[0]["metrics_percent"] and results[0]["dataset"] == "my-lines"
    training = json.loads((trained / "best/model/training.json").read_text())
    assert training["recipe"]["imports"] == [f"{name}.py" for name in FILES]


def test_its_model_is_scored_and_used_with_the_same_files(trained: Path, folder: Path) -> None:
    used = imports("my_model", "my_lines", "dice")
    assert "Dice" in done("evaluate", *used, "--checkpoint", "run", folder=folder)
    picture = str(folder / "data/my_lines/7.jpg")
    flags = ("--checkpoint", "run", "--image", picture, "--sentence", "the red block")
    done("predict", *imports("my_model"), *flags, folder=folder)
    without = amltrain(folder, "predict", *flags)
    assert without.returncode == 2 and without.stderr.count("\n") == 1
    assert "unknown model 'my_model_tiny'" in without.stderr and "--import my_model.py" in without.stderr


def test_a_broken_plugin_breaks_its_own_name_only(folder: Path) -> None:
    (folder / "broken.py").write_text("x = 1\nraise KeyError('a key')\n")
    ended = amltrain(folder, "list", "models", "caris_tiny", "--import", "broken.py")
    assert ended.returncode == 0 and "caris_tiny" in ended.stdout
    assert re.search(r"plugin broken.py was not loaded: .*broken.py, line 2: KeyError: 'a key'", ended.stderr)
    missing = amltrain(folder, "list", "models", "--import", "nowhere.py")
    assert missing.returncode == 2 and missing.stderr == "error: --import: nowhere.py does not exist\n"


def test_an_installed_package_registers_by_its_entry_point(folder: Path, tmp_path: Path) -> None:
    """As pip would install it: a module and its metadata on the path."""
    (tmp_path / "installed_plugin.py").write_text((folder / "my_model.py").read_text())
    metadata = tmp_path / "installed_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: installed-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[amltrain.plugins]\ninstalled = installed_plugin\nbroken = no_such_module\n"
    )
    ended = amltrain(folder, "list", "models", "my_model", path=str(tmp_path))
    assert ended.returncode == 0 and "my_model_tiny" in ended.stdout
    assert "plugin broken was not loaded" in ended.stderr
