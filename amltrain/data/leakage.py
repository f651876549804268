"""Combined training without leaks: RefCOCO, RefCOCO+ and RefCOCOg draw on the same images, so a training image of one
may be a test image of another. Every image of any evaluation split is dropped from training (big_vision's rule)."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from amltrain.data.prepared import open_prepared
from amltrain.data.rows import open_rows
from amltrain.data.splits import Counts, dataset_spec
from amltrain.errors import UserError


def held_out_images(prepared: str, dataset_names: Sequence[str], *, streaming: bool = False) -> set[int]:
    """Ids of all images in a val or test split of any of the data sets."""
    held_out: set[int] = set()
    for name in dataset_names:
        for split in dataset_spec(name).evaluation_splits:
            rows = open_rows(prepared, name, split, streaming=streaming)
            held_out.update(rows.columns.column("image_id").to_pylist())
    return held_out


def read_image_ids(path: Path) -> set[int]:
    """Image ids from a JSON list of numbers or of digit strings (PolyFormer's list has "000000000025")."""
    try:
        return {int(entry) for entry in json.loads(path.read_text())}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no JSON list of image ids: {error}") from error


def write_combined_manifest(
    prepared: str, dataset_names: Sequence[str], excluded: Iterable[int], *, leak_filter: bool
) -> Path:
    """Say what combined training uses: counts before and after the filter and the dropped image ids.

    Returns `<prepared>/combined[-unfiltered]-<names>.json`.
    """
    excluded = set(excluded) if leak_filter else set()
    per_dataset: dict[str, Any] = {}
    dropped: set[int] = set()
    for name in dataset_names:
        table = open_prepared(prepared, name, "train").select_columns(["image_id", "referents"])
        before, after = [0, 0, 0], [0, 0, 0]
        for row in table:
            amounts = (len(row["referents"]), sum(len(r["sentences"]) for r in row["referents"]), 1)
            kept = row["image_id"] not in excluded
            dropped.update(() if kept else (row["image_id"],))
            for unit, amount in enumerate(amounts):
                before[unit] += amount
                after[unit] += amount * kept
        per_dataset[name] = {"before": Counts(*before)._asdict(), "after": Counts(*after)._asdict()}
    manifest = {
        "datasets": list(dataset_names),
        "leak_filter": leak_filter,
        "train": per_dataset,
        "dropped_images": sorted(dropped),
    }
    kind = "combined" if leak_filter else "combined-unfiltered"
    path = Path(prepared) / f"{kind}-{'-'.join(dataset_names)}.json"
    aside = path.with_suffix(".json.tmp")
    aside.write_text(json.dumps(manifest, indent=1))
    os.replace(aside, path)
    return path
