"""Recorded tensors of BarLeRIa's official code (commit 8632568), on both towers, and where our model computes them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from amltrain.models.backbones.clip import CLIPText, CLIPViT
from amltrain.models.backbones.eva_clip import EvaCLIPViT
from amltrain.models.barleria import BarLeRIa
from amltrain.records import Batch, ModelOutput
from tests.parity.compare import Adapter, Read
from tests.parity.detris import batch, item, whole


def build(config: Mapping[str, Any]) -> BarLeRIa:
    """The JSON has the official configuration under "cfg", the towers' sizes under "clip" and "side" beside it."""
    cfg, clip, side = config["cfg"], config["clip"], config["side"]
    size = side["img_size"]
    if "vision_cfg" in clip:
        tower, words = clip["vision_cfg"], clip["text_cfg"]
        vision: CLIPViT | EvaCLIPViT = EvaCLIPViT(
            width=tower["width"],
            layers=tower["layers"],
            heads=tower["width"] // tower["head_width"],
            patch_size=tower["patch_size"],
            mlp_ratio=tower["mlp_ratio"],
            embed_dim=clip["embed_dim"],
        )
        text = CLIPText(
            width=words["width"],
            layers=words["layers"],
            heads=words["heads"],
            vocab_size=words["vocab_size"],
            max_positions=words["context_length"],
            embed_dim=clip["embed_dim"],
            gelu=True,
        )
    else:
        vision = CLIPViT(
            width=clip["vision_width"],
            layers=clip["vision_layers"],
            heads=config["vision_heads"],
            patch_size=clip["vision_patch_size"],
            table_size=size // clip["vision_patch_size"],
            embed_dim=clip["embed_dim"],
        )
        text = CLIPText(
            width=clip["transformer_width"],
            layers=clip["transformer_layers"],
            heads=config["text_heads"],
            vocab_size=clip["vocab_size"],
            max_positions=clip["context_length"],
            embed_dim=clip["embed_dim"],
        )
    return BarLeRIa(
        vision=vision,
        text=text,
        prompt_hidden=config["prompt_mlp_hidden"],
        side_dim=side["embed_dim"],
        side_depth=side["depth"],
        side_heads=side["heads"],
        queries=side["num_queries"],
        table_size=size // vision.stride,
        layers=cfg["num_layers"],
        heads=cfg["num_head"],
        feedforward=cfg["dim_ffn"],
        dropout=0.0,
    )


def flat(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output.flatten(2)


def tokens_first(inputs: tuple[Any, ...], output: Any) -> Tensor:
    """Input [B, N, C] -> [N, B, C]."""
    return inputs[0].transpose(0, 1)


def to_map(inputs: tuple[Any, ...], output: Any) -> Tensor:
    """Input [B, N, C] -> [B, C, N]."""
    return inputs[0].transpose(1, 2)


def neck_input(index: int) -> Read:
    return lambda inputs, output: inputs[0][index]


def error(output: ModelOutput, batch: Batch) -> Tensor:
    return output.aux["reconstruction"].mean()


CAPTURES: dict[str, tuple[str, Read]] = {
    "inter.vis.prompt_tokens": ("prompts", whole),
    "inter.text.tokens": ("text.ln_final", whole),
    "inter.text.state": ("head.kernel", lambda inputs, output: inputs[0]),
    "inter.neck.out": ("neck", whole),
    "inter.clip.block0_patches": ("side.readings.0", to_map),
    "inter.vis.block0": ("vision_flows.1.0", tokens_first),
    "inter.text.block0": ("text_flows.1.0", tokens_first),
    **{f"inter.vis.v{3 + i}": ("neck", neck_input(i)) for i in range(3)},
    "inter.side.block0_pass2": ("side.blocks.0", whole),
    "inter.side.block0_pass1": ("side.blocks.0", whole),
    "inter.side.x": ("side", item(0)),
    "inter.side.td7": ("side.feedback.7", item(1)),
    "inter.side.td0": ("side.feedback.0", item(1)),
    "inter.side.feedback_in": ("side.feedback.7", lambda inputs, output: inputs[0]),
    "inter.side.linear": ("side_linear", whole),
    "inter.decoder.out": ("decoder", flat),
    "inter.proj.vis": ("head.visual", whole),
}

ADAPTER = Adapter(
    build=build,
    loss="barleria",
    captures=CAPTURES,
    last=["inter.side.block0_pass2"],
    batch=batch,
    outputs={"inter.side.var_loss": error},
    left_out={
        "inter.side.query": "a parameter repeated for every image; its gradient is compared",
        "inter.vis.block0_flow": "part of inter.vis.block0; the two towers recorded it in different layouts",
        "extra.clip_pos_embed": "the position table's resampling; tests/models/test_etris.py compares it on ETRIS",
        "train.target_resized": "our loss resizes the target itself; output.loss depends on it",
    },
)
"""1e-5 for logits; activations at three times the official code's own distance from float64; a loss of 70 to 90."""
