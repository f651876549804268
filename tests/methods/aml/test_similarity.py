"""PMME: hand-computed values, properties, and the two ways to compute the random projection."""

import math

import pytest
import torch
import torch.nn.functional as F

from amltrain.errors import UserError
from amltrain.methods.aml.similarity import (
    CosineSimilarity,
    IdentityProjection,
    PatchScorer,
    RandomProjection,
    create_projection,
    gaussian_projections,
    patch_logits,
    patch_max,
)
from amltrain.records import AlignmentFeatures


def random_features(batch: int = 2, side: int = 4, tokens: int = 6, visual: int = 24, text: int = 16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    text_mask = torch.arange(tokens).expand(batch, -1) < torch.tensor([[tokens], [tokens - 2]])[:batch]
    return AlignmentFeatures(
        torch.randn(batch, visual, side, side, generator=generator),
        torch.randn(batch, tokens, text, generator=generator),
        text_mask,
    )


def test_hand_computed_patches() -> None:
    # four patches of width 2 and two tokens; similarities 2, 0 | 0, 2 | 1, 1 | -1, 1
    visual = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [1.0, 1.0], [-1.0, 1.0]]])
    text = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    logits = patch_logits(visual, text)
    assert logits.tolist() == [[[2, 0], [0, 2], [1, 1], [-1, 1]]]
    sure = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(patch_max(logits, 1.0), torch.tensor([[sure, sure, 0.5, sure]]))
    sharper = 1 / (1 + math.exp(-4))
    torch.testing.assert_close(patch_max(logits, 0.5), torch.tensor([[sharper, sharper, 0.5, sharper]]))


def test_bilinear_form_by_hand() -> None:
    form = torch.tensor([[0.0, 3.0], [5.0, 0.0]])  # [C_v, C_t]
    visual = torch.tensor([[[1.0, 2.0]]])
    text = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert patch_logits(visual, text, form).tolist() == [[[10.0, 3.0]]]


@pytest.mark.parametrize("seed", range(3))
def test_collapsed_form_equals_explicit_projections(seed: int) -> None:
    features = random_features(seed=seed)
    collapsed = PatchScorer(RandomProjection(24, 16, dim=512, seed=seed), temperature=0.01)
    explicit = PatchScorer(RandomProjection(24, 16, dim=512, seed=seed, explicit=True), temperature=0.01)
    torch.testing.assert_close(collapsed(features), explicit(features), rtol=1e-4, atol=1e-5)


def test_projection_is_a_function_of_its_seed_and_has_variance_one_over_dim() -> None:
    visual, text = gaussian_projections(300, 200, 1024, seed=3)
    again, _ = gaussian_projections(300, 200, 1024, seed=3)
    assert torch.equal(visual, again)
    assert not torch.equal(visual, gaussian_projections(300, 200, 1024, seed=4)[0])
    for matrix in (visual, text):
        assert abs(matrix.var().item() * 1024 - 1) < 0.02


def test_scores_lie_between_one_over_real_tokens_and_one() -> None:
    features = random_features()
    for temperature in (1e-4, 0.02, 1e4):
        scores = PatchScorer(RandomProjection(24, 16), temperature=temperature)(features)
        assert scores.shape == (2, 4, 4)
        real = features.text_mask.sum(dim=1)[:, None, None]
        assert (scores >= 1 / real - 1e-6).all()
        assert (scores <= 1).all()


def test_padded_tokens_never_win_and_never_count() -> None:
    features = random_features()
    scorer = PatchScorer(RandomProjection(24, 16), temperature=0.02)
    loud = features.text.clone()
    loud[1, 4:] = 1e3 * torch.randn(2, 16)
    assert torch.equal(scorer(features), scorer(features._replace(text=loud)))
    shorter = AlignmentFeatures(features.visual[1:], features.text[1:, :4], features.text_mask[1:, :4])
    torch.testing.assert_close(scorer(features)[1:], scorer(shorter))
    counted = PatchScorer(RandomProjection(24, 16), temperature=0.02, score_padding=True)
    assert not torch.equal(counted(features), counted(features._replace(text=loud)))


def test_autocast_does_not_reach_the_scores() -> None:
    features = random_features()
    scorer = PatchScorer(RandomProjection(24, 16), temperature=0.005)
    expected = scorer(features)
    with torch.autocast("cpu", torch.bfloat16):
        scores = scorer(features)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected)


def test_normalisation_makes_the_features_length_irrelevant() -> None:
    features = random_features()
    longer = features._replace(visual=features.visual * 30, text=features.text * 0.1)
    scorer = PatchScorer(RandomProjection(24, 16), temperature=0.02)
    torch.testing.assert_close(scorer(features), scorer(longer))


def test_identity_compares_features_as_they_are() -> None:
    features = random_features(visual=16)
    scores = PatchScorer(create_projection("identity", 16, 16), temperature=0.1)(features)
    cosine = F.cosine_similarity(
        features.visual.flatten(2).transpose(1, 2)[:, :, None], features.text[:, None], dim=-1
    ).masked_fill(~features.text_mask[:, None], -torch.inf)
    torch.testing.assert_close(scores.flatten(1), (cosine / 0.1).softmax(-1).amax(-1))


def test_identity_rejects_different_widths() -> None:
    with pytest.raises(UserError, match=r"24 \(visual\) and 16 \(text\)"):
        create_projection("identity", 24, 16)


def test_cosine_finds_the_patch_that_is_most_like_a_word_where_pmme_does_not() -> None:
    """Two words at right angles: a patch that is both, one that is the first alone, one that is neither."""
    words = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, -1]]])
    patches = torch.tensor([[1.0, 1, 0], [2, 0, 0], [0.1, 0, 1]]).T[None, :, :, None]
    features = AlignmentFeatures(patches, words, torch.tensor([[True, True, False]]))
    scores = CosineSimilarity()(features).flatten()
    assert scores.tolist() == pytest.approx([(1 + 0.5**0.5) / 2, 1.0, (1 + 0.1 / 1.01**0.5) / 2])
    pmme = PatchScorer(IdentityProjection(), temperature=0.1)(features).flatten()
    assert pmme[0] < pmme[2]  # both words at once: no favourite


def test_cosine_stays_between_zero_and_one_and_counts_no_padding() -> None:
    torch.manual_seed(0)
    visual, text, mask = torch.randn(3, 8, 4, 5), torch.randn(3, 6, 8), torch.arange(6) < torch.tensor([[2], [4], [6]])
    scores = CosineSimilarity()(AlignmentFeatures(visual, text, mask))
    cut = CosineSimilarity()(AlignmentFeatures(visual[:1], text[:1, :2], mask[:1, :2]))
    assert scores.shape == (3, 4, 5) and scores.min() >= 0 and scores.max() <= 1
    torch.testing.assert_close(scores[:1], cut)


@pytest.mark.parametrize("kind", ["random", "learnable", "linear"])
def test_projections_have_buffers_or_parameters(kind: str) -> None:
    projection = create_projection(kind, 24, 16, dim=64)
    assert bool(list(projection.parameters())) == (kind == "learnable")
    assert bool(projection.state_dict())
