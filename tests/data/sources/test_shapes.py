"""RefShapes: a sentence means its targets and nothing else, in every flavour, the same for the same seed."""

import hashlib
import json
import pickle
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from amltrain.data.prepare import prepare
from amltrain.data.rows import open_prepared
from amltrain.data.segmentation import decode_rle
from amltrain.data.sources.shape_styles import STYLES
from amltrain.data.sources.shapes import SIZES, TEXTURES, Scene, draw_scene, expressions, write_refshapes
from amltrain.errors import UserError

FLAVOURS = ("refshapes", "refshapes+", "refshapesg", "grefshapes")
ALL = STYLES["cluttered"]
WORDS = {"size": SIZES, "colour": ALL.colours, "texture": TEXTURES, "form": ALL.forms}
KINDS = {word: kind for kind, words in WORDS.items() for word in words}
AXES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1), "above": (1, -1), "below": (1, 1)}


@cache
def scenes(
    flavour: str, count: int = 100, style: str = "simple"
) -> list[tuple[Scene, list[tuple[list[int], list[str]]]]]:
    generators = [np.random.default_rng([7, number]) for number in range(count)]
    drawn = [
        draw_scene(g, 96, crowded=i % 3 == 0, twins=flavour == "refshapes", style=STYLES[style])
        for i, g in enumerate(generators)
    ]
    return [(scene, expressions(g, scene, flavour)) for scene, g in zip(drawn, generators, strict=True)]


def named(scene: Scene, words: list[str]) -> set[int]:
    """Objects that all of the attribute words fit; plural forms count as the form."""
    wanted = [(KINDS[w], w) for w in (word if word in KINDS else word.removesuffix("s") for word in words)
              if w in KINDS]  # fmt: skip
    return {i for i, shape in enumerate(scene.shapes) if all(getattr(shape, kind) == w for kind, w in wanted)}


def understand(scene: Scene, sentence: str) -> set[int]:
    """What a reader who knows the words, and nothing of how the sentence was made, takes it to mean."""
    if " which is " in sentence:
        subject, rest = sentence.split(" which is ")
        (other,) = named(scene, rest.split())
        axis, sign = AXES[next(word for word in rest.split() if word in AXES)]
        return {
            i
            for i in named(scene, subject.split())
            if sign * (scene.shapes[i].centre[axis] - scene.shapes[other].centre[axis]) > 0
        }
    if " and " in sentence:
        return set.union(*(named(scene, half.split()) for half in sentence.split(" and ")))
    fitting = named(scene, sentence.split())
    place = re.findall(r"\b(left|right|top|bottom)\b", sentence)
    if place and fitting:
        axis, sign = AXES[place[0]]
        return {max(fitting, key=lambda i: sign * scene.shapes[i].centre[axis])}
    return fitting


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_sentence_means_its_targets_and_nothing_else(flavour: str, style: str) -> None:
    seen = 0
    for scene, found in scenes(flavour, style=style):
        for targets, sentences in found:
            for sentence in sentences:
                assert understand(scene, sentence) == set(targets), sentence
                seen += 1
    assert seen > 400


def test_cluttered_scenes_have_more_of_everything() -> None:
    simple, cluttered = ([scene for scene, _ in scenes("refshapes", style=style)] for style in ("simple", "cluttered"))
    forms = [{s.form for scene in drawn for s in scene.shapes} for drawn in (simple, cluttered)]
    assert forms[0] == set(STYLES["simple"].forms) < forms[1] == set(STYLES["cluttered"].forms)
    counts = [np.mean([len(scene.shapes) for scene in drawn]) for drawn in (simple, cluttered)]
    areas = [np.mean([m.mean() for scene in drawn for m in scene.masks]) for drawn in (simple, cluttered)]
    assert counts[1] > counts[0] + 1 and areas[1] < 0.75 * areas[0]
    grounds = [
        np.mean([scene.image[~np.any(scene.masks, axis=0)].std(axis=0).max() for scene in drawn])
        for drawn in (simple, cluttered)
    ]
    assert grounds[1] > 1.5 * grounds[0]


def test_alike_scenes_have_six_distractors_of_one_form() -> None:
    for scene, found in scenes("refshapes", style="alike"):
        assert len({shape.form for shape in scene.shapes}) == 1 and len(scene.shapes) <= 7
        assert len(found) <= 3
    counts = [len(scene.shapes) for scene, _ in scenes("refshapes", style="alike")]
    assert np.mean(counts) > 6.8


def test_more_objects_are_described_when_asked_for(tmp_path: Path) -> None:
    sizes = {"train": 5, "val": 1, "testA": 1, "testB": 1}
    counts = []
    for described in (1, 3, 8):
        folder = write_refshapes(tmp_path / str(described), split_sizes=sizes, described=described, progress=False)
        with next(folder.glob("*.p")).open("rb") as file:
            counts.append(len(pickle.load(file)))
    assert counts[0] == 8 < counts[1] < counts[2]


def test_simple_scenes_are_those_of_the_first_version() -> None:
    """Scores that were published for them stay comparable."""
    digest = hashlib.sha256()
    for flavour in FLAVOURS:
        for scene, found in scenes(flavour)[:20]:
            digest.update(repr(found).encode() + np.stack(scene.masks).tobytes())
    assert digest.hexdigest()[:16] == "2582b9d000d3d5d5"


def test_the_sentence_is_needed() -> None:
    """Every object shares its form or its colour with another one more often than not, and no two words are spare."""
    shared = [
        any(o is not s and (o.form == s.form or o.colour == s.colour) for o in scene.shapes)
        for scene, _ in scenes("refshapes+")
        for s in scene.shapes
    ]
    assert np.mean(shared) > 0.8
    targets = [len(found) for _, found in scenes("refshapes+")]
    assert np.mean(targets) > 2  # several referents a scene: what is salient in a scene does not tell which is meant


def test_flavours_say_what_their_originals_say() -> None:
    text = {flavour: [s for _, found in scenes(flavour) for _, many in found for s in many] for flavour in FLAVOURS}
    location = re.compile(r"\b(left|right|top|bottom|above|below)\b")
    assert np.mean([bool(location.search(s)) for s in text["refshapes"]]) > 0.05
    assert not any(location.search(s) for s in text["refshapes+"])
    assert np.mean([len(s.split()) for s in text["refshapesg"]]) > 2.5 * np.mean(
        [len(s.split()) for s in text["refshapes+"]]
    )
    counts = [len(targets) for _, found in scenes("grefshapes") for targets, _ in found]
    assert {0, 1, 2} <= set(counts)


def test_objects_are_big_enough_and_masks_are_what_can_be_seen() -> None:
    for scene, found in scenes("refshapes"):
        assert len(scene.shapes) >= 3
        assert sum(m.astype(int) for m in scene.masks).max() <= 1  # a pixel belongs to the object in front
        for (target,), _ in found:
            assert scene.masks[target].sum() > 50
    radii = {
        kind: [s.radius for scene, _ in scenes("refshapes") for s in scene.shapes if s.size == kind] for kind in SIZES
    }
    assert (
        0.05 * 96 < min(radii["small"]) < max(radii["small"]) < 0.9 * min(radii["big"])
    )  # "big" can be seen to be true


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_readers_of_real_data_read_it_whole(flavour: str, tmp_path: Path) -> None:
    sizes = {"train": 12, "val": 2, "testA": 2, "testB": 2, "test": 2}
    folder = write_refshapes(tmp_path / "refer", flavour, split_sizes=sizes, size=64, progress=False)
    manifest = prepare(flavour, tmp_path / "refer", tmp_path / "prepared", progress=False)
    assert manifest["skipped"] == []
    assert manifest["splits"]["train"]["images"] == 12
    instances = json.loads((folder / "instances.json").read_text())
    assert {type(a["segmentation"]) for a in instances["annotations"]} == {list, dict}  # polygons and run lengths
    area = {a["id"]: a["area"] for a in instances["annotations"]}
    rows = open_prepared(str(tmp_path / "prepared"), flavour, "train")
    for row in rows:
        for referent in row["referents"]:
            expected = sum(area[i] for i in referent["ann_ids"] if i >= 0)
            assert int(decode_rle(referent["mask"]).sum()) == expected
            assert referent["no_target"] == (expected == 0)


def test_a_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    def content(name: str, seed: int) -> dict[str, bytes]:
        sizes = dict.fromkeys(("train", "val", "testA", "testB"), 2)
        write_refshapes(tmp_path / name, split_sizes=sizes, size=48, seed=seed, progress=False)
        return {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*.*")}

    first = content("a", 0)
    assert first == content("b", 0)
    assert first != content("c", 1)


def test_more_scenes_leave_the_first_ones_as_they_are(tmp_path: Path) -> None:
    for name, train in (("few", 2), ("many", 4)):
        sizes = {"train": train, "val": 1, "testA": 1, "testB": 1}
        write_refshapes(tmp_path / name, split_sizes=sizes, size=48, progress=False)
    images = "images/mscoco/images/train2014/COCO_train2014_000000000002.jpg"
    assert (tmp_path / "few" / images).read_bytes() == (tmp_path / "many" / images).read_bytes()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"split_sizes": {"train": 0}}, r"data\.shapes\.train is 0; a split needs at least 1 scene"),
        ({"split_sizes": {"testB": -5}}, r"data\.shapes\.evaluation is -5"),
        ({"size": 4}, r"data\.shapes\.size is 4; the shapes need scenes of at least 16 pixels"),
        ({"seed": -1}, r"data\.shapes\.seed is -1"),
    ],
)
def test_scenes_that_cannot_be_drawn_leave_nothing_behind(request_: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write_refshapes(tmp_path / "refer", progress=False, **request_)
    assert not (tmp_path / "refer").exists()


def test_the_smallest_scenes_are_whole(tmp_path: Path) -> None:
    sizes = dict.fromkeys(("train", "val", "testA", "testB"), 20)
    write_refshapes(tmp_path / "refer", split_sizes=sizes, size=16, progress=False)
    assert prepare("refshapes", tmp_path / "refer", tmp_path / "prepared", progress=False)["skipped"] == []
