"""A normalising flow on the shortcut of a transformer block: an affine step and planar steps, close to the identity.

Papers: Rezende and Mohamed, Variational Inference with Normalizing Flows, ICML 2015; Wang et al., BarLeRIa, ICLR 2024.
The log-determinant is not computed, because nothing reads it.

BarLeRIa: frozen CLIP towers with flows on their shortcuts, words inserted as prompts, and a side network.

Paper: Wang et al., BarLeRIa: An Efficient Tuning Framework for Referring Image Segmentation, ICLR 2024.
Official code: NastrondAd/BarLeRIa, commit 8632568, MIT. Reimplemented on CLIP's towers in `backbones/` and timm's EVA;
nothing is copied. Neck, decoder and head are those of ETRIS.

What AML scores: CLIP without prompts and flows, map against tokens, both in CLIP's shared space, because words are in
the image from the first block on. It costs one more pass of both towers. With EVA-02-CLIP the image side is frozen.

Kept from the official code on purpose:
- padded words are inserted as prompts like any other, so all sentences must be padded to one length;
- the side network's gate normalises the words over the batch, so a sample's mask depends on its batch. The full-size
  models do it too (`gate_norm="batch"`); `gate_norm="channel"` is the cosine that was meant, and the tiny model's;
- the top-down signal passes the values' bias a second time and is not normed;
- EVA's last norm is left out; position tables of CLIP train, EVA's of the image does not.
Not kept: log-determinants of the flows, which nothing reads, and their second names in a checkpoint.

Dimensions: B batch, L text tokens, W text width, N patches, V image width, E width of CLIP's shared space.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amltrain.config.schema import Preprocess
from amltrain.models.backbones.clip import (
    OFFICIAL_NAMES,
    OFFICIAL_VIT_NAMES,
    CLIPText,
    CLIPViT,
    load_clip_text,
    load_clip_vit,
)
from amltrain.models.backbones.eva_clip import EVA_DROPS, OFFICIAL_EVA_NAMES, EvaCLIPViT
from amltrain.models.backbones.weights import fill, read_state_dict
from amltrain.models.base import Conversion, convert
from amltrain.models.families import PixelTextModel
from amltrain.models.layers.basic import ModuleListOf
from amltrain.models.layers.cris_decoder import OFFICIAL_DECODER_NAMES, OFFICIAL_NECK_NAMES, GatedNeck
from amltrain.models.layers.side_network import FUSED_BLOCKS, GateNorm, SideNetwork
from amltrain.models.registry import LETTERBOX_UNDONE, ModelInfo, register_model
from amltrain.records import AlignmentFeatures, Batch, Features, ModelOutput


class PlanarStep(nn.Module):
    """z + s tanh(<w, z> + b)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.empty(1, dim)), nn.Parameter(torch.empty(1, dim))
        self.bias = nn.Parameter(torch.empty(1))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.01, 0.01)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.scale * F.linear(z, self.weight, self.bias).tanh()


class Flow(nn.Module):
    """mu + exp(logsigma) x, then the planar steps: [..., C] -> [..., C]."""

    def __init__(self, dim: int, steps: int = 4) -> None:
        super().__init__()
        self.mu, self.logsigma = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.steps = nn.ModuleList(PlanarStep(dim) for _ in range(steps))

    def forward(self, x: Tensor) -> Tensor:
        z = self.mu + self.logsigma.exp() * x
        for step in self.steps:
            z = step(z)
        return z


_FLOW = r"(?:transformer\.res)?blocks\.(\d+)\.flow"
RENAMES = [
    *(
        rule
        for tower, ours in ((r"^backbone\.visual\.", "vision"), (r"^backbone\.(?:text\.)?", "text"))
        for rule in (
            (tower + _FLOW + r"\.", rf"{ours}_flows.\1.0."),
            (tower + _FLOW + r"2\.", rf"{ours}_flows.\1.1."),
        )
    ),
    (r"^(\w+_flows\..*)\.affine_transform\.", r"\1."),
    (r"^(\w+_flows\..*)\.transforms\.", r"\1.steps."),
    (r"^backbone\.visual\.", "vision."),
    (r"^backbone\.(?:text\.)?", "text."),
    (r"^intertwiner\.proj\.", "prompts."),
    (r"^side_adapter_network\.proj\.", "side.words."),
    (r"^side_adapter_network\.(query_embed|query_pos_embed)", r"side.\1"),
    (r"^side_adapter_network\.vit_model\.patch_embed\.proj\.", "side.patch_embed."),
    (r"^side_adapter_network\.vit_model\.decoders\.", "side.feedback."),
    (r"^side_adapter_network\.vit_model\.", "side."),
    (r"^side_adapter_network\.fusion_layers\.layer_(\d)\.input_proj\.0\.", r"side.readings.\1.norm."),
    (r"^side_adapter_network\.fusion_layers\.layer_(\d)\.input_proj\.1\.", r"side.readings.\1.project."),
    *OFFICIAL_NECK_NAMES,
    *OFFICIAL_DECODER_NAMES,
]
"""Official key names to ours, except inside the towers, as rules for `re.sub`, applied in this order."""
DROPS = [(r".*\.log_jacobians\..*", "a second name of the flow's planar steps"), *EVA_DROPS]


class BarLeRIa(PixelTextModel):
    """Two tuned towers, the side network, and ETRIS' neck, decoder and head; one-channel logits at stride 4."""

    vision: CLIPViT | EvaCLIPViT

    def __init__(
        self,
        *,
        vision: CLIPViT | EvaCLIPViT,
        text: CLIPText,
        prompt_hidden: int = 32,
        side_dim: int = 144,
        side_depth: int = 8,
        side_heads: int = 3,
        queries: int = 128,
        table_size: int = 26,
        layers: int = 3,
        heads: int = 8,
        feedforward: int = 512,
        dropout: float = 0.1,
        gate_norm: GateNorm = "batch",
        train_encoders: bool = False,
    ) -> None:
        """vision, text: built towers of one shared space; the image tower has twelve blocks.

        prompt_hidden: of the words' projections. side_*, queries, table_size, gate_norm: of the side network.
        layers, heads, feedforward, dropout: of the decoder.
        train_encoders: False freezes the towers except CLIP's position tables, as the official code does.
        """
        super().__init__()
        self.vision, self.text = vision, text
        if not train_encoders:
            vision.requires_grad_(False)
            text.requires_grad_(False)
            text.positional_embedding.requires_grad_(True)
            if isinstance(vision, CLIPViT):
                vision.positional_embedding.requires_grad_(True)
        self.vision_flows = _flows(vision.width, len(vision.blocks))
        self.text_flows = _flows(text.width, len(text.blocks))
        self.prompts = nn.Sequential(
            nn.Linear(text.width, prompt_hidden), nn.ReLU(), nn.Linear(prompt_hidden, vision.width)
        )
        for layer in self.prompts:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.side = SideNetwork(
            tower_dim=vision.width,
            text_dim=text.width,
            dim=side_dim,
            depth=side_depth,
            heads=side_heads,
            queries=queries,
            patch_size=vision.stride,
            table_size=table_size,
            hidden=prompt_hidden,
            gate_norm=gate_norm,
        )
        self.side_linear = nn.Linear(side_dim, text.width)
        neck = GatedNeck(vision.channels, text.embed_dim, text.width, residual=False)
        self.add_decoder(neck, layers=layers, heads=heads, feedforward=feedforward, dropout=dropout)
        self.alignment_dims = (text.embed_dim, text.embed_dim)
        self.gradient_checkpointing = False

    @property
    def frame_stride(self) -> int:
        return self.vision.stride

    def encode(self, batch: Batch) -> Features:
        """Three maps of the image padded to multiples of the patch.

        `extra`: "sentence" [B, E], the side network's "side" map [B, D, h, w] and its "reconstruction" error [B].
        """
        words = self.text.embed(batch.input_ids, batch.text_mask)
        tokens, sentence = self.text.finish(self._run_text(words), batch.text_mask)
        return self._encode_image(batch, words, tokens, sentence)

    def reencode_image(self, batch: Batch, features: Features) -> Features:
        words = self.text.embed(batch.input_ids, batch.text_mask)
        return self._encode_image(batch, words, features.text, features.extra["sentence"])

    def fuse_maps(self, features: Features) -> Tensor:
        side = self.side_linear(features.extra["side"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().fuse_maps(features) + side

    def decode(self, features: Features, batch: Batch) -> ModelOutput:
        """As the base, with the side network's "reconstruction" error [B], which the loss reads."""
        output = super().decode(features, batch)
        return output._replace(aux={"reconstruction": features.extra["reconstruction"], **output.aux})

    def alignment_features(
        self, batch: Batch, features: Features | None = None, *, text: str | None = None, visual: str | None = None
    ) -> AlignmentFeatures:
        """Both towers without prompts and flows, so `features` serve nothing here: [B, E, h, w] and [B, L, E]."""
        tokens, _ = self.text(batch.input_ids, batch.text_mask)
        shared = self.text.project(tokens)
        x, grid = self.vision.embed(self.padded(batch.image))
        code = self.vision.rotary(grid, 0)
        for i in range(len(self.vision.blocks)):
            x = self._vision_block(i, x, code, tuned=False)
        seen = self.vision.finish(x[:, 1:]).transpose(1, 2).unflatten(2, grid)
        return AlignmentFeatures(seen, shared, batch.text_mask)

    def _encode_image(self, batch: Batch, words: Tensor, tokens: Tensor, sentence: Tensor) -> Features:
        """Words [B, L, W]: what entered the text tower, which prompts the image tower."""
        image = self.padded(batch.image)
        x, grid = self.vision.embed(image)
        prompts = self.prompts(words)
        x = torch.cat([x[:, :1], prompts.to(x.dtype), x[:, 1:]], dim=1)
        before = 1 + prompts.shape[1]
        code = self.vision.rotary(grid, prompts.shape[1])
        streams = []
        for i in range(len(self.vision.blocks)):
            x = self._recomputed(self._vision_block, i, x, code)
            streams.append(x[:, before:])
        third = len(streams) // 3
        patches = (streams[third - 1], streams[2 * third - 1], self.vision.finish(streams[-1]))
        maps = tuple(p.transpose(1, 2).unflatten(2, grid) for p in patches)
        side, error = self.side(image, tokens, [streams[i] for i in FUSED_BLOCKS])
        extra = {"sentence": sentence, "side": side, "reconstruction": error}
        return Features(maps, tokens, batch.text_mask, extra)

    def _vision_block(self, index: int, x: Tensor, code: Tensor | None, tuned: bool = True) -> Tensor:
        block, flows = self.vision.blocks[index], self.vision_flows[index]
        x = (flows[0](x) if tuned else x) + self.vision.read(index, x, code)
        return (flows[1](x) if tuned else x) + block.mlp(block.norm2(x))

    def _run_text(self, x: Tensor) -> Tensor:
        """The text tower's blocks with flows, [B, L, W] -> [B, L, W]."""
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        for i in range(len(self.text.blocks)):
            x = self._recomputed(self._text_block, i, x, mask)
        return x

    def _text_block(self, index: int, x: Tensor, mask: Tensor) -> Tensor:
        block, flows = self.text.blocks[index], self.text_flows[index]
        x = flows[0](x) + block.read(x, mask)
        return flows[1](x) + block.mlp(block.norm2(x))

    def _recomputed(self, function: Any, *inputs: Any) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Flows and prompts, and the rest, both at the full rate as in the official code."""
        adapters = ("vision_flows.", "text_flows.", "prompts.")
        groups: dict[str, list[nn.Parameter]] = {"adapters": [], "rest": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups["adapters" if name.startswith(adapters) else "rest"].append(parameter)
        return [{"name": name, "params": p, "lr": lr, "weight_decay": weight_decay} for name, p in groups.items()]

    def convert_state_dict(self, official: Mapping[str, Tensor]) -> Conversion:
        tower = OFFICIAL_EVA_NAMES if isinstance(self.vision, EvaCLIPViT) else OFFICIAL_VIT_NAMES
        return convert(official, self.state_dict(), renames=[*RENAMES, *tower, *OFFICIAL_NAMES], drops=DROPS)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.gradient_checkpointing = enabled
        self.text.gradient_checkpointing = enabled


def _flows(dim: int, blocks: int) -> "ModuleListOf[ModuleListOf[Flow]]":
    return ModuleListOf(ModuleListOf((Flow(dim), Flow(dim))) for _ in range(blocks))


def _info(size: int, tokenizer: str, max_tokens: int = 17) -> ModelInfo:
    return ModelInfo(
        paper="BarLeRIa: An Efficient Tuning Framework for Referring Image Segmentation (ICLR 2024)",
        official_code="github.com/NastrondAd/BarLeRIa, commit 8632568",
        licence="MIT",
        aml_scores="CLIP's map x tokens in their shared space, towers without prompts and flows",
        preprocess=Preprocess(
            size=size,
            resize="letterbox",
            normalization="clip",
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            sentence_field="sent",
        ),
        protocol=LETTERBOX_UNDONE,
        loss="barleria",
    )


CLIP_TOKENIZER = "openai/clip-vit-base-patch16"


@register_model(_info(416, CLIP_TOKENIZER))
def barleria_vit_base(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 49408,
    dropout: float = 0.1,
    gate_norm: GateNorm = "batch",
) -> BarLeRIa:
    """Build the official model on CLIP ViT-B/16: 176.1 M parameters, 26.7 M trained.

    Both weights: ViT-B-16.pt; vision_weights also timm's vit_base_patch16_clip_quickgelu_224.openai, text_weights also
    openai/clip-vit-base-patch16.
    """
    vision, text = CLIPViT(), CLIPText(vocab_size=vocab_size)
    if vision_weights is not None:
        load_clip_vit(vision, vision_weights)
    if text_weights is not None:
        load_clip_text(text, text_weights)
    return BarLeRIa(vision=vision, text=text, dropout=dropout, gate_norm=gate_norm)


@register_model(_info(416, CLIP_TOKENIZER))
def barleria_eva02_base(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 49408,
    dropout: float = 0.1,
    gate_norm: GateNorm = "batch",
) -> BarLeRIa:
    """Build the official model on EVA-02-CLIP-B/16: 175.8 M parameters, 26.2 M trained.

    Both weights: EVA02_CLIP_B_psz16_s8B.pt.
    """
    vision, text = EvaCLIPViT(), CLIPText(vocab_size=vocab_size, gelu=True)
    model = BarLeRIa(vision=vision, text=text, dropout=dropout, gate_norm=gate_norm)
    for weights, part in ((vision_weights, "vision"), (text_weights, "text")):
        if weights is not None:
            _load_eva(model, part, weights)
    return model


def _load_eva(model: BarLeRIa, part: str, weights: str) -> None:
    """Fill one tower from EVA-02-CLIP's file. Raises UserError for a file that is missing or of another size."""
    official = {f"backbone.{key}": value for key, value in read_state_dict(Path(weights)).items()}
    found = model.convert_state_dict(official).state_dict
    tower = {key.removeprefix(f"{part}."): v for key, v in found.items() if key.startswith(f"{part}.")}
    fill(model.get_submodule(part), tower, weights)


@register_model(_info(96, "wordpiece", max_tokens=24))
def barleria_tiny(
    *,
    vision_weights: str | None = None,
    text_weights: str | None = None,
    vocab_size: int = 512,
    dropout: float = 0.0,
    gate_norm: GateNorm = "channel",
    train_encoders: bool = True,
) -> BarLeRIa:
    """Build a model small enough to learn synthetic scenes from scratch on two CPU cores.

    train_encoders: True, because its towers start from nothing.
    """
    vision = CLIPViT(width=96, layers=12, heads=4, patch_size=8, table_size=12, embed_dim=96)
    text = CLIPText(width=96, layers=3, heads=4, vocab_size=vocab_size, max_positions=64, embed_dim=96)
    if vision_weights is not None:
        load_clip_vit(vision, vision_weights)
    if text_weights is not None:
        load_clip_text(text, text_weights)
    return BarLeRIa(
        vision=vision,
        text=text,
        side_dim=48,
        side_depth=4,
        queries=4,
        table_size=12,
        layers=2,
        heads=4,
        feedforward=192,
        dropout=dropout,
        gate_norm=gate_norm,
        train_encoders=train_encoders,
    )
