"""A data set of the Hub, or a folder that `load_dataset` reads, as own data: its columns are named like a table's."""

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from amltrain.data.images import FileFault, decode_file, pixel_values
from amltrain.data.segmentation import encode_mask
from amltrain.data.sources.annotations import Annotations
from amltrain.data.sources.own import check_name
from amltrain.data.sources.table import AS_WRITTEN, ReadOptions, read_table
from amltrain.errors import UserError, cure, first_line


def read_hf(
    source: str,
    folder: Path,
    name: str,
    *,
    columns: Mapping[str, str] | None = None,
    options: ReadOptions = AS_WRITTEN,
) -> Annotations:
    """Write the pictures and a table of all splits into `folder`, then read that table.

    Columns with pictures (feature Image) become files. A split called validation becomes val. With one split only, the
    images are shared out as in any table without splits. Raises UserError.
    """
    check_name(name)
    try:
        splits = datasets.load_dataset(source, trust_remote_code=False)
    except Exception as error:  # the library raises its own types besides OSError and ValueError
        raise UserError(
            f"could not read {source} ({first_line(error)}); give a Hub data set id that can be reached, or a folder"
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table = folder / "table.jsonl"
        with table.open("w", encoding="utf-8") as lines:
            for split, rows in splits.items():
                for row in _plain_rows(rows, folder):
                    if len(splits) > 1:
                        row["split"] = "val" if split == "dev" and "val" not in splits else split
                    lines.write(json.dumps(row, default=_plain_value) + "\n")
    except OSError as error:
        raise UserError(f"could not write {folder} ({error.strerror or error}); {cure(error)}") from error
    except (TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: a column cannot be read as a table ({error}); drop it") from error
    return read_table(table, folder, name, columns=columns, options=options)._replace(place=source)


def _plain_rows(rows: datasets.Dataset, folder: Path) -> Any:
    """Rows whose pictures are files below `folder`, named by their content: the same picture is one image."""
    pictures = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    several = [c for c, f in rows.features.items() if isinstance(getattr(f, "feature", None), datasets.Image)]
    for column in pictures:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    for column in several:
        rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
    for number, row in enumerate(rows, 1):
        plain = dict(row)
        for column in pictures:
            plain[column] = _write(plain[column], folder, column)
        for column in several:
            plain[column] = _joined_masks(plain[column] or [], f"row {number}, column {column}")
        yield plain


def _joined_masks(pictures: Sequence[dict[str, Any]], where: str) -> dict[str, Any] | None:
    """Masks of several parts, one picture each, as run lengths of all. Raises UserError."""
    masks = []
    for picture in pictures:
        try:
            masks.append(pixel_values(decode_file(_content(picture))) != 0)
        except FileFault as fault:
            raise UserError(f"{where}: a mask cannot be read: {fault}") from fault
    if len({mask.shape for mask in masks}) > 1:
        raise UserError(f"{where}: its masks have different sizes")
    return encode_mask(np.any(masks, axis=0).astype(np.uint8)) if masks else None


def _plain_value(value: Any) -> Any:
    """A value that JSON does not have: arrays as lists, a PNG as base64, run lengths' counts as text."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode() if value.startswith(b"\x89PNG") else value.decode("ascii")
    raise TypeError(f"a {type(value).__name__}")


def _content(picture: dict[str, Any]) -> bytes:
    return picture["bytes"] if picture["bytes"] is not None else Path(picture["path"]).read_bytes()


def _write(picture: dict[str, Any] | None, folder: Path, column: str) -> str | None:
    if picture is None:
        return None
    content = _content(picture)
    try:
        ending = (Image.open(io.BytesIO(content)).format or "bin").lower()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        ending = "bin"  # counted as damaged where it is read
    name = f"{column}/{hashlib.sha256(content).hexdigest()[:24]}.{ending}"
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_bytes(content)
    return name
