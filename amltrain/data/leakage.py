"""Combined training without leaks: RefCOCO, RefCOCO+ and RefCOCOg draw on the same images, so a training image of one
may be a test image of another. Every image of any evaluation split is dropped from training (big_vision's rule).
"""

import json
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from amltrain.data.catalog import Counts, find_spec
from amltrain.data.rows import Rows, open_rows
from amltrain.errors import UserError
from amltrain.files import read_bytes, write_text


def excluded_images(
    prepared: str,
    dataset_names: Sequence[str],
    *,
    also_held_out: Sequence[str] = (),
    held_out_ids: Path | str | None = None,
    streaming: bool = False,
) -> set[int]:
    """Ids of all images in a val or test split of any of the data sets.

    also_held_out: further prepared data sets whose val and test splits count. held_out_ids: a JSON list of further ids.
    Raises UserError.
    """
    held_out: set[int] = set() if held_out_ids is None else read_image_ids(Path(held_out_ids))
    for name in dict.fromkeys([*dataset_names, *also_held_out]):
        for split in find_spec(name, prepared).evaluation_splits:
            rows = open_rows(prepared, name, split, streaming=streaming)
            held_out.update(rows.columns.column("image_id").to_pylist())
    return held_out


def read_image_ids(path: Path) -> set[int]:
    """Image ids from a JSON list of numbers or of digit strings (PolyFormer's list has "000000000025")."""
    try:
        entries = json.loads(read_bytes(path))
        if not isinstance(entries, list):
            raise TypeError(f"it holds a {type(entries).__name__}")
        return {int(entry) for entry in entries}
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is no JSON list of image ids: {error}") from error


def combined_path(prepared: str, dataset_names: Sequence[str], leak_filter: bool) -> Path:
    """Return the path of the manifest of a combined training."""
    return Path(prepared) / f"combined{'' if leak_filter else '-unfiltered'}-{'-'.join(dataset_names)}.json"


def write_combined_manifest(path: Path, prepared: str, dataset_names: Sequence[str], excluded: AbstractSet[int]) -> str:
    """Write down what combined training uses: counts before and after the filter, and the dropped image ids.

    excluded: images that training must not see; empty without the filter. Returns the counts for a person.
    """
    counts: dict[str, Any] = {}
    dropped: set[int] = set()
    lines = []
    for name in dataset_names:
        rows = open_rows(prepared, name, "train")
        images = np.asarray(rows.columns.column("image_id"))
        kept = ~np.isin(images, list(excluded))
        dropped.update(images[~kept].tolist())
        before, after = _count(rows, np.ones_like(kept)), _count(rows, kept)
        counts[name] = {"before": before._asdict(), "after": after._asdict()}
        lines.append(
            f"  {name:10} {after.images:>7,} of {before.images:,} images, {after.refs:,} of {before.refs:,} refs"
        )
    manifest = {
        "datasets": list(dataset_names),
        "leak_filter": bool(excluded),
        "train": counts,
        "dropped_images": sorted(dropped),
    }
    try:
        write_text(path, json.dumps(manifest, indent=1))
    except OSError as error:
        raise UserError(f"could not write {path} ({error.strerror})") from error
    return "\n".join([f"combined training, {len(dropped):,} images dropped ({path.name}):", *lines])


def _count(rows: Rows, kept: np.ndarray) -> Counts:
    """Refs, expressions and images of the rows where `kept` [rows] bool is true."""
    referents = rows.columns.column("referents").combine_chunks()
    refs = np.asarray(pc.list_value_length(referents), dtype=np.int64)
    sentences = np.asarray(pc.list_value_length(pc.struct_field(pc.list_flatten(referents), "sentences")), np.int64)
    return Counts(int(refs[kept].sum()), int(sentences[np.repeat(kept, refs)].sum()), int(kept.sum()))
