"""RefCOCO-M (the data set moondream/refcoco-m): RefCOCO's val with masks made again; Parquet files with their images.

    <root>/refcoco-m/data/validation-*.parquet

A row: image, image_id, file_name, samples: list of {id, category, sentences, bbox, mask: {counts, size}}. The images
are written to <root>/refcoco-m/images once, from where they are prepared like any others.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from amltrain.data.annotations import Annotations, check_entry
from amltrain.data.own import TableRow, build_annotations
from amltrain.data.specs import dataset_spec
from amltrain.errors import UserError, first_line
from amltrain.files import sha256

_COLUMNS = ("image", "image_id", "file_name", "samples")


def read_refcoco_m(root: Path, name: str) -> Annotations:
    """Read the Parquet files and write out their images. Raises UserError."""
    spec = dataset_spec(name)
    folder = root / spec.folder if (root / spec.folder).is_dir() else root
    shards = sorted([*folder.glob("data/validation-*.parquet"), *folder.glob("validation-*.parquet")])
    if not shards:
        raise UserError(f"{folder} has no data/validation-*.parquet; put RefCOCO-M's files there")
    rows = []
    for shard in shards:
        try:
            rows += _rows(shard, folder / "images")
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{shard} cannot be read ({first_line(error)}); download it again") from error
    sources = {shard.name: sha256(shard) for shard in shards}
    return build_annotations(rows, name, sources=sources, place=str(folder), spec=spec)


def _rows(shard: Path, images: Path) -> list[TableRow]:
    parquet = pq.ParquetFile(shard)
    missing = [column for column in _COLUMNS if column not in parquet.schema_arrow.names]
    if missing:
        raise UserError(f"{shard} has no column {missing[0]!r}; it has {', '.join(parquet.schema_arrow.names)}")
    rows: list[TableRow] = []
    images.mkdir(exist_ok=True)
    number = 0
    for batch in parquet.iter_batches(batch_size=64, columns=list(_COLUMNS)):
        for row in batch.to_pylist():
            rows += _row(row, f"row {number}", shard, images)
            number += 1
    return rows


def _row(row: dict[str, Any], place: str, shard: Path, images: Path) -> list[TableRow]:
    check_entry(row, ("image_id", "file_name"), place, str(shard))
    content = (row["image"] or {}).get("bytes")
    if not content or not isinstance(row["samples"], list):
        raise UserError(f"{shard}: {place} has no image or no samples; download it again")
    name = Path(row["file_name"]).name
    path = images / name
    if not path.exists():
        path.write_bytes(content)
    found = []
    for sample in row["samples"]:
        check_entry(sample, ("id", "sentences", "mask"), f"a sample of {place}", str(shard))
        texts = tuple(text for text in sample["sentences"] if isinstance(text, str))
        box = tuple(sample.get("bbox") or ())
        category = str(sample.get("category") or "")
        where = f"{place} of {shard.name}"
        box = box if len(box) == 4 else ()
        mask, ref_id = sample["mask"], sample["id"]
        found.append(TableRow(where, name, texts, mask, "val", ref_id, row["image_id"], category, box))
    return found
