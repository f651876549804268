"""CLIP's text tower, layer by layer, so that adapters can work inside; the same under every version of transformers.

Paper: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021.
Equal to transformers' CLIPTextModelWithProjection called without an attention mask. Written on torch's attention:
adapters need the middle of a layer, whose signature and key names change between the versions of transformers.

As DETRIS, ETRIS and CRIS use it: causal, no padding mask, padding of id 0, which later tokens and adapters do see.

Dimensions: B batch, L text tokens, W width, E width of the space shared with CLIP's image tower.

CLIP's Vision Transformer as a giver of maps, in thirds, so that something can work between them.

Paper: Radford et al., CLIP, ICML 2021. The blocks are those of `clip.py`. Equal to transformers' CLIPVisionModel; the
position table is resampled bicubically and not antialiased, as ETRIS does (timm antialiases: features differ).

Dimensions: B batch, h w grid of patches, C width, E width of the space shared with CLIP's text tower.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import Mlp, QuickGELU
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModelWithProjection

from amltrain.errors import UserError
from amltrain.models.backbones.weights import (
    TEXT_WEIGHTS,
    fill,
    from_pretrained,
    is_file,
    is_torchscript,
    read_state_dict,
    read_torchscript,
    timm_state,
)
from amltrain.models.layers.basic import ModuleListOf

OFFICIAL_NAMES = [
    (r"\btransformer\.resblocks\.", "blocks."),
    (r"\bblocks\.(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
    (r"\bblocks\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.mlp.fc1."),
    (r"\bblocks\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.mlp.fc2."),
]
"""OpenAI's key names to ours, as rules for `re.sub`."""

_HUGGINGFACE_NAMES = {
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.": "blocks.",
    "layer_norm1.": "norm1.",
    "layer_norm2.": "norm2.",
    "self_attn.": "attn.",
    "final_layer_norm.": "ln_final.",
}

Adapter = Callable[[Tensor], Tensor]
"""The residual stream between attention and MLP [B, L, W] -> what is added to the block's output, [B, L, W]."""

Between = Callable[[int, Tensor], Tensor]
"""(0, 1 or 2, an image tower's map after that third [B, C, h, w]) -> the map for the next third."""


class CLIPBlock(nn.Module):
    """Pre-norm transformer block, of the text tower and of the image tower."""

    def __init__(self, width: int, heads: int, *, gelu: bool = False) -> None:
        """gelu: the exact GELU (EVA-02-CLIP's text) instead of OpenAI's approximation."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width, act_layer=nn.GELU if gelu else QuickGELU)

    def attend(self, x: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """X [B, L, W], mask [L, L], padding [B, L] bool (True = may not be read; None = all is read) -> [B, L, W]."""
        return x + self.read(x, mask, padding)

    def read(self, x: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """Return what `attend` adds to the stream."""
        normed = self.norm1(x)
        return self.attn(normed, normed, normed, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0]

    def transform(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm2(x))


class CLIPText(nn.Module):
    """Token features and the sentence's vector. The defaults are the text tower of ViT-B/16."""

    def __init__(
        self,
        *,
        width: int = 512,
        layers: int = 12,
        heads: int = 8,
        vocab_size: int = 49408,
        max_positions: int = 77,
        embed_dim: int | None = 512,
        pad_id: int = 0,
        masks_padding: bool = False,
        gelu: bool = False,
    ) -> None:
        """embed_dim: None = the sentence's vector is not projected into CLIP's shared space.

        pad_id: id that padded positions get. masks_padding: no token reads them. gelu: see `CLIPBlock`.
        """
        super().__init__()
        self.width, self.embed_dim = width, width if embed_dim is None else embed_dim
        self.pad_id, self.masks_padding = pad_id, masks_padding
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(max_positions, width))
        self.blocks = ModuleListOf(CLIPBlock(width, heads, gelu=gelu) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = None if embed_dim is None else nn.Parameter(torch.empty(width, embed_dim))
        if embed_dim is not None:
            # CLIP's contrastive temperature: in the official file, read by nothing here
            self.logit_scale = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        """CLIP's own: the deeper the tower, the less every block adds to the residual stream at first."""
        width, residual_std = self.width, (2 * len(self.blocks) * self.width) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        if self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=width**-0.5)
        for block in self.blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=residual_std)

    def forward(
        self, input_ids: Tensor, text_mask: Tensor, adapters: Mapping[int, Adapter] | None = None
    ) -> tuple[Tensor, Tensor]:
        """input_ids [B, L] int64, text_mask [B, L] bool (True = a real token).

        adapters: modules parallel to the MLP of a block (from 0).
        Returns normed token features [B, L, W], padding included, and the sentence's vector [B, E]: the last real
        token's feature, projected. CLIP's end token is the last real one.
        Raises UserError when a sentence is longer than the position table.
        """
        x = self.run(self.embed(input_ids, text_mask), text_mask=text_mask, adapters=adapters)
        return self.finish(x, text_mask)

    def embed(self, input_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Return the input of the first block, [B, L, W]."""
        length = input_ids.shape[1]
        if length > len(self.positional_embedding):
            raise UserError(
                f"sentences of {length} tokens do not fit a text encoder of {len(self.positional_embedding)} "
                "positions; lower preprocess.max_tokens"
            )
        # whatever a tokenizer pads with: a tower is tuned with one id there
        return self.token_embedding(input_ids.masked_fill(~text_mask, self.pad_id)) + self.positional_embedding[:length]

    def run(
        self,
        x: Tensor,
        first: int = 0,
        end: int | None = None,
        *,
        text_mask: Tensor | None = None,
        adapters: Mapping[int, Adapter] | None = None,
    ) -> Tensor:
        """Run the blocks from `first` to before `end`, by default all: [B, L, W] -> [B, L, W].

        text_mask [B, L] bool: needed where padding is masked.
        """
        adapters = adapters or {}
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        padding = ~text_mask if self.masks_padding and text_mask is not None else None
        for i, block in enumerate(self.blocks[first:end], first):
            attended = self._recomputed(block.attend, x, mask, padding)
            x = self._recomputed(block.transform, attended)
            if i in adapters:
                x = x + adapters[i](attended)
        return x

    def finish(self, x: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map the last block's output to normed tokens [B, L, W] and the sentence's vector [B, E]."""
        tokens = self.ln_final(x)
        last = (text_mask.sum(dim=1) - 1).clamp(min=0)
        sentence = tokens[torch.arange(last.shape[0], device=x.device), last]
        return tokens, self.project(sentence)

    def project(self, features: Tensor) -> Tensor:
        """Features [..., W] in CLIP's shared space [..., E]; as they are where this tower has no projection."""
        return features if self.text_projection is None else features @ self.text_projection

    def _recomputed(self, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)


def load_clip_text(text: CLIPText, weights: str) -> None:
    """Fill a text tower from OpenAI's archive (ViT-B-16.pt), a state dict of it, or HuggingFace's form.

    weights: a .pt, .pth, .bin or .safetensors file under OpenAI's or HuggingFace's names, a folder, or a Hub id
    (openai/clip-vit-base-patch16). OpenAI's archives are TorchScript: their tensors are read, their code is not run.
    The image tower in the file is left alone. Raises UserError for a source that is missing or of another size.
    """
    if not is_file(weights):
        found, report = from_pretrained(CLIPTextModelWithProjection, weights, TEXT_WEIGHTS, output_loading_info=True)
        absent = set(report["missing_keys"])  # transformers has filled these with random numbers
        state = {key: value for key, value in found.state_dict().items() if key not in absent}
    elif is_torchscript(Path(weights)):
        state = read_torchscript(Path(weights))
    else:
        state = read_state_dict(Path(weights))
    tower = text_tower(state)
    if text.text_projection is None:
        tower = {key: value for key, value in tower.items() if key not in ("text_projection", "logit_scale")}
    fill(text, tower, weights)


def text_tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text part of a CLIP state dict under OpenAI's or HuggingFace's names, under ours and in float32."""
    other = ("visual.", "vision_model.", "visual_projection.", "input_resolution", "context_length", "vocab_size")
    kept = {k: v for k, v in state.items() if not k.startswith(other) and not k.endswith("position_ids")}
    ours = from_huggingface(kept) if "text_projection.weight" in kept else rename_official(kept)
    ours.setdefault("logit_scale", torch.zeros(()))  # HuggingFace's text-only form has none
    return {key: value.float() for key, value in ours.items()}


def rename_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's official key names to ours."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in OFFICIAL_NAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename HuggingFace's keys; there, query, key and value are apart and the projection is transposed."""
    renamed = {huggingface_name(key): value for key, value in pack_attention(state).items()}
    renamed["text_projection"] = renamed.pop("text_projection.weight").T.contiguous()
    return renamed


def huggingface_name(key: str) -> str:
    """Return our name of a HuggingFace key whose query, key and value are packed."""
    name = key.removeprefix("text_model.")
    for theirs, ours in _HUGGINGFACE_NAMES.items():
        name = name.replace(theirs, ours)
    return name.replace("q_proj.", "in_proj_")


def pack_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join query, key and value of HuggingFace's layers under the name of the query."""
    packed = dict(state)
    for key in state:
        if ".self_attn.q_proj." in key:
            parts = [key.replace(".q_proj.", f".{kind}_proj.") for kind in "qkv"]
            if all(part in packed for part in parts):
                packed[key] = torch.cat([packed.pop(part) if part != key else packed[part] for part in parts])
    return packed


OFFICIAL_VIT_NAMES = [(r"^vision\.conv1\.", "vision.patch_embed."), *OFFICIAL_NAMES]
"""OpenAI's key names, after "visual." became "vision.", to ours: rules for `re.sub`."""

_TIMM_NAMES = [
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^cls_token$", "class_embedding"),
    (r"^pos_embed$", "positional_embedding"),
    (r"^norm_pre\.", "ln_pre."),
    (r"^norm\.", "ln_post."),
    (r"\.attn\.qkv\.", ".attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"^head\.weight$", "proj"),
]


class CLIPViT(nn.Module):
    """Maps after a third and two thirds of the blocks, and the end in CLIP's shared space. The defaults are ViT-B/16
    at 416 px.
    """

    def __init__(
        self,
        *,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        patch_size: int = 16,
        table_size: int = 26,
        embed_dim: int = 512,
    ) -> None:
        """layers: a multiple of three. table_size: side of the position table in patches; it trains at that size."""
        super().__init__()
        self.stride, self.width = patch_size, width
        self.channels = (width, width, embed_dim)
        self.stream_channels = (width, width, width)
        self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) / width**0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + table_size**2, width) / width**0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = ModuleListOf(CLIPBlock(width, heads) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) / width**0.5)
        self.gradient_checkpointing = False

    def forward(self, image: Tensor, between: Between | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Image [B, 3, H, W], sides multiples of the patch -> maps of H / patch x W / patch, `channels` wide.

        between: what works on the patches after every third of the blocks, before anything reads them; the class
        token is not shown to it.
        """
        return self.encode_rest(self.encode_start(image), between)

    def encode_start(self, image: Tensor) -> tuple[Tensor, ...]:
        """The first third of the blocks, before `between`: patches [B, C, h, w], class token [B, 1, C]."""
        x, grid = self.embed(image)
        for block in self.blocks[: len(self.blocks) // 3]:
            x = self._run(block, x)
        return x[:, 1:].transpose(1, 2).unflatten(2, grid), x[:, :1]

    def encode_rest(self, start: tuple[Tensor, ...], between: Between | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The rest of `forward`, given what `encode_start` returned."""
        seen, first = start
        grid, third = seen.shape[-2:], len(self.blocks) // 3
        maps = []
        for level in range(3):
            if level:
                x = torch.cat([first, seen.flatten(2).transpose(1, 2)], dim=1)
                for block in self.blocks[level * third : (level + 1) * third]:
                    x = self._run(block, x)
                first, seen = x[:, :1], x[:, 1:].transpose(1, 2).unflatten(2, grid)
            seen = seen if between is None else between(level, seen)
            maps.append(seen)
        patches = seen.flatten(2).transpose(1, 2)
        return maps[0], maps[1], self.finish(patches).transpose(1, 2).unflatten(2, grid)

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Class token and patches as they enter the first block [B, 1 + N, C], and the grid (h, w)."""
        patches = self.patch_embed(image)
        grid = (patches.shape[-2], patches.shape[-1])
        first = self.class_embedding.expand(image.shape[0], 1, -1)
        x = torch.cat([first, patches.flatten(2).transpose(1, 2).to(first.dtype)], dim=1)
        return self.ln_pre(x + resample(self.positional_embedding, grid)), grid

    def rotary(self, grid: tuple[int, int], inserted: int) -> Tensor | None:
        """No rotary code: the table is all that tells positions."""
        return None

    def read(self, index: int, x: Tensor, code: Tensor | None) -> Tensor:
        """Return the attention output of block `index` for the stream. code: None, as `rotary` gives it."""
        return self.blocks[index].read(x)

    def finish(self, patches: Tensor) -> Tensor:
        """Patches after the last block in the shared space, [B, N, C] -> [B, N, E]."""
        return self.ln_post(patches) @ self.proj

    def shared(self, image: Tensor) -> Tensor:
        """CLIP's own answer at every patch, in the space that it shares with the text: [B, E, h, w]."""
        return self(image)[2]

    def _run(self, block: CLIPBlock, x: Tensor) -> Tensor:
        def whole(x: Tensor) -> Tensor:
            return block.transform(block.attend(x))

        if self.gradient_checkpointing and self.training:
            return checkpoint(whole, x, use_reentrant=False)
        return whole(x)


def resample(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position table [1 + side * side, C], the class token's row first, at a grid (h, w): [1 + h * w, C]."""
    side = round((len(table) - 1) ** 0.5)
    if grid == (side, side):
        return table
    patches = table[1:].T.unflatten(1, (side, side))[None].float()
    patches = F.interpolate(patches, size=grid, mode="bicubic").to(table.dtype)
    return torch.cat([table[:1], patches[0].flatten(1).T])


def load_clip_vit(vision: CLIPViT, weights: str) -> None:
    """Fill a ViT from OpenAI's archive (ViT-B-16.pt), a state dict of it, or a timm name or file
    (vit_base_patch16_clip_quickgelu_224.openai); the position table is resampled to this model's.

    Raises UserError for a source that is missing or of another size.
    """
    if not is_file(weights):
        state = timm_state(weights)
    elif is_torchscript(Path(weights)):
        state = read_torchscript(Path(weights))
    else:
        state = read_state_dict(Path(weights))
    ours = _image_tower(state)
    side = round((len(vision.positional_embedding) - 1) ** 0.5)
    if "positional_embedding" in ours:
        ours["positional_embedding"] = resample(ours["positional_embedding"], (side, side))
    fill(vision, ours, weights)


def _image_tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image part of a CLIP state dict under OpenAI's or timm's names, under ours and in float32."""
    official = any(key.startswith("visual.") for key in state)
    renamed = {}
    for key, value in state.items():
        if (official and not key.startswith("visual.")) or key == "head.bias":
            continue  # the text tower; zeros that timm's linear layer has and CLIP's projection has not
        name = re.sub(r"^visual\.", "vision.", key)
        for pattern, replacement in OFFICIAL_VIT_NAMES if official else _TIMM_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name.removeprefix("vision.")] = value.float()
    if not official:  # timm: a batch dimension on tokens, a linear layer's layout
        for token in ("class_embedding", "positional_embedding"):
            renamed[token] = renamed[token].squeeze(0)
        renamed["class_embedding"] = renamed["class_embedding"].squeeze(0)
        renamed["proj"] = renamed["proj"].T.contiguous()
    return renamed
