"""Mask grounding: which words are hidden, what its losses ask for, words that the mask alone tells, what is
rejected.
"""

import pytest
import torch

from amltrain.errors import UserError
from amltrain.losses import create_loss
from amltrain.methods.base import build_method
from amltrain.methods.mask_grounding import (
    MaskGroundingOptions,
    PixelAlignment,
    WordPredictor,
    hide_words,
)
from amltrain.models import create_model, model_info
from amltrain.randomness import random_key
from amltrain.records import Vocabulary
from tests.methods.aml.test_method import make_batch

BERT = Vocabulary(size=500, padding=0, mask=103, special=(0, 100, 101, 102, 103))
CLIP = Vocabulary(size=500, padding=0, mask=None, special=(0, 498, 499))


def test_words_are_hidden_at_their_rate_and_special_tokens_never() -> None:
    batch = make_batch(batch=200, tokens=20)
    batch.input_ids[:, 0] = 101
    ids, hidden = hide_words(batch, BERT, 0.15)
    assert 0.12 < hidden[:, 1:].float().mean() < 0.18
    assert not hidden[:, 0].any()
    assert torch.equal(ids == 103, hidden | (batch.input_ids == 103))
    assert torch.equal(ids[~hidden], batch.input_ids[~hidden])
    other = batch._replace(random_key=torch.tensor([random_key(0, 1, i) for i in range(200)]))
    assert not torch.equal(hide_words(other, BERT, 0.15)[1], hidden)  # another epoch hides others


def test_without_a_mask_token_a_random_one_stands_in() -> None:
    batch = make_batch(batch=50, tokens=20)
    ids, hidden = hide_words(batch, CLIP, 0.5)
    assert torch.equal(ids[~hidden], batch.input_ids[~hidden])
    assert ((ids != batch.input_ids) & hidden).sum() > 0.9 * hidden.sum()
    assert ids.max() < 500


def test_a_hidden_word_is_found_from_the_mask_alone() -> None:
    """The image is the same everywhere and all words are hidden: only the mask's place tells "left" from "right"."""
    torch.manual_seed(0)
    predictor = WordPredictor(4, 6, vocabulary=3, width=16, layers=1)
    visual, text, real = torch.ones(2, 4, 4, 4), torch.ones(2, 1, 6), torch.ones(2, 1, dtype=torch.bool)
    inside = torch.zeros(2, 4, 4)
    inside[0, :, :2], inside[1, :, 2:] = 1, 1
    optimizer = torch.optim.Adam(predictor.parameters(), 3e-3)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(predictor(visual, text, real, inside)[:, 0], torch.tensor([1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    swapped = predictor(visual, text, real, inside.flip(2))[:, 0].argmax(1)
    assert swapped.tolist() == [2, 1]


def test_padding_is_not_read() -> None:
    torch.manual_seed(0)
    predictor, real = WordPredictor(4, 6, vocabulary=9, width=16, layers=2), torch.tensor([[True, True, False]])
    visual, text, inside = torch.randn(1, 4, 3, 3), torch.randn(1, 3, 6), torch.rand(1, 3, 3)
    other = text.clone()
    other[:, 2] = 7
    alignment = PixelAlignment(4, 6, 8, 0.1)
    assert torch.equal(predictor(visual, text, real, inside)[:, :2], predictor(visual, other, real, inside)[:, :2])
    assert torch.equal(alignment(visual, text, real, inside), alignment(visual, other, real, inside))


def test_alignment_is_low_where_the_referents_pixels_agree_with_each_other_and_the_sentence() -> None:
    alignment = PixelAlignment(2, 2, 2, 0.1)
    for layer in (alignment.visual, alignment.text):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    inside = torch.tensor([[[1.0, 0.0]]])
    real, sentence = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[[1.0, 0.0]]])
    apart = alignment(torch.tensor([[[[1.0, -1.0]], [[0.0, 0.0]]]]), sentence, real, inside)
    alike = alignment(torch.tensor([[[[1.0, 1.0]], [[0.0, 0.0]]]]), sentence, real, inside)
    assert apart < 1e-3 < 1 < alike
    nothing = alignment(torch.tensor([[[[1.0, 1.0]], [[0.0, 0.0]]]]), sentence, real, torch.zeros(1, 1, 2))
    assert nothing.isfinite() and nothing > 1


@pytest.mark.parametrize("name", ["magnet_tiny", "cris_tiny", "rela_tiny"])
def test_any_model_trains_with_it_and_with_weight_0_it_is_the_plain_step(name: str) -> None:
    info = model_info(name)
    words = CLIP if name == "cris_tiny" else BERT
    batch = make_batch(size=(96, 96), tokens=12)

    def step(method: str, options: MaskGroundingOptions | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        task = build_method(method, create_model(name), create_loss(info.loss, **info.loss_kwargs), options, words)
        return task.eval()(batch)

    full = step("mask_grounding", MaskGroundingOptions(rate=0.5, width=16))
    assert full["loss"] > full["segmentation_loss"] and full["grounding_loss"] > 1
    off = step("mask_grounding", MaskGroundingOptions(rate=0, grounding_weight=0, alignment_weight=0, width=16))
    assert torch.equal(off["loss"], step("supervised")["loss"])


def test_what_cannot_work_is_rejected() -> None:
    for wrong in ({"rate": 1.5}, {"width": 20}, {"layers": 0}, {"temperature": 0}, {"grounding_weight": -1}):
        (name,) = wrong
        with pytest.raises(UserError, match=f"mask_grounding.{name}"):
            MaskGroundingOptions(**wrong).check()
    with pytest.raises(UserError, match="vocabulary"):
        build_method("mask_grounding", create_model("caris_tiny"), create_loss("weighted_cross_entropy"))
