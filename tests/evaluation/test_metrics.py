"""Every number that an official evaluation printed on the recorded mask pairs, by our metric."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from amltrain.errors import UserError
from amltrain.evaluation.hf_metric import ReferringSegmentation
from amltrain.evaluation.metrics import (
    METRICS,
    compute_scores,
    metric_terms,
    number_refs,
    sample_iou,
    scored_columns,
)


def classic_scores(intersections, unions, ties="ge"):
    return compute_scores(scored_columns(intersections, unions, ties=ties), "classic")


def generalized_scores(intersections, unions, no_target, predicted):
    return compute_scores(scored_columns(intersections, unions, no_target, predicted), "generalized")


SETS = ("all", "gt_nonempty", "ordinary")
CLOSE = 1e-6


@pytest.fixture(scope="module")
def recorded(shared_dir: Path) -> dict:
    return json.loads((shared_dir / "goldens/metrics/expected.json").read_text())


@pytest.fixture(scope="module")
def pairs(shared_dir: Path) -> dict[str, np.ndarray]:
    with np.load(shared_dir / "goldens/metrics/masks.npz") as masks:
        pixels = int(masks["hw"].prod())
        pred, gt = (np.unpackbits(masks[k], axis=1)[:, :pixels].astype(bool) for k in ("pred", "gt"))
        flags = {k: masks[f"{k}_no_target"] for k in ("gt", "pred")}
    return {"I": (pred & gt).sum(1), "U": (pred | gt).sum(1), "area": pred.sum(1)} | flags


def metric(pairs: dict, index: list[int], **options) -> dict:
    columns = {k: pairs[k][index] for k in ("I", "U", "gt", "pred")}
    return ReferringSegmentation(keep_in_memory=True).compute(
        intersections=columns["I"],
        unions=columns["U"],
        areas=pairs["area"][index],
        no_target=columns["gt"],
        predicted_no_target=columns["pred"],
        **options,
    )


def close(ours: float, official: float) -> bool:
    return math.isclose(ours, official, rel_tol=CLOSE, abs_tol=CLOSE)


def test_counts_of_pixels_are_the_recorded_ones(pairs: dict, recorded: dict):
    assert pairs["I"].tolist() == recorded["I"]
    assert pairs["U"].tolist() == recorded["U"]


@pytest.mark.parametrize("subset", SETS)
@pytest.mark.parametrize("code", ["lavt_test", "lavt_train_val", "caris_eval", "caris_train_val", "polyformer"])
def test_codes_that_count_ties(pairs: dict, recorded: dict, subset: str, code: str):
    official, index = recorded["results"][subset][code], recorded["sets"][subset]
    ours = metric(pairs, index)
    scale = 100 if code == "polyformer" else 1  # it prints fractions
    overall = official.get("overall_iou_percent", official.get("overall_iou"))
    mean = official.get("mean_iou_percent", official.get("mean_iou"))
    assert close(ours["oIoU"], overall * scale)
    if mean == "nan":  # CARIS gives up on an empty union; we count it and say so
        assert ours["empty_unions"] > 0
    else:
        assert close(ours["mIoU"], mean * scale)
    precision = official.get("precision_percent", official.get("precision"))
    for threshold, value in precision.items():
        assert close(ours[f"Pr@{threshold}"], value * scale), threshold


@pytest.mark.parametrize("subset", SETS)
@pytest.mark.parametrize("family", ["cris", "etris", "detris"])
@pytest.mark.parametrize("stage", ["validate", "inference"])
def test_codes_that_do_not_count_ties(pairs: dict, recorded: dict, subset: str, family: str, stage: str):
    official, index = recorded["results"][subset][f"{family}_{stage}"], recorded["sets"][subset]
    ours = metric(pairs, index, ties="gt")
    assert close(ours["mIoU"], official["mean_iou_percent"])
    for name, value in official["precision_percent"].items():
        assert close(ours[f"Pr@0.{name[3]}"], value), name
    if "overall_iou_percent" in official:
        assert close(ours["oIoU"], official["overall_iou_percent"])
    iou = sample_iou(pairs["I"][index], pairs["U"][index], "gt")
    np.testing.assert_allclose(iou, official["per_sample_iou"], rtol=CLOSE)


def assert_rela(ours: dict, official: dict) -> None:
    for name, value in official.items():
        name, scale = (name.replace("_", "-"), 100) if name in ("N_acc", "T_acc") else (name, 1)
        assert close(ours[name], value * scale), name


@pytest.mark.parametrize("subset", SETS)
def test_rela(pairs: dict, recorded: dict, subset: str):
    official = recorded["results"][subset]["rela"]
    for source, values in official["results"].items():
        assert source == "grefcoco"
        assert_rela(metric(pairs, recorded["sets"][subset], generalized=True), values)


def test_rela_with_two_sources(pairs: dict, recorded: dict):
    official = recorded["rela_two_sources"]
    source = np.array(official["source"])
    for name, values in official["results"].items():
        index = np.flatnonzero((source == name) | (name == "full")).tolist()
        assert_rela(metric(pairs, index, generalized=True), values)


def test_rela_on_a_classic_dataset(pairs: dict, recorded: dict):
    official = recorded["rela_classic_refcoco_only"]["results"]["refcoco"]
    index = recorded["sets"]["gt_nonempty"]
    assert_rela(metric(pairs, index, generalized=True), official)


def test_only_rejected_no_target_samples_give_no_division_by_zero():
    scores = generalized_scores([0, 0], [0, 7], [True, True], [True, True])
    assert scores["gIoU"] == scores["N-acc"] == 100
    assert math.isnan(scores["cIoU"])
    assert math.isnan(scores["T-acc"])
    assert math.isnan(scores["Pr@0.7"])


def test_pixel_count_rule_on_the_recorded_borders(pairs: dict, recorded: dict):
    names = ["nt_1px", "nt_49px", "nt_50px", "nt_51px"]
    index = [recorded["names"].index(n) for n in names]
    assert (pairs["area"][index] < 50).tolist() == [True, True, False, False]
    said = pairs["area"][index] < 50
    scores = generalized_scores(pairs["I"][index], pairs["U"][index], pairs["gt"][index], said)
    assert scores["N-acc"] == scores["gIoU"] == 50


def test_ties_split_the_families():
    assert classic_scores([5, 6], [10, 10])["Pr@0.5"] == 100
    assert classic_scores([5, 6], [10, 10], ties="gt")["Pr@0.5"] == 50
    assert classic_scores([700], [1000], ties="gt")["Pr@0.7"] == 100  # float32(0.7) is below 0.7
    assert classic_scores([7], [10], ties="gt")["Pr@0.7"] == 0  # but 1e-6 weighs more with a small union


def test_exchanged_columns_are_rejected():
    with pytest.raises(UserError, match="exchanged"):
        ReferringSegmentation(keep_in_memory=True).compute(
            intersections=[5], unions=[3], areas=[4], no_target=[False], predicted_no_target=[False]
        )


def test_the_page_on_adding_a_metric(repository: Path):
    """Its example, run as it stands, is reported by the next evaluation."""
    page = (repository / "docs" / "adding-a-metric.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    try:
        exec(compile(code, "adding-a-metric.md", "exec"), {})
        scores = compute_scores(scored_columns([4, 0], [10, 6], areas=[6, 2]), "classic")
        assert scores["Dice"] == pytest.approx(100 * 2 * 4 / (6 + 8 + 2 + 4))
        with pytest.raises(UserError, match="registered already"):
            exec(compile(code, "adding-a-metric.md", "exec"), {})
    finally:
        METRICS["classic"].remove("Dice")
    assert "Dice" not in classic_scores([1], [2])


def random_refs(seed: int) -> dict[str, np.ndarray]:
    """120 samples of 40 refs; the model rejects some, and some refs have no no-target sentence or only such."""
    rng = np.random.default_rng(seed)
    none, truth, area = rng.random(120) < 0.5, rng.integers(1, 50, 120), rng.integers(0, 50, 120)
    area[rng.random(120) < 0.4] = 0
    truth[none] = 0
    both = rng.integers(0, np.minimum(truth, area) + 1)
    ids = np.stack([rng.integers(0, 8, 120), rng.integers(0, 5, 120)])
    return {
        "intersections": both, "unions": truth + area - both, "areas": area, "no_target": none,
        "predicted_no_target": rng.random(120) < 0.2, "refs": number_refs(*ids), "truth": truth,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_metrics_of_the_robust_data_sets(seed: int):
    """A loop over refs and sentences, as the evaluations of R-RefCOCO and Ref-ZOM count."""
    columns = random_refs(seed)
    truth = columns.pop("truth")
    robust, negatives, ious, total = [], [], [], np.zeros(2)
    empty = (columns["areas"] == 0) | columns["predicted_no_target"]
    for ref in np.unique(columns["refs"]):
        i_sum = u_sum = positives = 0
        rejected = []
        for n in np.flatnonzero(columns["refs"] == ref):
            if columns["no_target"][n]:
                rejected.append(bool(empty[n]))
                u_sum += 0 if empty[n] else columns["areas"][n]
                continue
            i, u = (0, truth[n]) if empty[n] else (columns["intersections"][n], columns["unions"][n])
            i_sum, u_sum, positives = i_sum + i, u_sum + u, positives + 1
            total += (i, u)
            ious.append(i / u)
        robust += [i_sum / u_sum] if positives else []
        negatives += [np.mean(rejected)] if rejected else []
    expected = {
        "rIoU": np.mean(robust), "r": np.mean(negatives), "target mIoU": np.mean(ious),
        "target oIoU": total[0] / total[1], "zero-target accuracy": empty[columns["no_target"]].mean(),
    }  # fmt: skip
    samples = scored_columns(**columns)
    for name, value in expected.items():
        assert math.isclose(metric_terms(name, samples, "generalized").percent(), 100 * value), name
    assert not expected.keys() & compute_scores(samples, "generalized").keys()


def test_a_ref_is_an_image_and_an_id():
    assert number_refs([7, 7, 3, 7, 3], [1, 2, 1, 1, 1]).tolist() == [1, 2, 0, 1, 0]
    with pytest.raises(UserError, match="need the ref of every sample"):
        metric_terms("r", scored_columns([1], [1]), "generalized")


def test_box_accuracy_counts_targets_that_were_not_rejected() -> None:
    """Box IoUs 0.5, 0.6, 1 (rejected by the model), and a sentence without target."""
    samples = scored_columns(
        [0, 0, 0, 0], [9, 9, 9, 0], [False, False, False, True], [False, False, True, True],
        boxes=([1, 3, 4, 0], [2, 5, 4, 0]),
    )  # fmt: skip
    for kind in ("classic", "generalized"):
        assert metric_terms("Acc@0.5", samples, kind).percent() == pytest.approx(200 / 3)
        assert metric_terms("Acc@0.75", samples, kind).percent() == 0.0
    assert "Acc@0.5" not in compute_scores(samples, "generalized")
    with pytest.raises(UserError, match=r"Acc@0.9 needs the boxes of every sample"):
        metric_terms("Acc@0.9", scored_columns([0], [9]), "classic")


def test_detection_accuracy_counts_every_sample_once() -> None:
    """Three full batches of 2 and a last one of 1, as in the golden of C3VG: mean of batches 87.5, per sample 85.71."""
    hits = np.array([1, 1, 1, 1, 0, 1, 1])
    detected = (np.where(hits, 50, 49), np.full(7, 100))
    scored = scored_columns(np.ones(7), np.ones(7), detected=detected)
    per_batch = np.mean([hits[i : i + 2].mean() for i in range(0, 7, 2)])
    assert 100 * per_batch == 87.5
    assert metric_terms("DetAcc@0.5", scored, "classic").percent() == pytest.approx(600 / 7)
    with pytest.raises(UserError, match="evaluate again"):
        metric_terms("DetAcc@0.5", scored_columns([1], [1]), "classic")


def test_detection_accuracy_is_of_sentences_with_a_target() -> None:
    scored = scored_columns(
        [0, 5, 5], [0, 9, 9], [True, False, False], [True, True, False], detected=([0, 90, 90], [0, 100, 100])
    )
    assert metric_terms("DetAcc@0.5", scored, "generalized").percent() == 50
    assert "DetAcc@0.5" not in compute_scores(scored, "generalized")
