"""C3VG: official keys and groups, recorded training steps, and what is kept of the official code's flaws."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.ops import roi_pool

from amltrain.errors import UserError
from amltrain.losses import create_loss
from amltrain.models import create_model
from amltrain.models.c3vg import box_weights, region_maximum
from amltrain.records import ModelOutput
from tests.models.test_registry import make_batch
from tests.parity import c3vg as recorded_c3vg
from tests.parity import compare


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return create_model("c3vg_tiny", vocab_size=64).eval()


@pytest.fixture
def recorded(shared_dir):
    return load_file(shared_dir / "goldens" / "c3vg" / "tiny.safetensors")


@pytest.fixture
def official(shared_dir, recorded):
    """The model of the recorded case with its weights, and the names of the official parameters."""
    config = compare.read_config(shared_dir / "goldens" / "c3vg" / "tiny.json")
    return compare.load_model(recorded_c3vg.ADAPTER, config, compare.official_weights(recorded))


def test_official_keys_and_groups(shared_dir):
    folder = shared_dir / "goldens" / "c3vg"
    content = json.loads((folder / "full_keys.json").read_text())
    shapes = content["keys"]
    with torch.device("meta"):
        model = create_model("c3vg_beit3_base")
        state = {f"module.{key}": torch.empty(shape) for key, (shape, *_) in shapes.items()}
    conversion = model.convert_state_dict(state)
    assert (conversion.unmatched, conversion.missing) == ([], [])
    dead = json.loads((folder / "full_optim_groups.json").read_text())["never_receives_a_gradient"]
    assert {key.removeprefix("module.") for key in conversion.dropped} == set(dead)
    assert sum(p.numel() for p in model.parameters()) == content["total_params"] - content["n_params_never_trained"]
    ours = {id(p): group for group in model.param_groups(5e-4, 0.0) for p in group["params"]}
    parameters = dict(model.named_parameters())
    for group in json.loads((folder / "full_optim_groups.json").read_text())["groups"]:
        for name in set(group["names"]) - set(dead):
            own = ours[id(parameters[conversion.renamed[f"module.{name}"]])]
            assert own["lr"] == pytest.approx(group["lr"])


def test_recorded_training_steps(shared_dir, official, recorded):
    """Losses and gradient norms of 6 steps: Adam with AMSGrad, a quarter of the rate, gradients clipped to 0.15."""
    expected = json.loads((shared_dir / "goldens" / "c3vg" / "train_steps.json").read_text())
    model, _ = official
    batch, criterion = recorded_c3vg.batch(recorded), recorded_c3vg.criterion()
    groups = model.param_groups(0.25 * 5e-4, 0.0)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-9, amsgrad=True)
    losses, norms = [], []
    for _ in range(6):
        loss = criterion(model.train()(batch), batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.15).item())
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(expected["loss_before_step"], rel=1e-5)
    assert norms == pytest.approx(expected["gradient_norm_before_clip"], rel=1e-4)


@torch.no_grad()
def test_each_modality_alone(official, recorded):
    model, _ = official
    scored = model.eval().alignment_features(recorded_c3vg.batch(recorded))
    image = recorded["extra.image_alone"][:, 1:]
    torch.testing.assert_close(scored.visual.flatten(2).transpose(1, 2), image, rtol=0, atol=2e-5)
    torch.testing.assert_close(scored.text, recorded["extra.text_alone"], rtol=0, atol=2e-5)


def test_region_maximum_equals_roi_pooling():
    torch.manual_seed(0)
    x = torch.randn(40, 5, 6, 7)
    corners = torch.rand(40, 4) * 12 - 3
    boxes = torch.cat([torch.arange(40.0)[:, None], corners], dim=1)
    torch.testing.assert_close(region_maximum(x, corners), roi_pool(x, boxes, 1).flatten(1), rtol=0, atol=0)
    assert (region_maximum(x, corners) == 0).any()


def test_box_weights_by_hand():
    weights = box_weights(torch.tensor([[0.3, -0.2, 0.6, 0.5]]), (4, 5))[0]
    assert [(row == 1).tolist() for row in weights] == [[False, True, True, False, False]] * 2 + [[False] * 5] * 2
    assert (weights[weights < 1] - 0.1).abs().max() < 1e-6


@torch.no_grad()
def test_what_the_sentence_vector_is(tiny):
    words = torch.randn(3, 5, 64)
    mask = torch.arange(5) < torch.tensor([[5], [4], [2]])
    sentence = tiny._sentence(words, mask)
    assert torch.equal(sentence[0], words[0, 4])
    assert torch.equal(sentence[1:], torch.maximum(words[1:, 4], words[1:, 3]))
    meant = create_model("c3vg_tiny", vocab_size=64, as_released=False)
    assert torch.equal(meant._sentence(words, mask)[2], torch.maximum(words[2, 0], words[2, 1]))


@torch.no_grad()
def test_as_meant_reads_padding_nowhere():
    torch.manual_seed(0)
    model = create_model("c3vg_tiny", vocab_size=64, as_released=False).eval()
    batch = make_batch("c3vg_tiny", 96, 96)
    other = batch._replace(input_ids=batch.input_ids.masked_fill(~batch.text_mask, 7))
    torch.testing.assert_close(model(other).logits, model(batch).logits, rtol=0, atol=0)
    shorter = batch.mapped(lambda value: value[1:])
    real = int(shorter.text_mask.sum())
    cut = shorter._replace(input_ids=shorter.input_ids[:, :real], text_mask=shorter.text_mask[:, :real])
    torch.testing.assert_close(model(cut).logits, model(shorter).logits, rtol=1e-4, atol=1e-4)


def test_boxes_come_from_the_target_where_none_are_given(tiny):
    batch = make_batch("c3vg_tiny", 96, 96)
    with torch.no_grad():
        output = tiny(batch)
    loss = create_loss("c3vg")
    boxes = torch.tensor([[32.0, 24.0, 48.0, 48.0]]).repeat(2, 1)
    assert loss(output, batch, boxes)["loss"] == loss(output, batch)["loss"]
    assert loss(output, batch, boxes + 5)["box_fine"] != loss(output, batch)["box_fine"]
    empty = loss(output, batch._replace(target=torch.zeros_like(batch.target)))
    assert empty["box_fine"] == empty["consistency_fine"] == 0
    assert empty["mask_fine"] > 0


def test_loss_rejects_a_model_without_its_heads():
    batch = make_batch("c3vg_tiny", 96, 96)
    with pytest.raises(UserError, match="coarse stage"):
        create_loss("c3vg")(ModelOutput(torch.zeros(2, 1, 24, 24)), batch)


@torch.no_grad()
def test_boxes_are_of_the_image_not_of_its_padding(tiny):
    """Padded to whole patches by hand or by the model: the same box in pixels."""
    batch = make_batch("c3vg_tiny", 92, 90)
    padded = batch._replace(image=torch.nn.functional.pad(batch.image, (0, 6, 0, 4)))
    ours, theirs = tiny(batch).aux["box"], tiny(padded).aux["box"]
    size = torch.tensor([90.0, 92.0, 90.0, 92.0])
    torch.testing.assert_close(ours * size, theirs * 96, rtol=1e-5, atol=1e-4)


def test_weights_that_cannot_be_and_a_table_of_another_size(tiny, tmp_path):
    with pytest.raises(UserError, match=r"leave model\.text_weights out"):
        create_model("c3vg_tiny", text_weights="words.pth")
    state = {f"beit3.{key}": value.contiguous() for key, value in tiny.beit3.state_dict().items()}
    table = "beit3.encoder.embed_positions.A.weight"
    state[table] = state[table][: 3 + 36].clone()
    save_file(state, tmp_path / "beit3.safetensors")
    loaded = create_model("c3vg_tiny", vocab_size=64, vision_weights=str(tmp_path / "beit3.safetensors"))
    own = loaded.beit3.encoder.embed_positions.A.weight
    torch.testing.assert_close(own[:3], state[table][:3])
    assert own.shape == (3 + 144, 96)


def test_the_loss_reads_the_boxes_of_the_batch(tiny):
    assert tiny.needs_boxes
    batch = make_batch("c3vg_tiny", 96, 96)
    with torch.no_grad():
        output = tiny(batch)
    loss, boxes = create_loss("c3vg"), torch.tensor([[30.0, 20.0, 50.0, 49.0]]).repeat(2, 1)
    assert loss(output, batch._replace(box=boxes))["loss"] == loss(output, batch, boxes)["loss"]
    assert loss(output, batch._replace(box=boxes))["box_fine"] != loss(output, batch)["box_fine"]
