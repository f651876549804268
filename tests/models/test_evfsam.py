"""EVF-SAM: official keys, what is trained, its two pictures, SAM's parts against transformers' whole models."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    Sam2Config,
    Sam2Model,
    SamConfig,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from amltrain.data.transforms import normalise
from amltrain.errors import UserError
from amltrain.losses import create_loss
from amltrain.models import create_model
from amltrain.models.layers.prompted_sam import PromptedSAM, PromptedSAM2
from tests.models.test_registry import make_batch

TINY = ["evfsam_tiny", "evfsam2_tiny"]


@pytest.fixture(params=TINY)
def model(request):
    torch.manual_seed(0)
    return create_model(request.param, vocab_size=64).eval()


def official_keys(shared_dir, name):
    """Keys and shapes; EVF-SAM2's list leaves out what it shares with EVF-SAM."""
    folder = shared_dir / "goldens" / "evfsam"
    first = json.loads((folder / "full_keys.json").read_text())
    if name == "evfsam_beit3_large":
        return first["keys"]
    shared = {key: value for key, value in first["keys"].items() if not key.startswith("visual_model.")}
    return json.loads((folder / "full_keys_sam2.json").read_text())["keys"] | shared


@pytest.mark.parametrize(("name", "dropped"), [("evfsam_beit3_large", 16), ("evfsam2_beit3_large", 173)])
def test_official_keys(shared_dir, name, dropped):
    keys = official_keys(shared_dir, name)
    with torch.device("meta"):
        model = create_model(name)
        state = {key: torch.empty(shape) for key, (shape, *_) in keys.items()}
    conversion = model.convert_state_dict(state)
    assert (conversion.unmatched, conversion.missing) == ([], [])
    assert len(conversion.dropped) == dropped
    assert len(conversion.renamed) + dropped == len(keys)


def test_official_gradients_reach_what_is_trained(shared_dir):
    """All that gets a gradient in the official code trains here, but the parts that get exactly 0."""
    folder = shared_dir / "goldens" / "evfsam"
    recorded, facts = load_file(folder / "tiny.safetensors"), json.loads((folder / "tiny.json").read_text())
    with torch.device("meta"):
        model = create_model("evfsam_beit3_large")
        keys = {key: torch.empty(shape) for key, (shape, *_) in official_keys(shared_dir, "evfsam_beit3_large").items()}
    renamed = model.convert_state_dict(keys).renamed
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {renamed[n[5:]] for n in recorded if n.startswith("grad.") and n[5:] in renamed} <= trained
    frozen = {renamed[n] for n in (*facts["no_grad_params"], *facts["zero_grad_params"]) if "mask_decoder" in n}
    assert frozen and not frozen & trained
    assert not {name for name in trained if name.startswith("sam.vision_encoder.")}


def test_what_is_frozen_stays_in_evaluation_mode():
    with torch.device("meta"):
        model = create_model("evfsam2_beit3_large").train()
    assert not any(parameter.requires_grad for parameter in model.sam.parameters())
    assert not model.sam.vision_encoder.training
    assert model.beit3.training


@torch.no_grad()
def test_small_picture_shows_the_same_in_its_own_statistics(model):
    """From the network's input or from the batch's own second picture: a quarter of white is -0.5."""
    grey, batch = torch.full((1, 3, 96, 96), 64, dtype=torch.uint8), make_batch("evfsam_tiny", 96, 96, count=1)
    batch = batch._replace(image=normalise(grey, "imagenet"), view=None)
    for given in (batch, batch._replace(image=batch.image * 0, view=normalise(grey, "clip"))):
        small = model.small_picture(given)
        assert small.shape == (1, 3, 96, 96)
        torch.testing.assert_close(small, torch.full_like(small, 2 * 64 / 255 - 1))


def sam_config():
    return SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=32,
            output_channels=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
            window_size=3,
            global_attn_indexes=[1],
            initializer_range=0.1,
            num_pos_feats=32,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(hidden_size=64, image_size=64, patch_size=8),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=64, mlp_dim=96, num_attention_heads=4, iou_head_hidden_dim=32, layer_norm_eps=1e-5
        ),
    )


@torch.no_grad()
def test_sam_equals_transformers_whole_model(tmp_path):
    """Loaded from a folder of transformers. A point as prompt is two vectors there, so its own decoder is compared."""
    torch.manual_seed(0)
    theirs = SamModel(sam_config()).eval()
    theirs.save_pretrained(tmp_path / "sam")
    config = sam_config()
    ours = PromptedSAM(config.vision_config, config.mask_decoder_config).eval()
    ours.load(str(tmp_path / "sam"))
    image, prompt = torch.randn(2, 3, 64, 64), torch.randn(2, 64)
    maps = ours.encode(image)
    torch.testing.assert_close(maps[0], theirs.get_image_embeddings(image), rtol=1e-5, atol=1e-5)
    code = theirs.get_image_wide_positional_embeddings()
    torch.testing.assert_close(ours.position(8, 8, torch.float32), code, rtol=1e-4, atol=1e-4)
    dense = theirs.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(2, -1, 8, 8)
    expected, _ = theirs.mask_decoder(maps[0], code.expand(2, -1, -1, -1), prompt[:, None, None], dense, False)
    torch.testing.assert_close(ours(maps, prompt), expected[:, 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sam2_equals_transformers_whole_model(tmp_path):
    """Loaded from a folder of transformers: the maps, and the masks of a prompt in place of a point."""
    torch.manual_seed(1)
    model = create_model("evfsam2_tiny", vocab_size=64).eval()
    vision, decoder = model.sam.vision_encoder.config, model.sam.mask_decoder.config
    prompts = {"hidden_size": 64, "image_size": 96, "patch_size": 16}
    config = Sam2Config(vision_config=vision, mask_decoder_config=decoder, prompt_encoder_config=prompts)
    theirs = Sam2Model(config).eval()
    torch.nn.init.normal_(theirs.no_memory_embedding)
    theirs.save_pretrained(tmp_path / "sam2")
    model.sam.load(str(tmp_path / "sam2"))
    image, prompt = torch.randn(2, 3, 96, 96), torch.randn(2, 64)
    maps = model.sam.encode(image)
    fine, middle, coarse = theirs.get_image_embeddings(image)
    masks, iou = model.sam.candidates(maps, prompt)
    dense = theirs.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(2, -1, 6, 6)
    code = theirs.get_image_wide_positional_embeddings().expand(2, -1, -1, -1)
    expected, quality, _, _ = theirs.mask_decoder(coarse, code, prompt[:, None, None], dense, True, [fine, middle])
    torch.testing.assert_close(masks, expected[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(iou, quality[:, 0], rtol=1e-4, atol=1e-5)


def test_sam_from_an_official_file_or_a_sentence(model, tmp_path):
    state = {key: value.contiguous() for key, value in model.sam.state_dict().items()}
    save_file({**state, "head.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"not SAM's, first"):
        model.sam.load(str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="not a file"):
        create_model("evfsam_tiny", text_weights="beit3")


def test_sam2_takes_the_mask_of_the_highest_iou_of_its_last_three():
    masks = torch.arange(2 * 3 * 4.0).reshape(2, 3, 2, 2)
    iou = torch.tensor([[0.1, 0.9, 0.3], [0.5, 0.2, 0.6]])
    assert torch.equal(PromptedSAM2.chosen(masks, iou), torch.stack([masks[0, 1:2], masks[1, 2:3]]))


@torch.no_grad()
def test_logits_are_enlarged_without_aligned_corners(model):
    batch = make_batch("evfsam_tiny", 96, 96)
    output = model(batch)
    low = output.aux["low_resolution"]
    assert low.shape in ((2, 1, 48, 48), (2, 1, 24, 24))  # four times stride 8, four times stride 16
    torch.testing.assert_close(output.logits, F.interpolate(low, (96, 96), mode="bilinear", align_corners=False))


@torch.no_grad()
def test_another_image_keeps_the_prompt(model):
    batch = make_batch("evfsam_tiny", 96, 96)
    features = model.encode(batch)
    dark = model.reencode_image(batch._replace(image=torch.zeros_like(batch.image)), features)
    assert torch.equal(dark.extra["prompt"], features.extra["prompt"])
    assert not torch.equal(dark.visual[-1], features.visual[-1])


def test_a_picture_of_the_mean_colour_has_a_gradient_of_usual_size(model):
    """Its patches are 0 before the first block."""
    batch = make_batch("evfsam_tiny", 96, 96)
    batch = batch._replace(image=torch.zeros_like(batch.image))
    create_loss("cross_entropy_dice")(model.train()(batch), batch)["loss"].backward()
    assert max(p.grad.norm() for p in model.parameters() if p.grad is not None) < 100
