"""The demo in a real browser: an image is uploaded, a sentence typed, and two models answer."""

import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from amltrain.commands.demo import main
from amltrain.data.text import SentenceTokenizer
from amltrain.errors import UserError
from amltrain.hub.model_folder import Pretrained
from amltrain.inference.demo import Contender, build_page, launch, load_contenders, respond
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


def png(side: tuple[int, int], mode: str = "1") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, side).save(buffer, "PNG")
    return buffer.getvalue()


UPLOADS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a picture of 900 million pixels": (lambda: png((30000, 30000)), "too many pixels"),
    "a picture of 36 million pixels": (lambda: png((6000, 6000)), "36 million pixels"),
    "one long row": (lambda: png((65000, 500)), "32 million pixels"),
    "too many bytes": (lambda: png((8, 8)) + bytes(21 * 2**20), "21 MiB"),
    "empty": (lambda: b"", "not an image"),
    "text": (lambda: b"hello", "not an image"),
    "a page": (lambda: b"<html><script>alert(1)</script>", "not an image"),
    "a drawing": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "an archive": (lambda: b"PK\x03\x04" + bytes(100), "not an image"),
    "a pickle": (lambda: b"\x80\x04K\x01.", "not an image"),
    "a program": (lambda: b"\x7fELF" + bytes(100), "not an image"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image|cannot be read"),
    "half a picture": (lambda: png((64, 64), "RGB")[:60], "not an image|cannot be read"),
    "a header alone": (lambda: png((64, 64))[:33], "not an image|cannot be read"),
    "no width": (lambda: png((64, 64)).replace(bytes([0, 0, 0, 64]), bytes(4), 1), "not an image|cannot be read"),
    "zeros": (lambda: bytes(1000), "not an image"),
}


@pytest.mark.parametrize("name", UPLOADS)
def test_an_upload_that_is_no_picture_of_a_fair_size(contenders: list[Contender], tmp_path: Path, name: str) -> None:
    content, said = UPLOADS[name]
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.png").write_bytes(content())
    before = time.monotonic()
    with pytest.raises(UserError, match=said) as caught:
        respond(contenders, str(tmp_path / "secret" / "x.png"), "the red square")
    assert time.monotonic() - before < 2
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("upload", "sentence", "said"),
    [
        (None, "", "Upload an image, and type what to look for"),
        (None, "x", "Upload an image first"),
        ("", "x", "Upload an image first"),
        ("x.png", "", "Type what to look for"),
        ("x.png", " \n\t", "Type what to look for"),
        ("x.png", None, "Type what to look for"),
        ("x.png", 7, "Type what to look for"),
        ("x.png", ["a"], "Type what to look for"),
        ("x.png", "a" * 501, "501 characters"),
        ("x.png", "red " * 500_000, "2,000,000 characters"),
        ("nowhere.png", "x", "not an image"),
        (".", "x", "not an image"),
        ("/dev/zero", "x", "not an image"),
    ],
)
def test_a_request_that_is_none(contenders: list[Contender], upload: Any, sentence: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        respond(contenders, upload, sentence)


@pytest.mark.parametrize("sentence", ["a" * 500, "\x00\x1b[2J red", "😀 square", "\u202esquare", "a\nb"])
def test_a_strange_sentence_is_answered(contenders: list[Contender], tmp_path: Path, sentence: str) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "x.png")
    assert all("probability" in shown.text for shown in respond(contenders, str(tmp_path / "x.png"), sentence))


@pytest.mark.slow
def test_twenty_clients_at_once_are_served(contenders: list[Contender], tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    from gradio_client import Client, handle_file

    Image.new("RGB", (640, 480), (200, 30, 30)).save(tmp_path / "red.jpg")
    (tmp_path / "bomb.png").write_bytes(png((30000, 30000)))
    page = build_page(contenders[1:])
    address = launch(page, "127.0.0.1", None, block=False)
    try:
        clients = [Client(address, verbose=False) for _ in range(20)]

        def ask(number: int) -> float:
            before = time.monotonic()
            hostile = number % 5 == 0  # some upload too much, and nobody waits for them
            upload = handle_file(tmp_path / ("bomb.png" if hostile else "red.jpg"))
            if hostile:
                with pytest.raises(Exception, match="pixels"):
                    clients[number].predict(upload, "the red square", api_name="/segment")
            else:
                assert "probability" in clients[number].predict(upload, "the red square", api_name="/segment")[1]
            return time.monotonic() - before

        with ThreadPoolExecutor(20) as pool:
            seconds = list(pool.map(ask, range(20)))
        print(f"20 clients: slowest {max(seconds):.2f} s")
        assert max(seconds) < 3, seconds
    finally:
        page.close()


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
