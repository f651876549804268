"""Random files for the readers: an answer or one sentence, never another error; what is valid comes through."""

import json
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from amltrain.config.files import read_config_files
from amltrain.data.segmentation import BrokenSegmentationError, decode_mask, encode_mask, referent_mask
from amltrain.data.sources.refer import read_refer
from amltrain.errors import UserError
from amltrain.files import load_json, load_pickle
from tests.data.original import HEIGHT, WIDTH, Original

FAST = settings(max_examples=60, deadline=None, database=None)
NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats())
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5)),
    lambda inside: st.one_of(st.lists(inside, max_size=3), st.dictionaries(st.text(max_size=5), inside, max_size=3)),
    max_leaves=8,
)


def reads_or_rejects_in_a_line(read: Callable[[], Any]) -> bool:
    """Read; whether it worked, or ended in a UserError of one line. Any other error fails the test."""
    try:
        read()
    except UserError as error:
        return bool(str(error).strip()) and "\n" not in str(error).strip()
    return True


@FAST
@given(st.data())
def test_a_mask_survives_and_any_change_of_its_text_is_a_mask_or_rejected(data: st.DataObject) -> None:
    """Also against pycocotools, on what passes."""
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    mask = np.random.default_rng(data.draw(st.integers(0, 2**32))).random((height, width)) < data.draw(st.floats(0, 1))
    rle = encode_mask(mask.astype(np.uint8))
    assert np.array_equal(decode_mask(rle), mask)
    place = data.draw(st.integers(0, len(rle["counts"]) - 1))
    text = (
        rle["counts"][:place] + data.draw(st.text(max_size=3)) + rle["counts"][place + data.draw(st.integers(0, 2)) :]
    )
    try:
        found = decode_mask(rle | {"counts": text})
    except UserError:
        return
    assert np.array_equal(found, coco.decode({"size": [height, width], "counts": text.encode()}))
    assert found.shape == (height, width) and found.max(initial=0) <= 1


@FAST
@given(VALUES)
def test_any_value_as_a_segmentation(value: Any) -> None:
    try:
        found = referent_mask([value], HEIGHT, WIDTH)
    except BrokenSegmentationError:
        return
    assert decode_mask(found.union).any()


@FAST
@given(st.lists(st.lists(st.one_of(st.floats(), st.integers(-100, 100)), max_size=9), max_size=4))
def test_any_numbers_as_polygons(polygons: list[list[float]]) -> None:
    try:
        found = referent_mask([polygons], HEIGHT, WIDTH)
    except BrokenSegmentationError:
        return
    assert decode_mask(found.union).any()


@FAST
@given(st.one_of(st.binary(max_size=200), VALUES.map(pickle.dumps)))
def test_any_bytes_as_json_or_pickle(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)
        for read in (load_json, load_pickle):
            assert reads_or_rejects_in_a_line(lambda read=read: read(path))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return Original(tmp_path_factory.mktemp("original"), per_split=1).write()


@FAST
@given(data=st.data())
def test_any_value_in_the_files_of_refer(original: Original, data: st.DataObject) -> None:
    refs = json.loads(json.dumps(original.refs))
    instances = {"images": original.images, "annotations": original.annotations, "categories": []}
    instances = json.loads(json.dumps(instances))
    content: Any = data.draw(st.sampled_from([refs, instances]))
    for _ in range(data.draw(st.integers(1, 4))):
        key = data.draw(st.sampled_from(list(content) if isinstance(content, dict) else list(range(len(content)))))
        if not isinstance(content[key], (dict, list)) or not content[key]:
            break
        inside, content = content, content[key]
    else:
        content, key = inside, key
    content[key] = data.draw(VALUES)
    original.refs_file.write_bytes(pickle.dumps(refs))
    (original.folder / "instances.json").write_text(json.dumps(instances))
    assert reads_or_rejects_in_a_line(lambda: read_refer(original.root, "refcoco"))


@FAST
@given(st.one_of(st.text(max_size=100), VALUES.map(json.dumps), st.binary(max_size=50)))
def test_any_text_as_a_config(text: str | bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
        assert reads_or_rejects_in_a_line(lambda: read_config_files(["--config", str(path)], {}))
