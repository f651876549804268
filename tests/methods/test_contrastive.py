"""Contrast of sentences and images: similarity and loss against loops, what it teaches, what is rejected."""

import math

import pytest
import torch

from amltrain.errors import UserError
from amltrain.losses import create_loss
from amltrain.methods.base import build_method
from amltrain.methods.contrastive import ContrastiveOptions, contrast, late_interaction
from amltrain.models import create_model, model_info
from amltrain.records import AlignmentFeatures
from tests.methods.aml.test_method import make_batch


def features(batch: int = 3) -> AlignmentFeatures:
    torch.manual_seed(0)
    text_mask = torch.tensor([[True] * 4, [True, True, True, False], [True, False, False, False]])[:batch]
    return AlignmentFeatures(torch.randn(batch, 5, 2, 3), torch.randn(batch, 4, 5), text_mask)


def test_similarity_is_the_words_mean_of_their_best_patch() -> None:
    given = features()
    found = late_interaction(given)
    for sentence in range(3):
        for image in range(3):
            patches = given.visual[image].flatten(1).T
            words = given.text[sentence][given.text_mask[sentence]]
            best = [max(torch.cosine_similarity(word, patch, dim=0).item() for patch in patches) for word in words]
            assert found[sentence, image].item() == pytest.approx(sum(best) / len(best), abs=1e-6)


def test_the_loss_asks_for_the_own_pair_and_leaves_sentences_about_nothing_out() -> None:
    similarity = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.2, 0.3, -1.0]])
    counted = torch.tensor([True, True, False])
    rows = [-math.log(math.exp(10) / sum(math.exp(10 * x) for x in similarity[i].tolist())) for i in (0, 1)]
    columns = [-math.log(math.exp(10) / sum(math.exp(10 * x) for x in similarity[:, i].tolist())) for i in (0, 1)]
    assert contrast(similarity, 0.1, counted).item() == pytest.approx(sum(rows + columns) / 4, rel=1e-5)
    assert contrast(similarity, 0.1, torch.zeros(3, dtype=torch.bool)) == 0


def test_sentences_find_their_images_after_a_few_steps() -> None:
    torch.manual_seed(0)
    info = model_info("dual_tiny")
    method = build_method(
        "contrastive",
        create_model("dual_tiny"),
        create_loss(info.loss, **info.loss_kwargs),
        ContrastiveOptions(weight=2),
    )
    batch = make_batch(batch=4, size=(96, 96), tokens=12)
    optimizer = torch.optim.AdamW(method.param_groups(5e-4, 0.0), lr=5e-4)
    before = method.eval()(batch)
    for _ in range(6):
        method.train()(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    after = method.eval()(batch)
    assert after["contrastive_loss"] < 0.9 * before["contrastive_loss"]


def test_encoders_of_two_widths_are_rejected() -> None:
    with pytest.raises(UserError, match=r"CARIS's are 256 and 128 wide"):
        build_method("contrastive", create_model("caris_tiny"), create_loss("weighted_cross_entropy"))
    with pytest.raises(UserError, match=r"contrastive.temperature"):
        ContrastiveOptions(temperature=0).check()
