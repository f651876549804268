"""LLaVA's parts as transformers has them: CLIP's image encoder, a projector, a LLaMA.

Its image token needs no row of the embedding here, because image and words are put together outside.

Source: Liu et al., Visual Instruction Tuning, NeurIPS 2023 (Apache-2.0).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from amltrain.errors import UserError
from amltrain.files import load_json
from amltrain.models.backbones.weights import fill, from_pretrained, is_file, read_state_dict
from amltrain.models.base import convert

CLIP = "openai/clip-vit-large-patch14"
EMBEDDINGS, TOWER = "model.language_model.embed_tokens.weight", "model.vision_tower."
NAMES = [
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", TOWER),
    (r"^model\.mm_projector\.", "model.multi_modal_projector."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
]
"""LLaVA's own key names to transformers', as rules for `re.sub`."""
DROPS = [(r".*\.rotary_emb\.inv_freq", "computed again"), (r".*\.position_ids", "computed again")]


def build_reader(config: LlavaConfig, tokens: int) -> LlavaForConditionalGeneration:
    """Build LLaVA for a vocabulary of `tokens`, with a projector of one layer, as up to version 1.1."""
    text: Any = config.text_config
    vision: Any = config.vision_config
    text.vocab_size, config.image_token_id = tokens, 0
    reader = LlavaForConditionalGeneration(config)
    inner: Any = reader.model
    inner.multi_modal_projector = nn.Linear(vision.hidden_size, text.hidden_size)
    return reader


def load_reader(reader: LlavaForConditionalGeneration, weights: str, tokens: int) -> None:
    """Fill it from LLaVA's own files, one or a folder of shards, .safetensors or .bin.

    tokens: of LLaVA's vocabulary that the reader shares; rows behind them are of added tokens, [SEG] and others, and
    keep their random start, N(0, 0.02). CLIP comes from where LLaVA's config.json says. Raises UserError.
    """
    own = reader.state_dict()
    state: dict[str, Tensor] = {}
    for path in _files(weights):
        state |= read_state_dict(path)
    for name, mine in (("lm_head.weight", "lm_head.weight"), ("model.embed_tokens.weight", EMBEDDINGS)):
        if name in state:
            if len(state[name]) < tokens:
                raise UserError(
                    f"{weights}: {name} has {len(state[name]):,} rows and the tokenizer {tokens:,} tokens of its own; "
                    f"use LLaVA's tokenizer (preprocess.tokenizer)"
                )
            state[name] = torch.cat([state[name][:tokens].to(own[mine].dtype), own[mine][tokens:]])
    found = convert(state, own, renames=NAMES, drops=DROPS)
    if found.unmatched:
        raise UserError(
            f"{weights} has {len(found.unmatched)} keys that are not LLaVA's, first {found.unmatched[0]}; name its own "
            f"files (model.text_weights)"
        )
    tensors = found.state_dict
    if any(key.startswith(TOWER) for key in found.missing):
        tower = from_pretrained(CLIPVisionModel, _tower(weights), ("CLIP", "model.text_weights"))
        tensors |= {TOWER + key: value for key, value in tower.state_dict().items()}
    fill(reader, tensors, weights)


def _files(weights: str) -> list[Path]:
    path = Path(weights)
    if is_file(weights):
        return [path]
    found = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not found:
        raise UserError(
            f"LLaVA's weights {weights!r} are no folder with its .safetensors or .bin files; download it and name the "
            f"folder (model.text_weights)"
        )
    return found


def _tower(weights: str) -> str:
    """The CLIP that LLaVA's config.json names."""
    config = Path(weights) / "config.json"
    told = load_json(config).get("mm_vision_tower") if config.is_file() else None
    return told if isinstance(told, str) else CLIP


def sizes_of(
    *,
    width: int,
    layers: int,
    heads: int,
    mlp: int,
    clip: int,
    clip_layers: int,
    clip_heads: int,
    pixels: int,
    patch: int,
    positions: int,
) -> LlavaConfig:
    """Sizes of the two transformers. clip: width of the image encoder, read before its last layer. pixels, patch: sides
    of its picture and patches.
    """
    vision = CLIPVisionConfig(
        hidden_size=clip,
        intermediate_size=4 * clip,
        num_hidden_layers=clip_layers,
        num_attention_heads=clip_heads,
        image_size=pixels,
        patch_size=patch,
    )
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    return LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-2, projector_hidden_act="gelu")


def llava_7b() -> LlavaConfig:
    """LLaVA 7B v1.1: Vicuna 7B, CLIP ViT-L/14 at 224 pixels."""
    return sizes_of(
        width=4096,
        layers=32,
        heads=32,
        mlp=11008,
        clip=1024,
        clip_layers=24,
        clip_heads=16,
        pixels=224,
        patch=14,
        positions=2048,
    )
