"""ReMamber at full size against the official key lists, counts and recorded logits, and what AML scores."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from amltrain.errors import UserError
from amltrain.models import check_param_groups, create_model
from amltrain.models.backbones.vmamba import VMamba, load_vmamba
from amltrain.records import Batch
from tests.models.test_registry import make_batch

KEYS = {"conv": ("full_keys.json", 880), "mamba": ("full_keys_mamba.json", 1030)}


@pytest.fixture(params=list(KEYS))
def head(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def batch() -> Batch:
    return make_batch("remamber_tiny", 64, 96)


def full(head: str) -> nn.Module:
    with torch.device("meta"):
        return create_model(f"remamber_{head}")


def build(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return create_model("remamber_tiny", vocab_size=64, **kwargs).eval()


def test_every_official_key_is_mapped(head: str, shared_dir: Path) -> None:
    name, count = KEYS[head]
    content = json.loads((shared_dir / "goldens/remamber" / name).read_text())
    official = {key: torch.empty(shape, device="meta") for key, (shape, _) in content["keys"].items()}
    model = full(head)
    conversion = model.convert_state_dict(official)
    assert conversion.unmatched == []
    assert conversion.missing == []
    assert len(conversion.renamed) + len(conversion.dropped) == content["n_keys"] == count
    assert conversion.dropped == {}
    own = model.state_dict()
    assert {k: v.shape for k, v in conversion.state_dict.items()} == {k: v.shape for k, v in own.items()}
    assert sum(p.numel() for p in model.parameters()) == content["total_params"]


def test_parameters_of_the_parts() -> None:
    model = full("conv")
    assert sum(p.numel() for p in model.text_encoder.parameters()) == 123_060_480
    assert sum(p.numel() for p in model.vision.patch_embed.parameters()) == 76_032
    assert sum(p.numel() for p in model.decoder.parameters()) == 9_484_545
    guides = [p for n, p in model.twisters.named_parameters() if ".guide." in n]
    local = [p for n, p in model.twisters.named_parameters() if ".local." in n]
    assert sum(p.numel() for p in guides) == 1_476_480
    assert sum(p.numel() for p in local) == 3_915_648


def test_unknown_and_incomplete_keys_are_reported() -> None:
    model = build()
    assert model.convert_state_dict({"other.weight": torch.zeros(1)}).unmatched == ["other.weight"]
    key = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight"
    with pytest.raises(UserError, match="in_proj_weight has shape"):
        model.convert_state_dict({key: torch.zeros(96, 96)})


def test_param_groups_are_the_official_ones(head: str) -> None:
    model = full(head)
    groups = {group["name"]: group for group in model.param_groups(lr=5e-5, weight_decay=1e-4)}
    check_param_groups(model, groups.values())
    assert {name: group["lr"] for name, group in groups.items()} == {
        "vision": 2.5e-5,
        "text_encoder": 2.5e-5,
        "twisters": 5e-5,
        "decoder": 5e-5,
    }
    assert {group["weight_decay"] for group in groups.values()} == {1e-4}


def test_aml_scores_the_image_without_words(batch: Batch) -> None:
    model = build()
    one = model.alignment_features(batch)
    other = model.alignment_features(batch._replace(input_ids=batch.input_ids.flip(0)))
    assert one.visual.shape == (2, model.alignment_dims[0], 2, 3)
    assert torch.equal(one.visual, other.visual)
    assert not torch.allclose(one.text, other.text)


def test_the_mamba_head_trains(batch: Batch) -> None:
    model = build(head="mamba").train()
    model(batch).logits.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_another_number_of_tokens_is_rejected(batch: Batch) -> None:
    short = batch._replace(input_ids=batch.input_ids[:, :10], text_mask=batch.text_mask[:, :10])
    with pytest.raises(UserError, match=r"exactly 24 tokens, not 10; set preprocess.max_tokens to 24"):
        build()(short)


def test_whatever_a_tokenizer_pads_with(batch: Batch) -> None:
    model = build()
    padded = batch._replace(input_ids=batch.input_ids.masked_fill(~batch.text_mask, 7))
    torch.testing.assert_close(model(batch).logits, model(padded).logits, rtol=0, atol=0)


def test_official_vmamba_files_load(tmp_path: Path) -> None:
    torch.manual_seed(1)
    sizes = {"embed_dim": 8, "depths": (1, 1), "drop_path_rate": 0.0}
    source, target = VMamba(**sizes), VMamba(**sizes)
    back = {"conv1": "0", "norm1": "2", "conv2": "5", "norm2": "7", "conv": "1", "norm": "3"}
    official = {"classifier.head.weight": torch.zeros(3, 16)}
    for key, value in source.state_dict().items():
        parts = key.split(".")
        if "patch_embed" in parts or "downsample" in parts:
            parts[-2] = back[parts[-2]]
        official[".".join(parts)] = value
    torch.save({"model": official}, tmp_path / "vssm.pth")
    load_vmamba(target, str(tmp_path / "vssm.pth"))
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(target(image), source(image), rtol=0, atol=0)
    with pytest.raises(UserError, match="is not a file, and no hub has VMamba by name"):
        load_vmamba(target, "vmamba_base")


def _weight(key: str, shape: list[int]) -> Tensor:
    """Every full-size weight is a function of its name, as recorded."""
    x = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, dtype=np.float32)
    if key.endswith("running_mean"):
        x = 0.1 * x
    elif key.endswith("running_var"):
        x = 0.5 + np.abs(x)
    elif key.endswith("A_logs"):
        x = 0.4 * x
    elif key.endswith("Ds"):
        x = 1 + 0.3 * x
    elif key.endswith("dt_projs_bias"):
        x = -2 + 0.7 * x
    elif key.endswith("bias"):
        x = 0.05 * x
    elif key.endswith(("x_proj_weight", "dt_projs_weight")):
        x = x / np.sqrt(np.float32(shape[-1]))
    elif x.ndim == 1 and key.endswith("weight"):
        x = 1 + 0.1 * x
    elif "embedding" in key:
        x = 0.1 * x
    else:
        x = x / np.sqrt(np.float32(np.prod(shape[1:])))
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


@pytest.mark.slow
def test_full_size_logits_are_the_recorded_ones(head: str, shared_dir: Path) -> None:
    content = json.loads((shared_dir / "goldens/remamber" / KEYS[head][0]).read_text())
    recorded = load_file(shared_dir / f"goldens/remamber/full_{head}.safetensors")
    official = {
        key: _weight(key, shape) if shape else torch.zeros((), dtype=torch.long)
        for key, (shape, kind) in content["keys"].items()
        if "position_ids" not in key
    }
    model = create_model(f"remamber_{head}").eval()
    model.load_state_dict(model.convert_state_dict(official).state_dict)
    image = np.random.default_rng(1).standard_normal((1, 3, 480, 480), dtype=np.float32)
    batch = make_batch(f"remamber_{head}", 480, 480, count=1)._replace(
        image=torch.from_numpy(image), input_ids=recorded["input.ids"], text_mask=recorded["input.mask"].bool()
    )
    with torch.no_grad():
        features = model.encode(batch)
        logits = model.decode(features, batch).logits
    torch.testing.assert_close(features.text, recorded["inter.text.tokens"], rtol=0, atol=5e-5)
    for i, stage in enumerate(features.visual):
        means = recorded[f"inter.stage{i + 1}.mean_over_space"]
        torch.testing.assert_close(stage.mean(dim=(2, 3)), means, rtol=0, atol=5e-5)
    torch.testing.assert_close(logits[..., ::4, ::4], recorded["output.logits"], rtol=0, atol=5e-5)
