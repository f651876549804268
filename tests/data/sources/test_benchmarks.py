"""Benchmarks from small files in their real layout, prepared and scored with masks whose scores are known by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from amltrain.commands.evaluate import main as evaluate
from amltrain.commands.prepare import main
from amltrain.data.catalog import SUITES, dataset_spec, read_manifest
from amltrain.data.rows import open_rows
from amltrain.data.segmentation import decode_mask, encode_mask
from amltrain.evaluation.results import Results, read_results
from amltrain.paper.analyse import main as analyse
from tests.data.layouts import BENCHMARKS, corner, square, write_shard
from tests.data.original import HEIGHT, WIDTH

EMPTY = np.zeros((HEIGHT, WIDTH), np.uint8)


def prepare(name: str, root: Path) -> Path:
    BENCHMARKS[name](root)
    return prepare_files(name, root)


def prepare_files(name: str, root: Path) -> Path:
    main(["--dataset", name, "--refer_root", str(root), "--output", str(root / "prepared"), "--workers", "1"])
    return root / "prepared"


def referents(prepared: Path, name: str, split: str) -> list[dict[str, Any]]:
    rows = open_rows(str(prepared), name, split, streaming=True).columns.column("referents").to_pylist()
    return [referent for row in rows for referent in row]


def predict(prepared: Path, name: str, split: str, masks: list[np.ndarray]) -> None:
    """Write one mask for every sentence, in order; one that is empty says "nothing"."""
    found = [(r["ref_id"], s["sent_id"]) for r in referents(prepared, name, split) for s in r["sentences"]]
    lines = [
        {"ref_id": ref, "sent_id": sent, **encode_mask(mask), "no_target": not mask.any()}
        for (ref, sent), mask in zip(found, masks, strict=True)
    ]
    folder = prepared.parent / "masks"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}-{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def scores(prepared: Path, *chosen: str) -> list[Results]:
    evaluate([
        "--predictions", str(prepared.parent / "masks"), "--preset", "cgformer", "--data.prepared", str(prepared),
        "--output", str(prepared.parent / "scores"), "--pictures", "0", "--data.workers", "0", *chosen,
    ])  # fmt: skip
    return read_results(prepared.parent / "scores/results.json")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_split_is_read(name: str, tmp_path: Path) -> None:
    prepared = prepare(name, tmp_path)
    manifest = read_manifest(prepared / name)
    assert manifest is not None and manifest["skipped"] == []
    assert manifest["spec"].get("box_only", False) == dataset_spec(name).box_only
    for split in dataset_spec(name).splits:
        found = referents(prepared, name, split)
        assert found and all(decode_mask(r["mask"]).any() != r["no_target"] for r in found)


def test_gseval_is_scored_by_mean_iou_and_boxes(tmp_path: Path) -> None:
    prepared = prepare("gseval", tmp_path)
    found = referents(prepared, "gseval", "test")
    assert [r["category"] for r in found] == ["class 1", "class 2"]
    assert [r["sentences"][0]["raw"] for r in found] == [f"Trail {n} behind the plane." for n in range(2)]
    assert all(np.array_equal(decode_mask(r["mask"]), square()) for r in found)
    frame = square()
    frame[7:23, 7:23] = 0  # 400 - 256 = 144 pixels, in the same box
    predict(prepared, "gseval", "test", [frame, square()])
    (result,) = scores(prepared, "--data.datasets", "[gseval]", "--splits", "test")
    assert result.metrics["mIoU"] == pytest.approx(100 * (144 / 400 + 1) / 2, abs=1e-3)
    assert result.metrics["Acc@0.5"] == 100.0 and "gIoU" not in result.metrics


def test_instances_of_pbench_are_one_target_and_none_is_no_target(tmp_path: Path) -> None:
    prepared = prepare("pbench", tmp_path)
    both, none = referents(prepared, "pbench", "level_3")
    assert decode_mask(both["mask"]).sum() == 400 + 100 - 25 and both["mask_exclusive"] is None
    assert none["no_target"] and none["sentences"][0]["raw"] == "a dog"
    for split in dataset_spec("pbench").splits:
        predict(prepared, "pbench", split, [square(), EMPTY if split == "dense" else square()])
    results = scores(prepared, "--data.datasets", "[pbench]", "--splits", "all")
    by_split = {r.split: r.metrics for r in results}
    iou = 400 / 475
    assert list(by_split) == list(dataset_spec("pbench").splits)
    assert by_split["dense"]["gIoU"] == pytest.approx(100 * (iou + 1) / 2, abs=1e-3)
    assert by_split["level_0"]["gIoU"] == pytest.approx(100 * iou / 2, abs=1e-3)
    assert by_split["level_0"]["cIoU"] == pytest.approx(100 * 400 / (475 + 400), abs=1e-3)
    for name in ("N-acc", "zero-target accuracy"):
        assert (by_split["dense"][name], by_split["level_0"][name]) == (100.0, 0.0)


def test_the_boxes_of_ref_adv_are_scored_as_boxes_alone(tmp_path: Path) -> None:
    """The truth is 20 x 20 at (5, 5). The box around `corner(n)` is n x n at (0, 0)."""
    prepared = prepare("ref-adv-s", tmp_path)
    found = referents(prepared, "ref-adv-s", "test")
    order = [r["category"] for r in found]
    assert sorted(order) == ["2-3 distractors", "2-3 distractors", "4-6 distractors", "7 or more distractors"]
    assert all(r["bbox"] == [5, 5, 20, 20] and np.array_equal(decode_mask(r["mask"]), square()) for r in found)
    two = np.zeros_like(EMPTY)
    two[5, 5] = two[24, 24] = 1  # two pixels whose box is the truth's
    predict(prepared, "ref-adv-s", "test", [two, corner(25), corner(22), EMPTY])
    # IoU 1; 400 / 625 = 0.64; 17 * 17 / (484 + 400 - 289) = 0.486; 0
    (result,) = scores(prepared, "--data.datasets", "[ref-adv-s]", "--splits", "test")
    assert result.metrics == {"Acc@0.5": 50.0, "Acc@0.75": 25.0, "Acc@0.9": 25.0}
    analyse(["errors", "--results", str(tmp_path / "scores"), "--output", str(tmp_path / "errors")])
    said = (tmp_path / "errors/errors-ref-adv-s-test.md").read_text()
    for group in set(order):
        hits = [number < 2 for number, category in enumerate(order) if category == group]
        row = next(line for line in said.splitlines() if line.startswith(f"| {group} "))
        assert row.split("|")[2:4] == [f" {len(hits):>7} ", f" {100 * sum(hits) / len(hits):>7.2f} "]


def test_refs_of_nwpu_refer_are_joined_to_several_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = prepare("nwpu-refer", tmp_path)
    assert "3 sentences that are not English were left out" in capsys.readouterr().out
    found = referents(prepared, "nwpu-refer", "test")
    assert [[s["raw"] for s in r["sentences"]] for r in found] == [["the left ship"], ["all ships"], ["the airplane"]]
    areas = [int(decode_mask(r["mask"]).sum()) for r in found]
    assert areas == [100, 200, 0] and [r["no_target"] for r in found] == [False, False, True]
    one, both = (decode_mask(r["mask"]) for r in found[:2])
    predict(prepared, "nwpu-refer", "test", [both, both, one])
    (result,) = scores(prepared, "--data.datasets", "[nwpu-refer]", "--splits", "test")
    assert result.metrics["target mIoU"] == pytest.approx(75.0) and result.metrics["N-acc"] == 0.0
    assert result.metrics["target oIoU"] == pytest.approx(100 * 300 / 400)
    assert result.metrics["gIoU"] == pytest.approx(50.0) and result.metrics["cIoU"] == pytest.approx(60.0)


def test_a_suite_is_one_table_and_names_what_is_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gseval", "ref-adv-s"):
        prepared = prepare(name, tmp_path)
    predict(prepared, "gseval", "test", [square(), square()])
    predict(prepared, "ref-adv-s", "test", [square(), square(), square(), EMPTY])
    capsys.readouterr()
    scores(prepared, "--suite", "out_of_domain")
    said = (tmp_path / "scores/out_of_domain.md").read_text()
    assert said in capsys.readouterr().out
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    header = ["dataset", "split", "samples", "mean IoU", "cumulative IoU", "Pr@0.7", "Pr@0.9"]
    assert rows[0] == [*header, "Acc@0.5", "Acc@0.75", "Acc@0.9"]
    assert rows[2] == ["gseval", "test", "2", "100.00", "100.00", "100.00", "100.00", "100.00", "-", "-"]
    assert rows[3] == ["ref-adv-s", "test", "4", "-", "-", "-", "-", "75.00", "75.00", "75.00"]
    assert "Not prepared: pbench (tiiuae/PBench on the Hub), nwpu-refer (" in said and "refcoco-m" in said


def test_a_suite_without_data_or_with_its_own_parts_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prepared").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(SystemExit):
        scores(tmp_path / "prepared", "--suite", "out_of_domain")
    said = capsys.readouterr().err
    assert "holds no data set of the suite out_of_domain. Not prepared: gseval (hustvl/GSEval" in said
    assert all(name in said for name in SUITES["out_of_domain"])
    for flag in (("--splits", "test"), ("--data.datasets=[gseval]",)):
        with pytest.raises(SystemExit):
            scores(tmp_path / "prepared", "--suite", "out_of_domain", *flag)
        assert f"leave {flag[0].partition('=')[0]} out" in capsys.readouterr().err


def changed(path: Path, change: Any) -> None:
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        change(row)
    write_shard(path, rows)


@pytest.mark.parametrize(
    ("name", "file", "change", "said"),
    [
        ("pbench", "PBench/data/dense-00000-of-00001.parquet", lambda r: r.pop("masks"),
         "has no column 'masks'; expected are image, expression, masks, it has"),
        ("pbench", "PBench/data/dense-00000-of-00001.parquet", lambda r: r.update(expression=None),
         "row 0 has an expression that is no text"),
        ("pbench", "PBench/data/dense-00000-of-00001.parquet",
         lambda r: r["masks"] and r["masks"][0].update(size=[3, 3]), "row 0 has masks that cannot be joined"),
        ("ref-adv-s", "ref-adv-s/data/train-00000-of-00001.parquet", lambda r: r.update(solution=[5.0, 5.0, 5.0, 9.0]),
         "row 0 has a 'solution' that is not x1 < x2"),
        ("ref-adv-s", "ref-adv-s/data/train-00000-of-00001.parquet", lambda r: r.update(image=None),
         "row 0 has no bytes of an image"),
    ],
)  # fmt: skip
def test_other_columns_are_rejected(
    name: str, file: str, change: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BENCHMARKS[name](tmp_path)
    changed(tmp_path / file, change)
    with pytest.raises(SystemExit):
        prepare_files(name, tmp_path)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"idx": 0, "image_path": "a.jpg"}, "line 1 has no 'class_id'; a line of GSEval has idx, image_path, class_id"),
        ({"idx": "0", "image_path": "a.jpg", "class_id": 1, "caption": "a", "segmentation": {}}, "that is no int"),
        ([1], "line 1 has no 'idx'"),
    ],
)
def test_other_lines_are_rejected(line: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "GSEval").mkdir()
    (tmp_path / "GSEval/GroundingSuite-Eval.jsonl").write_text(json.dumps(line))
    with pytest.raises(SystemExit):
        prepare_files("gseval", tmp_path)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(set(BENCHMARKS) - {"refcoco-m"}))
def test_an_empty_folder_names_the_files_and_their_source(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        prepare_files(name, tmp_path)
    assert dataset_spec(name).source in capsys.readouterr().err
