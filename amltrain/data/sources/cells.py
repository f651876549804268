"""Texts, cells, ids and splits as people and tools write them: read rightly, or rejected with the reason.

`read_text` decides the encoding of every text file; nothing is ever replaced. `cell_value` reads what spreadsheets,
pandas and `datasets` write into a cell. `whole_number`, `hashed_id`, `truth` and `split_name` read ids, flags and
splits.
"""

import ast
import codecs
import hashlib
import io
import itertools
import json
import math
import re
import reprlib
import tokenize
from pathlib import Path
from typing import Any

from amltrain.errors import UserError, first_line
from amltrain.files import read_bytes

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
REPLACEMENT = "\ufffd"
_YES, _NO = {"1", "true", "yes", "1.0", "t", "y"}, {"0", "false", "no", "", "0.0", "f", "n"}
_ABSENT = {"nan", "none", "null", "<na>", "n/a", "nat"}
"""How pandas and others write a cell that is empty."""
_SPLITS = {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "testing": "test",
    "testa": "testA",
    "testb": "testB",
}


def decode_text(content: bytes, place: str, encoding: str | None = None) -> str:
    """The text of a file's bytes: by its byte-order mark, by `encoding`, else as UTF-8. Raises UserError; replaces
    nothing.
    """
    found = next((name for mark, name in _BOMS if content.startswith(mark)), None)
    try:
        text = content.decode(found or encoding or "utf-8")
    except LookupError as error:
        raise UserError(f"--encoding {encoding!r} is not known; examples: utf-8, cp1252, gbk, shift_jis") from error
    except UnicodeDecodeError as error:
        if found or encoding:
            raise UserError(f"{place} is not valid {found or encoding} (byte {error.start})") from error
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{place}, line {line} is not UTF-8; save it as UTF-8, or name its encoding: --encoding cp1252 (Excel and "
            f"Windows in Western Europe), gbk, shift_jis"
        ) from error
    if not found and not encoding and "\0" in text[:1000] and text.count("\0") > len(text) // 4:
        raise UserError(f"{place} looks like UTF-16 without a byte-order mark; name it: --encoding utf-16-le")
    return text


def read_text(path: Path, encoding: str | None = None) -> str:
    """The text of a file, see `decode_text`. Raises UserError."""
    return decode_text(read_bytes(path), str(path), encoding)


def text_lines(text: str) -> list[str]:
    """Lines that end in a line feed, with or without a carriage return; no other character ends a line of a file."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def read_json(path: Path, encoding: str | None = None) -> Any:
    """A JSON file's content. Raises UserError that names the line."""
    return parse_json(read_text(path, encoding), str(path))


def parse_json(text: str, place: str) -> Any:
    """JSON text; a key that is given twice in one object is rejected. Raises UserError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"{place}: the key {twice[:50]!r} is given twice in one object; keep one of them")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({first_line(error)})") from error


def text_fault(text: str) -> str | None:
    """Why a text cannot be a sentence or a name; None where it can."""
    if REPLACEMENT in text:
        return "it contains the replacement character U+FFFD: its file was once read in a wrong encoding"
    if "\0" in text:
        return "it contains a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "it contains half of a surrogate pair, which is not valid text"
    return None


def clean_sentence(text: str) -> str:
    """A sentence with white space of every kind as single spaces."""
    return " ".join(text.split())


def is_absent(cell: Any) -> bool:
    """Whether a cell is empty: nothing, an empty text or list, or a written NaN."""
    if cell is None:
        return True
    if isinstance(cell, str):
        return not cell or (len(cell) < 9 and (not cell.strip() or cell.strip().lower() in _ABSENT)) or cell.isspace()
    if isinstance(cell, float):
        return math.isnan(cell)
    return isinstance(cell, (list, tuple, dict)) and not cell


def cell_value(cell: Any, where: str) -> Any:
    """A cell of text that is JSON, or the repr that Python writes of lists and dicts, as its value; else the cell.

    where: names file, row and column in the message. Raises UserError for a text that begins like a list and is one
    in neither spelling: as a sentence or a mask it would mean something else.
    """
    if not isinstance(cell, str) or cell.strip()[:1] not in ("[", "{"):
        return cell
    text = cell.strip()
    if text[-1] not in ("]", "}"):
        return cell  # a sentence that begins with a bracket
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    return _python_repr(text, where)


def _python_repr(text: str, where: str) -> Any:
    """The value of a Python literal. Raises UserError: numpy's repr has no commas and ends in `...` when long."""
    if re.match(r"[\[{]\s*[\w'\"-]*\s+[^:=,]*[\]}]$", text) and not re.search(r"[,'\"\d]", text):
        return text  # "[a car]" in brackets is a sentence
    advice = f"{where} looks like a list and is not JSON: {reprlib.repr(text)}; write it with json.dumps"
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        strings = [token.type == tokenize.STRING for token in tokens]
        if any(one and other for one, other in itertools.pairwise(strings)):
            raise UserError(f"{advice} (texts without commas between them, as numpy prints an array)")
        value = ast.literal_eval(text)
    except UserError:
        raise
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError) as error:
        kind = "; numpy prints arrays without commas" if re.search(r"\d\s+\d", text) else ""
        raise UserError(f"{advice}{kind}") from error
    if isinstance(value, set):
        raise UserError(f"{advice} (a set has no order)")
    return _plain(value)


def _plain(value: Any) -> Any:
    """Tuples as lists, deeply."""
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value


def whole_number(cell: Any, column: str, where: str) -> int | None:
    """A whole number of 64 bits; 3.0 is 3, NaN is not given. Raises UserError."""
    if is_absent(cell):
        return None
    try:
        if isinstance(cell, bool):
            raise ValueError
        if isinstance(cell, str) and "." in cell:
            cell = float(cell)
        if isinstance(cell, float) and (not cell.is_integer() or abs(cell) > 2**53):
            raise ValueError
        number = int(cell)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{where}: {column} is {str(cell)[:50]!r}, not a whole number") from None
    if not -(2**63) <= number < 2**63:
        raise UserError(f"{where}: {column} needs more than 64 bits")
    return number


def is_number_text(text: str) -> bool:
    """Whether a text is a number, or empty; any other is an id of its own."""
    return is_absent(text) or re.fullmatch(r"\s*[-+]?[\d.]+(e[-+]?\d+)?\s*", text, re.IGNORECASE) is not None


def hashed_id(text: str) -> int:
    """A number of 62 bits for a text, above all numbers that people give."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:7], "big") | 2**61


def truth(cell: Any, column: str, where: str) -> bool:
    """True or false, also as 1, 0.0, yes, NaN (false). Raises UserError."""
    text = "" if is_absent(cell) else str(cell).strip().lower()
    if text not in _YES | _NO:
        raise UserError(f"{where}: {column} is {str(cell)[:50]!r}, not true or false")
    return text in _YES


def split_name(cell: Any) -> str | None:
    """A split's name in one spelling: `Train` is train and `valid` is val; other names stay as they are."""
    if is_absent(cell):
        return None
    name = str(cell).strip()
    folded = name.casefold()
    if folded in ("train", "val", "test"):
        return folded
    return _SPLITS.get(folded, name)
