"""The scores and masks that a report shows are those of AML."""

import torch

from amltrain.losses import create_loss
from amltrain.methods.aml.masker import Aligner, build_aligner
from amltrain.methods.aml.method import AML
from amltrain.methods.aml.options import AMLOptions
from amltrain.methods.base import build_method
from amltrain.models import create_model
from amltrain.records import Batch


def batch(count: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        image=torch.randn(count, 3, 96, 96, generator=generator),
        input_ids=torch.randint(5, 40, (count, 8), generator=generator),
        text_mask=torch.arange(8).expand(count, -1) < 5,
        target=torch.zeros(count, 96, 96, dtype=torch.uint8),
        no_target=torch.zeros(count, dtype=torch.bool),
        sample_id=torch.arange(count),
        random_key=torch.arange(count) + 17,
        geometry=torch.tensor([[96.0, 96, 1, 1, 0, 0]] * count, dtype=torch.float64),
    )


def test_scores_have_the_papers_mean_and_masks_follow_tau() -> None:
    torch.manual_seed(0)
    model = create_model("caris_tiny", vocab_size=50).eval()
    aligner = Aligner(model)
    maps = aligner(batch())
    assert maps.scores.shape[0] == 3
    assert abs(maps.scores.mean().item() - 0.75) < 0.01
    assert maps.blocks.shape == (3, 3, 3)
    assert not Aligner(model, AMLOptions(tau=0.0))(batch()).blocks.any()
    assert Aligner(model, AMLOptions(tau=1.0, rho=1.0))(batch()).blocks.all()
    waiting = Aligner(model, AMLOptions(tau=1.0, rho=1.0, start_after=100, projection="grounded"))
    assert waiting(batch()).blocks.all()  # as at the end of its run


def test_settings_come_from_the_run() -> None:
    model = create_model("caris_tiny", vocab_size=50).eval()
    training = {"recipe": {"aml": {"enabled": True, "preset": "paper", "tau": 0.3, "rho": None}}}
    aligner = build_aligner(model, training)
    assert aligner is not None
    assert (aligner.tau, aligner.settings.rho, aligner.trained) == (0.3, 0.25, True)
    assert build_aligner(model, {"recipe": {"method": "aml", "aml": {"features": "oracle"}}}) is None  # reads truth
    plain = build_aligner(model, None)
    assert plain is not None and not plain.trained
    released = build_aligner(model, {"recipe": {"method": "aml", "aml": {"preset": "released"}}})
    assert released is not None and released.settings.projection == "linear"


def test_maps_are_those_of_the_method_itself() -> None:
    """Also where a run scores its own prediction, or hides blocks at random places."""
    torch.manual_seed(0)
    model = create_model("caris_tiny", vocab_size=50).eval()
    for options in ({"temperature": 0.02}, {"features": "pred"}, {"temperature": 0.02, "level": "random"}):
        method = build_method("aml", model, create_loss("weighted_cross_entropy"), AMLOptions(**options))
        assert isinstance(method, AML)
        scores = method.score(batch())
        maps = Aligner(model, AMLOptions(**options))(batch())
        assert torch.equal(maps.scores, scores)
        assert torch.equal(maps.blocks, method.blocks(scores, batch()))
