"""C3VG: a coarse box and mask from one query, then fine ones from a map that the coarse ones re-weight.

Paper: Dai et al., Multi-task Visual Grounding with Coarse-to-Fine Consistency Constraints, AAAI 2025. Official code:
Dmmm1997/C3VG, commit 7738820 (Apache-2.0). Reimplemented; every recorded tensor of the official code is reproduced
(tests/parity/c3vg.py). BEiT-3 reads image and words together; there is one query per sentence, so nothing is matched.

Kept, because the released weights were trained with it:
- The sentence's vector was meant as a maximum over real tokens, but the padding is used as an index: it is the last
  position's vector, or the maximum of the last two where the sentence is padded. So it depends on `max_tokens`.
- The words' position code has lost its frequencies (`collapsed_code`).
- The box of the coarse stage picks its region in shares of the image, not in cells: at most the map's first few cells.
- The pixel head has one set of weights for both stages. LayerNorm over channels has epsilon 1e-5. Images are normalised
  with ImageNet's statistics, not with BEiT-3's.
`as_released=False` builds the network as it was meant: a maximum over real tokens, a sine code, a region in cells.

Not kept: two decoders that are never called, one whose result is overwritten, two segmentation branches and two
embeddings without effect (140 tensors, 7.5 M parameters, that never get a gradient); the box divided by (height, width,
height, width), which is the same on square images only.

Its boxes are the annotation's, as in the official code; around the target mask where a row has none (`data.boxes`).

What AML scores: the image alone x the words alone through BEiT-3, one more pass; 71 % of a forward.

Dimensions: B batch, L text tokens, C encoder width, D head width, h w grid of patches, N = h w.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.config.schema import Preprocess
from amltrain.errors import UserError
from amltrain.matching import corners_of, sides
from amltrain.models.base import Conversion, RISModel, convert
from amltrain.models.beit3 import BEiT3Encoder, load_beit3, resampled
from amltrain.models.layers.basic import sine_position
from amltrain.models.layers.cris_decoder import at_image_size
from amltrain.models.layers.query_reader import MLP, OFFICIAL_READER_NAMES, Reader, SelfReader, collapsed_code
from amltrain.models.registry import NETWORK_FRAME, ModelInfo, register_model
from amltrain.records import AlignmentFeatures, Batch, Features, ModelOutput

RENAMES = [
    (r"^module\.", ""),
    (r"^vis_enc\.beit3\.", "beit3."),
    (r"^head\.lan_embedding\.", "words."),
    (r"^head\.img_embedding\.", "image."),
    (r"^head\.query_embedding\.", "query."),
    (r"^head\.query_augment_module\.query2text_crossattn\.", "query_words."),
    (r"^head\.query_augment_module\.query2img_crossattn\.", "query_image."),
    (r"^head\.query_augment_module\.query_embed\.", "learned_query."),
    (r"^head\.box_branch_first\.predict\.", "coarse_box."),
    (r"^head\.box_branch_second\.predict\.", "fine_box."),
    (r"^head\.proj_pixel_level_cons\.vis\.", "pixel_head.visual."),
    (r"^head\.proj_pixel_level_cons\.txt\.", "pixel_head.kernel."),
    (r"^head\.UIM\.img_embedding\.", "interaction.image."),
    (r"^head\.UIM\.box_coorinate_embed\.", "interaction.coordinates."),
    (r"^head\.UIM\.box_linear\.", "interaction.box."),
    (r"^head\.UIM\.seg_linear\.", "interaction.cells."),
    (r"^head\.UIM\.box2text_crossattn\.", "interaction.box_words."),
    (r"^head\.UIM\.box2img_crossattn\.", "interaction.box_image."),
    (r"^head\.UIM\.sa\.", "interaction.cells_self."),
    (r"^head\.neck\.fpn1\.", "neck.four_times."),
    (r"^head\.neck\.fpn2\.0\.", "neck.twice."),
    (r"^head\.neck\.lateral_convs\.(\d)\.conv\.", r"neck.lateral.\1.0."),
    (r"^head\.neck\.lateral_convs\.(\d)\.norm_layer\.", r"neck.lateral.\1.1."),
    (r"^head\.neck\.fpn_convs\.(\d)\.conv\.", r"neck.lateral.\1.2."),
    (r"^head\.neck\.fpn_convs\.(\d)\.norm_layer\.", r"neck.lateral.\1.3."),
    *(
        (rf"^head\.fpn_decoder\.{kind}{i}_{4 - step}\.", f"decoder.steps.{step}.{3 * (i - 1) + (kind == 'bn')}.")
        for step in range(3)
        for i in (1, 2)
        for kind in ("conv", "bn")
    ),
    *OFFICIAL_READER_NAMES,
]
DROPS = [
    (r"(module\.)?vis_enc\.beit3\.vision_embed\.mask_token", "pretraining's stand-in for hidden patches"),
    (r"(module\.)?head\.UIM\.(seg2img_crossattn|segboxCA)\..*", "a decoder that is never called"),
    (r"(module\.)?head\.UIM\.seg2text_crossattn\..*", "a decoder whose result is overwritten"),
    (r"(module\.)?head\.(seg_branch_\w+|seg_cons_embedding|box_cons_embedding)\..*", "without effect"),
    (r"(module\.)?head\.logit_scale", "without effect"),
]
BOX_WEIGHT_OUTSIDE = 0.1


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, C, h, w]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PixelHead(nn.Module):
    """The sentence's vector makes a weight per channel and a bias: one logit per pixel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.visual = nn.Conv2d(dim, dim // 2, 1)
        self.kernel = nn.Linear(dim, dim // 2 + 1)

    def forward(self, x: Tensor, sentence: Tensor) -> Tensor:
        """X [B, D, h, w], sentence [B, D] -> logits [B, 1, h, w]."""
        kernel = self.kernel(sentence)
        logits = torch.einsum("bc,bchw->bhw", kernel[:, :-1], self.visual(x))
        return (logits + kernel[:, -1, None, None])[:, None]


class Interaction(nn.Module):
    """The coarse box and mask re-weight the map; box and cells then read words and map once more."""

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float, as_released: bool) -> None:
        super().__init__()
        self.as_released = as_released
        self.image = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim))
        self.coordinates = nn.Linear(4, dim)
        self.box = MLP(2 * dim, dim, dim, dim)
        self.cells = MLP(4 * dim, dim, dim, dim)
        self.box_words = Reader(dim, heads, feedforward, 1, dropout)
        self.box_image = Reader(dim, heads, feedforward, 3, dropout)
        self.cells_self = SelfReader(dim, heads, feedforward, 3, dropout)

    def forward(
        self, x: Tensor, words: Tensor, padding: Tensor, coarse_box: Tensor, coarse_logits: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """X [B, D, h, w], words [B, L, D], padding [B, L] bool, coarse_box [B, 4] shares, coarse_logits [B, 1, h, w],
        position [N, D] -> the box's vector [B, D], refined map [B, D, h, w].
        """
        height, width = x.shape[-2:]
        seen = F.relu(self.image(x))
        corners = corners_of(coarse_box.detach())
        region = corners if self.as_released else corners * sides(corners, width, height)
        box = self.box(torch.cat([region_maximum(seen, region), self.coordinates(coarse_box)], dim=1))
        inside = box_weights(corners, (height, width))[:, None].to(seen.dtype)
        weight = coarse_logits.sigmoid()
        cells = torch.cat([seen * weight, seen * inside, seen * weight * inside, seen], dim=1)
        cells = self.cells(cells.flatten(2).transpose(1, 2))
        query = self.box_words(box[:, None], words, padding=padding)
        query = self.box_image(query, cells, memory_position=position)
        refined = self.cells_self(cells, position)
        return query[:, 0], refined.transpose(1, 2).unflatten(2, (height, width))


def region_maximum(x: Tensor, corners: Tensor) -> Tensor:
    """The largest value of every channel in a box, as RoI max pooling to one cell; 0 where no cell is left.

    x [B, D, h, w]; corners [B, 4] in cells, rounded half away from zero, the last cell included. -> [B, D].
    """
    corners = corners.sign() * (corners.abs() + 0.5).floor()
    low, high = corners[:, :2], corners[:, 2:]
    high = torch.maximum(high, low)
    inside = (
        _between(low[:, 1], high[:, 1] + 1, x.shape[2])[:, :, None]
        & _between(low[:, 0], high[:, 0] + 1, x.shape[3])[:, None, :]
    )
    largest = x.masked_fill(~inside[:, None], -torch.inf).flatten(2).amax(dim=2)
    return largest.masked_fill(~inside.flatten(1).any(dim=1)[:, None], 0.0)


def box_weights(corners: Tensor, size: tuple[int, int]) -> Tensor:
    """1 in the cells that a box touches, BOX_WEIGHT_OUTSIDE elsewhere. corners [B, 4] shares -> [B, h, w] float."""
    rows = _between((corners[:, 1] * size[0]).floor(), (corners[:, 3] * size[0]).ceil(), size[0])
    columns = _between((corners[:, 0] * size[1]).floor(), (corners[:, 2] * size[1]).ceil(), size[1])
    inside = (rows[:, :, None] & columns[:, None, :]).to(corners.dtype)
    return BOX_WEIGHT_OUTSIDE + (1 - BOX_WEIGHT_OUTSIDE) * inside


def _between(low: Tensor, end: Tensor, count: int) -> Tensor:
    """low, end [B] -> [B, count] bool, True at indices low <= i < end."""
    index = torch.arange(count, device=low.device)
    return (index >= low[:, None]) & (index < end[:, None])


class Neck(nn.Module):
    """A map of one stride -> maps of four: four times and twice as fine, the same, half as fine."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.four_times = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 2, 2, stride=2),
            ChannelNorm(dim // 2),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2),
        )
        self.twice = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)
        self.widths = (dim // 4, dim // 2, dim, 2 * dim)
        self.lateral = nn.ModuleList(
            nn.Sequential(
                _convolution(given, width, 1), ChannelNorm(width), _convolution(width, width, 3), ChannelNorm(width)
            )
            for given, width in zip((dim // 4, dim // 2, dim, dim), self.widths, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """X [B, D, h, w] -> maps of widths D/4, D/2, D, 2D, from fine to coarse."""
        half = F.max_pool2d(x, 2, ceil_mode=min(x.shape[-2:]) < 2)
        maps = (self.four_times(x), self.twice(x), x, half)
        return [lateral(m) for lateral, m in zip(self.lateral, maps, strict=True)]


class ConvolutionDecoder(nn.Module):
    """From the coarsest map to the finest: enlarge, join, two convolutions."""

    def __init__(self, dim: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        given = (widths[3] + widths[2], dim + widths[1], dim + widths[0])
        self.steps = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(wide, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), nn.ReLU()),
                *(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), nn.ReLU()),
            )
            for wide in given
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps from fine to coarse -> [B, D, 4h, 4w]."""
        y = maps[3]
        for step, skip in zip(self.steps, reversed(maps[:3]), strict=True):
            y = F.interpolate(y, skip.shape[-2:], mode="bilinear", align_corners=True)
            y = step(torch.cat([y, skip], dim=1))
        return y


def _convolution(given: int, dim: int, kernel: int) -> nn.Conv2d:
    convolution = nn.Conv2d(given, dim, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


class C3VG(RISModel):
    """BEiT-3 and the coarse-to-fine head; one-channel logits at four times the grid of patches."""

    encoders = ("beit3",)
    mask_channels = 1
    needs_boxes = True

    def __init__(
        self,
        beit3: BEiT3Encoder,
        *,
        dim: int = 256,
        heads: int = 8,
        feedforward: int = 1024,
        dropout: float = 0.1,
        encoder_lr_scale: float = 0.1,
        as_released: bool = True,
    ) -> None:
        """dim: of the head, a multiple of 4 and of heads. encoder_lr_scale: multiplies the encoder's rate."""
        super().__init__()
        self.beit3 = beit3
        self.words = nn.Linear(beit3.dim, dim, bias=False)
        self.image = nn.Conv2d(beit3.dim, dim, 1, bias=False)
        self.query = nn.Linear(beit3.dim, dim, bias=False)
        self.learned_query = nn.Embedding(1, dim)
        self.query_words = Reader(dim, heads, feedforward, 1, dropout)
        self.query_image = Reader(dim, heads, feedforward, 1, dropout)
        self.coarse_box, self.fine_box = MLP(dim, dim, dim, 4), MLP(dim, dim, dim, 4)
        self.pixel_head = PixelHead(dim)
        self.interaction = Interaction(dim, heads, feedforward, dropout, as_released)
        self.neck = Neck(dim)
        self.decoder = ConvolutionDecoder(dim, self.neck.widths)
        self.encoder_lr_scale, self.as_released = encoder_lr_scale, as_released
        self.alignment_dims = self.fused_dims = (beit3.dim, beit3.dim)

    def encode(self, batch: Batch) -> Features:
        """Image and words together; the map and the words of the last block, and the image's first token."""
        visual, words, first = self.beit3.encode_together(batch.image, batch.input_ids, batch.text_mask)[-1]
        return Features((visual,), words, batch.text_mask, {"image": first})

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        """Fine logits; aux: coarse_logits [B, 1, h, w], box and coarse_box [B, 4] shares of the image, fused features.

        Of an image that was padded to whole patches, logits and boxes are given for the image itself.
        """
        visual = self.image(features.visual[-1])
        words, padding = self.words(features.text), ~features.text_mask
        sentence = self._sentence(words, features.text_mask)
        position = self._image_position(visual)
        box = self._coarse_query(features.extra["image"], words, padding, visual, position)
        coarse_box = self.coarse_box(box).sigmoid()
        coarse_logits = self.pixel_head(visual, sentence)
        box, refined = self.interaction(visual, words, padding, coarse_box, coarse_logits, position)
        logits = self.pixel_head(self.decoder(self.neck(refined)), sentence)
        size, patch = (batch.image.shape[-2], batch.image.shape[-1]), self.beit3.patch
        frame = sides(logits, 1 + (-size[1] % patch) / size[1], 1 + (-size[0] % patch) / size[0])
        aux = {
            "coarse_logits": at_image_size(coarse_logits, size, patch),
            "coarse_box": coarse_box * frame,
            "box": self.fine_box(box).sigmoid() * frame,
            "fused_visual": features.visual[-1],
            "fused_text": features.text,
        }
        return ModelOutput(at_image_size(logits, size, patch), aux)

    def alignment_features(
        self, batch: Batch, features: Features | None = None, *, text: str | None = None, visual: str | None = None
    ) -> AlignmentFeatures:
        """The image alone [B, C, h, w] and the words alone [B, L, C]; `features` have seen each other."""
        return self.beit3.encode_alone(batch.image, batch.input_ids, batch.text_mask)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The encoder at a tenth of the rate; the official recipe has no weight decay, a given one is everyone's."""
        encoder = [p for p in self.beit3.parameters() if p.requires_grad]
        known = {id(p) for p in encoder}
        head = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        return [
            {"name": "encoder", "params": encoder, "lr": lr * self.encoder_lr_scale, "weight_decay": weight_decay},
            {"name": "head", "params": head, "lr": lr, "weight_decay": weight_decay},
        ]

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        """As `RISModel`; the image's position table is resampled to this model's size, as the official loader does."""
        grid = (self.beit3.table_size, self.beit3.table_size)
        fitted = {
            key: resampled(value, grid) if key.endswith(".embed_positions.A.weight") else value
            for key, value in official.items()
        }
        return convert(fitted, self.state_dict(), renames=RENAMES, drops=DROPS)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.beit3.gradient_checkpointing = enabled

    def _sentence(self, words: Tensor, text_mask: Tensor) -> Tensor:
        """Words [B, L, D], text_mask [B, L] bool -> [B, D]; see the file's head."""
        if not self.as_released:
            return words.masked_fill(~text_mask[..., None], -torch.inf).amax(dim=1)
        last, before = words[:, -1], words[:, -2]
        return last.where(text_mask.all(dim=1)[:, None], torch.maximum(last, before))

    def _coarse_query(self, first: Tensor, words: Tensor, padding: Tensor, visual: Tensor, position: Tensor) -> Tensor:
        """First [B, C], words [B, L, D], padding [B, L] bool, visual [B, D, h, w], position [N, D] -> [B, D]."""
        start = (self.query(first) + self.learned_query.weight)[:, None]
        empty = torch.zeros_like(start)
        word_position = self._word_position(words)
        query = self.query_words(empty, words, position=start, memory_position=word_position, padding=padding)
        cells = visual.flatten(2).transpose(1, 2)
        return self.query_image(empty, cells, position=query, memory_position=position)[:, 0]

    def _image_position(self, x: Tensor) -> Tensor:
        return sine_position(x.shape[-2], x.shape[-1], x.shape[1], device=x.device).to(x.dtype)

    def _word_position(self, words: Tensor) -> Tensor:
        length, dim = words.shape[1:]
        if self.as_released:
            return collapsed_code(length, dim, device=words.device).to(words.dtype)
        steps = torch.arange(length, device=words.device, dtype=torch.float32)
        frequencies = torch.exp(torch.arange(0, dim, 2, device=words.device).float() * (-math.log(10000.0) / dim))
        angle = steps[:, None] * frequencies
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).to(words.dtype)


def _build(encoder: BEiT3Encoder, vision_weights: str | None, text_weights: str | None, **model: Any) -> C3VG:
    if text_weights is not None:
        raise UserError("C3VG's BEiT-3 reads words with the same encoder; leave model.text_weights out")
    if vision_weights is not None:
        load_beit3(encoder, vision_weights)
    return C3VG(encoder, **model)


def _info(size: int, tokenizer: str) -> ModelInfo:
    return ModelInfo(
        paper="Multi-task Visual Grounding with Coarse-to-Fine Consistency Constraints (AAAI 2025)",
        official_code="github.com/Dmmm1997/C3VG, commit 7738820",
        licence="Apache-2.0; its BEiT-3 encoder MIT",
        aml_scores="the image alone x the words alone through the shared encoder",
        preprocess=Preprocess(
            size=size,
            resize="square_aliased",
            normalization="imagenet",
            tokenizer=tokenizer,
            max_tokens=20,
            sentence_field="sent",
        ),
        protocol=NETWORK_FRAME,
        loss="c3vg",
    )


@register_model(_info(320, "YxZhang/evf-sam"))
def c3vg_beit3_base(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 64010,
    table_size: int = 20,
    dropout: float = 0.1,
    drop_path_rate: float = 0.1,
    as_released: bool = True,
) -> C3VG:
    """C3VG on BEiT-3 base, patches of 16 pixels: the official C3VG-Mix.

    vision_weights: the official BEiT-3 file, whose position table is resampled where it has another size.
    table_size: side of the model's position table in patches, 20 for 320 pixels. dropout: of the head.
    as_released: see the head of this file; False only for weights of your own.
    """
    encoder = BEiT3Encoder(vocab_size=max(vocab_size, 64010), table_size=table_size, drop_path=drop_path_rate)
    return _build(encoder, vision_weights, text_weights, dropout=dropout, as_released=as_released)


@register_model(_info(96, "wordpiece"))
def c3vg_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    dropout: float = 0.0,
    drop_path_rate: float = 0.0,
    as_released: bool = True,
) -> C3VG:
    """A small C3VG with patches of 8 pixels that learns synthetic scenes from scratch on two CPU cores."""
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
    head = {"dim": 64, "feedforward": 128, "encoder_lr_scale": 1.0}
    return _build(encoder, vision_weights, text_weights, dropout=dropout, as_released=as_released, **head)
