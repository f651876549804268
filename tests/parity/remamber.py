"""Recorded tensors of ReMamber's official code (commit 9edcf01), with both heads, and where our model computes them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from amltrain.models.backbones.clip import CLIPText
from amltrain.models.backbones.vmamba import VMamba
from amltrain.models.remamber import ReMamber
from tests.parity.compare import Adapter, Read


def build(config: Mapping[str, Any]) -> ReMamber:
    text = config["text_encoder"]
    return ReMamber(
        vision=VMamba(embed_dim=config["dims"][0], depths=config["depths"], drop_path_rate=0.0),
        text_encoder=CLIPText(
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            vocab_size=text["vocab_size"],
            max_positions=text["max_position_embeddings"],
            embed_dim=None,
            pad_id=text["pad_token_id"],
            masks_padding=True,
        ),
        head=config["head"],
        tokens=config["tokens"],
        hidden=config["local_text_hidden"],
        resolution=config["twister_resolution"],
    )


def whole(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output


def channels_first(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output.permute(0, 3, 1, 2)


def item_first(index: int) -> Read:
    return lambda inputs, output: output[index].permute(0, 3, 1, 2)


CAPTURES: dict[str, tuple[str, Read]] = {
    "inter.text.tokens": ("text_encoder", lambda inputs, output: output[0]),
    "inter.text.pooled": ("text_encoder", lambda inputs, output: output[1]),
    "inter.patch_embed": ("vision.patch_embed", channels_first),
    "inter.layers0.block0.op": ("vision.layers.0.blocks.0.op", channels_first),
    "inter.layers0.blocks": ("vision.layers.0", channels_first),
    "inter.text_guidance0": ("twisters.0.guide", lambda inputs, output: output.relu()),
    "inter.local_text0": ("twisters.0.local", whole),
    "inter.twister0.ss1d": ("twisters.0.blocks.0.channels", channels_first),
    "inter.twister0.out": ("twisters.0.blocks.0.positions", channels_first),
    "inter.mmblock0.img": ("twisters.0.blocks.0", item_first(0)),
    "inter.mmblock0.local": ("twisters.0.blocks.0", item_first(2)),
    **{f"inter.stage{i + 1}": (f"twisters.{i}", channels_first) for i in range(4)},
    "inter.decoder.mixer3": ("decoder.mixers.0", whole),
    "inter.decoder.mixer1": ("decoder.mixers.2", whole),
    "inter.decoder.layer0": ("decoder.levels.0", channels_first),
    "inter.decoder.fusion0": ("decoder.fusions.0", whole),
    "inter.decoder.layer3": ("decoder.levels.3", channels_first),
    "inter.decoder.out": ("decoder", whole),
}
ADAPTER = Adapter(
    build=build,
    loss="cross_entropy_dice",
    captures=CAPTURES,
)
