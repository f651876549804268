"""Means over seeds, paired intervals clustered by image, and rejections, on results whose answers are known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator

from amltrain.commands.compare import main, parse_groups
from amltrain.errors import UserError
from amltrain.evaluation.compare import compare, comparison_latex, comparison_markdown
from amltrain.evaluation.evaluator import evaluate_model
from amltrain.evaluation.metrics import scored_columns
from amltrain.evaluation.results import BOX_COLUMNS, DETECTED_COLUMNS, Results, merge_results, named_protocol
from amltrain.evaluation.samples import read_samples, sample_table, write_samples
from amltrain.evaluation.statistics import image_draws
from amltrain.evaluation.tables import markdown
from amltrain.paper.breakdown import break_down, breakdown_markdown, kinds_of, worst_cases
from tests.evaluation.stand_in import Scenes, SeesBright, loader


@pytest.fixture(scope="module")
def scored() -> Results:
    return evaluate_model(Accelerator(cpu=True), SeesBright(), loader(Scenes()), named_protocol("caris"))


def write(folder: Path, results: Results, gain: int = 0, **protocol: object) -> Path:
    """Results whose intersections are larger by `gain` pixels, as an evaluation writes them."""
    samples = results.samples.copy()
    samples[:, 1] = np.minimum(samples[:, 1] + gain, samples[:, 2])
    i, u = samples[:, 1], samples[:, 2]
    iou = {"oIoU": 100 * i.sum() / u.sum(), "mIoU": 100 * scored_columns(i, u).iou.mean()}
    changed = replace(
        results,
        samples=samples,
        metrics=results.metrics | iou,
        protocol=results.protocol | protocol,
        files={"samples": "samples/x.parquet"},
    )
    write_samples(folder / "samples" / "x.parquet", sample_table(changed, Scenes()))
    merge_results(folder / "results.json", [changed])
    return folder


def test_means_deviations_and_paired_intervals(scored: Results, tmp_path: Path):
    none = [write(tmp_path / f"none{s}", scored, s) for s in (0, 4)]
    aml = [write(tmp_path / f"aml{s}", scored, s) for s in (8, 16)]
    found = compare({"none": none, "aml": aml}, draws=500)
    split = ("scenes", "val")
    seeds = found.values["none"][split]["oIoU"]
    assert len(seeds) == 2
    text = comparison_markdown(found)
    assert f"{np.mean(seeds):.2f} ± {np.std(seeds, ddof=1):.2f}" in text
    gain = {d.metric: d for d in found.differences}["mIoU"]
    expected = np.mean(found.values["aml"][split]["mIoU"]) - np.mean(found.values["none"][split]["mIoU"])
    assert gain.value == pytest.approx(expected)
    assert gain.low < gain.value < gain.high and gain.covers == "images, 2 seeds"
    assert not gain.unequal  # the two seeds of aml lie too far apart
    assert found.differences == compare({"none": none, "aml": aml}, draws=500).differences
    table = comparison_latex(found)
    assert "\\textbf{" in table and "$\\pm$" in table
    assert f"aml - none & scenes & val & mIoU & {gain.value:+.2f} & ".replace("& -", "& $-$") in table
    assert "t over seeds" in text and "t over seeds" in table
    assert "least p with 2 pairs is 0.5" in text and "images, 2 seeds" in text
    alone = compare({"none": none[:1], "aml": aml[:1]})
    assert "t over seeds" not in comparison_markdown(alone) + comparison_latex(alone)
    assert "compare several seeds" in comparison_markdown(alone)
    gain = {d.metric: d for d in alone.differences}["mIoU"]
    assert gain.unequal and gain.covers == "images, one seed" and gain.p <= gain.p_holm < 0.05
    some = compare({"none": none, "aml": aml[:1]}, draws=50).differences[0]
    assert some.covers == "images, 1 and 2 seeds" and some.seeds is some.flip is None and some.low < some.high


def test_the_same_model_differs_by_nothing(scored: Results, tmp_path: Path):
    one, two = write(tmp_path / "a", scored), write(tmp_path / "b", scored)
    assert all((d.value, d.low, d.high) == (0, 0, 0) for d in compare({"a": [one], "b": [two]}).differences)


def test_one_image_gives_no_interval(scored: Results, tmp_path: Path):
    places = [write(tmp_path / "a", scored), write(tmp_path / "b", scored, 8)]
    for place in places:
        path = place / "samples" / "x.parquet"
        table = pq.read_table(path)
        same = pa.array([7] * len(table), table.schema.field("image_id").type)
        write_samples(path, table.set_column(table.schema.get_field_index("image_id"), "image_id", same))
    found = compare({"a": places[:1], "b": places[1:]}, draws=20)
    assert all(np.isnan(d.low) and not d.unequal for d in found.differences)
    assert "a single image" in found.notes[0]


def test_draws_take_whole_images():
    weights = image_draws(np.array([7, 7, 3, 9, 9, 9]), draws=50, seed=1)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()
    assert weights.std(0).min() > 0


def test_unequal_protocols_are_rejected_by_name(scored: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, two = write(tmp_path / "a", scored), write(tmp_path / "b", scored, threshold=0.35)
    with pytest.raises(SystemExit) as stopped:
        main([str(one), str(two)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "differ in threshold (0.5 and 0.35); evaluate both with the same --preset" in said


def test_altered_rows_and_other_samples_are_rejected(scored: Results, tmp_path: Path):
    shuffled = replace(scored, protocol=scored.protocol | {"shuffled_sentences": True})
    merge_results(tmp_path / "results.json", [shuffled])
    with pytest.raises(UserError, match="holds no score"):
        compare({"a": [tmp_path]})
    with pytest.raises(UserError, match=r"has no results\.json; write it with amltrain evaluate"):
        compare({"a": [tmp_path / "gone"]})
    fewer = replace(scored, samples=scored.samples[1:])
    with pytest.raises(UserError, match="different samples"):
        compare({"a": [write(tmp_path / "a", scored)], "b": [write(tmp_path / "b", fewer)]})


def test_samples_of_a_version_without_checksums_are_read_and_named(scored: Results, tmp_path: Path):
    one, two = write(tmp_path / "a", scored), write(tmp_path / "b", scored)
    with_checksums = compare({"a": [one], "b": [two]})
    [file] = (two / "samples").glob("*.parquet")
    older = pq.read_table(file).replace_schema_metadata(None).drop_columns([*BOX_COLUMNS, *DETECTED_COLUMNS])
    pq.write_table(older, file)
    compared = compare({"a": [one], "b": [two]})
    assert compared.differences == with_checksums.differences
    [note] = compared.notes
    assert f"{two}/results.json carry no checksum" in note and with_checksums.notes == []


def test_other_numbers_of_seeds_are_said_to_have_no_test(scored: Results, tmp_path: Path):
    one, two, three = (write(tmp_path / name, scored, gain) for gain, name in enumerate("abc"))
    text = comparison_markdown(compare({"a": [one], "b": [two, three]}))
    assert "images, 2 and 1 seeds" in text and "No test over seeds: the models do not have as many" in text
    assert "Seeds are not covered" not in text
    assert "Seeds are not covered" in comparison_markdown(compare({"a": [one], "b": [two]}))


def test_groups():
    assert parse_groups(["none=a,b", "runs/aml"]) == {"none": ["a", "b"], "aml": ["runs/aml"]}
    with pytest.raises(UserError, match="taken"):
        parse_groups(["x/a", "y/a"])


def test_every_column_of_a_table_has_a_rule_that_markdown_reads():
    rule = markdown([("model", "", "x"), ("a", "*", "1")], text_columns=1)[1]
    assert all(len(cell.strip()) > 1 for cell in rule.strip("|").split("|")), rule


def test_breakdown(scored: Results, tmp_path: Path):
    write_samples(tmp_path / "x.parquet", sample_table(scored, Scenes()))
    table = read_samples(tmp_path / "x.parquet")
    groups = break_down(table, "ge", "classic")
    assert [(g.name, g.samples) for g in groups["words"]] == [("3 to 4", 13)]  # "the bright one 3"
    assert groups["words"][0].metrics["mIoU"] == pytest.approx(scored.metrics["mIoU"])
    assert groups["category"] == []
    worst = worst_cases(table, 3)
    assert [case["ref_id"] for case in worst] == [0, 1, 2] or worst[0]["iou"] <= worst[1]["iou"] <= worst[2]["iou"]
    assert len({case["ref_id"] for case in worst}) == 3
    shown = breakdown_markdown({}, worst)
    assert {"sample_id", str(worst[0]["sample_id"])} <= set(shown.split())


@pytest.mark.parametrize(
    ("sentence", "kinds"),
    [
        ("the red car on the left", {"colour", "position"}),
        ("second man not wearing a hat", {"ordinal", "negation", "relation"}),
        ("dog", {"plain"}),
        ("bystander", {"plain"}),  # whole words only
    ],
)
def test_kinds(sentence: str, kinds: set[str]):
    assert kinds_of(sentence) == kinds
