"""Rows of table files: JSONL, a JSON list, CSV and TSV as spreadsheets and pandas write them, and Parquet.

No row is ever joined with another and no character lost: quoting that does not fit is an error that names the line.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from amltrain.data.sources.cells import decode_text, parse_json, text_lines
from amltrain.data.sources.pictures import ENDINGS
from amltrain.errors import UserError, first_line
from amltrain.files import read_bytes

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".tab", ".parquet")
DELIMITERS = ",;\t|"
_LARGEST_CELL = 2**31 - 1
_A_PICTURE = re.compile(rf"\n[^\n]*({'|'.join(re.escape(ending) for ending in ENDINGS)})\b", re.IGNORECASE)


def read_table_file(table: Path, encoding: str | None = None) -> Any:
    """The content of a table file: a list of rows, or an object where a .json file holds one. Raises UserError."""
    if table.exists() and not table.is_file():
        raise UserError(f"could not read {table} (not a regular file); for a folder of files give --folder")
    if not table.is_file():
        raise UserError(f"there is no table {table}")
    kind = table.suffix.lower()
    if kind not in KINDS:
        raise UserError(f"{table}: the table should be .jsonl, .json, .csv, .tsv or .parquet")
    if kind == ".parquet":
        return _parquet_rows(table)
    text = decode_text(read_bytes(table), str(table), encoding)
    if kind in (".jsonl", ".ndjson"):
        return list(_json_lines(text, table))
    if kind == ".json":
        return _plain_json(text, table)
    return _tsv_rows(text, table) if kind in (".tsv", ".tab") else _csv_rows(text, table)


def _json_lines(text: str, table: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text_lines(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{table}, line {number} is not JSON ({first_line(error)})") from error
        if not isinstance(row, dict):
            raise UserError(f"{table}, line {number} holds a {type(row).__name__}, not an object")
        yield row


def _plain_json(text: str, table: Path) -> Any:
    if len(text) < 1 << 20:
        return parse_json(text, str(table))  # also tells of keys that are given twice
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{table} is not JSON ({first_line(error)})") from error


def _parquet_rows(table: Path) -> list[dict[str, Any]]:
    try:
        return pq.read_table(table, page_checksum_verification=True).to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{table} cannot be read as parquet ({first_line(error)})") from error


def _header(names: list[str], table: Path) -> list[str]:
    """Column names without white space around them; one that is used twice would lose a column."""
    names = [name.strip() for name in names]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{table} has the column {twice!r} twice; rename one of them")
    return names


def _csv_rows(text: str, table: Path) -> list[dict[str, Any]]:
    """CSV by the rules of RFC 4180, with the delimiter that the header has, every cell as text."""
    first = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=lambda sign: (first.count(sign), -DELIMITERS.index(sign)))
    spaced = f"{delimiter} " in first
    old = csv.field_size_limit(_LARGEST_CELL)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=spaced, strict=True)
        try:
            names = _header(next(reader, []), table)
            return [row for cells in reader if (row := _csv_row(cells, names, reader.line_num, table))]
        except csv.Error as error:
            fix = "write quotes inside a quoted cell twice, and put cells that hold commas in double quotes"
            raise UserError(f"{table}, line {reader.line_num} cannot be read as csv ({error}); {fix}") from error
    finally:
        csv.field_size_limit(old)


def _csv_row(cells: list[str], names: list[str], line: int, table: Path) -> dict[str, Any] | None:
    """A row by column; None for an empty line."""
    if not cells:
        return None
    if len(cells) != len(names):
        raise UserError(
            f"{table}, line {line} cannot be read as csv (Expected {len(names)} columns, got {len(cells)}); put cells "
            f"that hold commas in double quotes"
        )
    swallowed = next((cell for cell in cells if "\n" in cell and _A_PICTURE.search(cell)), None)
    if swallowed is not None:
        raise UserError(
            f"{table}, line {line}: the cell {swallowed[:40]!r}... runs over several rows; close its double quote, or "
            f"write a quote inside a cell twice"
        )
    return dict(zip(names, cells, strict=True))


def _tsv_rows(text: str, table: Path) -> list[dict[str, Any]]:
    """TSV: a row per line, a cell between tabs, quotes as they are. pandas puts cells with quotes in quotes and doubles
    those inside: such cells are told by that, and those of a file whose header is in quotes altogether.
    """
    lines = [(number, line) for number, line in enumerate(text_lines(text), 1) if line.strip()]
    if not lines:
        return []
    header = lines[0][1].split("\t")
    all_quoted = all(len(name) > 1 and name[0] == name[-1] == '"' for name in header)
    names = _header([name.strip('"') if all_quoted else name for name in header], table)
    rows = []
    for number, line in lines[1:]:
        cells = [_unquoted(cell, all_quoted) for cell in line.split("\t")]
        if len(cells) != len(names):
            raise UserError(
                f"{table}, line {number} has {len(cells)} cells, its header has {len(names)}; a cell of a .tsv has no "
                f"tab and no line break"
            )
        rows.append(dict(zip(names, cells, strict=True)))
    return rows


def _unquoted(cell: str, always: bool) -> str:
    inner = cell[1:-1]
    if len(cell) < 2 or not cell[0] == cell[-1] == '"' or '"' in inner.replace('""', ""):
        return cell
    return inner.replace('""', '"') if always or '""' in inner else cell
