"""Recorded tensors of the official GSVA (commit 618dc79) and LISA (3cb2d43) code and where our model computes them.

A recorded batch has pictures, conversations and sentences; ours has a row per sentence, and here also a picture without
any. Logits are recorded for every [SEG], at the picture's own size.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, SamMaskDecoderConfig, SamVisionConfig

from amltrain.frames import from_longest
from amltrain.losses import create_loss
from amltrain.models.backbones.llava import build_reader
from amltrain.models.layers.prompted_sam import PromptedSAM
from amltrain.models.mllm import MLLMSegmenter
from amltrain.records import IMAGE, UNSCORED, Batch, Conversation, ModelOutput
from tests.parity.compare import Adapter, Read, ReadOutput

SEGMENT, REJECT = 440, 441
"""Ids of all recorded cases; LISA's 441 is <im_start>, which no label holds."""
CASE: dict[str, Any] = {}
"""What a batch cannot say: the rows of the current case."""


def build(config: Mapping[str, Any]) -> MLLMSegmenter:
    llm, clip, sam = config["llm"], config["clip"], config["sam"]
    vision = CLIPVisionConfig(**{k: v for k, v in clip.items() if k != "select_layer"})
    text = LlamaConfig(**{k: v for k, v in llm.items() if k not in ("base_vocab", "rope_theta")})
    reader = LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=clip["select_layer"])
    sam_vision = SamVisionConfig(
        hidden_size=sam["embed_dim"],
        output_channels=sam["prompt_embed_dim"],
        num_hidden_layers=sam["depth"],
        num_attention_heads=sam["num_heads"],
        image_size=sam["img_size"],
        patch_size=sam["patch_size"],
        window_size=sam["window_size"],
        global_attn_indexes=sam["global_attn_indexes"],
        mlp_ratio=float(sam["mlp_ratio"]),
    )
    decoder = SamMaskDecoderConfig(
        hidden_size=sam["prompt_embed_dim"],
        mlp_dim=sam["decoder_mlp_dim"],
        num_attention_heads=sam["decoder_heads"],
        iou_head_hidden_dim=sam["iou_head_hidden_dim"],
        layer_norm_eps=1e-5,
    )
    return MLLMSegmenter(
        build_reader(reader, llm["vocab_size"]),
        PromptedSAM(sam_vision, decoder),
        segment=SEGMENT,
        reject=REJECT if config["tokens"]["[REJ]"] == REJECT else None,
        lora_rank=config["lora"]["r"],
        lora_alpha=config["lora"]["alpha"],
        lora_dropout=0.0,
    )


def expanded(patches: int, ids: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One position for the image -> as many as it has patches."""
    rows = []
    for i, label, m in zip(ids, labels, mask, strict=True):
        at = int((i == IMAGE).nonzero()[0, 0])
        rows.append(
            tuple(
                torch.cat([x[:at], x.new_full((patches,), value), x[at + 1 :]])
                for x, value in ((i, IMAGE), (label, UNSCORED), (m, True))
            )
        )
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))  # type: ignore[return-value]


def batch(recorded: Mapping[str, Tensor]) -> Batch:
    length = recorded.get("inter.attention_mask_expanded", recorded.get("inter.llm_norm")).shape[1]  # type: ignore[union-attr]
    patches = length - recorded["input.ids"].shape[1] + 1
    ids, labels, mask = expanded(patches, *(recorded[f"input.{name}"] for name in ("ids", "labels", "mask")))
    offset = recorded["input.offset"].tolist()
    owner = torch.tensor([p for p in range(len(offset) - 1) for _ in range(offset[p], offset[p + 1])])
    answered = torch.isin(ids, torch.tensor([SEGMENT, REJECT])) & (labels != UNSCORED)
    row, place = answered.nonzero(as_tuple=True)
    targets = [m for p in range(len(offset) - 1) for m in recorded[f"input.masks_{p}"]]
    height, width = recorded["input.original_size"].double().unbind(1)
    rows, columns = recorded["input.resized"].double().unbind(1)
    none = ids[row, place] != SEGMENT
    count = len(row)
    evaluation = "output.ids_row0" in recorded
    CASE.update(rows=row.tolist(), owner=owner.tolist(), absent=none.tolist(), evaluation=evaluation)
    return Batch(
        image=recorded["input.image"],
        input_ids=torch.zeros(count, 4, dtype=torch.int64),
        text_mask=torch.ones(count, 4, dtype=torch.bool),
        target=torch.zeros(count, 8, 8, dtype=torch.uint8),
        no_target=none,
        sample_id=torch.arange(count),
        random_key=torch.arange(count),
        geometry=torch.stack([height, width, rows / height, columns / width, 0 * rows, 0 * rows], dim=1),
        original_target=tuple(targets),
        view=recorded["input.image_clip"],
        conversation=Conversation(ids, labels, mask, row, place, owner, torch.arange(len(offset) - 1), evaluation),
    )


def chosen(number: int) -> list[int]:
    """Sentences of a conversation that have recorded masks: all in an evaluation, else those with [SEG]."""
    return [i for i, row in enumerate(CASE["rows"]) if row == number and (CASE["evaluation"] or not CASE["absent"][i])]


def masks(number: int) -> ReadOutput:
    """Logits of one conversation's masks at the picture's own size, [n, h0, w0]."""

    def read(output: ModelOutput, batch: Batch) -> Tensor:
        found = [from_longest(output.logits[i, 0], batch.original_target[i].shape) for i in chosen(number)]
        return torch.stack(found)

    return read


def small(sentences: Callable[[], list[int]]) -> ReadOutput:
    return lambda output, batch: output.aux["low_resolution"][sentences()]


def of_image(number: int) -> Callable[[], list[int]]:
    return lambda: [i for i, row in enumerate(CASE["rows"]) if CASE["owner"][row] == number]


def whole(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def picture(number: int, *, first: bool = False) -> Read:
    return lambda inputs, output: (inputs[0] if first else whole(inputs, output))[number : number + 1]


def of_owner(inputs: tuple[Any, ...], output: Any) -> Tensor:
    """Of every conversation's picture."""
    return output[torch.tensor(CASE["owner"])]


def term(key: str) -> ReadOutput:
    return lambda output, batch: create_loss("language_and_masks")(output, batch)[key]


READER, VISION = "reader.model", "sam.vision_encoder"
CAPTURES: dict[str, tuple[str, Read]] = {
    "inter.clip_projected": (f"{READER}.multi_modal_projector", of_owner),
    "inter.clip_features": (
        f"{READER}.multi_modal_projector",
        lambda inputs, output: inputs[0][torch.tensor(CASE["owner"])],
    ),
    "inter.llm_embeds": (f"{READER}.language_model.layers.0.input_layernorm", lambda inputs, output: inputs[0]),
    **{f"inter.llm_layer{i}": (f"{READER}.language_model.layers.{i}", whole) for i in range(2)},
    "inter.llm_norm": (f"{READER}.language_model.norm", whole),
    **{f"inter.sparse_row_{r}": ("prompt", lambda inputs, output, r=r: output[chosen(r)][:, None]) for r in (0, 1, 3)},
    **{f"inter.sam_patch_embed_image_{p}": (f"{VISION}.patch_embed", picture(p)) for p in range(3)},
    **{f"inter.sam_block{b}_image_{p}": (f"{VISION}.layers.{b}", picture(p)) for b in range(3) for p in range(3)},
    **{f"inter.sam_embedding_image_{p}": (f"{VISION}.neck", picture(p)) for p in range(3)},
}
OFFICIAL = "base_model.model.model.visual_model"
EMPTY = "a conversation without masks, for which nothing is recorded"

ADAPTER = Adapter(
    build=build,
    loss="language_and_masks",
    captures=CAPTURES,
    batch=batch,
    outputs={
        **{f"output.pred_masks_row{r}": masks(r) for r in (0, 1, 3)},
        **{f"inter.low_res_logits_row_{r}": small(lambda r=r: chosen(r)) for r in (0, 1, 3)},
        **{f"inter.low_res_logits_image_{p}": small(of_image(p)) for p in range(2)},
    },
    training_outputs={
        "output.ce_loss": term("language_loss"),
        "output.mask_bce_loss": term("cross_entropy"),
        "output.mask_dice_loss": term("dice"),
    },
    left_out={
        "inter.attention_mask_expanded": "an input here",
        "inter.labels_expanded": "an input here",
        "inter.text_hidden": "the prompt is computed where it is read, inter.sparse_row",
        "inter.lm_logits": "computed for the loss, output.ce_loss, and where an answer is due",
        "inter.iou_row": "nothing reads it, and it is not returned",
        "output.mask_loss": "the sum of output.mask_bce_loss and output.mask_dice_loss",
        "output.pred_masks_row2": EMPTY,
        "inter.sparse_row_2": EMPTY,
        "inter.low_res_logits_row_2": EMPTY,
        "output.ids_row0": "tests/models/test_mllm.py compares what the first pass says",
        f"grad.{OFFICIAL}.mask_decoder.output_hypernetworks_mlps.1": "recorded as 0; frozen here",
        "extra.": "tests/models/test_mllm.py compares it",
    },
)
