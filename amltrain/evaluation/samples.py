"""One row per sample as Parquet: ids, sentence, pixels, IoU and flags, for error analysis, comparisons and reports."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from amltrain.errors import UserError, first_line
from amltrain.evaluation.metrics import Scored, Ties, number_refs
from amltrain.evaluation.results import BOX_COLUMNS, DETECTED_COLUMNS, SAMPLE_COLUMNS, Results
from amltrain.files import is_sealed, new_file, seal, unseal

FOLDER = "samples"
STANDS_ON = ("checkpoint", "predictions", "step", "weights_sha256", "data_fingerprint")
"""Facts of an evaluation that its samples carry."""
COLUMNS = {
    "dataset": "data set",
    "split": "split",
    "sample_id": "position in the split, int64",
    "image_id": "int64",
    "ref_id": "int64",
    "sent_id": "int64",
    "sentence": "text that the model read",
    "intersection": "pixels, int64, in the protocol's frame",
    "union": "pixels, int64",
    "iou": "0..1, float64; with the no-target rule where the generalized metrics are computed",
    "area": "pixels of the predicted mask, int64",
    "box_intersection": "pixels that the boxes around prediction and truth share, int64",
    "box_union": "pixels of either box, int64",
    "detected_intersection": "1/4096 pixels that the model's own box and the true one share, int64; 0 without boxes",
    "detected_union": "1/4096 pixels of either, int64; 0 without boxes",
    "truth_area": "pixels of the ground truth, int64",
    "truth_share": "share of the frame that the ground truth covers, 0..1, float64; NaN if the frame is unknown",
    "no_target": "bool, the sentence refers to nothing",
    "predicted_no_target": "bool",
    "finite": "bool, the logits were finite",
    "category": "class of the referent; empty where the data do not name it",
    "same_class": "other objects of that class in the image that the split refers to, int64; -1 = unknown",
}
"""Columns of the file and their content."""


def sample_table(results: Results, dataset: Any) -> pa.Table:
    """Rows of `COLUMNS`, in the order of sample ids. dataset: the one evaluated."""
    scored = results.scored()
    ids = results.samples[:, 0].tolist()
    infos = [dataset.info(i) for i in ids]
    if hasattr(dataset, "annotation"):
        notes = [dataset.annotation(i) for i in ids]
        if results.protocol["frame"] == "original":
            pixels = np.array([note.height * note.width for note in notes], float)
        else:
            pixels = np.full(len(ids), float(np.prod(results.protocol["size"])))
        annotated = ([note.category for note in notes], [note.same_class for note in notes])
    else:
        pixels, annotated = np.full(len(ids), np.nan), ([""] * len(ids), [-1] * len(ids))
    columns = {
        "dataset": [results.dataset] * len(ids),
        "split": [results.split] * len(ids),
        "sample_id": ids,
        **{name: [getattr(i, name) for i in infos] for name in ("image_id", "ref_id", "sent_id", "sentence")},
        "intersection": scored.intersection,
        "union": scored.union,
        "iou": results.sample_iou(),
        "area": scored.area,
        **{name: results.samples[:, SAMPLE_COLUMNS.index(name)] for name in (*BOX_COLUMNS, *DETECTED_COLUMNS)},
        "truth_area": scored.truth_area,
        "truth_share": scored.truth_area / pixels,
        "no_target": scored.no_target,
        "predicted_no_target": scored.predicted_no_target,
        "finite": results.samples[:, 5].astype(bool),
        "category": annotated[0],
        "same_class": annotated[1],
    }
    return pa.table({name: columns[name] for name in COLUMNS})


def write_samples(path: Path, table: pa.Table, facts: Mapping[str, Any] | None = None) -> None:
    """Write a Parquet file atomically, with a checksum. Raises UserError when it cannot be written.

    facts: what the rows stand on, as in `Results.provenance`; the fingerprints of model and data are kept.
    """
    kept = {name: facts[name] for name in STANDS_ON if name in facts} if facts else {}
    with new_file(path) as temporary:
        pq.write_table(seal(table, kept), temporary, write_page_checksum=True)


def read_samples(path: str | Path) -> pa.Table:
    """Read what `write_samples` wrote, in this or an earlier version. Raises UserError for any other file.

    A table of a version that wrote no checksum is taken as it is; `is_sealed` tells. One of a version that had no boxes
    gets columns of 0: its results have no box metric either.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        named = set(table.column_names)  # damaged names may not be UTF-8
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a table of samples ({first_line(error)}); evaluate again") from error
    missing = [name for name in COLUMNS if name not in named]
    if missing not in ([], list(DETECTED_COLUMNS), [*BOX_COLUMNS, *DETECTED_COLUMNS]):
        raise UserError(f"{path} has no column {missing[0]!r}; evaluate again with this version")
    if is_sealed(table):
        unseal(table, path)
    for name in missing:
        table = table.append_column(name, pa.array(np.zeros(len(table), np.int64)))
    return table


def check_origin(table: pa.Table, results: Results, path: Path) -> None:
    """Raise UserError if samples that were read belong to another model or other data than a row of results."""
    facts = unseal(table, path) if is_sealed(table) else {}
    for name, what in (("weights_sha256", "weights"), ("data_fingerprint", "data")):
        mine, theirs = results.provenance.get(name), facts.get(name)
        if mine is not None and theirs is not None and mine != theirs:
            raise UserError(f"{path} has the samples of other {what} than its row of results.json; evaluate again")


def scored_samples(table: pa.Table, ties: Ties) -> Scored:
    """The columns that metrics need. ties: of the protocol."""
    return Scored(
        intersection=table.column("intersection").to_numpy(),
        union=table.column("union").to_numpy(),
        area=table.column("area").to_numpy(),
        no_target=table.column("no_target").to_numpy(),
        predicted_no_target=table.column("predicted_no_target").to_numpy(),
        ties=ties,
        ref=number_refs(table.column("image_id").to_numpy(), table.column("ref_id").to_numpy()),
        **{name: table.column(name).to_numpy() for name in (*BOX_COLUMNS, *DETECTED_COLUMNS)},
    )
