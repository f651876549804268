"""BEiT-3: the image alone equals timm's BEiT-3, official keys, and who reads whom."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from amltrain.errors import UserError
from amltrain.models import create_model
from amltrain.models.beit3 import BEiT3
from amltrain.records import Batch
from tests.models.test_registry import make_batch


@pytest.fixture
def model() -> BEiT3:
    torch.manual_seed(0)
    model = create_model("beit3_tiny", vocab_size=64)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def batch() -> Batch:
    return make_batch("beit3_tiny", 96, 96)


def official(model: BEiT3) -> dict[str, Tensor]:
    """The encoder as the official code saves it."""
    state = {f"beit3.{key}": value for key, value in model.beit3.state_dict().items()}
    return {**state, "beit3.vision_embed.mask_token": torch.zeros(1, 1, 96), "mlm_head.weight": torch.zeros(64, 96)}


@torch.no_grad()
def test_the_image_alone_equals_timms(model: BEiT3, batch: Batch) -> None:
    """timm converts official keys itself, and keeps the image's part."""
    sizes = {"img_size": 96, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4, "num_classes": 0}
    own = timm.create_model("beit3_base_patch16_224", **sizes).eval()
    own.norm, own.fc_norm = own.fc_norm, torch.nn.Identity()  # timm pools before its norm
    state = checkpoint_filter_fn(official(model), own)
    state = {key.replace("layer_norm.", "norm."): v for key, v in state.items() if "mlm_head" not in key}
    own.load_state_dict(state)
    expected = own.forward_features(batch.image)[:, 1:]
    scored = model.alignment_features(batch)
    torch.testing.assert_close(scored.visual.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


def test_official_keys_convert_and_load(model: BEiT3, tmp_path: Path) -> None:
    conversion = model.convert_state_dict(official(model))
    assert conversion.unmatched == []
    assert all(key.startswith("decoder.") for key in conversion.missing)
    assert set(conversion.dropped) == {"beit3.vision_embed.mask_token", "mlm_head.weight"}
    save_file({key: value.contiguous() for key, value in official(model).items()}, tmp_path / "beit3.safetensors")
    loaded = create_model("beit3_tiny", vocab_size=64, vision_weights=str(tmp_path / "beit3.safetensors"))
    for key, value in model.beit3.state_dict().items():
        torch.testing.assert_close(loaded.beit3.state_dict()[key], value, rtol=0, atol=0)


@torch.no_grad()
def test_who_reads_whom(model: BEiT3, batch: Batch) -> None:
    """Fused features depend on the other modality; what AML scores does not."""
    others = batch._replace(input_ids=batch.input_ids.roll(1, 1))
    assert not torch.allclose(model.encode(others).visual[-1], model.encode(batch).visual[-1], atol=1e-4)
    torch.testing.assert_close(model.alignment_features(others).visual, model.alignment_features(batch).visual)
    dark = batch._replace(image=torch.zeros_like(batch.image))
    assert not torch.allclose(model.encode(dark).text, model.encode(batch).text, atol=1e-4)
    torch.testing.assert_close(model.alignment_features(dark).text, model.alignment_features(batch).text)


@torch.no_grad()
def test_padding_is_never_read(model: BEiT3, batch: Batch) -> None:
    other_padding = batch._replace(input_ids=batch.input_ids.masked_fill(~batch.text_mask, 7))
    torch.testing.assert_close(model(other_padding).logits, model(batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"text_weights": "words.pth"}, "leave model.text_weights out"), ({"vision_weights": "beit3"}, "not a file")],
)
def test_weights_that_cannot_be(kwargs: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model("beit3_tiny", **kwargs)
