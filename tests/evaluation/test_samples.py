"""Tables of samples and rankings: a changed bit changes no number without a word."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator

from amltrain.commands.rank import write_ranking
from amltrain.data.mosaic import Ranking
from amltrain.errors import UserError
from amltrain.evaluation.compare import read_runs
from amltrain.evaluation.evaluator import evaluate_model
from amltrain.evaluation.results import Results, merge_results, moved_models, named_protocol, write_results
from amltrain.evaluation.samples import read_samples, sample_table, write_samples
from amltrain.evaluation.tables import table
from amltrain.files import seal, unseal
from tests.evaluation.stand_in import Scenes, SeesBright, loader


@pytest.fixture(scope="module")
def scored() -> Results:
    accelerator = Accelerator(cpu=True)
    facts = {"checkpoint": "run/best", "step": 4, "weights_sha256": "ab" * 32}
    return evaluate_model(accelerator, SeesBright(), loader(Scenes()), named_protocol("cris"), provenance=facts)


@pytest.fixture(scope="module")
def files(scored: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealed")
    write_samples(folder / "samples.parquet", sample_table(scored, Scenes()), scored.provenance)
    generator = np.random.default_rng(0)
    images, scores = generator.integers(0, 2**40, (50, 8)), generator.random((50, 8), np.float32)
    write_ranking(folder / "ranking.parquet", np.arange(50) * 3, images, scores, {"model": "clip", "data": "seven"})
    return folder


def flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << place % 8
    path.write_bytes(content)


def values(kind: str, path: Path) -> object:
    if kind == "samples":
        return str(read_samples(path).to_pydict())  # NaN is not NaN
    read = Ranking(path)
    return [(key, read[key].images.tolist(), read[key].scores.tolist()) for key in range(160)]


@pytest.mark.parametrize("kind", ["samples", "ranking"])
def test_no_flipped_bit_changes_a_number_without_a_word(files: Path, tmp_path: Path, kind: str) -> None:
    """A bit of a reader's hints (who wrote the file, sizes of pages) may flip unseen: the numbers are the same."""
    path, sound = tmp_path / "copy.parquet", values(kind, files / f"{kind}.parquet")
    size, found = (files / f"{kind}.parquet").stat().st_size, 0
    for number in range(150):
        shutil.copy(files / f"{kind}.parquet", path)
        flipped(path, number * size // 150 + number % 3)
        try:
            same = values(kind, path) == sound
        except UserError:
            found += 1
        else:
            assert same, f"bit {number} changed a number"
    assert found > 75, found


@pytest.mark.parametrize("column", ["intersection", "union", "iou", "area", "no_target", "finite", "category"])
def test_a_changed_column_is_found_whoever_writes_the_file(files: Path, tmp_path: Path, column: str) -> None:
    read = pq.read_table(files / "samples.parquet")
    place = read.schema.get_field_index(column)
    turned = read.column(column).to_pylist()
    turned[0] = {bool: lambda v: not v, str: lambda v: f"{v}x"}.get(type(turned[0]), lambda v: v + 1)(turned[0])
    changed = read.set_column(place, read.schema.field(column), pa.array(turned, read.schema.field(column).type))
    pq.write_table(changed.replace_schema_metadata(read.schema.metadata), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="its values have changed since they were written"):
        read_samples(tmp_path / "x.parquet")


@pytest.mark.parametrize("harm", ["rows swapped", "row dropped", "row doubled", "facts changed", "seal cut"])
def test_a_table_that_is_not_the_one_that_was_sealed(files: Path, tmp_path: Path, harm: str) -> None:
    read = pq.read_table(files / "samples.parquet")
    seal_ = read.schema.metadata[b"amltrain"]
    other = {
        "rows swapped": lambda: read.take([1, 0, *range(2, len(read))]),
        "row dropped": lambda: read.slice(1),
        "row doubled": lambda: pa.concat_tables([read, read.slice(0, 1)]),
        "facts changed": lambda: read.replace_schema_metadata({b"amltrain": seal_.replace(b"abab", b"cdcd")}),
        "seal cut": lambda: read.replace_schema_metadata({b"amltrain": seal_[:-9]}),
    }[harm]()
    pq.write_table(other, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="damaged"):
        read_samples(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, None, 3]),
        pa.array([1.5, float("nan"), None]),
        pa.array([["a"], [], None]),
        pa.array([[1, 2], [3], []]),
        pa.array([True, None, False]),
        pa.array(["a", "ä", None]),
        pa.array([], pa.int32()),
    ],
    ids=str,
)
def test_a_seal_holds_for_every_kind_of_column_and_page(column: pa.Array, tmp_path: Path) -> None:
    one = seal(pa.table({"x": column}), {"a": 1})
    pq.write_table(one, tmp_path / "x.parquet", row_group_size=1)
    assert unseal(pq.read_table(tmp_path / "x.parquet"), "x") == {"a": 1}


def test_samples_of_other_weights_or_data_than_their_row_are_rejected(scored: Results, tmp_path: Path) -> None:
    for name, what in (("weights_sha256", "weights"), ("data_fingerprint", "data")):
        row = replace(scored, provenance={**scored.provenance, name: "one"}, files={"samples": "x.parquet"})
        write_samples(tmp_path / "x.parquet", sample_table(row, Scenes()), {**row.provenance, name: "other"})
        write_results(tmp_path / "results.json", [row])
        with pytest.raises(UserError, match=f"the samples of other {what} than its row"):
            read_runs(tmp_path)


def test_a_best_that_moves_between_two_splits_is_two_models(scored: Results, tmp_path: Path) -> None:
    later = {**scored.provenance, "step": 8, "weights_sha256": "cd" * 32}
    moved = replace(scored, split="testA", provenance=later)
    rows = merge_results(tmp_path / "results.json", [scored])
    assert not moved_models(rows)
    rows = merge_results(tmp_path / "results.json", [moved])
    (line,) = moved_models(rows)
    assert "scenes val by abababab (step 4); scenes testA by cdcdcdcd (step 8)" in line
    assert line in table(rows)
    with pytest.raises(UserError, match="run/best is not one model in these results"):
        read_runs(tmp_path)
    again = merge_results(tmp_path / "results.json", [replace(scored, provenance=later)])
    assert [row.split for row in again] == ["val", "testA"] and not moved_models(again)  # the old row is replaced
