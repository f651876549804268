"""Values of annotation files that would be read as something else."""

from typing import Any

import pytest

from amltrain.data.catalog import dataset_spec
from amltrain.data.sources.entries import by_id, check_refs, referred_ids
from amltrain.errors import UserError


def ref(**changes: Any) -> dict[str, Any]:
    sentences = [{"sent_id": 1, "sent": "the cup", "raw": "The cup"}]
    return {"ref_id": 1, "image_id": 2, "ann_id": 3, "split": "train", "sentences": sentences} | changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentences": [{"sent_id": 1, "sent": "x", "raw": True}]}, "a sentence of ref 1 has 'raw' True, not a text"),
        ({"sentences": [{"sent_id": 1, "sent": 7}]}, "a sentence of ref 1 has 'sent' 7, not a text"),
        ({"sentences": [{"sent_id": 1, "sent": ["the", "cup"]}]}, "has 'sent' \\['the', 'cup'\\], not a text"),
        ({"ann_id": -1}, "ref number 0 has ann_id -1, it refers to nothing, which refcoco has no refs for"),
        ({"ann_id": [-1]}, "it refers to nothing, which refcoco has no refs for"),
        ({"ann_id": []}, "has an empty ann_id"),
        ({"image_id": True}, "has 'image_id' True, not a whole number"),
    ],
)
def test_what_would_mean_something_else_is_rejected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_refs([ref(**change)], dataset_spec("refcoco"), "refcoco", "refs.p")


def test_nothing_is_meant_where_a_data_set_has_it() -> None:
    nothing = ref(ann_id=[-1], no_target=True)
    check_refs([nothing], dataset_spec("grefcoco"), "grefcoco", "grefs.json")
    assert referred_ids(nothing) == []


def test_a_missing_text_is_the_other_one() -> None:
    check_refs([ref(sentences=[{"sent_id": 1, "sent": None, "raw": "A"}])], dataset_spec("refcoco"), "refcoco", "x")


def test_an_annotation_of_image_true_is_of_no_image() -> None:
    entry = {"id": 3, "image_id": True, "bbox": [0, 0, 1, 1]}
    with pytest.raises(UserError, match="annotation number 0 has 'image_id' True, not a whole number"):
        by_id([entry], "annotation", ("bbox",), "instances.json")
    assert by_id([{"id": 3, "bbox": [0, 0, 1, 1]}], "annotation", ("bbox",), "instances.json").keys() == {3}
