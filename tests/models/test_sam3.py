"""SAM 3: equal to transformers' Sam3Model on the same weights, its published keys, its presence head."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from amltrain.errors import UserError
from amltrain.losses import create_loss
from amltrain.models import create_model
from amltrain.models.sam3 import SAM3
from amltrain.records import Batch, ModelOutput
from tests.models.test_registry import make_batch


@pytest.fixture
def model() -> SAM3:
    torch.manual_seed(0)
    model = create_model("sam3_tiny", vocab_size=64)
    for parameter in model.parameters():  # tables that start at zero hide differences
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def batch() -> Batch:
    return make_batch("sam3_tiny", 96, 96)


@torch.no_grad()
def test_mask_and_presence_equal_transformers(model: SAM3, batch: Batch) -> None:
    expected = model.sam3(pixel_values=batch.image, input_ids=batch.input_ids, attention_mask=batch.text_mask.long())
    output = model(batch)
    assert output.logits.shape == (2, 1, 48, 48)
    torch.testing.assert_close(output.logits, expected.semantic_seg, rtol=1e-4, atol=1e-5)
    presence = output.aux["no_target"][:, :1] - output.aux["no_target"][:, 1:]
    torch.testing.assert_close(presence, expected.presence_logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_aml_scores_is_transformers_own_map_and_tokens(model: SAM3, batch: Batch) -> None:
    scored = model.alignment_features(batch)
    maps = model.sam3.vision_encoder(batch.image).fpn_hidden_states
    words = model.sam3.get_text_features(batch.input_ids, attention_mask=batch.text_mask.long()).pooler_output
    torch.testing.assert_close(scored.visual, maps[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scored.text[batch.text_mask], words[batch.text_mask], rtol=1e-4, atol=1e-5)


def test_published_keys_convert_and_load(model: SAM3, tmp_path: Path) -> None:
    official = {f"detector_model.{key}": value for key, value in model.sam3.state_dict().items()}
    official["tracker_model.memory"] = torch.zeros(1)
    conversion = model.convert_state_dict(official)
    assert (conversion.unmatched, conversion.missing) == ([], [])
    assert list(conversion.dropped) == ["tracker_model.memory"]
    save_file({key: value.contiguous() for key, value in official.items()}, tmp_path / "model.safetensors")
    loaded = create_model("sam3_tiny", vocab_size=64, vision_weights=str(tmp_path / "model.safetensors"))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)


def test_text_weights_have_no_place() -> None:
    with pytest.raises(UserError, match=r"model\.vision_weights; leave model\.text_weights out"):
        create_model("sam3_tiny", text_weights="words.safetensors")


def test_loss_of_a_sentence_without_target(batch: Batch) -> None:
    loss = create_loss("mask_and_presence", dice_weight=0.0, presence_weight=1.0)
    nothing = batch._replace(target=torch.zeros_like(batch.target), no_target=torch.ones(2, dtype=torch.bool))
    empty = torch.full((2, 1, 24, 24), -20.0)
    says_nothing = ModelOutput(empty, {"no_target": torch.tensor([[-9.0, 9.0]] * 2)})
    says_something = ModelOutput(empty, {"no_target": torch.tensor([[9.0, -9.0]] * 2)})
    assert loss(says_nothing, nothing)["loss"] < 1e-6
    assert loss(says_something, nothing)["loss"] == pytest.approx(18, abs=1e-3)
    with pytest.raises(UserError, match="needs a model with a no-target head"):
        loss(ModelOutput(empty), nothing)
