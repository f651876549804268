"""The distortion bound holds inside a modality and for concatenated pairs, and says nothing across modalities."""

import pytest
import torch
import torch.nn.functional as F

from amltrain.methods.aml.similarity import gaussian_projections, patch_logits
from amltrain.paper.values import distortion_bound, failure_probability


def distance_ratios(points: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
    return (torch.pdist(projected.double()) / torch.pdist(points.double())) ** 2


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("dim", [1024, 2048, 4096])
def test_distances_inside_a_modality_keep_to_the_bound(dim: int) -> None:
    projection, other = gaussian_projections(1024, 768, dim)
    for points, matrix in ((unit(196, 1024), projection), (unit(20, 768, seed=1), other)):
        epsilon = distortion_bound(len(points), dim)
        ratios = distance_ratios(points, points @ matrix.T)
        assert (ratios - 1).abs().max() < epsilon
        assert (ratios - 1).abs().max() > epsilon / 5  # the bound is not empty


def test_concatenated_pairs_keep_to_the_bound() -> None:
    visual, text = unit(150, 1024), unit(150, 768, seed=1)
    matrices = gaussian_projections(1024, 768, 2048)
    projected = torch.cat([visual @ matrices[0].T, text @ matrices[1].T], dim=-1)
    ratios = distance_ratios(torch.cat([visual, text], dim=-1), projected)
    assert (ratios - 1).abs().max() < distortion_bound(150, 2048)


def test_inner_products_across_modalities_are_lost() -> None:
    """The same vector on both sides: one projection keeps the inner product 1, two independent ones give noise."""
    points = unit(2000, 512)
    visual, text = gaussian_projections(512, 512, 2048)
    shared = ((points @ visual.T) * (points @ visual.T)).sum(-1)
    across = ((points @ visual.T) * (points @ text.T)).sum(-1)
    assert (shared - 1).abs().max() < distortion_bound(2000, 2048)
    assert across.mean().abs() < 0.01
    assert 0.8 < across.std() * 2048**0.5 < 1.2
    similar = patch_logits((points[:300] @ visual.T)[None], (points[:300] @ text.T)[None])
    truth = points[:300] @ points[:300].T
    assert torch.corrcoef(torch.stack([similar.flatten(), truth.flatten()]))[0, 1].abs() < 0.05


def test_the_bound_holds_with_the_probability_that_it_names() -> None:
    for points in (196, 5000):
        epsilon = distortion_bound(points, 2048)
        assert failure_probability(points, 2048, epsilon) == pytest.approx(0.05, rel=1e-6)
    assert distortion_bound(196, 10) == 1.0
