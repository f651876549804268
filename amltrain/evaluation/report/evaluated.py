"""The rows of an earlier evaluation, so that a report need not score the split again."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from amltrain.config.schema import Protocol
from amltrain.errors import UserError
from amltrain.evaluation.compare import Run, read_runs
from amltrain.evaluation.results import SAMPLE_COLUMNS, Results
from amltrain.hub.find import find_model_folder


def read_evaluation(place: str | Path, model: str, rule: Protocol, dataset: Any) -> Results:
    """Read results of `model` on this split, with a row per sample, from the folder of an evaluation.

    place: as `amltrain evaluate --output` wrote it. rule: the protocol that the results must have. dataset: the split
    that the report shows. Raises UserError if there is no such result, if it has no samples, or if they are others.
    """
    about = dataset.info(0)
    split = f"{about.dataset} {about.split}"
    of_split = read_runs(place).get((about.dataset, about.split), [])
    found = [run for run in of_split if _same_model(run, model) and _same_rule(run.results, rule)]
    if len(found) != 1:
        raise UserError(
            f"{place} has {len(found) or 'no'} scores of {model} on {split} under its own protocol; write one with: "
            f"amltrain evaluate --checkpoint {model} --splits {about.split}"
        )
    [run] = found
    if run.samples is None:
        raise UserError(f"{place} has no samples of {split}; run amltrain evaluate again")
    _check_ids(place, run.samples, dataset)
    return replace(run.results, samples=_rows(run.samples))


def _same_model(run: Run, model: str) -> bool:
    checkpoint = run.results.provenance.get("checkpoint")
    if not checkpoint:
        return False
    try:
        return find_model_folder(checkpoint).resolve() == find_model_folder(model).resolve()
    except UserError:  # the model has moved since
        return False


def _same_rule(results: Results, rule: Protocol) -> bool:
    names = ("frame", "threshold", "interpolation", "sentences", "no_target_pixels")
    return all(results.protocol.get(name) == getattr(rule, name) for name in names)


def _check_ids(place: str | Path, samples: pa.Table, dataset: Any) -> None:
    infos = [dataset.info(i) for i in range(len(dataset))]
    for name in ("image_id", "ref_id", "sent_id", "sentence"):
        theirs: Sequence[Any] = samples.column(name).to_pylist()
        if theirs != [getattr(info, name) for info in infos]:
            raise UserError(
                f"{place} was scored on other samples than {infos[0].dataset} {infos[0].split} has now ({name}); run "
                "amltrain evaluate again"
            )


def _rows(samples: pa.Table) -> NDArray[np.int64]:
    columns = [samples.column(name).to_numpy(zero_copy_only=False) for name in SAMPLE_COLUMNS]
    return np.stack(columns, axis=1).astype(np.int64)
