"""The table of data sets, and what manifests state of own ones."""

from typing import Any

import pytest

from amltrain.data.catalog import (
    Counts,
    DatasetSpec,
    belongs,
    check_split,
    compare_with_published,
    dataset_spec,
    spec_of,
)
from amltrain.errors import UserError

SPEC = {"splits": ["train", "val"], "split_by": "own", "generalised": True, "metrics": ["Acc@0.5"]}


def test_a_manifest_gives_its_spec() -> None:
    spec = spec_of({"dataset": "mine", "spec": SPEC}, "manifest.json")
    assert (spec.splits, spec.generalised, spec.metrics) == (("train", "val"), True, ("Acc@0.5",))
    assert spec.has("val", "val") and not spec.has("testA", "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generalised": "no"}, "m.json: spec.generalised is 'no', not true or false; prepare it again"),
        ({"generalised": 1}, "spec.generalised is 1, not true or false"),
        ({"box_only": []}, "spec.box_only is"),
        ({"metrics": [["mIoU"]]}, "does not state the metrics"),
        ({"split_by": None}, "spec.split_by is None, not a text"),
        ({"splits": [1]}, "does not state the splits"),
    ],
)
def test_a_manifest_that_says_something_else_is_rejected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec_of({"dataset": "mine", "spec": {**SPEC, **change}}, "m.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("refcocog-umd", "'refcocog-umd' is called 'refcocog' here"),
        ("refcoco-google", "refcoco has no split by 'google'; it has refcoco"),
        ("recoco", "did you mean refcoco"),
    ],
)
def test_a_near_name_is_told(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataset_spec(name)


def test_splits_are_those_of_refer() -> None:
    assert belongs("testAB", "testA") and belongs("testAB", "testB") and belongs("test", "test")
    assert not belongs("val", "testA") and not belongs("testA", "train")
    with pytest.raises(UserError, match="refcoco has no split 'test'; it has train, val, testA, testB"):
        check_split("refcoco", "test")


def test_counts_are_held_against_the_published_ones() -> None:
    spec = DatasetSpec("x", "unc", ("train", "val"), {"train": Counts(2, 5, 1), "val": Counts(expressions=4)})
    told = compare_with_published(spec, {"train": Counts(2, 5, 1), "val": Counts(9, 3, 9)})
    assert told == {"train": "as published", "val": "published: 4 expressions"}
