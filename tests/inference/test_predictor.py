"""A predictor takes an image and sentences and gives masks at the image's own size."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from amltrain.config.schema import Preprocess, Protocol
from amltrain.errors import UserError
from amltrain.evaluation.results import named_protocol
from amltrain.hub.model_folder import Pretrained
from amltrain.inference.predictor import INSIDE, NO_PIXEL, NO_TARGET, Predictor, load_image, read_image
from amltrain.records import Batch, ModelOutput
from tests.evaluation.stand_in import SeesBright

PREPROCESS = Preprocess(
    size=48, resize="square", normalization="half", tokenizer="words", max_tokens=6, sentence_field="sent"
)


class Words:
    """Tokens are the lengths of the words."""

    def __call__(self, sentence: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.zeros(6, dtype=torch.int64)
        lengths = [len(w) for w in sentence.split()][:6]
        ids[: len(lengths)] = torch.tensor(lengths)
        return ids, ids > 0


def predictor(head: bool = False, resize: str = "square", protocol: Protocol | None = None) -> Predictor:
    preprocess = replace(PREPROCESS, resize=resize)
    model = SeesBright(head)
    return Predictor(Pretrained(model, preprocess, protocol or named_protocol("caris"), Words(), "stand_in", {}))


@pytest.fixture
def scene() -> tuple[Image.Image, np.ndarray]:
    truth = np.zeros((60, 90), bool)
    truth[15:45, 30:75] = True
    return Image.fromarray(np.where(truth, 255, 0).astype(np.uint8)), truth


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return np.count_nonzero(a & b) / np.count_nonzero(a | b)


@pytest.mark.parametrize("resize", ["square", "letterbox"])
def test_masks_fit_the_image(scene, resize: str):
    image, truth = scene
    found = predictor(resize=resize)(image, "the bright one")
    assert len(found) == 1
    assert found[0].mask.shape == found[0].probability.shape == (60, 90)
    assert iou(found[0].mask, truth) > 0.9
    assert found[0].confidence > 0.9
    assert not found[0].nothing
    assert found[0].confidence_of == INSIDE


def test_paths_arrays_and_images_give_the_same(scene, tmp_path: Path):
    image, _ = scene
    image.save(tmp_path / "scene.png")
    array = np.asarray(image)
    expected = predictor()(image, "x")[0].probability
    for given in (
        tmp_path / "scene.png",
        str(tmp_path / "scene.png"),
        array,
        np.stack([array] * 3, 2),
        array[::-1][::-1],
    ):
        assert np.array_equal(predictor()(given, "x")[0].probability, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("https://example.org/a.jpg", "is a URL"),
        (np.zeros((4, 4, 3), np.float32), "shape 4 x 4 x 3 and type float32"),
        (np.zeros((3, 9, 9), np.uint8), "shape 3 x 9 x 9"),
        (np.zeros((0, 4, 3), np.uint8), "shape 0 x 4 x 3"),
        (b"bytes", "an image is a bytes"),
    ],
)
def test_what_is_not_an_image(given: object, message: str):
    with pytest.raises(UserError, match=message):
        load_image(given)  # type: ignore[arg-type]


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match="is not an image file"):
        read_image(tmp_path / "pipe.png")


def test_it_says_what_it_is():
    assert repr(predictor()) == "Predictor(stand_in, 48 px square, cpu, fp32)"


def test_half_precision_is_used_and_changes_little(scene):
    class Linear(SeesBright):
        def forward(self, batch: Batch) -> ModelOutput:
            weight = torch.full((2, 3, 1, 1), 5.0)
            weight[0] = -5
            logits = torch.nn.functional.conv2d(batch.image, weight)
            assert logits.dtype == (torch.bfloat16 if half else torch.float32)
            return ModelOutput(logits)

    pretrained = Pretrained(Linear(), PREPROCESS, named_protocol("caris"), Words(), "stand_in", {})
    half = False
    full = Predictor(pretrained)(scene[0], "x")[0]
    half = True
    low = Predictor(pretrained, precision="bf16")(scene[0], "x")[0]
    assert low.probability.dtype == np.float32
    assert np.abs(low.probability - full.probability).max() < 0.01


def test_many_sentences_come_back_in_order(scene):
    image, _ = scene
    found = predictor(head=True)(image, [f"number {i}" for i in range(20)])
    assert len(found) == 20
    # the stand-in says "nothing" to every third sample of a batch of eight
    assert [s.nothing for s in found] == [i % 8 % 3 == 0 for i in range(20)]
    assert not found[0].mask.any()
    assert found[1].mask.any()
    assert [s.confidence_of for s in found[:2]] == [NO_TARGET, INSIDE]


def test_nothing_by_pixel_count_and_by_an_empty_mask(scene):
    image, truth = scene
    rule = replace(named_protocol("caris"), no_target_pixels=int(truth.sum()) * 2)
    assert predictor(protocol=rule)(image, "x")[0].nothing
    black = predictor()(Image.new("RGB", (50, 40)), "x")[0]
    assert black.nothing
    assert black.confidence > 0.9
    assert black.confidence_of == NO_PIXEL
    assert black.mask.shape == (40, 50)


def test_a_rotated_photo_is_seen_upright(scene, tmp_path: Path):
    image, truth = scene
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    image.rotate(90, expand=True).save(tmp_path / "photo.png", exif=exif)
    found = predictor()(read_image(tmp_path / "photo.png"), "the bright one")
    assert iou(found[0].mask, truth) > 0.9


@pytest.mark.parametrize("upright", [True, False])
def test_a_photo_of_16_bits_is_seen_as_one_of_8(scene, tmp_path: Path, upright: bool):
    image, _ = scene
    exif = Image.Exif()
    exif[0x0112] = 1 if upright else 6
    deep = Image.fromarray((np.asarray(image).astype(np.uint16) // 2) * np.uint16(257))
    (deep if upright else deep.rotate(90, expand=True)).save(tmp_path / "deep.png", exif=exif)
    expected = predictor()(image.point(lambda v: v // 2), "the bright one")[0]
    for given in (read_image(tmp_path / "deep.png"), Image.open(tmp_path / "deep.png")):
        assert np.array_equal(predictor()(given, "the bright one")[0].probability, expected.probability)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(UserError, match=r"depth\.tif has float pixels"):
        read_image(tmp_path / "depth.tif")


@pytest.mark.parametrize(("sentences", "kind"), [(None, "NoneType"), (3, "int"), (["the bright one", 3], "int")])
def test_a_sentence_that_is_no_text(scene, sentences: Any, kind: str):
    with pytest.raises(UserError, match=f"a sentence is of type {kind}; give a text"):
        predictor()(scene[0], sentences)


def test_bad_input(scene, tmp_path: Path):
    with pytest.raises(UserError, match="a sentence is empty"):
        predictor()(scene[0], ["fine", " "])
    with pytest.raises(UserError, match="there is no image"):
        read_image(tmp_path / "none.jpg")
    Image.effect_noise((200, 200), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:4000])
    (tmp_path / "text.jpg").write_text("not an image")
    for name in ("half.jpg", "text.jpg"):
        with pytest.raises(UserError, match=f"{name} cannot be read as an image"):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match="a/model has no tokenizer files"):
        Predictor(Pretrained(SeesBright(), PREPROCESS, named_protocol("caris"), None, "x", {}, "a/model"))


def test_the_model_sees_what_the_loader_would_give(scene):
    seen: list[Batch] = []

    class Spy(SeesBright):
        def forward(self, batch: Batch) -> ModelOutput:
            seen.append(batch)
            return super().forward(batch)

    predict = Predictor(Pretrained(Spy(), PREPROCESS, named_protocol("caris"), Words(), "stand_in", {}))
    predict(scene[0], ["the bright one", "it"])
    batch = seen[0]
    assert batch.image.shape == (2, 3, 48, 48)
    assert batch.image.dtype == torch.float32
    assert batch.input_ids.tolist() == [[3, 6, 3, 0, 0, 0], [2, 0, 0, 0, 0, 0]]
    assert batch.text_mask.sum(1).tolist() == [3, 1]
    assert batch.geometry[0, :2].tolist() == [60, 90]


def test_the_threshold_may_be_chosen_and_is_told() -> None:
    own = predictor()
    model = Pretrained(SeesBright(False), PREPROCESS, named_protocol("caris"), Words(), "stand_in", {})  # type: ignore[arg-type]
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    areas = []
    for threshold in (0.0, 0.5, 1.0):
        (found,) = Predictor(model, threshold=threshold)(image, "a cup")
        assert found.threshold == threshold
        areas.append(int(found.mask.sum()))
    assert areas[0] >= areas[1] == int(own(image, "a cup")[0].mask.sum()) >= areas[2] == 0
    with pytest.raises(UserError, match="threshold is 2 and must lie from 0 to 1"):
        Predictor(model, threshold=2)


def test_files_and_folders_are_read_one_after_the_other(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        Image.new("RGB", (20, 10), "white").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = list(predictor().each(tmp_path, ["a cup", "a ball"]))
    assert [Path(path).name for path, _ in found] == ["a.png", "b.png"]
    assert all(len(masks) == 2 and masks[0].mask.shape == (10, 20) for _, masks in found)
    assert len(list(predictor().each([tmp_path / "a.png"], "a cup"))) == 1
    with pytest.raises(UserError, match="there is no image"):
        next(predictor().each(tmp_path / "nothing", "a cup"))


def test_several_images_are_pointed_to_each(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    for several in (tmp_path, str(tmp_path / "*.png"), [tmp_path / "a.png"]):
        with pytest.raises(UserError, match=r"Predictor\.each") as caught:
            predictor()(several, "the dog")  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"a predictor of a list; give one checkpoint, .* to Predictor\.each"):
        Predictor(["runs/a/best"])  # type: ignore[arg-type]


def test_a_path_is_loaded_on_the_device_of_every_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a folder here nor a Hub repository"):
        Predictor(tmp_path / "nothing")
    model = Pretrained(SeesBright(False), PREPROCESS, named_protocol("caris"), Words(), "stand_in", {})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="there is no device cuda:77"):
        Predictor(model, "cuda:77")
