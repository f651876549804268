"""SAM 3 by its instances: equal to transformers' on the same weights; its loss, its union, its data."""

import math

import pytest
import torch
import torch.nn.functional as F

from amltrain.errors import UserError
from amltrain.instance_loss import Instances, Wanted, instances_of
from amltrain.losses import create_loss
from amltrain.matching import box_loss, corners_of
from amltrain.models import create_model
from amltrain.models.sam3_instances import SAM3Instances
from amltrain.records import Batch, ModelOutput
from tests.models.test_registry import make_batch


@pytest.fixture
def model() -> SAM3Instances:
    torch.manual_seed(0)
    model = create_model("sam3_instances_tiny", vocab_size=64)
    for parameter in model.parameters():  # tables that start at zero hide differences
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def batch() -> Batch:
    return make_batch("sam3_instances_tiny", 96, 96)


@torch.no_grad()
def test_every_output_equals_transformers(model: SAM3Instances, batch: Batch) -> None:
    expected = model.sam3(pixel_values=batch.image, input_ids=batch.input_ids, attention_mask=batch.text_mask.long())
    aux = model(batch).aux
    for found, wanted in (
        (aux["masks"], expected.pred_masks),
        (aux["scores"][:, -1], expected.pred_logits),
        (corners_of(aux["boxes"][:, -1]), expected.pred_boxes),
        (aux["presence"], expected.presence_logits),
        (aux["semantic"], expected.semantic_seg),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_the_mask_is_the_union_of_queries_that_are_meant(model: SAM3Instances, batch: Batch) -> None:
    output = model(batch)
    aux = output.aux
    score = aux["scores"][:, -1].sigmoid() * aux["presence"].sigmoid()  # [B, Q], as SAM 3 multiplies them
    for threshold in (0.02, 0.3, 0.7):
        model.score_threshold = threshold
        logits, no_target, best = model.union(aux["masks"], aux["scores"][:, -1], aux["presence"])
        meant = (score > threshold)[..., None, None] & (aux["masks"] > 0)
        torch.testing.assert_close(logits[:, 0] > 0, meant.any(dim=1), rtol=0, atol=0)
        assert ((no_target.argmax(1) == 1) == (score <= threshold).all(dim=1)).all()
        assert (best == score.argmax(dim=1)).all()
    each = torch.arange(2)
    torch.testing.assert_close(aux["box"], aux["boxes"][each, -1, best])


def test_thresholds_that_cannot_be() -> None:
    for threshold in (0.0, 1.0, -0.5, 1.5):
        with pytest.raises(UserError, match="score_threshold"):
            create_model("sam3_instances_tiny", score_threshold=threshold)


def outputs(scores: torch.Tensor, boxes: torch.Tensor, masks: torch.Tensor, presence: float = 4.0) -> ModelOutput:
    count = len(scores)
    aux = {"scores": scores, "boxes": boxes, "masks": masks, "presence": torch.full((count, 1), presence)}
    return ModelOutput(masks[:, :1], {**aux, "semantic": masks[:, :1]})


def two_squares(instances: bool) -> Batch:
    """Two objects in the first sample, nothing in the second."""
    batch = make_batch("sam3_instances_tiny", 32, 32)
    parts = torch.zeros(2, 2, 32, 32, dtype=torch.uint8)
    parts[0, 0, 4:12, 4:12], parts[0, 1, 16:28, 18:26] = 255, 255
    empty = torch.tensor([False, True])
    return batch._replace(target=parts.amax(1), no_target=empty, instances=parts if instances else None)


def test_each_object_has_a_query() -> None:
    """By hand: three queries, two of them on the objects; the matching finds them whatever their order."""
    batch = two_squares(instances=True)
    wanted = instances_of(batch, torch.float32)
    assert wanted.there.tolist() == [[True, True], [False, False]]
    shares = wanted.boxes[0]
    boxes = torch.stack([shares[1], torch.tensor([0.5, 0.5, 1.0, 1.0]), shares[0]])[None, None].repeat(2, 1, 1, 1)
    scores = torch.full((2, 1, 3), -2.0)
    loss = Instances()
    pairs = loss.match(scores[:, 0], boxes[:, 0], wanted)
    assert sorted(zip(pairs.query.tolist(), pairs.instance.tolist(), strict=True)) == [(0, 1), (2, 0)]
    assert pairs.sample.tolist() == [0, 0]
    assert loss.box_loss(boxes[:, 0], pairs, wanted) < 1e-6

    probability = torch.sigmoid(torch.tensor(-2.0))
    matched = 10 * 0.25 * (1 - probability) ** 2 * -probability.log()
    other = 0.75 * probability**2 * -(1 - probability).log()
    torch.testing.assert_close(loss.score_loss(scores[:, 0], pairs, wanted), (2 * matched + other) / 2)

    masks = torch.full((2, 3, 32, 32), -20.0)
    masks[0, 0], masks[0, 2] = (40 * (batch.instances[0, i] > 0).float() - 20 for i in (1, 0))
    assert loss.mask_loss(masks, pairs, wanted, batch) < 1e-3
    assert loss.mask_loss(masks.flip(1), pairs, wanted, batch) > 1


def test_one_object_needs_no_assignment() -> None:
    """The cheapest query of every sample is the Hungarian assignment of one instance."""
    torch.manual_seed(0)
    batch = two_squares(instances=False)._replace(no_target=torch.zeros(2, dtype=torch.bool))
    batch = batch._replace(target=batch.target.flip(0) | batch.target)
    wanted = instances_of(batch, torch.float32)
    scores, boxes = torch.randn(2, 7), torch.rand(2, 7, 4)
    pairs = Instances().match(scores, boxes, wanted)
    padded = Wanted(*(torch.cat([part, torch.zeros_like(part)], dim=1) for part in wanted))
    again = Instances().match(scores, boxes, padded)
    assert pairs.query.tolist() == again.query.tolist()
    assert pairs.weight.tolist() == [1, 1]


def test_the_annotated_box_of_one_object_is_taught() -> None:
    batch = two_squares(instances=False)
    box = torch.tensor([[2.0, 2, 30, 30], [0, 0, 0, 0]])
    wanted = instances_of(batch._replace(box=box), torch.float32)
    torch.testing.assert_close(wanted.boxes[0, 0], torch.tensor([0.5, 0.5, 0.875, 0.875]))
    assert not torch.allclose(instances_of(batch, torch.float32).boxes[0, 0], wanted.boxes[0, 0])
    assert box_loss(wanted.boxes[0], wanted.boxes[0]) == 0


def test_a_sentence_that_means_nothing_teaches_presence_alone() -> None:
    batch = two_squares(instances=True)
    nothing = batch.mapped(lambda tensor: tensor[1:])
    output = outputs(torch.randn(1, 2, 3), torch.rand(1, 2, 3, 4), torch.full((1, 3, 32, 32), -20.0), presence=3.0)
    terms = create_loss("instances")(output, nothing)
    assert terms["score"] == 0 and terms["box"] == 0 and terms["mask"] == 0
    assert terms["loss"] == pytest.approx(F.softplus(torch.tensor(3.0)).item(), abs=1e-3)
    assert math.isfinite(terms["loss"])


def test_another_model_is_named() -> None:
    with pytest.raises(UserError, match=r"needs a model that finds instances \(sam3_instances\)"):
        create_loss("instances")(ModelOutput(torch.zeros(2, 1, 8, 8)), two_squares(instances=True))


def test_every_module_that_trains_gets_a_gradient(model: SAM3Instances) -> None:
    """With several instances in a batch, with one, and with none: what one rank trains, every rank trains."""
    model.train()
    whole = make_batch("sam3_instances_tiny", 96, 96)
    several = torch.zeros(2, 2, 96, 96, dtype=torch.uint8)
    several[0, 0, :40, :40], several[0, 1, 50:, 50:] = 255, 255
    none = whole._replace(target=torch.zeros_like(whole.target), no_target=torch.ones(2, dtype=torch.bool))
    for batch in (whole, whole._replace(target=several.amax(1), instances=several), none):
        model.zero_grad()
        create_loss("instances")(model(batch), batch)["loss"].backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
