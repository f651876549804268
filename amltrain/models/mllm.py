"""A language model that reads image and sentence, and SAM, which draws what it names: GSVA, LISA, and their kind.

Papers: Xia et al., GSVA: Generalized Segmentation via Multimodal Large Language Models, CVPR 2024; Lai et al., LISA:
Reasoning Segmentation via Large Language Model, CVPR 2024. Official code: LeapLabTHU/GSVA, commit 618dc79;
dvlab-research/LISA, commit 3cb2d43 (both Apache-2.0). Reimplemented on transformers' Llava and SAM modules; every
recorded case is reproduced (tests/parity/gsva.py).

The language model reads a conversation: the image's tokens, a question, and an answer with [SEG] for every sentence,
or [REJ] for one that names nothing here. The state that predicts an answer's token is the prompt of SAM's mask decoder.

A batch without conversations gets the shortest one there is: image, sentence, answer. Its answer is one token, so a
prediction takes one pass: [SEG] against [REJ] where the answer is due, with no ground truth in the input.

Kept: the state before [SEG], not at it; a rejected sentence in training has logits of 0 everywhere, without gradient,
which count in the mean of the loss; SAM's decoder with epsilon 1e-5.

Not kept: the official code builds LLaVA's trained projector again, with random values, and freezes it. The parts of SAM
that no mask is read from stay frozen (official: trained, with a gradient of 0). A batch without `view` makes the
language model's picture from SAM's; the official one is cut from the original.

What AML scores: the projected patches x the rows of the embedding table of the sentence's tokens; every later state of
a word has read the image.

Dimensions: B sentences, P pictures, R conversations, T tokens, N image tokens, D width of the language model, C of
SAM's decoder, S side of SAM's input.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from amltrain.config.schema import Preprocess, Protocol
from amltrain.frames import MEAN_STD, inside_longest
from amltrain.models.backbones.llava import NAMES, build_reader, llava_7b, load_reader, sizes_of
from amltrain.models.base import Conversion, RISModel, convert
from amltrain.models.layers.basic import Tuning, tune
from amltrain.models.layers.prompted_sam import OFFICIAL_DROPS, PromptedSAM, sam_huge, sam_tiny
from amltrain.models.registry import ModelInfo, register_model
from amltrain.records import IMAGE, UNSCORED, AlignmentFeatures, Batch, Conversation, Features, ModelOutput

RENAMES = [
    (r"^(module\.)?base_model\.model\.", ""),
    (r"^model\.text_hidden_fcs\.0\.", "prompt."),
    (r"^model\.visual_model\.", "visual_model."),
    *NAMES,
    (r"^(lm_head|model)\.", r"reader.\1."),
]
DROPS = [
    (rf"((module\.)?base_model\.model\.)?model\.{pattern}", reason)
    for pattern, reason in OFFICIAL_DROPS
    if pattern.startswith("(")
]
KEYS = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""What transformers calls the keys and values of earlier tokens; until 5.20 it was the second."""
UNSAID = 30.0
"""Logit of a decision that was made by reading or writing a token, and of a mask that was not asked for."""


class MLLMSegmenter(RISModel):
    """A vision-language model and a SAM; one-channel logits at SAM's input size."""

    encoders = ("reader",)
    mask_channels = 1
    encodes_image_alone = True
    rescale: Tensor
    shift: Tensor

    def __init__(
        self,
        reader: LlavaForConditionalGeneration,
        sam: PromptedSAM,
        *,
        segment: int,
        reject: int | None,
        text_tuning: Tuning = "lora",
        vision_tuning: Tuning = "frozen",
        read_images: bool = False,
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.05,
        state_at: int = -1,
    ) -> None:
        """segment, reject: token ids of [SEG] and [REJ]; None = the model cannot reject.

        text_tuning: how the language model's layers train; its embeddings and head always do. vision_tuning: SAM's
        image encoder. read_images: whether the reader's own image encoder and projector train. state_at: where the
        prompt is read, counted from the answer's token: -1 (GSVA, LISA) or 0.
        """
        super().__init__()
        self.reader, self.sam = reader, sam
        self.segment, self.reject, self.state_at = segment, reject, state_at
        text: Any = reader.config.text_config
        vision: Any = reader.config.vision_config
        width, self.view_size = text.hidden_size, vision.image_size
        self.image_tokens = (vision.image_size // vision.patch_size) ** 2
        self.prompt = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, sam.width))
        layer: Any = reader.config.vision_feature_layer
        self.reads, self.read_layers = read_images, vision.num_hidden_layers + 1 + int(layer)
        self.vision_tuning: Tuning = vision_tuning
        sam.tune(vision_tuning, True, lora_rank)
        sam.no_mask_embed.requires_grad_(False)
        inner: Any = reader.model
        inner.vision_tower.requires_grad_(read_images)
        inner.multi_modal_projector.requires_grad_(read_images)
        for unread in (*inner.vision_tower.encoder.layers[self.read_layers :], inner.vision_tower.post_layernorm):
            unread.requires_grad_(False)
        tune(
            inner.language_model,
            text_tuning,
            lora_rank,
            alpha=lora_alpha,
            dropout=lora_dropout,
            targets=("q_proj", "v_proj"),
        )
        inner.language_model.embed_tokens.requires_grad_(True)
        (mean, std), (own_mean, own_std) = (
            torch.tensor(MEAN_STD[name], dtype=torch.float64)[..., None, None] for name in ("imagenet", "clip")
        )
        self.register_buffer("rescale", (std / own_std).float(), persistent=False)
        self.register_buffer("shift", ((mean - own_mean) / own_std).float(), persistent=False)
        self.alignment_dims = (width, width)

    def train(self, mode: bool = True) -> "MLLMSegmenter":
        super().train(mode)
        if self.vision_tuning == "frozen":
            self.sam.vision_encoder.train(False)
        if not self.reads:
            self.reader.model.vision_tower.train(False)  # type: ignore[union-attr]
        return self

    def encode(self, batch: Batch) -> Features:
        """SAM's maps of every sentence's picture as `visual`, embedded words as `text`.

        extra: prompt [B, C]; drawn [B] bool, whether a mask is asked for; what the language model says: language_loss
        [] and no_target [B, 2] where there are such.
        """
        talk = batch.conversation
        if talk is None:
            return self.encode_with_image(batch, self.encode_image(batch.image))
        inside = inside_longest(batch.geometry[talk.pictures], batch.image.shape[-1])
        image = batch.image[talk.pictures] * inside[:, None].to(batch.image.dtype)
        *maps, patches = self.encode_image(image, None if batch.view is None else batch.view[talk.pictures])
        owner = talk.owner[talk.row]
        return self._answer(batch, talk, tuple(level[owner] for level in maps), patches)

    def encode_image(self, image: Tensor, view: Tensor | None = None) -> tuple[Tensor, ...]:
        """Image [P, 3, H, W] and the reader's own picture of it -> SAM's maps, from fine to coarse, and its patches."""
        side = (self.sam.image_size, self.sam.image_size)
        framed = image if image.shape[-2:] == side else F.interpolate(image, side, mode="bilinear", align_corners=False)
        with nullcontext() if self.vision_tuning != "frozen" else torch.no_grad():
            maps = self.sam.encode(framed)
        return (*maps, self.see(image, view))

    def encode_with_image(self, batch: Batch, image: tuple[Tensor, ...]) -> Features:
        """The shortest conversation about every sentence's image."""
        *maps, patches = image
        return self._answer(batch, self._short(batch), tuple(maps), patches)

    def _answer(self, batch: Batch, talk: Conversation, maps: tuple[Tensor, ...], patches: Tensor) -> Features:
        """Read a talk about patches [P, N, D]. maps: of every sentence's picture."""
        states, cache = self._read(talk, patches)
        if talk.open:
            extra = self._write(talk, states, cache)
        else:
            extra = self._judge(talk, states, batch)
            drawn = self._asked(talk) if self.training else talk.place >= 0
            if not self.training and self.reject is not None and talk.scored:
                # every sentence gets a mask: [REJ] is read as [SEG] in a second pass, as the official evaluation does
                said = torch.where(talk.ids == self.reject, self.segment, talk.ids)
                states, _ = self._read(talk._replace(ids=said), patches)
            extra |= {"prompt": self.prompt(self._states_of(talk, states)), "drawn": drawn}
        words = self.reader.get_input_embeddings()(batch.input_ids)
        return Features(maps, words, batch.text_mask, extra)

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        """Logits [B, 1, S, S]; aux: low_resolution [B, 1, S/4, S/4], and language_loss, no_target where there are such.

        SAM draws a mask for every sentence, also for one that is rejected: every process then runs the same parts.
        """
        low = self.sam(features.visual, features.extra["prompt"].to(features.visual[-1].dtype))
        exact = low.to(torch.promote_types(low.dtype, torch.float32))
        side = (self.sam.image_size, self.sam.image_size)
        logits = F.interpolate(exact, side, mode="bilinear", align_corners=False)
        silent = 0.0 if self.training else -UNSAID
        logits = torch.where(features.extra["drawn"][:, None, None, None], logits, silent)
        aux = {key: value for key, value in features.extra.items() if key in ("language_loss", "no_target")}
        return ModelOutput(logits, {"low_resolution": low} | aux)

    def see(self, image: Tensor, view: Tensor | None = None) -> Tensor:
        """Projected patches [P, N, D] of the reader's own picture; None: made of SAM's."""
        picture = self.small_picture(image) if view is None else view.to(image.dtype)
        inner: Any = self.reader.model
        tower = inner.vision_tower
        with nullcontext() if self.reads else torch.no_grad():
            seen = tower.pre_layrnorm(tower.embeddings(picture))
            for layer in tower.encoder.layers[: self.read_layers]:
                seen = layer(seen, attention_mask=None)
        return inner.multi_modal_projector(seen[:, 1:])

    def small_picture(self, image: Tensor) -> Tensor:
        """The reader's picture [B, 3, s, s] from SAM's input [B, 3, S, S], as CLIP normalises it."""
        side = self.view_size
        small = F.interpolate(image, (side, side), mode="bicubic", align_corners=False, antialias=True)
        return small * self.rescale + self.shift

    def alignment_features(
        self, batch: Batch, features: Features | None = None, *, text: str | None = None, visual: str | None = None
    ) -> AlignmentFeatures:
        """The projected patches [B, D, h, w] and the embedded words [B, L, D]; `features` have seen each other."""
        patches = self.see(batch.image, batch.view)
        side = round(patches.shape[1] ** 0.5)
        words = self.reader.get_input_embeddings()(batch.input_ids)
        return AlignmentFeatures(patches.transpose(1, 2).unflatten(2, (side, side)), words, batch.text_mask)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """One group, as in the official code, whose weight decay is 0."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return [{"name": "all", "params": trained, "lr": lr, "weight_decay": weight_decay}]

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        own = self.state_dict()
        updated = [name.removesuffix(".base_layer.weight") for name in own if name.endswith(".base_layer.weight")]
        lora = [(rf"^({re.escape(name)})\.weight$", r"\1.base_layer.weight") for name in updated]
        return convert(official, own, renames=[*RENAMES, *self.sam.renames, *lora], drops=DROPS)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        inner: Any = self.reader.model
        inner.language_model._set_gradient_checkpointing(
            enabled, partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        )
        if self.vision_tuning != "frozen":
            self.sam.set_gradient_checkpointing(enabled)

    def _short(self, batch: Batch) -> Conversation:
        """The shortest conversation, R = B: the image's tokens, the sentence's, and one answer, right padded."""
        count, length = batch.input_ids.shape
        tokens, device = self.image_tokens, batch.input_ids.device
        image = batch.input_ids.new_full((count, tokens), IMAGE)
        answer = torch.full((count, 1), self.segment, device=device)
        if self.reject is not None and self.training:
            answer = torch.where(batch.no_target[:, None], self.reject, answer)
        place = tokens + batch.text_mask.sum(1)
        ids = torch.cat([image, batch.input_ids, answer.new_zeros(count, 1)], dim=1)
        ids = ids.scatter(1, place[:, None], answer)
        steps = torch.arange(tokens + length + 1, device=device)
        labels = torch.where(steps == place[:, None], ids, UNSCORED)
        each = torch.arange(count, device=device)
        return Conversation(ids, labels, steps <= place[:, None], each, place, each, each, scored=False)

    def _read(self, talk: Conversation, patches: Tensor) -> tuple[Tensor, Any]:
        """Talk and patches [P, N, D] -> states after the final norm [R, T, D]; keys and values, of an open talk."""
        inner: Any = self.reader.model
        shown = talk.ids == IMAGE
        embedded = inner.language_model.embed_tokens(talk.ids.masked_fill(shown, 0))
        owned = patches[talk.owner].to(embedded.dtype)
        number = (shown.long().cumsum(1) - 1).clamp(
            min=0
        )  # of the patch; masked_scatter's backward waits for the device
        placed = owned.gather(1, number[..., None].expand(-1, -1, owned.shape[-1]))
        embedded = torch.where(shown[..., None], placed, embedded)
        positions = _positions(talk.mask) if talk.open else None  # padding on the right moves nothing
        mask = talk.mask if talk.open else _causal(talk.mask)  # transformers would wait for the device to make it
        result = inner.language_model(
            inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=talk.open
        )
        return result.last_hidden_state, getattr(result, KEYS, None) if talk.open else None

    def _states_of(self, talk: Conversation, states: Tensor) -> Tensor:
        """The state that prompts each sentence's mask, [B, D]."""
        return states[talk.row, (talk.place + self.state_at).clamp(min=0)]

    def _asked(self, talk: Conversation) -> Tensor:
        """Whether the answer that is in the input asks for a mask, [B] bool."""
        asked = talk.ids[talk.row, talk.place.clamp(min=0)] == self.segment
        return asked & (talk.place >= 0)

    def _judge(self, talk: Conversation, states: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What the language model says to answers that are in the input."""
        head: Any = self.reader.lm_head
        logits = head(states[:, :-1])
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        loss = F.cross_entropy(exact, talk.labels[:, 1:].flatten(), ignore_index=UNSCORED)
        found = {"language_loss": loss}
        if self.reject is None:
            return found
        before = head(states[talk.row, (talk.place - 1).clamp(min=0)]).float()
        yes, no = before[:, self.segment], before[:, self.reject]
        if talk.scored:  # the official rule: where there is a target, whatever is not [SEG] rejects it; else only [REJ]
            others = torch.arange(before.shape[1], device=before.device)
            not_yes = before.masked_fill(others == self.segment, -torch.inf).amax(1)
            not_no = before.masked_fill(others == self.reject, -torch.inf).amax(1)
            yes, no = torch.where(batch.no_target, not_no, yes), torch.where(batch.no_target, no, not_yes)
        return found | {"no_target": torch.stack([yes, no], dim=1)}

    def _write(self, talk: Conversation, states: Tensor, cache: Any, longest: int = 48) -> dict[str, Tensor]:
        """Let the model answer an open talk, left padded, R = B, greedily; waits for the device after every token."""
        inner: Any = self.reader.model
        head: Any = self.reader.lm_head
        state, mask = states[:, -1], talk.mask
        prompt = state
        said = torch.zeros(len(state), dtype=torch.int64, device=state.device)  # 0 nothing yet, 1 [SEG], 2 the end
        rejected = said.bool()
        for _ in range(longest):
            token = head(state).argmax(1)
            now = (said == 0) & (token == self.segment)
            prompt = torch.where(now[:, None], state, prompt)
            if self.reject is not None:
                rejected = rejected | ((said == 0) & (token == self.reject))
            ends = (token == talk.end) | (token == -1 if self.reject is None else token == self.reject)
            said = torch.where(now, 1, torch.where((said == 0) & ends, 2, said))
            if bool((said > 0).all()):
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            result = inner.language_model(
                inputs_embeds=inner.language_model.embed_tokens(token[:, None]),
                attention_mask=mask,
                position_ids=_positions(mask)[:, -1:],
                use_cache=True,
                **{KEYS: cache},
            )
            state, cache = result.last_hidden_state[:, -1], getattr(result, KEYS)
        drawn = said == 1
        found = {"prompt": self.prompt(prompt), "drawn": drawn}
        if self.reject is not None:
            says = torch.where(drawn, UNSAID, -UNSAID).to(state.dtype)
            found["no_target"] = torch.stack([says, -says], dim=1)
        return found


def _causal(mask: Tensor) -> Tensor:
    """What every token reads of a right-padded conversation, [R, 1, T, T] bool: itself and what comes before it."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    return (steps[:, None] >= steps)[None, None] & mask[:, None, None]


def _positions(mask: Tensor) -> Tensor:
    """Number of every token that is read, [R, T] int64, whichever side the padding is on."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


PROTOCOL = Protocol(
    frame="original", threshold=0.5, interpolation="cropped", sentences="all", ties="ge", mask_parts="union"
)


def _info(
    paper: str, code: str, size: int, tokenizer: str, max_tokens: int, talk: Literal["", "gsva", "lisa"]
) -> ModelInfo:
    return ModelInfo(
        paper=paper,
        official_code=code,
        licence="Apache-2.0; LLaMA, LLaVA and SAM have licences of their own",
        aml_scores="projected patches x embedded words, neither of which has read the other",
        preprocess=Preprocess(
            size=size,
            resize="longest",
            normalization="imagenet",
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            sentence_field="sent",
            conversation=talk,
            view_size=224 if talk else 0,
        ),
        protocol=PROTOCOL,
        loss="language_and_masks",
    )


GSVA = "GSVA: Generalized Segmentation via Multimodal Large Language Models (CVPR 2024)"
LISA = "LISA: Reasoning Segmentation via Large Language Model (CVPR 2024)"


def _assemble(
    reader: LlavaForConditionalGeneration,
    sam: PromptedSAM,
    vision_weights: str | None,
    text_weights: str | None,
    **model: Any,
) -> MLLMSegmenter:
    if vision_weights is not None:
        sam.load(vision_weights)
    if text_weights is not None:
        load_reader(reader, text_weights, model["segment"])
    return MLLMSegmenter(reader, sam, **model)


LLAVA = "liuhaotian/LLaVA-Lightning-7B-v1-1"


def _seven_billion(
    vocab_size: int,
    answers: Sequence[int],
    vision_weights: str | None,
    text_weights: str | None,
    text_tuning: Tuning,
    **lora: Any,
) -> MLLMSegmenter:
    """LLaVA 7B v1.1 and SAM ViT-H. answers: ids of [SEG], and of [REJ] where there is one."""
    segment, *reject = answers
    return _assemble(
        build_reader(llava_7b(), vocab_size),
        sam_huge(),
        vision_weights,
        text_weights,
        segment=segment,
        reject=reject[0] if reject else None,
        text_tuning=text_tuning,
        **lora,
    )


@register_model(_info(GSVA, "github.com/LeapLabTHU/GSVA, commit 618dc79", 1024, LLAVA, 64, "gsva"))
def gsva_7b(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 32004,
    answer_tokens: list[int] | None = None,
    text_tuning: Tuning = "lora",
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.05,
) -> MLLMSegmenter:
    """GSVA with LLaVA 7B v1.1 and SAM ViT-H; answers [SEG] or [REJ].

    vision_weights: SAM's, facebook/sam-vit-huge or the official file. text_weights: folder with LLaVA's files.
    answer_tokens: ids of [SEG] and [REJ]; null = 32000 and 32001. text_tuning: how the language model's layers train.
    """
    lora = {"lora_rank": lora_rank, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    answers = answer_tokens or [32000, 32001]
    return _seven_billion(vocab_size, answers, vision_weights, text_weights, text_tuning, **lora)


@register_model(_info(LISA, "github.com/dvlab-research/LISA, commit 3cb2d43", 1024, LLAVA, 64, "lisa"))
def lisa_7b(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 32003,
    answer_tokens: list[int] | None = None,
    text_tuning: Tuning = "lora",
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.05,
) -> MLLMSegmenter:
    """LISA with LLaVA 7B v1.1 and SAM ViT-H; it cannot say that there is nothing.

    The arguments are those of `gsva_7b`; answer_tokens: the id of [SEG]; null = 32000.
    """
    lora = {"lora_rank": lora_rank, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    answers = answer_tokens or [32000]
    return _seven_billion(vocab_size, answers, vision_weights, text_weights, text_tuning, **lora)


@register_model(_info("none: a small GSVA of ours", "none", 96, "wordpiece", 24, ""))
def mllm_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    answer_tokens: list[int] | None = None,
    text_tuning: Tuning = "full",
    lora_rank: int = 8,
) -> MLLMSegmenter:
    """A small GSVA that learns drawn scenes from scratch; 96 pixels. The shortest conversation, answers [SEG] or [REJ].

    answer_tokens: ids of the two; null = two rows behind the vocabulary.
    """
    segment, reject = answer_tokens or (vocab_size, vocab_size + 1)
    sizes = sizes_of(
        width=96,
        layers=3,
        heads=4,
        mlp=256,
        clip=96,
        clip_layers=3,
        clip_heads=4,
        pixels=96,
        patch=8,
        positions=256,
    )
    return _assemble(
        build_reader(sizes, max(vocab_size, segment + 1, reject + 1)),
        sam_tiny(),
        vision_weights,
        text_weights,
        segment=segment,
        reject=reject,
        text_tuning=text_tuning,
        vision_tuning="full",
        read_images=True,
        lora_rank=lora_rank,
    )
