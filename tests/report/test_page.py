"""The page is one file without outside references, and works in a browser by keyboard, light and dark."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amltrain.evaluation.results import Results, named_protocol
from amltrain.report.collect import Card, draw_layers, with_earlier
from amltrain.report.curves import histogram, training_charts
from amltrain.report.page import SplitPart, render, write_page
from tests.browser import chromium

SENTENCES = ["the red one", "<script>alert(1)</script> dog", "a dog on the left of the house", 'quote " & dog']


def card(i: int, sentence: str) -> Card:
    mask = np.zeros((20, 30), bool)
    mask[5:15, 5:15] = True
    layers = draw_layers(Image.new("RGB", (30, 20), (90, 90, 90)), mask, mask, np.ones((2, 2), np.float32))
    words = len(sentence.split())
    return Card("refcoco", "val", i, i, i, sentence, words, i / 4, ("best", "worst")[i % 2], "", 30, 20, layers)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    protocol = vars(named_protocol("caris")) | {"size": [448, 448], "metrics": "classic", "no_target_by": ""}
    results = Results("refcoco", "val", {"oIoU": 61.234, "mIoU": float("nan")}, {"samples": 4}, protocol)
    split = SplitPart(results, [histogram("IoU", np.array([0.2]))], [card(i, s) for i, s in enumerate(SENTENCES)])
    curves = training_charts([{"step": 1.0, "loss": 2.0}, {"step": 2.0, "loss": 1.0}])
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_page(path, render("Run <x>", {"model": "caris"}, curves, [split], tau=0.4))
    return path


def test_it_is_said_where_every_prediction_missed() -> None:
    protocol = vars(named_protocol("caris")) | {"size": [448, 448], "metrics": "classic", "no_target_by": ""}
    results = Results("refcoco", "val", {"oIoU": 0.0, "mIoU": 0.0}, {"samples": 4}, protocol)
    missed, hit = ([card(i, "a dog")._replace(iou=iou, group="random") for i in (1, 2)] for iou in (0.0, 0.5))
    text = [render("Run", {}, [], [SplitPart(results, [], cards)]) for cards in (missed, hit)]
    assert ["has IoU 0, so none is called best" in page for page in text] == [True, False]


def test_what_another_model_predicts_stands_beside(page: Path) -> None:
    """Scores before and after on one table, both predictions on a card, and both IoUs."""
    protocol = vars(named_protocol("caris")) | {"size": [448, 448], "metrics": "classic", "no_target_by": ""}
    after, before = (Results("mine", "val", {"oIoU": value}, {"samples": 2}, protocol) for value in (61.5, 12.25))
    cards = [card(i, f"dog {i}") for i in (2, 3)]
    earlier = [one._replace(iou=0.125, note="the model predicts no target") for one in cards]
    text = render("Run", {}, [], [SplitPart(after, [], with_earlier(cards, earlier), before)])
    assert re.search(r"val, before</td>.*?12\.25.*?val, after</td>.*?61\.50", text, re.DOTALL)
    assert text.count("<b>IoU 50.0</b> (before 12.5, the model predicts no target)") == 1
    assert text.count("<figcaption>before</figcaption>") == text.count("<figcaption>after</figcaption>") == 2
    assert "<figcaption>prediction</figcaption>" not in text
    assert "<figcaption>before</figcaption>" not in page.read_text(encoding="utf-8")


def test_one_file_without_outside_references(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "61.23" in text and "–" in text
    assert "Run &lt;x&gt;" in text and "<script>alert" not in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert "url(http" not in text and "@import" not in text
    assert [p.name for p in page.parent.iterdir()] == ["report.html"]


def test_in_a_browser(page: Path) -> None:
    with chromium() as browser:
        context = browser.new_context(color_scheme="dark")
        tab = context.new_page()
        faults: list[str] = []
        requests: list[str] = []
        tab.on("console", lambda message: faults.append(message.text))
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page.as_uri())
        visible = "#cards article:not([hidden])"
        assert tab.locator(visible).count() == 4

        tab.keyboard.press("/")
        tab.keyboard.type("dog left")
        assert tab.locator(visible + " h3").all_text_contents() == [SENTENCES[2]]
        assert tab.locator("#count").text_content() == "1 of 4"
        tab.get_by_role("button", name="Reset").click()
        tab.locator("[name=low]").fill("40")
        tab.locator("[name=order]").select_option("down")
        assert tab.locator(visible + " h3").all_text_contents() == [SENTENCES[3], SENTENCES[2]]
        tab.locator("[name=longest]").fill("0")
        assert tab.locator("#none").is_visible()
        tab.get_by_role("button", name="Reset").click()

        tab.locator("h1").click()
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("Enter")
        assert tab.locator("dialog h3").text_content() == SENTENCES[1]
        tab.keyboard.press("Escape")
        assert not tab.locator("dialog").is_visible()

        dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        tab.locator("#theme").press("Enter")
        light = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (dark, light) == ("rgb(20, 23, 27)", "rgb(255, 255, 255)")
        assert faults == []
        assert [r for r in requests if not r.startswith("data:")] == [page.as_uri()]
