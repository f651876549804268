"""BEiT-3: one transformer whose attention is shared, whose other layers are one set per modality; a light decoder.

Paper: Wang et al., Image as a Foreign Language: BEiT Pretraining for Vision and Vision-Language Tasks, CVPR 2023.
Official code: microsoft/unilm, beit3 (MIT). Reimplemented with the official key names; strong open specialists
(EVF-SAM, C3VG, DeRIS) stand on this encoder. The decoder is ours: four blocks' maps, brought together and enlarged
fourfold, against one vector made of the image's and the sentence's first tokens; and a no-target head on the same
vector.

Image and words read each other from the first block on. What AML scores is a second look without the other modality:
the image alone and the sentence alone through the same weights, as BEiT-3 encodes them for retrieval; one more pass.
The position table of the image keeps its pretrained size and is resampled (bicubic) for other sizes.

Dimensions: B batch, L text tokens, C width, h w grid of patches, V = 1 + h w visual tokens, D decoder width.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amltrain.config.schema import Preprocess
from amltrain.errors import UserError
from amltrain.models.backbones.weights import fill, is_file, read_state_dict
from amltrain.models.base import Conversion, RISModel, convert
from amltrain.models.layers.cris_decoder import at_image_size
from amltrain.models.registry import NETWORK_FRAME, ModelInfo, register_model
from amltrain.records import AlignmentFeatures, Batch, Features, ModelOutput

DROPS = [
    (r"beit3\.vision_embed\.mask_token", "pretraining's stand-in for hidden patches"),
    (r"(?!beit3\.|decoder\.).*", "a head of pretraining or of another task"),
]
FIRST_POSITION = 2
"""Position tables start at 2, as in fairseq; their first two rows are never read."""
LEVELS = 4


class Multiway(nn.Module):
    """A layer of which the image's tokens pass copy A and the words' copy B."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.A, self.B = build(), build()

    def forward(self, x: Tensor, split: int) -> Tensor:
        """X [B, N, C], of which the first `split` tokens are the image's."""
        if split == 0:
            return self.B(x)
        if split == x.shape[1]:
            return self.A(x)
        return torch.cat([self.A(x[:, :split]), self.B(x[:, split:])], dim=1)


class MultiwayAttention(nn.Module):
    """Self-attention over all tokens of both modalities; only the projections and the inner norm are per modality."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (Multiway(lambda: _linear(dim, dim)) for _ in range(3))
        self.out_proj = Multiway(lambda: _linear(dim, dim))
        self.inner_attn_ln = Multiway(lambda: nn.LayerNorm(dim))

    def forward(self, x: Tensor, split: int, mask: Tensor | None) -> Tensor:
        """X [B, N, C], mask [B, 1, 1, N] bool (True = may be read) or None."""
        q, k, v = (
            project(x, split).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.out_proj(self.inner_attn_ln(read, split), split)


class FeedForward(nn.Module):
    """Two linear layers with a GELU and a norm between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = _linear(dim, hidden), _linear(hidden, dim)
        self.ffn_layernorm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x))))


class Block(nn.Module):
    """Pre-norm attention and feed-forward network."""

    def __init__(self, dim: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.self_attn = MultiwayAttention(dim, heads)
        self.self_attn_layer_norm = Multiway(lambda: nn.LayerNorm(dim))
        self.ffn = Multiway(lambda: FeedForward(dim, 4 * dim))
        self.final_layer_norm = Multiway(lambda: nn.LayerNorm(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, split: int, mask: Tensor | None) -> Tensor:
        """As `MultiwayAttention`."""
        x = x + self.drop_path(self.self_attn(self.self_attn_layer_norm(x, split), split, mask))
        return x + self.drop_path(self.ffn(self.final_layer_norm(x, split), split))


class Positions(nn.Module):
    """Position tables: A the image's, B the words'."""

    def __init__(self, patches: int, text_positions: int, dim: int) -> None:
        super().__init__()
        self.A = nn.Embedding(1 + patches + FIRST_POSITION, dim)
        self.B = nn.Embedding(text_positions, dim)


class MultiwayEncoder(nn.Module):
    """Position tables, blocks and a last norm; the official `encoder`."""

    def __init__(self, dim: int, depth: int, heads: int, patches: int, text_positions: int, drop_path: float) -> None:
        super().__init__()
        self.embed_positions = Positions(patches, text_positions, dim)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.layers = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.layer_norm = Multiway(lambda: nn.LayerNorm(dim))


class VisionEmbedding(nn.Module):
    """Patches of an image as tokens."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        trunc_normal_(self.cls_token, std=0.02)


class BEiT3Encoder(nn.Module):
    """Image, words or both -> their tokens after the blocks named. The defaults are BEiT-3 base at 224 pixels."""

    def __init__(
        self,
        *,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        patch: int = 16,
        table_size: int = 14,
        vocab_size: int = 64010,
        text_positions: int = 1024,
        drop_path: float = 0.0,
    ) -> None:
        """table_size: side of the image's position table in patches."""
        super().__init__()
        self.dim, self.patch, self.table_size = dim, patch, table_size
        self.text_embed = nn.Embedding(vocab_size, dim)
        self.vision_embed = VisionEmbedding(dim, patch)
        self.encoder = MultiwayEncoder(dim, depth, heads, table_size**2, text_positions, drop_path)
        for table in (self.text_embed, self.encoder.embed_positions.A, self.encoder.embed_positions.B):
            nn.init.normal_(table.weight, std=0.02)
        self.taps = [depth * (i + 1) // LEVELS - 1 for i in range(LEVELS)]
        self.gradient_checkpointing = False

    def embed_image(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image [B, 3, H, W], sides multiples of the patch -> tokens [B, V, C], grid (h, w)."""
        patches = self.vision_embed.proj(image)
        grid = (patches.shape[-2], patches.shape[-1])
        cls = self.vision_embed.cls_token.expand(patches.shape[0], -1, -1)
        x = torch.cat([cls.to(patches.dtype), patches.flatten(2).transpose(1, 2)], dim=1)
        table = resampled(self.encoder.embed_positions.A.weight, grid)
        return x + table[FIRST_POSITION:], grid

    def embed_words(self, input_ids: Tensor, text_mask: Tensor) -> Tensor:
        """input_ids [B, L] int64, text_mask [B, L] bool -> [B, L, C], zero at padded tokens."""
        positions = self.encoder.embed_positions.B.weight[FIRST_POSITION : FIRST_POSITION + input_ids.shape[1]]
        return (self.text_embed(input_ids) + positions) * text_mask[..., None]

    def forward(self, x: Tensor, split: int, mask: Tensor | None) -> list[Tensor]:
        """Embedded tokens [B, N, C], the first `split` the image's; mask [B, 1, 1, N] bool (True = may be read).

        Returns the outputs of the four tapped blocks, every one after the last norm.
        """
        outputs = []
        for i, layer in enumerate(self.encoder.layers):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, split, mask, use_reentrant=False)
            else:
                x = layer(x, split, mask)
            if i in self.taps:
                outputs.append(self.encoder.layer_norm(x, split))
        return outputs

    def encode_together(
        self, image: Tensor, input_ids: Tensor, text_mask: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Image and words, which read each other. For every tapped block: map [B, C, h, w], words [B, L, C], and the
        image's first token [B, C].
        """
        pixels, grid = self._embed_padded(image)
        words = self.embed_words(input_ids, text_mask)
        split = pixels.shape[1]
        mask = F.pad(text_mask, (split, 0), value=True)[:, None, None, :]
        outputs = self(torch.cat([pixels, words.to(pixels.dtype)], dim=1), split, mask)
        return [(_as_map(x[:, 1:split], grid), x[:, split:], x[:, 0]) for x in outputs]

    def encode_alone(self, image: Tensor, input_ids: Tensor, text_mask: Tensor) -> AlignmentFeatures:
        """The image without words [B, C, h, w], and the words without image [B, L, C], after the last block."""
        pixels, grid = self._embed_padded(image)
        alone = self(pixels, pixels.shape[1], None)[-1]
        words = self.embed_words(input_ids, text_mask)
        tokens = self(words, 0, text_mask[:, None, None, :])[-1]
        return AlignmentFeatures(_as_map(alone[:, 1:], grid), tokens, text_mask)

    def _embed_padded(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed an image [B, 3, H, W], padded at right and bottom to whole patches."""
        height, width = image.shape[-2:]
        return self.embed_image(F.pad(image, (0, -width % self.patch, 0, -height % self.patch)))


def resampled(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """An image's position table [FIRST_POSITION + 1 + side^2, C] for another grid of patches: bicubic.

    The rows that are never read, and the first token's, stay as they are.
    """
    first = FIRST_POSITION + 1
    side = math.isqrt(len(table) - first)
    if grid == (side, side):
        return table
    cells = table[first:].T.unflatten(1, (side, side))[None].float()
    cells = F.interpolate(cells, grid, mode="bicubic", align_corners=False)[0].flatten(1).T
    return torch.cat([table[:first], cells.to(table.dtype)])


class LightDecoder(nn.Module):
    """Four maps of one stride -> pixel features at four times their resolution, and the sentence's vector for them."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.merge = nn.Sequential(
            nn.Conv2d(LEVELS * dim, width, 1), nn.GroupNorm(8, width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.enlarge = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, stride=2),
            nn.GroupNorm(8, width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, stride=2),
        )
        self.sentence = nn.Sequential(nn.Linear(2 * dim, width), nn.GELU(), nn.Linear(width, width + 1))
        self.no_target = nn.Linear(2 * dim, 2)

    def forward(self, maps: list[Tensor], sentence: Tensor) -> tuple[Tensor, Tensor]:
        """maps: four [B, C, h, w]; sentence [B, 2 C] -> mask logits [B, 1, 4h, 4w], no-target logits [B, 2]."""
        pixels = self.enlarge(self.merge(torch.cat(maps, dim=1)))
        kernel = self.sentence(sentence)
        weight, bias = kernel[:, :-1], kernel[:, -1]
        logits = torch.einsum("bd,bdhw->bhw", weight, pixels) / weight.shape[1] ** 0.5 + bias[:, None, None]
        return logits[:, None], self.no_target(sentence)


class BEiT3(RISModel):
    """BEiT-3 and the light decoder; one-channel logits at a quarter of the patch."""

    encoders = ("beit3",)
    mask_channels = 1

    def __init__(self, beit3: BEiT3Encoder, *, width: int = 256, encoder_lr_scale: float = 0.1) -> None:
        """width: of the decoder, a multiple of 8. encoder_lr_scale: what the encoder's rate is multiplied by."""
        super().__init__()
        self.beit3 = beit3
        self.decoder = LightDecoder(beit3.dim, width)
        self.encoder_lr_scale = encoder_lr_scale
        self.alignment_dims = self.fused_dims = (beit3.dim, beit3.dim)

    def encode(self, batch: Batch) -> Features:
        """Image and words together; maps of the four blocks, from early to deep, and the last block's words."""
        outputs = self.beit3.encode_together(batch.image, batch.input_ids, batch.text_mask)
        _, words, first = outputs[-1]
        return Features(tuple(visual for visual, _, _ in outputs), words, batch.text_mask, {"image": first})

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        sentence = torch.cat([features.extra["image"], features.text[:, 0]], dim=1)
        logits, no_target = self.decoder(list(features.visual), sentence)
        size = (batch.image.shape[-2], batch.image.shape[-1])
        aux = {"no_target": no_target, "fused_visual": features.visual[-1], "fused_text": features.text}
        return ModelOutput(at_image_size(logits, size, self.beit3.patch), aux)

    def alignment_features(
        self, batch: Batch, features: Features | None = None, *, text: str | None = None, visual: str | None = None
    ) -> AlignmentFeatures:
        """The image alone [B, C, h, w] and the words alone [B, L, C]; `features` have seen each other."""
        return self.beit3.encode_alone(batch.image, batch.input_ids, batch.text_mask)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The encoder at its own rate; norms, embeddings, biases and other vectors do not decay."""
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            kind, scale = ("encoder", self.encoder_lr_scale) if name.startswith("beit3.") else ("decoder", 1.0)
            decays = parameter.ndim > 1 and not any(word in name for word in ("embed_positions", "text_embed", "cls_"))
            group = groups.setdefault(
                f"{kind}_{'decay' if decays else 'no_decay'}",
                {"params": [], "lr": lr * scale, "weight_decay": weight_decay if decays else 0.0},
            )
            group["params"].append(parameter)
        return [{"name": name, **group} for name, group in groups.items()]

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        """Convert a pretrained or fine-tuned BEiT-3 encoder; the decoder's keys are missing, because it is ours."""
        return convert(official, self.state_dict(), drops=DROPS)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.beit3.gradient_checkpointing = enabled


def _as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, grid)


def _linear(in_dim: int, dim: int) -> nn.Linear:
    linear = nn.Linear(in_dim, dim)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _build(encoder: BEiT3Encoder, vision_weights: str | None, text_weights: str | None, **model: Any) -> BEiT3:
    if text_weights is not None:
        raise UserError("BEiT-3 reads words with the same encoder; leave model.text_weights out")
    if vision_weights is not None:
        load_beit3(encoder, vision_weights)
    return BEiT3(encoder, **model)


def load_beit3(encoder: BEiT3Encoder, weights: str) -> None:
    """Fill an encoder from an official file (beit3_base_patch16_224.pth, .._indomain_.., or a fine-tuned one).

    An image's position table of another size is resampled, as the official code does.
    Raises UserError for anything but a file: no hub has the official file with its text weights.
    """
    if not is_file(weights):
        raise UserError(
            f"BEiT-3's weights {weights!r} are not a file; download beit3_base_patch16_224.pth from microsoft/unilm "
            f"and name it (model.vision_weights)"
        )
    state = {
        key.removeprefix("beit3."): value
        for key, value in read_state_dict(Path(weights)).items()
        if key.startswith("beit3.") and not key.endswith("mask_token")
    }
    table = "encoder.embed_positions.A.weight"
    if table in state and math.isqrt(len(state[table]) - FIRST_POSITION - 1) != encoder.table_size:
        state[table] = resampled(state[table], (encoder.table_size, encoder.table_size))
    fill(encoder, state, weights)


def _info(size: int, tokenizer: str, max_tokens: int) -> ModelInfo:
    return ModelInfo(
        paper="BEiT-3: Image as a Foreign Language (CVPR 2023), with a light decoder of ours",
        official_code="github.com/microsoft/unilm, beit3 (encoder)",
        licence="MIT (encoder); the decoder is ours, Apache-2.0",
        aml_scores="the image alone x the words alone through the shared encoder",
        preprocess=Preprocess(
            size=size,
            resize="square",
            normalization="half",
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            sentence_field="sent",
        ),
        protocol=NETWORK_FRAME,
        loss="mask_and_presence",
    )


@register_model(_info(384, "YxZhang/evf-sam", 32))
def beit3_base(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 64010,
    table_size: int = 14,
    drop_path_rate: float = 0.1,
) -> BEiT3:
    """BEiT-3 base, patches of 16 pixels.

    vision_weights: the official file, which holds the text weights too. vocab_size: of the tokenizer (beit3.spm).
    table_size: side of the file's position table in patches: 14 for the 224-pixel files, 24 for 384.
    """
    encoder = BEiT3Encoder(vocab_size=max(vocab_size, 64010), table_size=table_size, drop_path=drop_path_rate)
    return _build(encoder, vision_weights, text_weights)


@register_model(_info(384, "YxZhang/evf-sam", 32))
def beit3_large(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 64010,
    table_size: int = 14,
    drop_path_rate: float = 0.1,
) -> BEiT3:
    """BEiT-3 large, patches of 16 pixels; arguments as in `beit3_base`."""
    encoder = BEiT3Encoder(
        dim=1024,
        depth=24,
        heads=16,
        vocab_size=max(vocab_size, 64010),
        table_size=table_size,
        drop_path=drop_path_rate,
    )
    return _build(encoder, vision_weights, text_weights)


@register_model(_info(96, "wordpiece", 24))
def beit3_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    drop_path_rate: float = 0.0,
) -> BEiT3:
    """A small BEiT-3 with patches of 8 pixels that learns synthetic scenes from scratch on two CPU cores."""
    encoder = BEiT3Encoder(
        dim=96,
        depth=4,
        heads=4,
        patch=8,
        table_size=12,
        vocab_size=vocab_size,
        text_positions=66,
        drop_path=drop_path_rate,
    )
    return _build(encoder, vision_weights, text_weights, width=64, encoder_lr_scale=1.0)
