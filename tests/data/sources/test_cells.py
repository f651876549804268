"""Texts, cells, ids, splits and names of pictures as people and tools write them."""

import codecs
import csv
import io
import json
import math
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amltrain.data.sources.cells import (
    cell_value,
    decode_text,
    hashed_id,
    is_absent,
    parse_json,
    split_name,
    text_fault,
    text_lines,
    truth,
    whole_number,
)
from amltrain.data.sources.pictures import PictureFinder, same_pictures, tidy_name
from amltrain.data.sources.table_files import read_table_file
from amltrain.errors import UserError

TEXTS = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=30)
LINES = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\0"), min_size=1, max_size=20)


@settings(deadline=None)
@given(text=TEXTS, encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_a_text_comes_back_in_every_encoding_with_a_mark(text: str, encoding: str) -> None:
    if not text.startswith("\ufeff"):
        assert decode_text(text.encode(encoding), "x") == text


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        ("a\ncafé".encode("cp1252"), None, "x, line 2 is not UTF-8; .*--encoding cp1252"),
        ("日本".encode("shift_jis"), None, "x, line 1 is not UTF-8"),
        ("a,b,c,d,e\n".encode("utf-16-le"), None, "UTF-16 without a byte-order mark"),
        (codecs.BOM_UTF8 + b"\xff", None, "x is not valid utf-8-sig"),
        (b"abc", "klingon", "--encoding 'klingon' is not known"),
        (b"\xff\xff\xff", "ascii", "x is not valid ascii"),
    ],
)
def test_what_is_not_text_is_named(content: bytes, encoding: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        decode_text(content, "x", encoding)


def test_an_encoding_that_is_named_is_used() -> None:
    assert decode_text("café".encode("cp1252"), "x", "cp1252") == "café"
    assert decode_text("日本".encode("shift_jis"), "x", "shift_jis") == "日本"


def test_only_a_line_feed_ends_a_line() -> None:
    assert text_lines("a\u2028b\x85c\x0cd\r\ne") == ["a\u2028b\x85c\x0cd", "e"]


def test_a_damaged_text_is_no_sentence() -> None:
    assert all(text_fault(f"the red {sign} cup") for sign in ("\ufffd", "\0", chr(0xD83D)))
    assert text_fault("the red cup 😀") is None


@settings(deadline=None)
@given(texts=st.lists(LINES, min_size=1, max_size=4))
def test_lists_in_the_spellings_of_json_and_python(texts: list[str]) -> None:
    assert cell_value(json.dumps(texts), "x") == texts
    assert cell_value(repr(texts), "x") == texts
    assert cell_value(repr(tuple(texts)), "x") == repr(tuple(texts))  # begins with a parenthesis: a sentence


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("{'size': [4, 5], 'counts': b'abc'}", {"size": [4, 5], "counts": b"abc"}),
        ("[(1, 2), (3, 4)]", [[1, 2], [3, 4]]),
        ("[None, True]", [None, True]),
        ("[a red cup]", "[a red cup]"),
        ("[1] the first cup", "[1] the first cup"),
        ("the cup [left]", "the cup [left]"),
        ("", ""),
        (3, 3),
    ],
)
def test_a_cell_is_its_value(cell: Any, value: Any) -> None:
    assert cell_value(cell, "x") == value


@pytest.mark.parametrize(
    "cell",
    ["['a' 'b']", "[[ 8  8 24  8]]", "[array([1, 2])]", "[[1 2 ... 3]]", "{'a', 'b'}", "['a', 'b]", "[1, 2,, 3]"],
)
def test_a_list_in_no_known_spelling_is_named(cell: str) -> None:
    with pytest.raises(UserError, match="x looks like a list and is not JSON"):
        cell_value(cell, "x")


@pytest.mark.parametrize(
    ("cell", "number"),
    [("3.0", 3), (3.0, 3), ("3", 3), (" 7 ", 7), ("nan", None), (math.nan, None), (None, None), ("", None), ("-1", -1)],
)
def test_whole_numbers_of_pandas(cell: Any, number: int | None) -> None:
    assert whole_number(cell, "ref_id", "x") == number


@pytest.mark.parametrize("cell", ["3.5", 3.5, True, "1e300", 2**63, "seven", [3], math.inf, 2.0**60])
def test_what_is_no_whole_number_is_named(cell: Any) -> None:
    with pytest.raises(UserError, match="x: ref_id"):
        whole_number(cell, "ref_id", "x")


def test_truths() -> None:
    assert [truth(cell, "t", "x") for cell in ("1.0", 1.0, True, "TRUE", "yes", "y")] == [True] * 6
    assert [truth(cell, "t", "x") for cell in ("0.0", 0.0, False, "No", "", None, math.nan, "nan")] == [False] * 8
    with pytest.raises(UserError, match="x: t is 'maybe'"):
        truth("maybe", "t", "x")


def test_ids_splits_and_absent_cells() -> None:
    assert hashed_id("a") != hashed_id("b") and 2**61 <= hashed_id("a") < 2**63
    names = ["Train", "VALID", "validation", "test", "testa", "testB", "final", "dev", None, "nan"]
    expected = ["train", "val", "val", "test", "testA", "testB", "final", "dev", None, None]
    assert [split_name(name) for name in names] == expected
    assert all(map(is_absent, (None, "", " ", "NaN", "None", "<NA>", [], {}, math.nan)))
    assert not any(map(is_absent, (0, False, "0", "a", [0], 0.0)))


def test_a_key_given_twice_is_named() -> None:
    with pytest.raises(UserError, match="the key 'a' is given twice"):
        parse_json('{"a": 1, "b": {}, "a": 2}', "x")


CELLS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5)


@settings(deadline=None)
@given(rows=CELLS, delimiter=st.sampled_from(",;|"), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_any_csv_comes_back(rows: list[tuple[str, str]], delimiter: str, quoting: Any, tmp_path_factory: Any) -> None:
    written = io.StringIO(newline="")
    writer = csv.writer(written, delimiter=delimiter, quoting=quoting)
    writer.writerows([("image", "sentence"), *rows])
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_bytes(written.getvalue().encode())
    found = [(row["image"], row["sentence"]) for row in read_table_file(path)]
    assert found == rows


@settings(deadline=None)
@given(rows=st.lists(st.tuples(LINES.filter(str.strip), LINES.filter(str.strip)), min_size=1, max_size=5))
def test_any_tsv_without_quoting_comes_back(rows: list[tuple[str, str]], tmp_path_factory: Any) -> None:
    rows = [row for row in rows if not any(cell[0] == cell[-1] == '"' and '""' in cell[1:-1] for cell in row)]
    path = tmp_path_factory.mktemp("tsv") / "t.tsv"
    path.write_text("\n".join("\t".join(row) for row in [("image", "sentence"), *rows]), encoding="utf-8", newline="")
    assert [(row["image"], row["sentence"]) for row in read_table_file(path)] == rows


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_tsv_of_pandas_comes_back(quoting: Any, tmp_path: Path) -> None:
    import pandas as pd

    sentences = ['"stop" sign', 'the 21" screen', "plain", 'a "b"']
    path = tmp_path / "t.tsv"
    pd.DataFrame({"image": ["a", "b", "c", "d"], "sentence": sentences}).to_csv(
        path, sep="\t", index=False, quoting=quoting
    )
    assert [row["sentence"] for row in read_table_file(path)] == sentences


def test_a_row_of_a_tsv_that_is_torn_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("image\tsentence\na.jpg\tone\nb.jpg\n")
    with pytest.raises(UserError, match=r"line 3 has 1 cells, its header has 2"):
        read_table_file(tmp_path / "t.tsv")


@pytest.mark.parametrize(
    ("name", "tidy"),
    [
        ("a\\b.jpg", "a/b.jpg"),
        ("./a//b.jpg", "a/b.jpg"),
        (".\\a.jpg", "a.jpg"),
        ("file:///x/a%20b.jpg", "/x/a b.jpg"),
        (" a.jpg ", "a.jpg"),
    ],
)
def test_a_name_in_one_spelling(name: str, tidy: str) -> None:
    assert tidy_name(name) == tidy


def test_a_picture_is_found_under_other_spellings(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("sub/Café.JPG", "sub/b.jpg", "b.jpg", "000000000009.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    finder = PictureFinder(tmp_path, by_base_name=True)
    decomposed = unicodedata.normalize("NFD", "sub/Café.JPG")
    assert finder.find("sub/Café.JPG") == finder.find(decomposed) == finder.find("sub\\café.jpg") == "sub/Café.JPG"
    assert finder.find(str(tmp_path / "sub/b.jpg")) == finder.find("./sub/../sub/b.jpg") == "sub/b.jpg"
    assert finder.find("/elsewhere/CAFÉ.jpg") == "sub/Café.JPG"
    assert finder.find("/elsewhere/b.jpg") is None  # two pictures are called so
    assert finder.find("COCO_train2014_000000000009.jpg") == "000000000009.jpg"
    assert finder.find("../b.jpg") is None and finder.find("c.jpg") is None and finder.find("a\0b") is None


def test_one_picture_under_several_names(tmp_path: Path) -> None:
    for name, content in (("a.jpg", b"one"), ("b.jpg", b"two"), ("copy.jpg", b"one"), ("long.jpg", b"longer")):
        (tmp_path / name).write_bytes(content)
    os.symlink("a.jpg", tmp_path / "link.jpg")
    os.link(tmp_path / "b.jpg", tmp_path / "hard.jpg")
    names = ["a.jpg", "b.jpg", "copy.jpg", "link.jpg", "hard.jpg", "long.jpg", "missing.jpg"]
    same, copies = same_pictures(tmp_path, names)
    assert same == {"link.jpg": "a.jpg", "hard.jpg": "b.jpg"}
    assert copies == {"copy.jpg": "a.jpg"}
