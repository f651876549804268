"""Samples: the right sentence and mask for the right image, all randomness from (seed, epoch, index)."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from amltrain.data.dataset import OpenSplit, ReferDataset
from amltrain.data.rows import FEATURES, MappedRows, open_prepared
from amltrain.data.segmentation import decode_rle, referent_mask
from amltrain.data.transforms import ImageTransform
from amltrain.errors import UserError
from amltrain.records import Draw, Sample
from tests.data.stand_in import shapes_dataset, word_tokenizer


def equal(a: Sample, b: Sample) -> bool:
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


def rows_in_memory(images: list[bytes], referents: list[list[dict]]) -> MappedRows:
    import datasets

    rows = [
        {"image_id": i, "file_name": f"{i}.jpg", "height": 40, "width": 50, "image": {"bytes": b}, "referents": r}
        for i, (b, r) in enumerate(zip(images, referents, strict=True))
    ]
    return MappedRows(datasets.Dataset.from_list(rows, features=FEATURES))


def referent(ref_id: int, sentences: list[str], *, polygons: list[list[float]] | None = None) -> dict:
    mask = referent_mask([polygons] if polygons else [], 40, 50)
    return {
        "ref_id": ref_id, "ann_ids": [ref_id], "category": "thing", "bbox": [0, 0, 1, 1], "no_target": not polygons,
        "mask": mask.union, "mask_exclusive": mask.exclusive,
        "sentences": [{"sent_id": 10 * ref_id + i, "sent": s, "raw": s.upper()} for i, s in enumerate(sentences)],
    }  # fmt: skip


def jpeg(colour: str = "red") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (50, 40), colour).save(content, "JPEG")
    return content.getvalue()


OVERLAPPING = [[5, 5, 30, 5, 30, 30, 5, 30], [20, 20, 45, 20, 45, 35, 20, 35]]


def test_every_sentence_of_the_files_is_a_sample(prepared: str) -> None:
    dataset = shapes_dataset(prepared)
    expected = [
        (row["image_id"], r["ref_id"], s["sent_id"], s["sent"])
        for row in open_prepared(prepared, "refshapes", "train")
        for r in row["referents"]
        for s in r["sentences"]
    ]
    found = [dataset.info(i) for i in range(len(dataset))]
    assert [(f.image_id, f.ref_id, f.sent_id, f.sentence) for f in found] == expected
    assert {(f.dataset, f.split) for f in found} == {("refshapes", "train")}


def test_a_sample_is_its_rows_image_mask_and_sentence(prepared: str) -> None:
    dataset = shapes_dataset(prepared, keep_original_target=True)
    rows = {row["image_id"]: row for row in open_prepared(prepared, "refshapes", "train")}
    tokenizer, transform = word_tokenizer(), ImageTransform(32)
    for index in (0, 1, len(dataset) // 2, len(dataset) - 1):
        sample, info = dataset[index], dataset.info(index)
        row = rows[info.image_id]
        (source,) = (r for r in row["referents"] if r["ref_id"] == info.ref_id)
        mask = decode_rle(source["mask"])
        image, target, geometry = transform(Image.open(io.BytesIO(row["image"]["bytes"])), mask)
        ids, text_mask = tokenizer(info.sentence)
        assert torch.equal(sample.image, image) and torch.equal(sample.target, target)
        assert torch.equal(sample.input_ids, ids) and torch.equal(sample.text_mask, text_mask)
        assert torch.equal(sample.geometry, geometry)
        assert np.array_equal(sample.original_target.numpy(), mask * 255)
        assert int(sample.sample_id) == index


def test_unit_referent_draws_all_sentences_evenly_and_repeats_itself(prepared: str) -> None:
    dataset = shapes_dataset(prepared, unit="referent", seed=3)
    entry = int(np.argmax(dataset.index.sentences))
    count = int(dataset.index.sentences[entry])
    assert count >= 3
    drawn = [tuple(dataset[Draw(epoch, entry)].input_ids.tolist()) for epoch in range(60)]
    again = shapes_dataset(prepared, unit="referent", seed=3)
    assert drawn[:10] == [tuple(again[Draw(epoch, entry)].input_ids.tolist()) for epoch in range(10)]
    assert len(Counter(drawn)) == count
    assert min(Counter(drawn).values()) > 60 / count / 3


def test_the_random_key_differs_between_seeds_epochs_and_samples_only(prepared: str) -> None:
    keys = {
        (seed, epoch, index): int(shapes_dataset(prepared, unit="referent", seed=seed)[Draw(epoch, index)].random_key)
        for seed in (0, 1)
        for epoch in (0, 1)
        for index in (0, 1)
    }
    assert len(set(keys.values())) == 8
    dataset = shapes_dataset(prepared, unit="referent")
    assert int(dataset[Draw(1, 1)].random_key) == keys[0, 1, 1]
    assert len({int(dataset[Draw(1, 1, repeat)].random_key) for repeat in range(3)} | set(keys.values())) == 10


def test_several_data_sets_lie_one_behind_the_other(prepared: str) -> None:
    both = shapes_dataset(prepared, names=("refshapes", "refshapes+"), unit="referent")
    single = [shapes_dataset(prepared, names=(name,), unit="referent") for name in ("refshapes", "refshapes+")]
    assert both.split_sizes == [len(single[0]), len(single[1])]
    other = both.info(len(single[0]))
    assert other.dataset == "refshapes+" and other.ref_id == single[1].info(0).ref_id
    assert torch.equal(both[len(single[0])].image, single[1][0].image)


def test_held_out_images_are_left_out_and_nothing_else(prepared: str) -> None:
    whole = shapes_dataset(prepared)
    held_out = {whole.info(i).image_id for i in range(0, 60, 7)}
    part = shapes_dataset(prepared, excluded_images=held_out)
    kept = [info for info in (whole.info(i) for i in range(len(whole))) if info.image_id not in held_out]
    assert [part.info(i) for i in range(len(part))] == kept
    assert part.counts()["images"] == whole.counts()["images"] - len(held_out)


def test_first_sentences_and_first_samples(prepared: str) -> None:
    first = shapes_dataset(prepared, "val", first_sentence_only=True)
    referents = shapes_dataset(prepared, "val", unit="referent")
    assert len(first) == len(referents)
    assert len({first.info(i).ref_id for i in range(len(first))}) == len(first)
    some = shapes_dataset(prepared, "val", max_samples=5)
    assert len(some) == 5 and some.counts()["samples"] == 5


@pytest.mark.parametrize("unit", ["sentence", "referent"])
def test_shuffled_sentences_come_from_other_referents_each_once(prepared: str, unit: str) -> None:
    plain = shapes_dataset(prepared, unit=unit)
    shuffled = shapes_dataset(prepared, unit=unit, shuffle_sentences=True)
    owners = {plain.info(i).sent_id: plain.info(i).ref_id for i in range(len(plain))}
    if unit == "sentence":
        given = [shuffled.info(i) for i in range(len(shuffled))]
        assert all(owners[info.sent_id] != info.ref_id for info in given)
        assert sorted(info.sent_id for info in given) == sorted(owners)  # a permutation: the words are as frequent
    assert sorted(shuffled.text_of.tolist()) == list(range(len(plain)))
    assert (shuffled.referent_of[shuffled.text_of] != shuffled.referent_of).all()
    assert torch.equal(shuffled[3].image, plain[3].image) and torch.equal(shuffled[3].target, plain[3].target)
    assert any(not torch.equal(shuffled[i].input_ids, plain[i].input_ids) for i in range(5))
    assert equal(shuffled[3], shapes_dataset(prepared, unit=unit, shuffle_sentences=True)[3])


def test_parts_that_overlap_count_once_or_not_at_all() -> None:
    rows = rows_in_memory([jpeg()], [[referent(1, ["both"], polygons=OVERLAPPING)]])
    transform = ImageTransform(40)
    union, exclusive = (
        ReferDataset([OpenSplit("refcoco", "train", rows)], transform, word_tokenizer(), mask_parts=rule)[0].target
        for rule in ("union", "exclusive")
    )
    assert union.sum() > exclusive.sum() > 0
    assert (union >= exclusive).all()


def test_a_sentence_without_target_has_an_empty_mask_and_says_so() -> None:
    rows = rows_in_memory([jpeg()], [[referent(1, ["a"], polygons=OVERLAPPING[:1]), referent(2, ["nothing"])]])
    dataset = ReferDataset([OpenSplit("grefcoco", "train", rows)], ImageTransform(32), word_tokenizer())
    assert [bool(dataset[i].no_target) for i in range(2)] == [False, True]
    assert dataset[0].target.any() and not dataset[1].target.any()


def test_the_sentence_field_is_read_as_asked() -> None:
    rows = rows_in_memory([jpeg()], [[referent(1, ["a man"], polygons=OVERLAPPING)]])
    dataset = ReferDataset(
        [OpenSplit("refcoco", "val", rows)], ImageTransform(32), word_tokenizer(), sentence_field="raw"
    )
    assert dataset.info(0).sentence == "A MAN"


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_print_images_are_read(mode: str) -> None:
    content = io.BytesIO()
    Image.new("RGB", (50, 40), "blue").convert(mode).save(content, "JPEG")
    rows = rows_in_memory([content.getvalue()], [[referent(1, ["a"], polygons=OVERLAPPING)]])
    dataset = ReferDataset([OpenSplit("refcoco", "val", rows)], ImageTransform(32), word_tokenizer())
    assert dataset[0].image.shape == (3, 32, 32) and dataset.picture(0).mode == "RGB"


def test_a_damaged_image_is_named(prepared: str) -> None:
    rows = rows_in_memory([jpeg(), jpeg()[:100]], [[referent(i, ["a"], polygons=OVERLAPPING)] for i in range(2)])
    dataset = ReferDataset([OpenSplit("refcoco", "val", rows)], ImageTransform(32), word_tokenizer())
    assert dataset[0].image.shape == (3, 32, 32)
    with pytest.raises(UserError, match=r"1\.jpg .*row 1.* refcoco/val"):
        dataset[1]


def test_images_can_be_perturbed_by_sample(prepared: str) -> None:
    def darken(image: Image.Image, sample_id: int) -> Image.Image:
        return Image.new("RGB", image.size, (sample_id, 0, 0))

    dataset = shapes_dataset(prepared, "val", perturb=darken)
    assert dataset.picture(3).getpixel((0, 0)) == (3, 0, 0)
    assert torch.equal(dataset[3].image, ImageTransform(32)(dataset.picture(3)).image)


def test_an_image_is_decoded_once_for_its_sentences_in_a_row(prepared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from amltrain.data import dataset as module

    dataset = shapes_dataset(prepared, "val")
    alone = [shapes_dataset(prepared, "val")[i] for i in range(20)]
    decoded: list[str] = []
    original = module.decode_image
    monkeypatch.setattr(module, "decode_image", lambda *a: decoded.append(a[1]) or original(*a))
    assert all(equal(dataset[i], sample) for i, sample in enumerate(alone))
    assert len(decoded) == len({dataset.info(i).image_id for i in range(20)}) < 20


def test_the_torchvision_decoder_differs_by_at_most_one_grey_level(prepared: str) -> None:
    plain, fast = (shapes_dataset(prepared, "val", decoder=decoder) for decoder in ("pil", "torchvision"))
    for index in range(0, len(plain), 5):
        assert (plain[index].image.int() - fast[index].image.int()).abs().max() <= 1
        assert torch.equal(plain[index].target, fast[index].target)
    assert fast.describe()["decoder"] == "torchvision"
