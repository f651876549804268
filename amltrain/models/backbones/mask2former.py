"""Start weights from transformers' Mask2Former: Swin, pixel decoder and the first query layers, under DeRIS' key names.

DeRIS' perception branch starts from Mask2Former for COCO instances (Cheng et al., CVPR 2022). The official file is a
pickle of detectron2; transformers has the same weights. transformers has separate q, k and v where the official code
and this package have one matrix, so they are joined.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from amltrain.errors import UserError
from amltrain.models.backbones.weights import from_pretrained

_SWIN = r"^model\.pixel_level_module\.encoder\.(swin\.)?"
_BLOCK = _SWIN + r"encoder\.layers\.(\d+)\.blocks\.(\d+)\."
_PIXELS = r"^model\.pixel_level_module\.decoder\."
_LAYER = r"^model\.transformer_module\.decoder\.layers\.(\d+)\."
RENAMES = [
    (_SWIN + r"embeddings\.patch_embeddings\.projection\.", "swin.patch_embed.proj."),
    (_SWIN + r"embeddings\.norm\.", "swin.patch_embed.norm."),
    (_BLOCK + r"attention\.(self\.)?(relative_position_bias\.)?relative_position_bias_table", r"\2.\3.attn.table"),
    (_BLOCK + r"attention\.(self\.)?(q_proj|k_proj|v_proj|query|key|value)\.", r"\2.\3.attn.\5."),
    (_BLOCK + r"attention\.(o_proj|output\.dense)\.", r"\2.\3.attn.proj."),
    (_BLOCK + r"layernorm_before\.", r"\2.\3.norm1."),
    (_BLOCK + r"layernorm_after\.", r"\2.\3.norm2."),
    (_BLOCK + r"(mlp\.fc1|intermediate\.dense)\.", r"\2.\3.mlp.fc1."),
    (_BLOCK + r"(mlp\.fc2|output\.dense)\.", r"\2.\3.mlp.fc2."),
    (r"^(\d+)\.(\d+)\.(.*)$", r"swin.layers.\1.blocks.\2.\3"),
    (r"attn\.table$", "attn.relative_position_bias_table"),
    (_SWIN + r"encoder\.layers\.(\d+)\.downsample\.", r"swin.layers.\2.downsample."),
    (_PIXELS + r"input_projections\.", "pixel_decoder.input_proj."),
    (_PIXELS + r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"pixel_decoder.layers.\1.norm1."),
    (_PIXELS + r"encoder\.layers\.(\d+)\.final_layer_norm\.", r"pixel_decoder.layers.\1.norm2."),
    (_PIXELS + r"encoder\.layers\.(\d+)\.fc(\d)\.", r"pixel_decoder.layers.\1.linear\2."),
    (_PIXELS + r"encoder\.layers\.", "pixel_decoder.layers."),
    (_PIXELS + r"mask_projection\.", "pixel_decoder.mask_features."),
    (_PIXELS + r"adapter_1\.", "pixel_decoder.lateral."),
    (_PIXELS + r"layer_1\.", "pixel_decoder.merge."),
    (_PIXELS, "pixel_decoder."),
    (_LAYER + r"cross_attn\.", r"predictor.read_image.\1.attention."),
    (_LAYER + r"cross_attn_layer_norm\.", r"predictor.read_image.\1.norm."),
    (_LAYER + r"self_attn\.", r"predictor.read_queries.\1.attention."),
    (_LAYER + r"self_attn_layer_norm\.", r"predictor.read_queries.\1.norm."),
    (_LAYER + r"fc(\d)\.", r"predictor.feedforward.\1.linear\2."),
    (_LAYER + r"final_layer_norm\.", r"predictor.feedforward.\1.norm."),
    (r"^model\.transformer_module\.decoder\.layernorm\.", "predictor.norm."),
    (
        r"^model\.transformer_module\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.",
        r"predictor.mask_embed.layers.\1.",
    ),
    (r"^model\.transformer_module\.level_embed\.", "predictor.level_embed."),
    (r"^model\.transformer_module\.queries_embedder\.", "predictor.query_embed."),
]
UNUSED = (r"class_predictor\..*", r"criterion\..*", r".*\.queries_features\..*", r".*\.encoder\.(swin\.)?layernorm\..*")
PARTS = ("q", "k", "v")


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' keys to ours; q, k and v of an attention joined."""
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        if any(re.fullmatch(pattern, key) for pattern in UNUSED):
            continue
        stage = re.match(_SWIN + r"hidden_states_norms\.stage(\d)\.(\w+)$", key)
        name = key if stage is None else f"swin.norm{int(stage[2]) - 1}.{stage[3]}"
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        named[name] = value
    joined: dict[str, Tensor] = {}
    for name, value in named.items():
        found = re.match(r"(.*(attn|attention))\.(q_proj|query|k_proj|key|v_proj|value)\.(weight|bias)$", name)
        if found is None:
            joined[name] = value
        elif found[3] in ("q_proj", "query"):
            others = [re.sub(r"\.(q_proj|query)\.", kind, name) for kind in _kinds(found[3])]
            one = f"{found[1]}.qkv.{found[4]}" if found[2] == "attn" else f"{found[1]}.in_proj_{found[4]}"
            joined[one] = torch.cat([value, *(named[other] for other in others)])
    return joined


def _kinds(query: str) -> tuple[str, str]:
    return (".k_proj.", ".v_proj.") if query == "q_proj" else (".key.", ".value.")


def load_mask2former(model: nn.Module, weights: str) -> None:
    """Fill a DeRIS' Swin, pixel decoder and query layers from transformers' Mask2Former: a Hub id or a folder.

    Layers beyond the model's own, and queries beyond its number, are left out. Raises UserError where a tensor has no
    place or another shape.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    called = "Mask2Former", "model.vision_weights"
    found: Any = from_pretrained(Mask2FormerForUniversalSegmentation, weights, called)
    own = model.state_dict()
    layers = sum(name.startswith("predictor.read_image.") and name.endswith("in_proj_bias") for name in own)
    state = {}
    for name, value in renamed(found.state_dict()).items():
        layer = re.match(r"predictor\.(read_image|read_queries|feedforward)\.(\d+)\.", name)
        if layer is not None and int(layer[2]) >= layers:
            continue
        if name == "predictor.query_embed.weight":
            value = value[: own[name].shape[0]]
        if name not in own or own[name].shape != value.shape:
            place = f"is {list(own[name].shape)} here" if name in own else "has no place here"
            raise UserError(f"{weights}: {name} {list(value.shape)} {place}; name a Mask2Former of the same sizes")
        state[name] = value
    model.load_state_dict(state, strict=False)
