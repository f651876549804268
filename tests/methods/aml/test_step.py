"""What an AML step may and may not do around a model: state, randomness, precision, engines, variants."""

from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from amltrain.losses import create_loss
from amltrain.methods.aml.options import AMLOptions
from amltrain.methods.base import Method, build_method
from tests.methods.aml.test_method import make_batch, make_task
from tests.methods.aml.toy import Toy

VARIANTS = [
    {},
    {"preset": "released"},
    {"features": "late"},
    {"features": "pred", "tau": 0.6},
    {"projection": "learnable"},
    {"projection": "identity"},
    {"projection": "linear"},
    {"selection": "patch"},
    {"selection": "released"},
    {"level": "random"},
    {"level": "random", "random_shares": [0.2, 0.4]},
    {"projection": "grounded", "tau": 0.6},
    {"projection": "cosine", "tau": 0.6},
    {"projection": "grounded", "features": "late", "preset": "released", "tau": 0.6},
    {"features": "pred", "score_decay": 0.9, "tau": 0.6},
    {"level": "feature"},
    {"level": "loss"},
    {"level": "loss", "loss_weights": "random"},
    {"share": 0.3},
    {"share": 0.3, "level": "random"},
    {"dynamic_tau": 0.5},
    {"features": "oracle", "oracle": "distractors_first", "share": 0.3},
    {"features": "oracle", "level": "loss"},
    {"clean_loss_weight": 0.3},
    {"preset": "released", "features": "late", "normalize": True, "temperature": "auto"},
]


def toy_task(dropout: float = 0.0, frozen: bool = False, method: str = "aml", **aml) -> Method:
    torch.manual_seed(0)
    model = Toy(dropout=dropout, frozen=frozen)
    model.supports_suppression = True
    options = AMLOptions(**aml) if method == "aml" else None
    return build_method(method, model, create_loss("weighted_cross_entropy"), options)


def toy_batch(seed: int = 0, batch: int = 4):
    return make_batch(batch, (128, 96), seed=seed)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_variant_trains_everything_and_repeats(options: dict) -> None:
    task, batch = toy_task(**options), toy_batch()
    task.calibrate([batch])
    result = task(batch)
    result["loss"].backward()
    assert 0 < result["masked_share"] <= 1
    assert 0 < result["mean_score"] <= 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters() if p.requires_grad)
    again = toy_task(**options)
    again.calibrate([batch])
    assert torch.equal(again(batch)["loss"], result["loss"])
    assert not any(v.requires_grad for name, v in result.items() if name != "loss")


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_one_forward_and_backward_under_ddp(options: dict, tmp_path: Path) -> None:
    """No parameter may be left out and none marked ready twice, or DDP would raise at the second step."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        task = toy_task(**options)
        task.calibrate([toy_batch()])
        wrapped = DistributedDataParallel(task)
        for seed in range(2):
            task.zero_grad()
            wrapped(toy_batch(seed))["loss"].backward()
            trained = [p for p in task.parameters() if p.requires_grad]
            assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    finally:
        torch.distributed.destroy_process_group()


def test_stage_one_leaves_no_trace() -> None:
    """No batch-norm update, no random number, no gradient, the training mode of every module as it was."""
    task, batch = toy_task(dropout=0.5), toy_batch()
    task.model.norm.eval()  # a module that someone froze stays frozen
    before = {name: value.clone() for name, value in task.state_dict().items()}
    state = torch.get_rng_state()
    scores = task.score(batch)
    assert torch.equal(state, torch.get_rng_state())
    assert not scores.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert task.model.training
    assert task.model.dropout.training
    assert not task.model.norm.training


def test_dropout_of_stage_two_is_the_baselines() -> None:
    batch = toy_batch()
    task, plain = toy_task(dropout=0.5, tau=0.0, temperature=0.02), toy_task(dropout=0.5, method="supervised")
    torch.manual_seed(5)
    ours = task(batch)["loss"]
    torch.manual_seed(5)
    assert torch.equal(ours, plain(batch)["loss"])


def test_batch_norm_sees_the_masked_image_once() -> None:
    task, batch = toy_task(), toy_batch()
    task.calibrate([batch])
    task(batch)
    assert task.model.norm.num_batches_tracked == 1


def test_encodings_per_step() -> None:
    for options, times in (({}, 2), ({"preset": "released"}, 2), ({"level": "feature"}, 1), ({"features": "late"}, 2)):
        task, batch = toy_task(**options), toy_batch()
        task.calibrate([batch])
        task.model.encoded.clear()
        task(batch)
        assert len(task.model.encoded) == times, options


def test_gradients_survive_autocast() -> None:
    """A weight cast to half precision in stage 1, without gradient, must not be reused in stage 2."""
    task, batch = toy_task(), toy_batch()
    task.calibrate([batch])
    with torch.autocast("cpu", torch.bfloat16):
        result = task(batch)
    result["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in task.model.parameters())
    assert task.score(batch).dtype == torch.float32


def test_compiles_into_one_graph() -> None:
    for options in ({}, {"preset": "released"}):
        task, batch = toy_task(**options), toy_batch()
        task.calibrate([batch])
        expected = task(batch)["loss"]
        expected.backward()
        gradients = {name: p.grad.clone() for name, p in task.named_parameters()}
        task.zero_grad()
        torch._dynamo.reset()
        compiled = torch.compile(task, backend="aot_eager", fullgraph=True)
        result = compiled(batch)
        result["loss"].backward()
        torch.testing.assert_close(result["loss"], expected)
        for name, p in task.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name], msg=name)
        assert task.model.training


def test_learnable_projection_learns_even_where_nothing_is_masked() -> None:
    task, batch = toy_task(projection="learnable", tau=0.0, temperature=0.02), toy_batch()
    task(batch)["loss"].backward()
    assert task.scorer.projection.visual.grad.abs().sum() > 0


def test_learnable_mask_is_hard_in_the_forward_pass() -> None:
    task, batch = toy_task(projection="learnable"), toy_batch()
    task.calibrate([batch])
    scores = task.score(batch)
    blocks = task.blocks(scores, batch)
    image = task.masked_image(batch.image, blocks, scores)
    torch.testing.assert_close(image, task.masked_image(batch.image, blocks, scores.detach()))
    # a higher score keeps more of its block: the gradient of the block's sum is the sum of the original
    (gradient,) = torch.autograd.grad(image[0, :, :32, :32].sum(), scores)
    assert torch.sign(gradient[0, 0, 0]) == torch.sign(batch.image[0, :, :32, :32].sum())


def test_random_level_masks_as_much_elsewhere() -> None:
    batch = toy_batch()
    options = {"temperature": 0.005}
    aligned, random = toy_task(**options), toy_task(level="random", **options)
    scores = aligned.score(batch)
    ours, theirs = aligned.blocks(scores, batch), random.blocks(scores, batch)
    assert torch.equal(ours.sum((1, 2)), theirs.sum((1, 2)))
    assert not torch.equal(ours, theirs)


def test_feature_level_hides_positions_and_leaves_the_image() -> None:
    task, batch = toy_task(level="feature"), toy_batch()
    task.calibrate([batch])
    seen = []
    decode = task.model.decode
    task.model.decode = lambda features, b: seen.append((features, b)) or decode(features, b)
    task(batch)
    ((features, seen_batch),) = seen
    assert torch.equal(seen_batch.image, batch.image)
    assert features.suppressed.shape == features.visual[-1].shape[:1] + features.visual[-1].shape[2:]
    assert features.suppressed.any()
    assert not features.suppressed.all()


def test_predicted_mask_as_score() -> None:
    task, batch = toy_task(features="pred"), toy_batch()
    task.model.eval()
    assert not task.needs_calibration
    assert task.calibrate([batch]) is None
    torch.testing.assert_close(task.score(batch), task.model(batch).logits.softmax(1)[:, 1])


def test_smaller_stage_one_scores_fewer_patches() -> None:
    batch = make_batch()
    full, small = (make_task(temperature=0.02, stage1_size=size) for size in (None, 64))
    assert full.score(batch).shape == (2, 3, 3)
    assert small.score(batch).shape == (2, 2, 2)
    small(batch)["loss"].backward()
    assert small.blocks(small.score(batch), batch).shape == (2, 3, 3)


def test_cached_scores_are_computed_once_per_sentence() -> None:
    batch, other = toy_batch(), toy_batch(seed=1)
    task = toy_task(frozen=True, cache_scores=True, temperature=0.05)
    plain = toy_task(frozen=True, temperature=0.05)
    first = task(batch)
    assert first["mean_score"].item() == pytest.approx(plain(batch)["mean_score"].item(), abs=1e-3)
    again = task(batch)
    assert torch.equal(again["mean_score"], first["mean_score"])
    # stage 1, stage 2 of the first step; the second has stage 2 only; a new sentence of one sample costs one encoding
    assert task.model.encoded == [4, 4, 4]
    mixed = batch._replace(input_ids=torch.cat([other.input_ids[:1], batch.input_ids[1:]]))
    task(mixed)
    assert task.model.encoded == [4, 4, 4, 1, 4]


def test_plain_text_of_caris() -> None:
    batch = make_batch()
    prompted, plain = (make_task(temperature=0.02, text=text) for text in ("prompted", "plain"))
    assert not torch.equal(prompted.score(batch), plain.score(batch))
    blue = batch._replace(image=batch.image + 1.0)
    text = [plain.model.alignment_features(b, text="plain").text for b in (batch, blue)]
    assert torch.equal(*text)


def test_a_temperature_solved_again_follows_moved_weights() -> None:
    task, batch = toy_task(), toy_batch()
    task.calibrate([batch])
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert task.calibrate([batch]) is None
    stale = task.score(batch).mean().item()
    assert task.calibrate([batch], again=True).mean_score == pytest.approx(0.75, abs=0.01)
    assert task.score(batch).mean().item() == pytest.approx(0.75, abs=0.01)
    assert stale != pytest.approx(0.75, abs=0.01)
