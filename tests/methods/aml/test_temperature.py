"""The literal formula blanks images; the calibrated temperature gives the paper's mean score, alike on every rank."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from amltrain.errors import UserError
from amltrain.methods.aml.similarity import (
    gaussian_projections,
    mean_score,
    patch_logits,
    patch_max,
    solve_temperature,
    warn_if_literal,
)


def random_logits(tokens: int, entry_std: float, batch: int = 8, patches: int = 196, seed: int = 0) -> torch.Tensor:
    """Logits of random unit features under the paper's projections, D = 2048, entries N(0, entry_std^2)."""
    generator = torch.Generator().manual_seed(seed)
    visual = F.normalize(torch.randn(batch, patches, 1024, generator=generator), dim=-1)
    text = F.normalize(torch.randn(batch, tokens, 768, generator=generator), dim=-1)
    projections = gaussian_projections(1024, 768, 2048, seed)
    return patch_logits(visual, text, projections[0].T @ projections[1]) * (entry_std**2 * 2048)


@pytest.mark.parametrize(
    ("tokens", "entry_std", "mean", "weak_percent"),
    [(6, 2048**-0.5, 0.17, 100.0), (20, 2048**-0.5, 0.05, 100.0), (6, 1.0, 0.98, 0.0), (20, 1.0, 0.97, 0.1)],
)
def test_the_literal_formula(tokens: int, entry_std: float, mean: float, weak_percent: float) -> None:
    """Temperature 1, random unit features: N(0, 1/D) entries leave nothing over 0.4, N(0, 1) entries nothing under."""
    scores = patch_max(random_logits(tokens, entry_std), 1.0)
    assert scores.mean().item() == pytest.approx(mean, abs=0.006)
    assert (scores < 0.4).float().mean().item() * 100 == pytest.approx(weak_percent, abs=0.15)


@pytest.mark.parametrize("tokens", [4, 6, 20])
def test_solved_temperature_gives_the_papers_mean(tokens: int) -> None:
    logits = random_logits(tokens, 2048**-0.5)
    solved = solve_temperature([(logits, None)])
    scores = patch_max(logits, solved.temperature)
    assert scores.mean().item() == pytest.approx(0.75, abs=1e-3)
    assert solved.patches == 8 * 196
    # logits of standard deviation 2.5 to 6, as the published statistics want
    assert 2 < logits.std().item() / solved.temperature < 6.5


def test_mean_score_falls_as_the_temperature_rises() -> None:
    scored = [(random_logits(8, 2048**-0.5, batch=2), None)]
    means = [mean_score(scored, 10.0**exponent) for exponent in range(-5, 2)]
    assert means == sorted(means, reverse=True)
    assert means[0] > 0.98
    assert means[-1] == pytest.approx(1 / 8, abs=1e-3)


def test_ranks_agree_on_one_temperature() -> None:
    """Two ranks with different data: each sees the mean over both, through a reduction that averages or sums."""
    ranks = [[(random_logits(6, 2048**-0.5, batch=2, seed=s), None)] for s in (0, 1)]
    together = solve_temperature(ranks[0] + ranks[1])

    def totals(scored: list, temperature: float) -> torch.Tensor:
        scores = [patch_max(logits.double(), temperature) for logits, _ in scored]
        return torch.stack([sum(s.sum() for s in scores), torch.tensor(float(sum(s.numel() for s in scores)))])

    for combine in (sum, lambda both: sum(both) / 2):
        # rank 0 reduces with what rank 1 would send: its own totals scaled to the same temperature
        temperatures = iter(_asked(ranks[0], ranks[1], combine, totals))
        solved = next(temperatures)
        assert solved.temperature == pytest.approx(together.temperature, rel=1e-5)
        assert solved.mean_score == pytest.approx(0.75, abs=1e-3)


def _asked(own, other, combine, totals):
    """Solve on `own` while a second rank, asked at the same temperatures, contributes `other`."""
    import amltrain.methods.aml.similarity as module

    asked: list[float] = []
    original = module.mean_score

    def spy(scored, temperature, reduce=None):
        asked.append(temperature)
        return original(scored, temperature, reduce)

    module.mean_score = spy
    try:
        yield solve_temperature(own, reduce=lambda mine: combine([mine, totals(other, asked[-1]).float()]))
    finally:
        module.mean_score = original


def test_features_without_contrast_are_an_error() -> None:
    with pytest.raises(UserError, match="no temperature"):
        solve_temperature([(torch.zeros(1, 4, 5), None)])
    with pytest.raises(UserError, match=r"aml\.temperature"):
        solve_temperature([(torch.randn(1, 4, 1), None)])


def test_the_literal_value_warns() -> None:
    with pytest.warns(UserWarning, match="blanked"):
        warn_if_literal(1.0, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_literal(1.0, False)  # the released preset's scores are not normalised
        warn_if_literal(0.005, True)
