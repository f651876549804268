"""Every tool's export: written by us in the tool's form, read back, equal pixels; what is wrong is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from amltrain.commands.prepare import main
from amltrain.data.rows import open_rows
from amltrain.data.segmentation import decode_mask, referent_mask
from amltrain.data.sources.detect import detect, read_form
from amltrain.data.sources.frame import Frame, in_frame
from amltrain.data.sources.mask_forms import brush_mask
from amltrain.data.sources.objects import Imported, ImportOptions
from amltrain.data.sources.own import TableRow
from amltrain.errors import UserError
from tests.data.sources import writers
from tests.data.sources.writers import Mask, Object

SIZE = (30, 40)
POLYGON = [5.0, 6.0, 25.0, 6.0, 25.0, 16.0, 5.0, 16.0]
TRIANGLE = [2.5, 20.0, 30.0, 28.5, 12.0, 29.0]
CLASSES = ["square", "triangle"]


def drawn(polygon: list[float]) -> Mask:
    return decode_mask(referent_mask([[polygon]], *SIZE).union)


SQUARE = Object("square", drawn(POLYGON), POLYGON, "the square")
THREE = Object("triangle", drawn(TRIANGLE), TRIANGLE, "the triangle below")
STAINS = np.zeros(SIZE, np.uint8)
STAINS[3:5, 30:38] = STAINS[9, 33] = STAINS[12:20, 36:40] = 1
STAIN = Object("square", STAINS, None, "the stains on the right")


def pixels(row: TableRow) -> Mask:
    size = row.size or SIZE
    fitted, _ = in_frame(row.segmentation, Frame(*size))
    return decode_mask(referent_mask([fitted], *size).union)


def export(form: str, root: Path) -> Path:
    """Two pictures in the form of a tool; the square and the triangle in the first, stains in the second."""
    masked = form != "yolo"
    two = {"a.jpg": (SIZE, [SQUARE, THREE]), "b.jpg": (SIZE, [STAIN if masked else SQUARE])}
    places = {"cvat": "images", "voc": "JPEGImages", "fiftyone": "data", "labelme": "pictures"}
    for number, name in enumerate(two):
        split = ("train", "valid")[number]
        folder = f"{split}/images" if form == "yolo" else split if form == "coco" else places.get(form, "")
        (root / folder).mkdir(parents=True, exist_ok=True)
        stored = f"0a1b2c3d-{name}" if form == "label-studio" else name
        writers.picture(SIZE, number).save(root / folder / stored, quality=95)
    if form == "labelme":
        (root / "labels").mkdir()
        for name, (size, objects) in two.items():
            writers.write_labelme(root / "labels", name[0], size, objects)
    elif form == "yolo":
        for split, (name, (size, objects)) in zip(("train", "valid"), two.items(), strict=True):
            writers.write_yolo(root, split, name[0], size, objects, CLASSES)
    elif form == "coco":  # as Roboflow writes it: a file per split, numbers start again in each
        for split, (name, value) in zip(("train", "valid"), two.items(), strict=True):
            writers.write_coco(root / split / "_annotations.coco.json", {name: value})
    elif form == "voc":
        for split, (name, (_, objects)) in zip(("train", "val"), two.items(), strict=True):
            writers.write_voc(root, split, name[0], objects, CLASSES)
        (root / "SegmentationClass/note.txt").write_text("")
    else:
        writer = {"cvat": writers.write_cvat, "label-studio": writers.write_label_studio}
        writer.get(form, writers.write_fiftyone)(root, two)
    return root


FORMS = ["labelme", "cvat", "label-studio", "yolo", "coco", "voc", "fiftyone"]


def read(root: Path, form: str) -> Imported:
    return read_form(root, form, ImportOptions(None, root))


@pytest.mark.parametrize("form", FORMS)
def test_the_form_is_found_out_and_the_masks_are_equal(form: str, tmp_path: Path) -> None:
    root = export(form, tmp_path)
    assert detect(root).form == form
    imported = read(root, form)
    first, second, third = imported.rows
    if form == "voc":  # the 20 classes of VOC by their numbers; later objects cover earlier ones
        assert np.array_equal(pixels(first), SQUARE.mask & ~THREE.mask)
        assert [first.category, second.category] == ["aeroplane", "bicycle"]
    else:
        assert np.array_equal(pixels(first), SQUARE.mask)
        assert [first.category, second.category] == CLASSES
    assert np.array_equal(pixels(second), THREE.mask)
    assert np.array_equal(pixels(third), SQUARE.mask if form == "yolo" else STAIN.mask)
    assert [first.image[-5:], third.image[-5:]] == ["a.jpg", "b.jpg"]
    if form in ("yolo", "coco", "voc"):
        assert [row.split for row in imported.rows] == ["train", "train", "val"]
    with_texts = form not in ("yolo", "voc")
    assert [row.sentences for row in imported.rows] == [
        (thing.sentence,) if with_texts else () for thing in (SQUARE, THREE, STAIN)
    ]


@pytest.mark.parametrize("form", ["labelme", "cvat", "label-studio", "coco", "fiftyone"])
def test_an_export_is_prepared_in_one_call(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = export(form, tmp_path / "export")
    main([str(root), "--name", "mine", "--output", str(tmp_path / "prepared"), "--workers", "1"])
    said = capsys.readouterr().out
    assert "is read as" in said
    manifest = json.loads((tmp_path / "prepared/mine/manifest.json").read_text())
    assert sum(split["expressions"] for split in manifest["splits"].values()) == 3
    found = {}
    for split in manifest["splits"]:
        rows = open_rows(str(tmp_path / "prepared"), "mine", split, streaming=True)
        for row in rows.columns.column("referents").to_pylist():
            found |= {r["sentences"][0]["raw"]: decode_mask(r["mask"]) for r in row}
    assert all(np.array_equal(found[thing.sentence], thing.mask) for thing in (SQUARE, THREE, STAIN))


@settings(max_examples=30, deadline=None)
@given(mask=arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20)), elements=st.integers(0, 1)))
def test_any_brush_comes_back(mask: Mask) -> None:
    assert np.array_equal(brush_mask(writers.brush(mask), *mask.shape), mask)


MASK_WRITERS: dict[str, Callable[[Path, Mask], Any]] = {
    "labelme": lambda root, mask: writers.write_labelme(root, "a", mask.shape, [Object("thing", mask)]),
    "cvat": lambda root, mask: writers.write_cvat(root, {"a.jpg": (mask.shape, [Object("thing", mask)])}),
    "label-studio": lambda root, mask: writers.write_label_studio(
        root, {"a.jpg": (mask.shape, [Object("thing", mask)])}
    ),
    "coco": lambda root, mask: writers.write_coco(root / "x.json", {"a.jpg": (mask.shape, [Object("thing", mask)])}),
    "fiftyone": lambda root, mask: writers.write_fiftyone(root, {"a.jpg": (mask.shape, [Object("thing", mask)])}),
    "voc": lambda root, mask: writers.write_voc(root, "train", "a", [Object("cat", mask)], ["cat"]),
}


@pytest.mark.parametrize("form", list(MASK_WRITERS))
def test_any_mask_comes_back(form: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    shapes = st.tuples(st.integers(2, 24), st.integers(2, 24))

    @settings(max_examples=15, deadline=None)
    @given(mask=arrays(np.uint8, shapes, elements=st.integers(0, 1)).filter(lambda mask: mask.any()))
    def comes_back(mask: Mask) -> None:
        root = tmp_path_factory.mktemp(form)
        for name in ("a.jpg", "data/a.jpg", "JPEGImages/a.jpg", "images/a.jpg") if form != "coco" else ("a.jpg",):
            folder = {"fiftyone": "data", "voc": "JPEGImages", "cvat": "images"}.get(form, "")
            if name == f"{folder}/a.jpg".lstrip("/"):
                (root / name).parent.mkdir(exist_ok=True)
                writers.picture(mask.shape).save(root / name)
        MASK_WRITERS[form](root, mask)
        (row,) = read(root, form).rows
        assert row.size == mask.shape
        assert np.array_equal(pixels(row), mask)

    comes_back()


def test_a_picture_inside_a_labelme_file(tmp_path: Path) -> None:
    import base64
    import io

    content = io.BytesIO()
    writers.picture(SIZE).save(content, "JPEG")
    data = base64.b64encode(content.getvalue()).decode()
    writers.write_labelme(tmp_path, "a", SIZE, [SQUARE], imagePath="gone.jpg", imageData=data)
    writers.write_labelme(tmp_path, "b", SIZE, [THREE], imagePath="b.jpg")
    writers.picture(SIZE, 3).save(tmp_path / "b.jpg")
    imported = read_form(tmp_path, "labelme", ImportOptions(None, tmp_path / "scratch"))
    assert imported.images == tmp_path / "scratch"
    assert (imported.images / imported.rows[0].image).read_bytes() == content.getvalue()
    assert (imported.images / imported.rows[1].image).read_bytes() == (tmp_path / "b.jpg").read_bytes()


def test_shapes_of_a_group_are_one_object_and_lines_are_left_out(tmp_path: Path) -> None:
    writers.picture(SIZE).save(tmp_path / "a.jpg")
    shapes = [
        {"label": "cup", "points": [[1, 1], [5, 5]], "shape_type": "rectangle", "group_id": 1},
        {"label": "cup", "points": [[20, 20], [30, 10]], "shape_type": "rectangle", "group_id": 1},
        {"label": "cup", "points": [[20, 20], [30, 10]], "shape_type": "line", "group_id": None},
        {"label": "ball", "points": [[20, 15], [20, 20]], "shape_type": "circle", "group_id": None},
    ]
    writers.write_labelme(tmp_path, "a", SIZE, [], shapes=shapes, imagePath="a.jpg")
    imported = read(tmp_path, "labelme")
    cups, ball = imported.rows
    assert int(pixels(cups).sum()) == 16 + 100
    assert abs(int(pixels(ball).sum()) - 25 * np.pi) < 4
    assert imported.notes == ("1 points and lines are no areas and were left out (e.g. line 'cup' in a.json)",)


def test_colours_instead_of_a_palette(tmp_path: Path) -> None:
    """CVAT's "Segmentation mask 1.1": colours, named in labelmap.txt."""
    writers.write_voc(tmp_path, "default", "a", [SQUARE, THREE], CLASSES)
    writers.picture(SIZE).save(tmp_path / "JPEGImages/a.jpg")
    for folder in ("SegmentationObject", "SegmentationClass"):
        path = tmp_path / folder / "a.png"
        Image.open(path).convert("RGB").save(path)
        black = np.array(Image.open(path))
        black[(SQUARE.mask | THREE.mask) == 0] = 0
        Image.fromarray(black).save(path)
    kinds = np.array(Image.open(tmp_path / "SegmentationClass/a.png"))
    square, triangle = (kinds[mask > 0][0].tolist() for mask in (SQUARE.mask & ~THREE.mask, THREE.mask))
    named = [f"{n}:{','.join(map(str, c))}::" for n, c in (("square", square), ("triangle", triangle))]
    (tmp_path / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *named, "background:0,0,0::"]))
    rows = {row.category: pixels(row) for row in read(tmp_path, "voc").rows}
    assert np.array_equal(rows["triangle"], THREE.mask)
    assert np.array_equal(rows["square"], SQUARE.mask & ~THREE.mask)
    assert {row.split for row in read(tmp_path, "voc").rows} == {None}


@pytest.mark.parametrize(
    ("form", "name", "text", "message"),
    [
        ("cvat", "annotations.xml", "<annotations><track/></annotations>", "is a CVAT video"),
        ("cvat", "annotations.xml", '<!DOCTYPE x><annotations version="1"/>', "declares a document type"),
        ("cvat", "annotations.xml", "<annotations><image", "is not XML"),
        ("labelme", "a.json", '{"shapes": [], "imagePath": "a.jpg"}', "height None and width None are not a size"),
        ("coco", "a.json", '{"images": [{"id": 1}], "annotations": []}', "image number 0 has no id or no file_name"),
        (
            "coco",
            "a.json",
            '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}',
            "image id 1 is of 'a' and of 'b'",
        ),
        ("fiftyone", "samples.json", '{"samples": [{"filepath": "a.jpg"}]}', "has no field of Detections"),
        ("label-studio", "a.json", '[{"data": {"text": "x"}, "annotations": []}]', "has no picture"),
        ("yolo", "data.yaml", "train: images\nnames: [a]\n", "there is no 'images' below"),
        ("yolo", "data.yaml", "train: images\nnames: {a: b}\n", "names has the key 'a'"),
    ],
)
def test_what_is_wrong_is_named(form: str, name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path, form)


def test_lines_of_yolo_that_are_wrong_are_named(tmp_path: Path) -> None:
    root = export("yolo", tmp_path)
    labels = root / "train/labels/a.txt"
    for line, message in (
        ("7 0.1 0.1 0.2 0.2", "line 1: class 7 is not among the 2 names"),
        ("0 0.1 0.1 0.2", "has 3 numbers after the class"),
        ("0 10 12 30 40 50 60", "60 is not a share"),
        ("0 0.1 0.1 x 0.2", "is .*, not numbers"),
    ):
        labels.write_text(line)
        with pytest.raises(UserError, match=message):
            read(root, "yolo")


def test_two_forms_at_one_path_are_a_question(tmp_path: Path) -> None:
    export("coco", tmp_path)
    writers.write_cvat(tmp_path, {})
    with pytest.raises(UserError, match=r"can be read as cvat \(annotations.xml\) and coco .*; choose one with --form"):
        detect(tmp_path)


def test_objects_without_sentences_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = export("coco", tmp_path / "x")
    path = root / "train/_annotations.coco.json"
    content = json.loads(path.read_text())
    del content["annotations"][1]["sentence"]
    path.write_text(json.dumps(content))
    main([str(root), "--name", "mine", "--output", str(tmp_path / "p"), "--workers", "1"])
    assert "note: 1 objects have no sentence and were left out" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(export("yolo", tmp_path / "y")), "--name", "mine", "--output", str(tmp_path / "q")])
    assert "has 3 objects of 2 classes and no sentence; give --describe" in capsys.readouterr().err


def test_what_is_no_export_is_told_by_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an empty folder; give the one with your pictures and annotations"):
        detect(tmp_path)
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"has 2 pictures and no annotations that are known .* write a table"):
        detect(tmp_path)
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(UserError, match=r"note\.txt is in no form that is known; name it: --form, one of labelme"):
        detect(tmp_path / "note.txt")
