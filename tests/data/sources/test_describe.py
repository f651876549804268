"""Sentences for objects: each fits its target and nothing else, by an oracle that reads the words again."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from amltrain.commands.describe import main as describe_main
from amltrain.commands.prepare import main
from amltrain.data.sources.describe import (
    COLOURS,
    DescribeOptions,
    Instance,
    Sentence,
    colour_names,
    colour_shares,
    describe_picture,
)
from amltrain.data.sources.referring import Thing, extreme, place_in_row, relation, side_word, unique_words
from tests.data.sources import writers
from tests.data.sources.writers import Object

HEIGHT, WIDTH = 120, 160
PAINT = {"red": (200, 20, 20), "blue": (20, 40, 200), "green": (20, 150, 40), "yellow": (230, 210, 20)}
MANY = DescribeOptions(sentences=10, negatives=10)


def picture(boxes: list[tuple[str, str, tuple[int, int, int, int]]]) -> tuple[Image.Image, list[Instance]]:
    """A grey picture with painted boxes (class, colour, (x0, y0, x1, y1)); later ones over earlier ones."""
    pixels = np.full((HEIGHT, WIDTH, 3), 120, np.uint8)
    covers = []
    for _, colour, (x0, y0, x1, y1) in boxes:
        pixels[y0:y1, x0:x1] = PAINT[colour]
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[y0:y1, x0:x1] = 1
        covers = [earlier & ~mask for earlier in covers] + [mask]
    return Image.fromarray(pixels), [Instance(box[0], m, False) for box, m in zip(boxes, covers, strict=True)]


def meant(sentence: str, instances: list[Instance], colours: list[str]) -> set[int]:
    """The objects that a reader takes a sentence for: words are read one by one, sizes and sides by comparison."""
    words = sentence.removeprefix("the ").split()
    noun = next(word for word in words if word in ("cat", "dog", "kite"))
    members = [i for i, thing in enumerate(instances) if thing.label == noun and thing.mask.any()]
    centre = {i: np.argwhere(instances[i].mask).mean(0)[::-1] for i in members}
    area = {i: int(instances[i].mask.sum()) for i in members}
    for colour in COLOURS:
        if colour in words:
            members = [i for i in members if colours[i] == colour]
    if not members:
        return set()
    by_x = sorted(members, key=lambda i: centre[i][0])
    if "from" in words:
        order = by_x if "left" in words else by_x[::-1]
        return {order[("first", "second", "third", "fourth", "fifth").index(words[0])]}
    if "middle" in words:
        return {by_x[len(by_x) // 2]}
    for word, choose, key in (
        ("left", min, lambda i: centre[i][0]),
        ("leftmost", min, lambda i: centre[i][0]),
        ("right", max, lambda i: centre[i][0]),
        ("rightmost", max, lambda i: centre[i][0]),
        ("top", min, lambda i: centre[i][1]),
        ("bottom", max, lambda i: centre[i][1]),
        ("largest", max, lambda i: area[i]),
        ("bigger", max, lambda i: area[i]),
        ("smallest", min, lambda i: area[i]),
        ("smaller", min, lambda i: area[i]),
    ):
        if word in words and not {"of", "nearest", "closest"} & set(words):
            return {choose(members, key=key)}
    return set(members)


SIDE = st.integers(14, 50)
BOXES = st.tuples(
    st.sampled_from(["cat", "dog", "kite"]),
    st.sampled_from(list(PAINT)),
    st.integers(0, 145),
    st.integers(0, 105),
    SIDE,
    SIDE,
)


@settings(max_examples=150, deadline=None)
@given(scene=st.lists(BOXES, min_size=1, max_size=6), seed=st.integers(0, 3))
def test_every_sentence_fits_its_target_alone(scene: list[tuple[str, str, int, int, int, int]], seed: int) -> None:
    boxes = [(label, colour, (x, y, min(x + w, WIDTH), min(y + h, HEIGHT))) for label, colour, x, y, w, h in scene]
    image, instances = picture(boxes)
    colours = [colour for _, colour, _ in boxes]
    options = MANY._replace(seed=seed)
    found = describe_picture(image, instances, "a.jpg", options, ["cat", "dog", "kite"])
    for sentence in found:
        if sentence.kind in ("near", "relation"):
            continue
        expected = set() if sentence.target is None else {sentence.target}
        assert meant(sentence.text, instances, colours) == expected, sentence
    assert found == describe_picture(image, instances, "a.jpg", options, ["cat", "dog", "kite"])


def said(boxes: list[tuple[str, str, tuple[int, int, int, int]]], target: int) -> set[str]:
    image, instances = picture(boxes)
    texts: set[str] = set()
    for seed in range(12):
        found = describe_picture(image, instances, "a.jpg", MANY._replace(seed=seed))
        texts |= {sentence.text for sentence in found if sentence.target == target}
    return texts


def test_what_is_said_of_a_row() -> None:
    row = [("cup", colour, (10 + 50 * i, 40, 35 + 50 * i, 70)) for i, colour in enumerate(("red", "blue", "red"))]
    assert {"the middle cup", "the second cup from the left", "the blue cup"} <= said(row, 1)
    assert {"the leftmost cup", "the first cup from the left", "the third cup from the right"} <= said(row, 0)
    assert not any("red" in text for text in said(row, 0))


def test_what_is_said_of_two() -> None:
    two = [("dog", "red", (5, 30, 75, 100)), ("dog", "blue", (110, 60, 140, 90))]
    assert {"the left dog", "the largest dog", "the bigger dog", "the red dog"} <= said(two, 0)
    assert {"the dog on the right", "the smaller dog", "blue dog"} <= said(two, 1)


def test_what_is_said_by_another_thing() -> None:
    scene = [
        ("bottle", "green", (20, 40, 40, 80)),
        ("bottle", "green", (120, 40, 140, 80)),
        ("dog", "red", (46, 50, 80, 80)),
    ]
    texts = said(scene, 0)
    assert texts & {"the bottle nearest to the dog", "the bottle closest to the dog"}
    assert "the bottle to the left of the dog" in texts


def test_nothing_is_said_where_it_would_be_unclear() -> None:
    twins = [("dog", "red", (60, 40, 90, 70)), ("dog", "red", (64, 44, 94, 74))]
    assert not said(twins, 0)
    image, (one, other) = picture([("dog", "red", (10, 10, 50, 50)), ("dog", "blue", (100, 10, 150, 50))])
    assert describe_picture(image, [one, other._replace(crowd=True)], "a.jpg") == []
    tiny = [("dog", "red", (10, 10, 16, 14))]
    assert not said(tiny, 0)
    cup_and_bowl = [("cup", "red", (80, 10, 110, 40)), ("bowl", "blue", (10, 10, 50, 40))]
    assert "the cup" not in said(cup_and_bowl, 0) and "the red cup" not in said(cup_and_bowl, 0)


def test_negatives_fit_nothing() -> None:
    image, instances = picture([("bird", "red", (10, 10, 50, 50))])
    found = describe_picture(image, instances, "a.jpg", MANY._replace(negatives=50), ["bird", "kite", "dog", "car"])
    negatives = {sentence for sentence in found if sentence.target is None}
    assert {Sentence("the dog", None, "absent"), Sentence("the car", None, "absent")} <= negatives
    assert Sentence("the blue bird", None, "absent colour") in negatives
    texts = {sentence.text for sentence in negatives}
    assert "the kite" not in texts and "the red bird" not in texts and "the bird" not in texts


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((200, 20, 20), "red"),
        ((20, 40, 200), "blue"),
        ((20, 150, 40), "green"),
        ((230, 210, 20), "yellow"),
        ((250, 250, 250), "white"),
        ((10, 10, 10), "black"),
        ((128, 128, 128), "grey"),
        ((240, 130, 20), "orange"),
        ((110, 60, 25), "brown"),
        ((120, 40, 160), "purple"),
        ((240, 120, 190), "pink"),
    ],
)
def test_colours_are_measured(rgb: tuple[int, int, int], name: str) -> None:
    image = Image.new("RGB", (20, 20), rgb)
    assert COLOURS[int(colour_names(image)[0, 0])] == name
    assert colour_shares(colour_names(image), np.ones((20, 20), np.uint8))[name] == 1


def test_claims() -> None:
    things = [Thing({"noun": "a"}, (x, y), area=area) for x, y, area in ((10, 5, 4), (50, 6, 40), (90, 5, 400))]
    assert [place_in_row(things, [0, 1, 2], i, 10) for i in range(3)] == [(0, 3), (1, 3), (2, 3)]
    assert place_in_row(things, [0, 1], 0, 10) is None and place_in_row(things, [0, 1, 2], 0, 60) is None
    assert [extreme(things, [0, 1, 2], i, 2) for i in range(3)] == ["smallest", None, "largest"]
    assert side_word(things, 0, [1, 2], 10) == "left" and side_word(things, 2, [0, 1], 10) == "right"
    assert side_word(things, 1, [0, 2], 10) is None and side_word(things, 0, [], 10) is None
    assert relation((0, 0), (10, 1)) == "to the left of" and relation((0, 9), (1, 0)) == "below"
    words = [Thing({"colour": c, "form": f}, (0, 0)) for c, f in (("red", "star"), ("red", "moon"), ("blue", "moon"))]
    assert unique_words(words, 0, [("colour",), ("form",), ("colour", "form")]) == [
        {"form": "star"},
        {"colour": "red", "form": "star"},
    ]


def test_a_set_without_sentences_is_described_and_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = [("dog", "red", (5, 30, 75, 100)), ("dog", "blue", (110, 60, 140, 90))]
    image, instances = picture(boxes)
    image.save(tmp_path / "a.png")
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "b.png")
    objects = [Object(thing.label, thing.mask) for thing in instances]
    cat = [Object("cat", instances[0].mask)]
    writers.write_coco(tmp_path / "all.json", {"a.png": ((HEIGHT, WIDTH), objects), "b.png": ((HEIGHT, WIDTH), cat)})
    options = ["--negatives", "1", "--images", str(tmp_path)]
    describe_main([str(tmp_path / "all.json"), "--output", str(tmp_path / "t.jsonl"), *options])
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert {row["no_target"] for row in rows} == {True, False}
    assert "5 sentences were written" in capsys.readouterr().out or len(rows) >= 4
    shared = ["--images", str(tmp_path), "--output", str(tmp_path / "p"), "--workers", "1"]
    main([str(tmp_path / "all.json"), "--describe", "--negatives", "1", "--name", "one", *shared])
    main(["--table", str(tmp_path / "t.jsonl"), "--name", "two", *shared])
    one, two = (json.loads((tmp_path / f"p/{name}/manifest.json").read_text())["splits"] for name in ("one", "two"))
    assert one == two and sum(split["expressions"] for split in one.values()) == sum(len(r["sentences"]) for r in rows)
