"""Which samples a report shows, and that its pictures fit the image."""

import numpy as np
import pytest

from amltrain.report.collect import Rows, choose, onto_image


def rows(count: int = 30) -> Rows:
    iou = np.random.default_rng(0).permutation(count) / count
    ids = np.arange(count)
    return Rows(ids, ids // 2, iou, np.ones(count, np.int64))


def test_best_worst_and_random_without_repeats() -> None:
    table = rows()
    picked = choose(table, 9, seed=1)
    by_group = {g: [i for i, group in picked.items() if group == g] for g in ("best", "worst", "random")}
    assert [len(ids) for ids in by_group.values()] == [3, 3, 3]
    assert len({table.ref_id[i] for i in picked}) == 9
    assert table.iou[by_group["best"][0]] == table.iou.max()
    assert table.iou[by_group["worst"][0]] == table.iou.min()
    assert picked == choose(table, 9, seed=1)
    assert set(picked) != set(choose(table, 9, seed=2))


def test_chosen_samples_come_first_and_a_small_split_is_no_error() -> None:
    assert list(choose(rows(), 3, 0, chosen=[7, 6]).items())[:2] == [(7, "chosen"), (6, "chosen")]
    assert len(choose(rows(4), 60, 0)) == 2
    assert choose(rows(), 0, 0) == {}


def test_no_miss_is_called_best() -> None:
    table = rows(12)
    hit = int(table.sample_id[table.iou.argmax()])
    one_hit = table._replace(iou=np.where(table.sample_id == hit, 0.4, 0.0))
    assert [i for i, group in choose(one_hit, 9, 0).items() if group == "best"] == [hit]
    assert "best" not in choose(table._replace(iou=np.zeros(12)), 9, 0).values()


def test_what_was_gained_and_what_was_lost() -> None:
    """Against another model: the largest gains and losses, never a sample that did not change."""
    table = rows()
    before = table._replace(iou=np.where(table.sample_id == 4, 1.0, np.where(table.sample_id == 9, 0.0, table.iou)))
    before.iou[2], table.iou[4], table.iou[9] = table.iou[2], 0.1, 0.9
    picked = choose(table, 9, 1, before=before)
    assert [i for i, group in picked.items() if group == "gained"] == [9]
    assert [i for i, group in picked.items() if group == "lost"] == [4]
    assert list(picked.values()).count("random") == 3


@pytest.mark.parametrize("size", [(40, 80), (80, 40)])
def test_a_letterbox_is_undone(size: tuple[int, int]) -> None:
    height, width = size
    scale = 64 / max(size)
    offset = [(64 - scale * n) / 2 for n in size]
    values = np.arange(64)[:, None] + 100 * np.arange(64)[None]
    found = onto_image(values, (64, 64), [height, width, scale, scale, *offset])
    assert found.shape == size
    assert found[0, 0] == int(offset[0]) + 100 * int(offset[1])
    assert found[-1, -1] == int(63 - offset[0]) + 100 * int(63 - offset[1])
