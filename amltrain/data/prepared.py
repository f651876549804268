"""Open prepared data: a local folder or a Hub repository of the same layout, memory-mapped or as a stream."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError, DatasetsError

from amltrain.data.schema import FEATURES
from amltrain.data.specs import check_split
from amltrain.errors import UserError


def open_prepared(prepared: str, dataset: str, split: str, *, streaming: bool = False) -> Dataset | IterableDataset:
    """Rows of `FEATURES` of one split of one data set.

    prepared: the folder that holds `<dataset>/<split>-*.parquet`, or a Hub data set id with the same files.
    Raises UserError when they are not there, saying what is.
    """
    shards = local_shards(prepared, dataset, split)
    files = {split: [f"{dataset}/{split}-*.parquet"]}
    try:
        for shard in shards or ():  # `datasets` would fill a column that is not there with nulls
            check_columns(shard, pq.read_schema(shard).names)
        with _quiet():
            return datasets.load_dataset(
                prepared, data_files=files, split=split, streaming=streaming, features=FEATURES
            )
    except UserError:
        raise
    except (OSError, ValueError, DatasetsError, pa.ArrowException) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        why = shorten(str(cause), 300)  # `datasets` prints whole schemas
        fix = (
            f"remove {prepared}/{dataset} and prepare it again"
            if shards is not None
            else "it is no folder here either: run amltrain prepare first"
        )
        raise UserError(f"could not read {dataset}/{split} from {prepared} ({why}); {fix}") from error


def check_columns(place: str, columns: Sequence[str]) -> None:
    """Raise UserError unless a Parquet file has the columns of prepared data."""
    missing = sorted(set(FEATURES) - set(columns))
    if missing:
        raise UserError(f"{place} has no column {', '.join(missing)}; make it with amltrain prepare")


def local_shards(prepared: str, dataset: str, split: str) -> list[str] | None:
    """Paths of one split's Parquet files, in order; None if `prepared` is a Hub data set id. Raises UserError."""
    check_split(dataset, split)
    folder = Path(prepared)
    if folder.is_dir():
        paths = sorted(str(path) for path in folder.glob(f"{dataset}/{split}-*.parquet"))
        if not paths:
            there = sorted(path.parent.name for path in folder.glob("*/manifest.json"))
            raise UserError(
                f"{prepared} has no {dataset}/{split}-*.parquet (it holds {', '.join(there) or 'nothing prepared'}); "
                f"run amltrain prepare --dataset {dataset}"
            )
        return paths
    if prepared.count("/") == 1 and not prepared.startswith((".", "/")):
        return None
    raise UserError(f"{prepared} is no folder; run amltrain prepare --dataset {dataset} --output {prepared}")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for the memory-mapped copy, which takes a second."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
