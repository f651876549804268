"""The demo in a real browser: an image is uploaded, a sentence typed, and two models answer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amltrain.commands.demo import main
from amltrain.data.text import SentenceTokenizer
from amltrain.errors import UserError
from amltrain.hub.model_folder import Pretrained
from amltrain.inference.demo import Contender, build_page, launch, load_contenders
from amltrain.inference.predictor import Predictor
from amltrain.methods.aml.masker import Aligner
from amltrain.models import create_model, model_info
from tests.browser import chromium


@pytest.fixture(scope="module")
def contenders() -> list[Contender]:
    torch.manual_seed(0)
    info = model_info("caris_tiny")
    tokenizer = SentenceTokenizer.train_wordpiece(["the red square"], 24)
    model = create_model("caris_tiny", vocab_size=tokenizer.vocab_size)
    predictor = Predictor(Pretrained(model, info.preprocess, info.protocol, tokenizer, "caris_tiny", {}))
    return [Contender(predictor, Aligner(model), "first"), Contender(predictor, None, "second")]


def test_what_is_shown(contenders: list[Contender]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 100, 3), np.uint8))
    shown = contenders[0](image, "the red square")
    assert shown.mask.size == (320, 192)
    assert shown.alignment is not None and shown.alignment.size == (320, 192)
    assert "probability" in shown.text
    assert contenders[1](image, "x").alignment is None
    with pytest.raises(UserError, match="names 3 models"):
        load_contenders(["a", "b", "c"], None)


def test_a_port_that_cannot_be_is_rejected_before_models_are_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--checkpoint", "nothing", "--port", "70000"])
    assert "--port is 70000 and must lie between 1 and 65535" in capsys.readouterr().err


@pytest.mark.slow
def test_in_a_browser(contenders: list[Contender], tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    Image.new("RGB", (100, 60), (200, 30, 30)).save(tmp_path / "red.png")
    with chromium() as browser:
        page = build_page(contenders)
        address = launch(page, "127.0.0.1", None, block=False)
        try:
            tab = browser.new_page()
            tab.goto(address)
            tab.set_input_files("input[type=file]", tmp_path / "red.png")
            tab.locator("#sentence textarea, #sentence input").first.fill("the red square")
            tab.locator("#segment").click()
            tab.wait_for_function("document.querySelectorAll('.answer p').length == 2", timeout=20_000)
            answers = tab.locator(".answer").all_text_contents()
            assert all("probability" in answer for answer in answers)
            assert tab.locator("text=first").count() and tab.locator("text=second").count()
        finally:
            page.close()
