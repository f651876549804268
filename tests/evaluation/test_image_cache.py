"""Encode once: the same numbers as without, and the image encoder runs once per image."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from amltrain.config.schema import DataConfig, EvaluationConfig
from amltrain.data.loaders import build_eval_loaders, build_tokenizer
from amltrain.data.transforms import prepare_batch
from amltrain.evaluation.evaluator import evaluate_model
from amltrain.evaluation.perturbations import build_perturbation
from amltrain.models import create_model, list_models, model_info
from amltrain.models.base import RISModel

TINY = [name for name in list_models() if name.endswith("_tiny") and "swin" not in name]
READS_FROM_THE_START = ["barleria_tiny", "beit3_tiny", "c3vg_tiny"]
"""Their image encoders read the words in the first block."""


OPTIONS = {"sam3_instances_tiny": {"score_threshold": 0.01}}
"""Untrained, no instance of it is likely."""


def make(name: str, shapes: Path, **options) -> tuple[RISModel, object, object]:
    info = model_info(name)
    data = DataConfig(datasets=["refshapes"], prepared=str(shapes), workers=0)
    tokenizer = build_tokenizer(data, info.preprocess)
    torch.manual_seed(1)
    model = create_model(name, vocab_size=tokenizer.vocab_size, **OPTIONS.get(name, {}))
    evaluation = EvaluationConfig(splits=["val"], batch_size=5, max_samples=18)
    preprocess = replace(info.preprocess, size=64)
    loader = build_eval_loaders(data, preprocess, evaluation, info.protocol, tokenizer, **options)["val"]
    return model, loader, replace(info.protocol, threshold=0.5)


@pytest.mark.parametrize("name", [n for n in TINY if n not in READS_FROM_THE_START])
def test_the_same_numbers_with_fewer_images_encoded(name: str, shapes: Path):
    model, loader, protocol = make(name, shapes)
    assert model.encodes_image_alone
    encoded, encode_image = [], model.encode_image
    model.encode_image = lambda image: (encoded.append(len(image)), encode_image(image))[1]  # type: ignore
    accelerator = Accelerator(cpu=True)
    once = evaluate_model(accelerator, model, loader, protocol)
    images, encoded[:] = sum(encoded), []
    always = evaluate_model(accelerator, model, loader, protocol, encode_once=False)
    assert images == loader.dataset.counts()["images"] < 4
    assert sum(encoded) in (0, 18) and len(loader.dataset) == 18  # a model may encode both at once
    assert 0 < once.samples[:, 6].mean() < 96 * 96  # some masks are neither empty nor whole
    np.testing.assert_array_equal(once.samples, always.samples)


def test_perturbed_images_differ_from_sentence_to_sentence(shapes: Path):
    _, loader, _ = make("cris_tiny", shapes, perturb=build_perturbation("jitter"))
    assert len(np.unique(loader.dataset.image_groups())) == len(loader.dataset)


@pytest.mark.parametrize("name", [n for n in TINY if n not in READS_FROM_THE_START])
def test_encode_is_made_of_the_two_halves(name: str, shapes: Path):
    model, loader, _ = make(name, shapes)
    batch = prepare_batch(next(iter(loader)), loader.dataset.describe()["normalization"])
    with torch.no_grad():
        whole = model.eval().encode(batch)
        image = model.encode_image(batch.image)
        other = batch._replace(image=torch.zeros_like(batch.image))
        halves = model.encode_with_image(other, image)
    for a, b in zip(whole.visual, halves.visual, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(whole.text, halves.text, rtol=0, atol=0)


@pytest.mark.parametrize("name", READS_FROM_THE_START)
def test_no_claim_where_the_first_block_reads_the_words(name: str):
    assert not create_model(name).encodes_image_alone
