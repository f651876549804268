"""Alignment statistics by hand, added up over batches, written as rows, drawn as pictures."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from amltrain.methods.aml.recorder import (
    STATISTICS,
    WEAK,
    AlignmentDiagnostics,
    FixedSamples,
    alignment_sums,
    append_row,
    build_alignment_diagnostics,
    draw_alignment,
    summarise,
)
from tests.data.stand_in import shapes_dataset
from tests.methods.aml.test_method import calibrated, make_batch, make_task

IMAGES = [np.full((96, 96, 3), shade, np.uint8) for shade in (90, 200)]


def test_statistics_by_hand() -> None:
    # 2 x 2 patches of 2 x 2 pixels; the referent fills the left half
    scores = torch.tensor([[[0.1, 0.95], [0.35, 0.6]]])
    target = torch.zeros(1, 4, 4, dtype=torch.uint8)
    target[:, :, :2] = 255
    blocks = torch.tensor([[[True, True], [False, False]]])
    values = summarise(alignment_sums(scores, blocks, target, block=2))
    assert values["score_mean"] == pytest.approx(0.5)
    assert values["score_std"] == pytest.approx(scores.std(unbiased=False).item(), abs=1e-6)
    assert [values[f"below_{tau}"] for tau in (0.2, 0.3, 0.4, 0.6)] == [0.25, 0.25, 0.5, 0.5]
    assert [values["above_0.5"], values["above_0.9"]] == [0.5, 0.25]
    assert [values[f"referent_below_{tau}"] for tau in (0.2, 0.3, 0.4, 0.6)] == [0.5, 0.5, 1.0, 1.0]
    assert values["masked_image"] == 0.5
    assert values["masked_referent"] == values["masked_background"] == 0.5
    assert values["referent_ratio"] == 1
    assert values["auc"] == 0  # both of the referent's patches score below both others
    assert math.isnan(values["auc_shuffled"]) and math.isnan(values["agreement"])


def test_auc_and_agreement_by_hand() -> None:
    # 2 x 2 patches; the referent covers the first whole, a quarter of the second, nothing of the others
    target = torch.zeros(3, 4, 4, dtype=torch.uint8)
    target[:, :2, :2] = 255
    target[:, 0, 2] = 255
    target[2] = 0  # a sentence that means nothing in its image
    scores = torch.tensor([[[0.5, 0.0], [0.5, 0.2]], [[0.9, 1.0], [0.1, 0.2]], [[0.1, 0.2], [0.3, 0.4]]])
    values = summarise(alignment_sums(scores, torch.zeros(3, 2, 2), target, 2, shuffled=1 - scores, other=2 * scores))
    assert values["auc"] == pytest.approx((0.75 + 1) / 2)  # a tie counts half
    assert values["auc_shuffled"] == pytest.approx((0.25 + 0) / 2)
    assert values["agreement"] == pytest.approx(1)
    fine = scores.repeat_interleave(2, 1).repeat_interleave(2, 2)  # finer than the blocks: averaged to them
    assert summarise(alignment_sums(fine, torch.zeros(3, 2, 2), target, 2))["auc"] == values["auc"]


def test_a_probe_compares_with_other_sentences_and_projections() -> None:
    batch = make_batch()
    task = calibrated(make_task(diagnostics_every=1), batch)
    probe = task.probe(batch)
    assert torch.equal(probe.scores, task.score(batch))
    other = calibrated(make_task(projection_seed=1, temperature=float(task.scorer.temperature)), batch)
    assert torch.equal(probe.other, other.score(batch))
    features = task.scorer.features(task.model, batch)
    swapped = features._replace(text=features.text.flip(0), text_mask=features.text_mask.flip(0))
    assert torch.equal(probe.shuffled, task.scorer.score(swapped))
    assert task.state_dict().keys() == make_task().state_dict().keys()  # diagnostics may be switched in a resumed run
    late = make_task(diagnostics_every=1, features="late", temperature=0.02).probe(batch)
    assert late.shuffled is None and late.other is not None
    assert make_task(diagnostics_every=1, features="late", projection="grounded").probe(batch)[1:] == (None, None)
    assert make_task(diagnostics_every=1, features="pred").probe(batch)[1:] == (None, None)


def test_a_window_of_other_statistics_is_dropped() -> None:
    hook = AlignmentDiagnostics(Path(), 2)
    hook.restore([[1.0, 2.0]], torch.device("cpu"))
    assert hook.window() is None


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(6, 7, 7, generator=generator)
    blocks = torch.rand(6, 3, 3, generator=generator) < 0.3
    target = (torch.rand(6, 90, 75, generator=generator) < 0.2).to(torch.uint8) * 255
    whole = alignment_sums(scores, blocks, target, 32)
    parts = [alignment_sums(scores[i : i + 2], blocks[i : i + 2], target[i : i + 2], 32) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), whole)
    assert whole.shape == (len(STATISTICS), 2)


def test_images_without_a_referent_give_no_number() -> None:
    sums = alignment_sums(torch.rand(1, 2, 2), torch.zeros(1, 1, 1), torch.zeros(1, 32, 32, dtype=torch.uint8), 32)
    assert math.isnan(summarise(sums)["referent_below_0.4"])


def test_rows_of_an_abandoned_future_go(tmp_path: Path) -> None:
    path = tmp_path / "alignment.csv"
    for step in (10, 20, 30):
        append_row(path, {"step": step, "score_mean": step / 100})
    rows = append_row(path, {"step": 20, "score_mean": 0.5})
    assert [r["step"] for r in rows] == [10, 20]
    with path.open() as file:
        assert [r["score_mean"] for r in csv.DictReader(file)] == ["0.1", "0.5"]


def test_diagnostics_of_a_training_task(tmp_path: Path) -> None:
    batch = make_batch()
    task = calibrated(make_task({"text_dropout": 0.5}, diagnostics_every=2), batch)
    hook = AlignmentDiagnostics(tmp_path, 2, FixedSamples(batch, IMAGES, ["a red square", "the other one"]))
    state = torch.get_rng_state()
    expected = [task(make_batch(seed=s)) for s in (0, 1)]
    torch.set_rng_state(state)

    first = task(make_batch(seed=0))
    hook.update(first)
    assert hook.after_step(1, task) is None
    second = task(make_batch(seed=1))
    hook.update(second)
    values = hook.after_step(2, task, reduce=lambda sums: sums * 2)
    assert task.training
    assert values["alignment/score_mean"] == pytest.approx(
        (first["mean_score"] + second["mean_score"]).item() / 2, rel=1e-5
    )
    assert 0 < values["alignment/score_std"] < 0.5
    assert torch.equal(second["loss"], expected[1]["loss"])  # looking changed nothing
    assert (tmp_path / "alignment.csv").read_text().startswith("step,score_mean,score_std,below_0.2")
    for picture in ("alignment.png", "alignment/step-0000002.png"):
        assert (tmp_path / picture).stat().st_size > 5000


@pytest.mark.parametrize(("side", "block"), [(96, 32), (98, 32), (98, 16)])
def test_pictures_show_the_blocks_that_were_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, block: int
) -> None:
    batch = make_batch(1, (side, side))
    blocks = torch.zeros(1, -(-side // block), -(-side // block), dtype=torch.bool)
    blocks[0, 0, 1] = True
    shown, imshow = [], Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda axes, image, **kw: shown.append(image) or imshow(axes, image, **kw))
    samples = FixedSamples(batch, [np.full((side, side, 3), 90, np.uint8)], ["a red square"])
    draw_alignment(samples, torch.rand(1, 6, 6), blocks, block, tmp_path / "step.png")
    expected = np.zeros((side, side), bool)
    expected[:block, block : 2 * block] = True
    np.testing.assert_array_equal((shown[-1] == 0).all(-1), expected)


def test_what_a_run_asks_for(shapes: Path, tmp_path: Path) -> None:
    dataset, device = shapes_dataset(str(shapes)), torch.device("cpu")
    hook = build_alignment_diagnostics(dataset, tmp_path, device, 5, block=32, count=2)
    assert (hook.every_steps, hook.block, len(hook.samples.sentences)) == (5, 32, 2)
    assert build_alignment_diagnostics(dataset, tmp_path, device, 5, block=16).block == 16
    assert build_alignment_diagnostics(dataset, tmp_path, device, 5, block=16, tau=0.3).samples.tau == 0.3


def test_weak_pixels_are_outlined_and_scores_share_a_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outlined, scales = [], []
    monkeypatch.setattr(Axes, "contour", lambda axes, mask, **kw: outlined.append((kw["colors"], mask.mean())))
    monkeypatch.setattr(Figure, "colorbar", lambda figure, *given, **kw: scales.append(kw["label"]) or Bar(figure))
    samples = FixedSamples(make_batch(), IMAGES, ["a", "b"], tau=0.4)
    scores = torch.full((2, 3, 3), 0.9)
    scores[0, 0] = 0.1  # the second image has no weak patch
    draw_alignment(samples, scores, torch.zeros(2, 3, 3, dtype=torch.bool), 32, tmp_path / "step.png")
    weak = [share for colour, share in outlined if colour == WEAK]
    assert len(weak) == 1 and 0.25 < weak[0] < 0.5
    assert scales == ["alignment score"]


class Bar:
    def __init__(self, figure: Figure) -> None:
        self.ax = figure.axes[0]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    batch = make_batch()
    task = calibrated(make_task(diagnostics_every=1), batch)
    hook = AlignmentDiagnostics(tmp_path / "run", 1, FixedSamples(batch, IMAGES, ["a", "b"]))
    hook.update(task(batch))
    assert hook.after_step(1, task, is_main=False) is not None
    assert not (tmp_path / "run").exists()
