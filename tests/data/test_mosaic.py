"""NeMo's mosaic: the right picture and mask in one cell, companions from other images, reproducible."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from amltrain.data.mosaic import Mosaic, MosaicOptions, allowed_cells, compose, in_cell, ranking_path
from amltrain.data.transforms import ImageTransform
from amltrain.errors import UserError
from amltrain.records import Draw
from tests.data.stand_in import shapes_dataset

ALWAYS = {"probability": 1.0}


def write_ranking(folder: Path, kind: str, ranking: dict[int, list[tuple[int, float]]]) -> None:
    columns = {
        "key": list(ranking),
        "image_ids": [[image for image, _ in ranked] for ranked in ranking.values()],
        "scores": pa.array([[s for _, s in ranked] for ranked in ranking.values()], pa.list_(pa.float32())),
    }
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), ranking_path(folder, "refshapes", "train", kind))


@pytest.mark.parametrize(("cells", "size"), [(4, 32), (9, 32), (9, 31)])
def test_a_grid_fills_the_canvas_and_only_the_own_cell_has_a_mask(cells: int, size: int) -> None:
    pictures = [Image.new("RGB", (20 + i, 30), (i, i, i)) for i in range(cells)]
    for own in range(cells):
        canvas, mask = compose(pictures, own, size), in_cell(np.ones((30, 20 + own), np.uint8), own, cells, size)
        values = np.asarray(canvas)[..., 0]
        assert canvas.size == (size, size) and set(np.unique(values)) == set(range(cells))
        assert np.array_equal(mask == 1, values == own)


def test_the_own_cell_is_the_picture_resized_as_pil_does() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    mask = (np.random.default_rng(1).random((40, 60)) > 0.5).astype(np.uint8)
    others = [Image.new("RGB", (8, 8))] * 3
    canvas, covered = compose([others[0], picture, *others[1:]], 1, 32), in_cell(mask, 1, 4, 32)
    assert np.array_equal(np.asarray(canvas)[:16, 16:], picture.resize((16, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(covered[:16, 16:], Image.fromarray(mask).resize((16, 16), Image.Resampling.NEAREST))


@pytest.mark.parametrize("resize", ["square", "letterbox"])
def test_the_transform_leaves_a_canvas_as_it_is(prepared: str, resize: str) -> None:
    dataset = shapes_dataset(prepared, augmentations=[Mosaic(MosaicOptions(**ALWAYS))])
    dataset.transform = ImageTransform(32, resize, "clip")
    raw = Mosaic(MosaicOptions(**ALWAYS))(dataset.raw(3), Draw(0, 3), dataset)
    assert np.array_equal(dataset[3].image.permute(1, 2, 0).numpy(), np.asarray(raw.image))
    assert np.array_equal(dataset[3].target.numpy(), raw.mask * 255)


def test_samples_repeat_themselves_and_differ_by_epoch_and_seed(prepared: str) -> None:
    one, again, other = (
        shapes_dataset(prepared, seed=seed, augmentations=[Mosaic(MosaicOptions(**ALWAYS))]) for seed in (0, 0, 1)
    )
    assert torch.equal(one[Draw(2, 7)].image, again[Draw(2, 7)].image)
    assert not torch.equal(one[Draw(2, 7)].image, one[Draw(3, 7)].image)
    assert not torch.equal(one[Draw(2, 7)].image, other[Draw(2, 7)].image)


def test_the_given_share_of_samples_becomes_a_mosaic_and_the_rest_stays(prepared: str) -> None:
    plain = shapes_dataset(prepared)
    augmented = shapes_dataset(prepared, augmentations=[Mosaic(MosaicOptions(probability=0.25))])
    same = [torch.equal(plain[i].image, augmented[i].image) for i in range(200)]
    assert 0.6 < np.mean(same) < 0.88
    for i in range(40):
        assert torch.equal(plain[i].target, augmented[i].target) or not same[i]
        assert torch.equal(plain[i].input_ids, augmented[i].input_ids)


def test_every_cell_and_no_own_image_as_companion(prepared: str) -> None:
    dataset = shapes_dataset(prepared, unit="referent")
    augmentation = Mosaic(MosaicOptions(**ALWAYS, grids=[4, 9]))
    used: list[int] = []
    dataset.referent_picture = lambda referent: used.append(referent) or Image.new("RGB", (8, 8))
    cells = set()
    for index in range(150):
        used.clear()
        raw = dataset.raw(index)
        made = augmentation(raw, Draw(0, index), dataset)
        images = [int(dataset.referent_images[referent]) for referent in used]
        assert len(used) in (3, 8) and len({raw.ids.image_id, *images}) == len(used) + 1
        if len(used) == 3 and made.mask.any():
            rows, columns = np.nonzero(made.mask)
            cells.add(2 * int(rows.mean() > 16) + int(columns.mean() > 16))
    assert cells == {0, 1, 2, 3}


def test_words_of_place_choose_the_cell() -> None:
    assert allowed_cells("the dog on the left") == [0, 2]
    assert allowed_cells("Top right man") == [1]
    assert allowed_cells("bright top") == [0, 1]  # whole words
    assert allowed_cells("a dog") == allowed_cells("left or right") == [0, 1, 2, 3]


def test_retrieved_companions_follow_the_ranking_and_the_ceilings(prepared: str, tmp_path: Path) -> None:
    dataset = shapes_dataset(prepared)
    raw = dataset.raw(0)
    others = [int(i) for i in np.unique(dataset.referent_images) if i != raw.ids.image_id][:6]
    own = raw.ids.image_id
    ranked = [(own, 0.95), *((image, 0.9 - 0.1 * k) for k, image in enumerate(others)), (10**9, 0.1)]
    write_ranking(tmp_path, "sentences", {raw.ids.sent_id: ranked})
    write_ranking(tmp_path, "images", {own: [(others[2], 0.9), (others[3], 0.2)]})

    def found(**options: object) -> list[int]:
        augmentation = Mosaic(MosaicOptions(**ALWAYS, rankings=str(tmp_path), retrieval=1.0, **options))
        return dataset.referent_images[augmentation.candidates(raw, dataset)].tolist()

    assert found() == others  # neither the own image nor one that training does not have
    assert found(top_k=2) == others[:2]
    assert found(max_text_similarity=0.75) == others[2:]
    assert found(max_image_similarity=0.5) == [i for i in others if i != others[2]]
    assert found(max_text_similarity=-1.0) == others  # nothing is left: the last ranks


def test_too_few_ranked_companions_are_filled_up_and_said(
    prepared: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = shapes_dataset(prepared)
    write_ranking(tmp_path, "sentences", {10**9: [(1, 0.5)]})
    dataset.augmentations = [Mosaic(MosaicOptions(**ALWAYS, rankings=str(tmp_path), retrieval=1.0))]
    assert dataset[0].image.shape == (3, 32, 32) and dataset[1].target.dtype == torch.uint8
    assert [r.getMessage() for r in caplog.records if "random ones fill up" in r.getMessage()].__len__() == 1


def test_retrieval_begins_at_its_epoch(prepared: str, tmp_path: Path) -> None:
    dataset = shapes_dataset(prepared)
    dataset.augmentations = [
        Mosaic(MosaicOptions(**ALWAYS, rankings=str(tmp_path / "none"), retrieval=1.0, retrieval_epoch=5))
    ]
    dataset[Draw(4, 0)]
    with pytest.raises(
        UserError, match=r"ranking .*refshapes-train-sentences\.parquet cannot be read.*amltrain data rank"
    ):
        dataset[Draw(5, 0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 1.5}, r"mosaic\.probability is 1\.5"),
        ({"grids": [5]}, r"mosaic\.grids is \[5\]"),
        ({"top_k": 0}, r"mosaic\.top_k"),
        ({"retrieval": 0.5}, r"needs mosaic\.rankings"),
    ],
)
def test_options_out_of_range_are_rejected(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mosaic(MosaicOptions(**options))


def test_too_few_images_are_said(prepared: str) -> None:
    dataset = shapes_dataset(prepared)
    everyone = set(np.unique(dataset.referent_images).tolist())
    few = shapes_dataset(prepared, excluded_images=everyone - set(sorted(everyone)[:3]))
    with pytest.raises(UserError, match="a mosaic of 4 cells needs 4 training images, and there are 3"):
        Mosaic(MosaicOptions(**ALWAYS))(few.raw(0), Draw(0, 0), few)
