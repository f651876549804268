"""A data set of the Hub, or a folder that `load_dataset` reads, as own data: its columns are named like a table's."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from amltrain.data.sources.annotations import Annotations
from amltrain.data.sources.own import SHARES, check_name
from amltrain.data.sources.table import read_table
from amltrain.errors import UserError, first_line

_SPLITS = {"validation": "val", "valid": "val", "dev": "val"}


def read_hf(
    source: str,
    folder: Path,
    name: str,
    *,
    columns: Mapping[str, str] | None = None,
    mask_threshold: int | None = None,
    seed: int = 0,
    shares: Mapping[str, float] = SHARES,
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
                        row["split"] = _SPLITS.get(split, split)
                    lines.write(json.dumps(row) + "\n")
    except OSError as error:
        raise UserError(f"could not write {folder} ({error.strerror or error}); make room") from error
    except TypeError as error:
        raise UserError(f"{source}: a column cannot be read as a table ({error}); drop it") from error
    return read_table(
        table, folder, name, columns=columns, mask_threshold=mask_threshold, seed=seed, shares=shares
    )._replace(place=source)


def _plain_rows(rows: datasets.Dataset, folder: Path) -> Any:
    """Rows whose pictures are files below `folder`, named by their content: the same picture is one image."""
    pictures = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    for column in pictures:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    for row in rows:
        plain = dict(row)
        for column in pictures:
            plain[column] = _write(plain[column], folder, column)
        yield plain


def _write(picture: dict[str, Any] | None, folder: Path, column: str) -> str | None:
    if picture is None:
        return None
    content = picture["bytes"] if picture["bytes"] is not None else Path(picture["path"]).read_bytes()
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
