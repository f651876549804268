"""The original files: read as the REFER API reads them, and nothing but data is read."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from amltrain.data.catalog import belongs, dataset_spec
from amltrain.data.segmentation import decode_rle
from amltrain.data.sources.annotations import Annotations
from amltrain.data.sources.entries import by_id
from amltrain.data.sources.refer import read_refer
from amltrain.errors import UserError
from amltrain.files import load_pickle
from tests.data.groups import image_groups
from tests.data.original import Original


def groups(files: Annotations, split: str = "train") -> list:
    return list(image_groups(files, split))


@pytest.mark.parametrize("dataset", ["refcoco", "refcoco+", "refcocog", "refcocog-google", "grefcoco"])
def test_every_data_set_is_read_from_its_own_files(dataset: str, tmp_path: Path) -> None:
    files = read_refer(Original(tmp_path, dataset).write().root, dataset)
    for split in dataset_spec(dataset).splits:
        found = groups(files, split)
        assert len(found) == 3 and not any(group.skipped for group in found)
        for group in found:
            assert group.file_name == f"COCO_train2014_{group.image_id:012d}.jpg"  # the image's, not the ref's
            (referent,) = group.referents
            assert referent["ref_id"] == 1000 + group.image_id and referent["ann_ids"] == [100 + group.image_id]
            assert referent["category"] == "person" and referent["bbox"] == [5, 5, 20, 20]
            assert decode_rle(referent["mask"]).sum() == 400 and not referent["no_target"]
            assert [(s["sent"], s["raw"]) for s in referent["sentences"]] == [
                ("the square", "The square"),
                ("left thing", "Left thing"),
            ]
    assert set(files.sources) == {f"{files.spec.refs_name}{'.json' if files.spec.generalised else '.p'}",
                                  "instances.json"}  # fmt: skip


def test_refs_of_ones_own_may_be_json(tmp_path: Path) -> None:
    original = Original(tmp_path).write()
    expected = [groups(read_refer(tmp_path, "refcoco"), split) for split in original.spec.splits]
    original.refs_file.with_suffix(".json").write_text(json.dumps(original.refs))
    original.refs_file.unlink()
    assert [groups(read_refer(tmp_path, "refcoco"), split) for split in original.spec.splits] == expected


def test_a_sentence_without_its_raw_form_is_used_as_it_is(tmp_path: Path) -> None:
    original = Original(tmp_path)
    original.refs[0]["sentences"][0]["raw"] = None
    (referent,) = groups(read_refer(original.write().root, "refcoco"))[0].referents
    assert referent["sentences"][0]["raw"] == "the square"


def test_real_images_and_sentences(shared_dir: Path) -> None:
    """The counts that the data's own notes give, and boxes that fit the masks."""
    for dataset, expected in (
        ("refcoco", {"train": (37, 37), "val": (4, 10), "testA": (1, 3), "testB": (4, 14)}),
        ("refcocog", {"train": (22, 22), "val": (1, 1), "test": (5, 5)}),
    ):
        files = read_refer(shared_dir / "data" / "refer_mini", dataset)
        for split, (refs, sentences) in expected.items():
            found = [referent for group in groups(files, split) for referent in group.referents]
            assert (len(found), sum(len(r["sentences"]) for r in found)) == (refs, sentences)
            for referent in found:
                rows, columns = np.nonzero(decode_rle(referent["mask"]))
                x, y, width, height = referent["bbox"]
                assert abs(columns.min() - x) < 5 and abs(columns.max() + 1 - x - width) < 5
                assert abs(rows.min() - y) < 5 and abs(rows.max() + 1 - y - height) < 5


def test_several_targets_crowds_and_none(tmp_path: Path) -> None:
    original = Original(tmp_path, "grefcoco")
    original.annotations[1]["segmentation"] = [[26, 5, 36, 5, 36, 15, 26, 15]]
    original.annotations[1]["bbox"] = [26, 5, 10, 10]
    original.annotations[1]["category_id"] = 2
    original.annotations[2]["iscrowd"] = 1
    for annotation in original.annotations:
        del annotation["image_id"]  # here several images share them
    original.refs[0]["ann_id"] = [101, 102, 103]
    original.refs[1]["ann_id"] = [-1]
    original.refs[2]["ann_id"] = [103]
    several, none, crowd = (group.referents[0] for group in groups(read_refer(original.write().root, "grefcoco")))
    assert several["ann_ids"] == [101, 102, 103] and several["category"] == "person, bicycle"
    assert decode_rle(several["mask"]).sum() == 500  # the crowd is left out
    assert several["bbox"] == [5, 5, 31, 20]
    assert none["no_target"] and none["ann_ids"] == [] and not decode_rle(none["mask"]).any()
    assert not crowd["no_target"] and decode_rle(crowd["mask"]).sum() == 400  # alone, a crowd is the target


def test_split_names_follow_the_original_rule() -> None:
    assert belongs("testAB", "testA") and belongs("testAB", "testB") and not belongs("testB", "testA")
    assert belongs("testA", "test") and belongs("val", "val") and not belongs("val2", "val")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("refcoco-umd", r"refcoco has no split by 'umd'; it has refcoco \(unc\)"),
        ("refcoco+-umd", r"refcoco\+ has no split by 'umd'; it has refcoco\+ \(unc\)"),
        ("refcocog-umd", r"'refcocog-umd' is called 'refcocog' here"),
        ("refcocog-unc", r"refcocog has no split by 'unc'; it has refcocog \(umd\), refcocog-google \(google\)"),
        ("refcocoo", r"unknown data set 'refcocoo'; did you mean .*refcoco"),
    ],
)
def test_impossible_names_get_the_right_pair(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataset_spec(name)


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_pickle_executes_nothing(tmp_path: Path) -> None:
    for number, thing in enumerate((Hostile(tmp_path / "made"), print, np.zeros(3), Path("x"))):
        path = tmp_path / f"{number}.p"
        path.write_bytes(pickle.dumps([{"ref_id": thing}]))
        with pytest.raises(UserError, match=rf"{number}\.p is no plain annotation pickle .*it asks for"):
            load_pickle(path)
    assert not (tmp_path / "made").exists()
    for name in ("eval", "exec", "getattr", "__import__", "open"):
        path.write_bytes(b"cbuiltins\n" + name.encode() + b"\n(S'1'\ntR.")
        with pytest.raises(UserError, match=f"it asks for builtins.{name}"):
            load_pickle(path)


def test_a_python_2_pickle_is_read(tmp_path: Path) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(b"(lp0\n(dp1\nS'raw'\np2\nS'caf\\xc3\\xa9'\np3\nsS'ann_id'\np4\nI7\nsS'of'\np5\nc__builtin__\nset\n"
                     b"p6\n((lp7\nI1\natp8\nRp9\nsa.")  # fmt: skip
    assert load_pickle(path) == [{"raw": "café", "ann_id": 7, "of": {1}}]


def spoil_refs(original: Original, content: bytes) -> None:
    original.refs_file.write_bytes(content)


def drop_key(original: Original, kind: str, key: str) -> None:
    del getattr(original, kind)[1][key]
    write_annotations(original)


def set_key(original: Original, kind: str, key: str, value: object) -> None:
    getattr(original, kind)[1][key] = value
    write_annotations(original)


def set_exist(original: Original, value: object) -> None:
    original.refs[1]["sentences"][0]["exist"] = value
    write_annotations(original)


def write_annotations(original: Original) -> None:
    """Without the images, whose files need a size."""
    (original.folder / "instances.json").write_text(
        json.dumps({"images": original.images, "annotations": original.annotations, "categories": []})
    )
    original.refs_file.write_bytes(pickle.dumps(original.refs))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda o: o.refs_file.unlink(), r"refcoco has no refs\(unc\)\.p; put refcoco's original files there"),
        (lambda o: (o.folder / "instances.json").unlink(), r"refcoco has no instances\.json"),
        (lambda o: spoil_refs(o, o.refs_file.read_bytes()[:100]), r"refs\(unc\)\.p is (damaged|no plain)"),
        (lambda o: spoil_refs(o, b"<html>404</html>"), r"refs\(unc\)\.p is (damaged|no plain)"),
        (lambda o: spoil_refs(o, pickle.dumps({"refs": []})), "holds a dict, not a list of refs"),
        (lambda o: (o.folder / "instances.json").write_text('{"images": ['), r"instances\.json is damaged"),
        (lambda o: (o.folder / "instances.json").write_text(json.dumps({"images": []})), "no list 'annotations'"),
        (lambda o: drop_key(o, "refs", "split"), r"refs\(unc\)\.p: ref number 1 has no 'split'"),
        (lambda o: drop_key(o, "images", "height"), r"instances\.json: image number 1 has no 'height'"),
        (lambda o: drop_key(o, "annotations", "segmentation"), "annotation number 1 has no 'segmentation'"),
        (lambda o: spoil_refs(o, pickle.dumps([])), r"refs\(unc\)\.p holds no sentence at all"),
        (
            lambda o: set_key(o, "refs", "sentences", None),
            r"refs\(unc\)\.p: ref number 1 has 'sentences' None, not a li",
        ),
        (lambda o: set_key(o, "refs", "sentences", [3]), r"a sentence of ref 1002 has no 'sent_id'"),
        (lambda o: set_key(o, "refs", "split", 3), "ref number 1 has 'split' 3, not a text"),
        (
            lambda o: set_key(o, "refs", "ann_id", ["x"]),
            r"ref number 1 has 'ann_id' \['x'\], not a whole number or a li",
        ),
        (
            lambda o: set_key(o, "images", "height", "480"),
            "image number 1 has 'height' '480', not a whole number from 1 to 1048576",
        ),
        (
            lambda o: set_key(o, "refs", "split", "trainn"),
            r"refs\(unc\)\.p: ref number 1 has split 'trainn', and refcoco",
        ),
        (lambda o: set_key(o, "refs", "ann_id", []), r"ref number 1 has an empty ann_id; write \[-1\]"),
        (lambda o: set_key(o, "refs", "source", "zero"), "ref number 1 has 'source' 'zero', which changes its meaning"),
        (
            lambda o: set_exist(o, False),
            "a sentence of ref 1002 has 'exist' False, which changes its meaning and is not",
        ),
        (lambda o: set_key(o, "refs", "ref_id", 2**70), "'ref_id' .*, not a whole number of 64 bits"),
        (
            lambda o: set_key(o, "annotations", "bbox", [1, 2]),
            r"annotation number 1 has 'bbox' \[1, 2\], not four numb",
        ),
    ],
)
def test_damaged_files_are_named(spoil, message: str, tmp_path: Path) -> None:
    original = Original(tmp_path).write()
    spoil(original)
    with pytest.raises(UserError, match=message):
        read_refer(tmp_path, "refcoco")


def test_an_unused_bad_annotation_stops_nothing_and_a_doubled_id_is_named() -> None:
    good = {"id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]], "bbox": [1, 1, 8, 8], "category_id": 1}
    keys = ("segmentation", "bbox", "category_id")
    unused = [{"id": 2}, {"id": [3]}, "x", {"id": 4, "bbox": "y"}]
    assert by_id([*unused, good], "annotation", keys, "x.json", {1}) == {1: good}
    with pytest.raises(UserError, match=r"annotation number 0 has no 'segmentation'"):
        by_id(unused[:1], "annotation", keys, "x.json", {2})
    with pytest.raises(UserError, match=r"annotation number 0 has 'id' '1', not a whole number"):
        by_id([{**good, "id": "1"}], "annotation", keys, "x.json", {1})
    assert by_id([good, dict(good)], "annotation", keys, "x.json") == {1: good}
    with pytest.raises(UserError, match=r"annotation number 1 has the id 1, which another annotation"):
        by_id([good, {**good, "bbox": [0, 0, 1, 1]}], "annotation", keys, "x.json", {1})
