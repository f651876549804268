"""Every block of code on a page runs, or is named here with the reason why it cannot."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from amltrain.commands.train import read_run
from amltrain.data.text import SentenceTokenizer
from amltrain.hub.model_folder import save_pretrained
from amltrain.models import create_model, model_info

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "BENCHMARKS.md", "docker/README.md"]
PAGES += [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {
    "bash": "tests/test_documented_commands.py takes every command; tests/e2e runs them",
    "docs/finetune.md python 0": "tests/test_finetune.py does the same with random weights",
    "docs/adding-": "tests/docs/test_doors.py follows these pages from outside the package",
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
        elsewhere = page.startswith("docs/adding-") or f"{page} python {number}" in ELSEWHERE
        assert elsewhere or f'("{page}"' in ours, (page, number)


@pytest.mark.parametrize(("page", "number", "code"), blocks("yaml"))
def test_a_config_is_taken(page: str, number: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.startswith("docs/adding-"):
        pytest.skip(ELSEWHERE["docs/adding-"])
    (tmp_path / "mine.yaml").write_text(code)
    monkeypatch.chdir(tmp_path)
    run = read_run(["--config", "mine.yaml"])
    assert run.output is not None


def test_the_predictor_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, info = tmp_path / "runs/photos/best/model", model_info("lavt_tiny")
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
