"""results.json and the table say what was scored and how."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from amltrain.errors import UserError
from amltrain.evaluation.results import Results, merge_results, read_results, write_results
from amltrain.evaluation.tables import csv_table, latex_table, table

PROTOCOL = {
    "frame": "original", "size": [448, 448], "threshold": 0.35, "interpolation": "bicubic", "sentences": "all",
    "ties": "gt", "metrics": "classic", "no_target_by": "nothing: never said",
}  # fmt: skip


def classic(split: str = "val", **counts: int) -> Results:
    metrics = {"oIoU": 65.4321, "mIoU": 70.0, "Pr@0.5": float("nan")}
    return Results("refcoco", split, metrics, {"samples": 10834} | counts, PROTOCOL, {"checkpoint": "runs/a/best"})


def test_json_keeps_protocol_and_has_no_nan(tmp_path: Path):
    path = tmp_path / "new" / "results.json"
    write_results(path, [classic()])
    said = json.loads(path.read_text())
    assert said["results"][0]["metrics_percent"] == {"oIoU": 65.4321, "mIoU": 70.0, "Pr@0.5": None}
    assert said["results"][0]["protocol"] == PROTOCOL
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_json_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    (tmp_path / "results.json").mkdir()  # a folder in the way
    with pytest.raises(UserError, match="cannot write"):
        write_results(tmp_path / "results.json", [classic()])
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_table_names_each_protocol_once():
    generalized = Results("grefcoco", "val", {"gIoU": 1.0}, {"samples": 3}, PROTOCOL | {"metrics": "generalized"})
    text = table([classic(), classic("testA", empty_unions=2, not_finite=3), generalized])
    assert "| refcoco | val   |   10834 | 65.43 | 70.00 |      - |" in text
    assert (
        text.count("at the original size, probability > 0.35 (bicubic), all sentences, Pr@t: I / (U + 1e-6) > t.") == 1
    )
    assert "no target by nothing: never said" in text
    assert "refcoco testA: the logits of 3 samples are NaN" in text
    assert "refcoco testA: 2 samples with an empty union count as IoU 0." in text


def test_table_says_what_was_done_to_the_images_and_gives_the_mean():
    def perturbed(name: str, value: float) -> Results:
        notes = {"perturbation": {"name": name, "severity": 1.0, "seed": 0}}
        return Results("refcoco", "val", {"oIoU": value}, {"samples": 5}, PROTOCOL, notes)

    text = table([perturbed("haze", 50.0), perturbed("jitter", 61.0)])
    assert "| val (haze 1)    |       5 | 50.00 |" in text
    assert "| val (mean of 2) |         | 55.50 |" in text
    shuffled = Results("a", "val", {"oIoU": 1.0}, {"samples": 5}, PROTOCOL | {"shuffled_sentences": True})
    assert "val (sentences shuffled)" in table([shuffled])


def test_score_of_the_same_form_and_of_none():
    assert classic().score("cIoU") == classic().score("oIoU") == 65.4321
    with pytest.raises(UserError, match="no metric 'AP' on refcoco val; known: oIoU"):
        classic().score("AP")


def test_a_second_evaluation_loses_no_row(tmp_path: Path):
    """The same split, then with shuffled sentences, then perturbed, then under another protocol: four rows."""
    path, clean = tmp_path / "results.json", classic()
    shuffled = replace(clean, protocol=PROTOCOL | {"shuffled_sentences": True}, metrics={"oIoU": 4.98})
    haze = replace(clean, provenance=clean.provenance | {"perturbation": {"name": "haze", "severity": 1.0}})
    strict = replace(clean, protocol=PROTOCOL | {"threshold": 0.5})
    for row in (clean, shuffled, haze, strict, shuffled):
        merge_results(path, [row])
    rows = read_results(path)
    assert [r.metrics["oIoU"] for r in rows] == [65.4321, 4.98, 65.4321, 65.4321]
    assert [r.is_score for r in rows] == [True, False, False, True]
    assert len({r.stem() for r in rows}) == 4
    again = merge_results(path, [replace(clean, metrics={"oIoU": 66.0})])
    assert [r.metrics["oIoU"] for r in again] == [66.0, 4.98, 65.4321, 65.4321]


def test_a_damaged_file_is_left_alone(tmp_path: Path):
    path = tmp_path / "results.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"not a results\.json"):
        merge_results(path, [classic()])
    assert path.read_text() == "{"


def test_latex_and_csv():
    other = replace(classic(), metrics={"oIoU": 64.0, "mIoU": 71.0, "Pr@0.5": 80.0}, provenance={"checkpoint": "b_1"})
    text = latex_table([classic(), other, classic("testA")])
    assert r"runs/a/best & refcoco & val & \textbf{65.43} & 70.00 & - \\" in text
    assert r"b\_1 & refcoco & val & 64.00 & \textbf{71.00} & 80.00 \\" in text
    assert text.count("\\textbf") == 2  # testA has nothing to compare with
    assert text.startswith("\\begin{tabular}{lllrrr}\n\\toprule")
    lines = csv_table([classic(), other]).splitlines()
    assert lines[0].startswith("model,dataset,split,alteration,samples,oIoU,mIoU,Pr@0.5,protocol")
    assert lines[1].startswith("runs/a/best,refcoco,val,,10834,65.4321,70.0000,,")


def test_empty_masks_are_reported():
    empty = classic(samples=7, empty_masks=7)
    assert "refcoco val: every predicted mask is empty" in table([empty])
