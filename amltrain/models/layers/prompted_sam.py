"""SAM and SAM 2 with one vector as their only prompt: transformers' modules, called one by one.

transformers' whole models want points or boxes; the parts are the same functions. Two numbers differ from transformers'
defaults: the norms of SAM's mask decoder have epsilon 1e-5 in the official code, 1e-6 in transformers; SAM 2's are
right. Memory and video parts of SAM 2 are left out.

Sources: Kirillov et al., Segment Anything, ICCV 2023; Ravi et al., SAM 2, 2024 (Apache-2.0).

Dimensions: B batch, S input side, C decoder width, h w the grid of patches (SAM) or of stride 16 (SAM 2).
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import SamMaskDecoderConfig, SamModel, SamVisionConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamVisionEncoder

from amltrain.errors import UserError
from amltrain.models.backbones.weights import fill, from_pretrained, is_file, read_state_dict
from amltrain.models.base import convert
from amltrain.models.layers.basic import Tuning, cell_centres, tune

PARTS = r"(module\.)?(visual_model\.)?"
"""What the official keys of SAM may start with: those of EVF-SAM, or SAM's own file."""
HEADS = r"(iou_prediction_head|output_hypernetworks_mlps\.\d|pred_obj_score_head)"
OFFICIAL_NAMES = [
    (rf"^{PARTS}(sam_)?prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", "sam.position_matrix"),
    (rf"^{PARTS}(sam_)?prompt_encoder\.no_mask_embed\.", "sam.no_mask_embed."),
    (rf"^{PARTS}no_mem_embed$", "sam.no_memory"),
    (rf"^{PARTS}(sam_)?mask_decoder\.", "sam.mask_decoder."),
    (rf"^{PARTS}image_encoder\.trunk\.", "sam.vision_encoder.backbone."),
    (rf"^{PARTS}image_encoder\.blocks\.", "sam.vision_encoder.layers."),
    (rf"^{PARTS}image_encoder\.", "sam.vision_encoder."),
    (r"(sam\.vision_encoder\..*patch_embed)\.proj\.", r"\1.projection."),
    (r"(sam\.vision_encoder\..*)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"(sam\.vision_encoder\.backbone\..*\.mlp)\.layers\.0\.", r"\1.proj_in."),
    (r"(sam\.vision_encoder\.backbone\..*\.mlp)\.layers\.1\.", r"\1.proj_out."),
    (r"sam\.vision_encoder\.neck\.convs\.(\d)\.conv\.", r"sam.vision_encoder.neck.convs.\1."),
    (r"sam\.vision_encoder\.neck\.0\.", "sam.vision_encoder.neck.conv1."),
    (r"sam\.vision_encoder\.neck\.1\.", "sam.vision_encoder.neck.layer_norm1."),
    (r"sam\.vision_encoder\.neck\.2\.", "sam.vision_encoder.neck.conv2."),
    (r"sam\.vision_encoder\.neck\.3\.", "sam.vision_encoder.neck.layer_norm2."),
    (r"(sam\.mask_decoder\.transformer\..*)\.norm([1-4])\.", r"\1.layer_norm\2."),
    (r"sam\.mask_decoder\.transformer\.norm_final_attn\.", "sam.mask_decoder.transformer.layer_norm_final_attn."),
    (r"sam\.mask_decoder\.output_upscaling\.0\.", "sam.mask_decoder.upscale_conv1."),
    (r"sam\.mask_decoder\.output_upscaling\.1\.", "sam.mask_decoder.upscale_layer_norm."),
    (r"sam\.mask_decoder\.output_upscaling\.3\.", "sam.mask_decoder.upscale_conv2."),
    (rf"(sam\.mask_decoder\.{HEADS})\.layers\.0\.", r"\1.proj_in."),
    (rf"(sam\.mask_decoder\.{HEADS})\.layers\.1\.", r"\1.layers.0."),
    (rf"(sam\.mask_decoder\.{HEADS})\.layers\.2\.", r"\1.proj_out."),
]
"""Official key names of both to those of a module `sam`, as rules for `re.sub`."""
SAM2_NAMES = [
    (r"(sam\.mask_decoder\.transformer\..*)\.out_proj\.", r"\1.o_proj."),
    (r"(sam\.mask_decoder\.transformer\..*\.mlp)\.layers\.0\.", r"\1.proj_in."),
    (r"(sam\.mask_decoder\.transformer\..*\.mlp)\.layers\.1\.", r"\1.proj_out."),
]
"""What SAM 2's decoder is called otherwise in transformers."""
OFFICIAL_DROPS = [
    (rf"{PARTS}(sam_)?prompt_encoder\.(point_embeddings|not_a_point_embed|mask_downscaling)\..*", "of other prompts"),
    (rf"{PARTS}(memory_|obj_ptr_|maskmem_|no_obj_|no_mem_pos_enc|mask_downsample).*", "SAM 2's memory, for videos"),
    (rf"{PARTS}pixel_(mean|std)", "constants of preprocessing"),
]


class PromptedSAM(nn.Module):
    """SAM: image -> one map; map and prompt -> logits of mask token 0."""

    loads = SamModel
    never_taught = ("iou_prediction_head", *(f"output_hypernetworks_mlps.{i}" for i in (1, 2, 3)))
    """Parts of the mask decoder that the mask never reads."""
    renames = OFFICIAL_NAMES

    def __init__(self, vision: SamVisionConfig, decoder: SamMaskDecoderConfig) -> None:
        super().__init__()
        self.image_size, self.width = int(vision.image_size), decoder.hidden_size  # type: ignore[arg-type]
        decoder._attn_implementation = "sdpa"  # a part that stands alone has none
        self.vision_encoder: Any = SamVisionEncoder(vision)
        layers: Any = self.vision_encoder.layers
        for layer in layers:
            layer.attn.get_rel_pos = relative_positions
        self.mask_decoder: Any = SamMaskDecoder(decoder)
        _start(self.vision_encoder.pos_embed)
        self.add_prompt()

    def add_prompt(self) -> None:
        """Add what transformers keeps in its prompt encoder, and freeze what nothing reads."""
        self.no_mask_embed = nn.Embedding(1, self.width)
        self.register_buffer("position_matrix", torch.randn(2, self.width // 2))
        for name in self.never_taught:
            self.mask_decoder.get_submodule(name).requires_grad_(False)

    def encode(self, image: Tensor) -> tuple[Tensor, ...]:
        """Image [B, 3, S, S] -> maps from fine to coarse; the last is [B, C, h, w]."""
        return (self.vision_encoder(image).last_hidden_state,)

    def forward(self, maps: tuple[Tensor, ...], prompt: Tensor) -> Tensor:
        """Maps of `encode`, prompt [B, C] -> logits [B, 1, 4h, 4w]."""
        masks, _ = self.mask_decoder(multimask_output=False, **self.inputs(maps[-1], prompt))
        return masks[:, 0]

    def inputs(self, image: Tensor, prompt: Tensor) -> dict[str, Tensor]:
        """Arguments of transformers' mask decoders."""
        count, _, height, width = image.shape
        return {
            "image_embeddings": image,
            "image_positional_embeddings": self.position(height, width, image.dtype).expand(count, -1, -1, -1),
            "sparse_prompt_embeddings": prompt[:, None, None],
            "dense_prompt_embeddings": self.no_mask_embed.weight[..., None, None].expand(count, -1, height, width),
        }

    def position(self, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """Random Fourier features of the cells' centres, [1, C, h, w]."""
        matrix: Any = self.position_matrix
        centres = cell_centres(height, width, device=matrix.device).to(matrix.dtype)
        angle = 2 * math.pi * ((2 * centres - 1) @ matrix)
        code = torch.cat([angle.sin(), angle.cos()], dim=-1)
        return code.T.unflatten(1, (height, width))[None].to(dtype)

    def tune(self, vision: Tuning, decoder: bool, rank: int) -> None:
        """vision: how the image encoder trains; decoder: whether mask decoder and no-mask vector do."""
        tune(self.vision_encoder, vision, rank)
        if not decoder:
            self.mask_decoder.requires_grad_(False)
            for parameter in self.parameters(recurse=False):
                parameter.requires_grad_(False)
            self.no_mask_embed.requires_grad_(False)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.vision_encoder._set_gradient_checkpointing(enabled, partial(checkpoint, use_reentrant=False))

    def load(self, weights: str) -> None:
        """Fill it from an official file of SAM, or from a Hub id or folder of transformers."""
        if is_file(weights):
            state = {f"visual_model.{key}": value for key, value in read_state_dict(Path(weights)).items()}
            own = {f"sam.{key}": value for key, value in self.state_dict().items()}
            conversion = convert(state, own, renames=self.renames, drops=OFFICIAL_DROPS)
            if conversion.unmatched:
                raise UserError(
                    f"{weights} has {len(conversion.unmatched)} keys that are not SAM's, first "
                    f"{conversion.unmatched[0].removeprefix('visual_model.')}; name a file of this SAM"
                )
            found = conversion.state_dict
        else:
            model = from_pretrained(self.loads, weights, ("SAM", "model.vision_weights"))
            found = {f"sam.{key}": value for key, value in self.of_transformers(model).items()}
        fill(self, {key.removeprefix("sam."): value for key, value in found.items()}, weights)

    def of_transformers(self, model: Any) -> dict[str, Tensor]:
        """Our state from transformers' whole model."""
        state = {
            key: value
            for key, value in model.state_dict().items()
            if key.startswith(("vision_encoder.", "mask_decoder."))
        }
        state["no_mask_embed.weight"] = model.prompt_encoder.no_mask_embed.weight
        state["position_matrix"] = model.shared_image_embedding.positional_embedding
        if hasattr(model, "no_memory_embedding"):
            state["no_memory"] = model.no_memory_embedding
        return state


class PromptedSAM2(PromptedSAM):
    """SAM 2: image -> maps of strides 4, 8 and 16; of mask tokens 1 to 3, the one with the highest predicted IoU."""

    never_taught = ("iou_prediction_head", "pred_obj_score_head", "output_hypernetworks_mlps.0")
    renames = [*OFFICIAL_NAMES, *SAM2_NAMES]  # noqa: RUF012 - never mutated

    def __init__(self, vision: Any, decoder: Any) -> None:
        """vision: a Sam2VisionConfig, decoder: a Sam2MaskDecoderConfig."""
        nn.Module.__init__(self)
        from transformers.models.sam2.modeling_sam2 import Sam2MaskDecoder, Sam2Model, Sam2VisionModel

        self.loads: Any = Sam2Model
        self.image_size, self.width = int(vision.backbone_config.image_size[0]), decoder.hidden_size
        decoder._attn_implementation = "sdpa"
        self.vision_encoder = Sam2VisionModel(vision)
        self.mask_decoder = Sam2MaskDecoder(decoder)
        _start(self.vision_encoder.backbone.pos_embed)
        self.no_memory = nn.Parameter(torch.zeros(1, 1, self.width))
        self.add_prompt()
        self.vision_encoder.neck.convs[0].requires_grad_(False)  # stride 32: nothing reads it without the top-down path

    def encode(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.vision_encoder(image).fpn_hidden_states)

    def forward(self, maps: tuple[Tensor, ...], prompt: Tensor) -> Tensor:
        return self.chosen(*self.candidates(maps, prompt))

    def candidates(self, maps: Sequence[Tensor], prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, 3, 4h, 4w] of mask tokens 1 to 3 and their predicted IoU [B, 3]."""
        fine, middle, coarse = maps
        coarse = coarse + self.no_memory.transpose(1, 2)[..., None]
        high = [self.mask_decoder.conv_s0(fine), self.mask_decoder.conv_s1(middle)]
        inputs = self.inputs(coarse, prompt)
        masks, iou, _, _ = self.mask_decoder(multimask_output=True, high_resolution_features=high, **inputs)
        return masks[:, 0], iou[:, 0]

    @staticmethod
    def chosen(masks: Tensor, iou: Tensor) -> Tensor:
        """Masks [B, 3, h, w], iou [B, 3] -> [B, 1, h, w] of the highest IoU."""
        best = iou.argmax(dim=1)[:, None, None, None].expand(-1, 1, *masks.shape[-2:])
        return masks.gather(1, best)


def sam_huge() -> PromptedSAM:
    """SAM ViT-H at 1024 pixels."""
    vision = SamVisionConfig(
        hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, global_attn_indexes=[7, 15, 23, 31]
    )
    return PromptedSAM(vision, SamMaskDecoderConfig(layer_norm_eps=1e-5))


def sam_tiny() -> PromptedSAM:
    """A small SAM at 96 pixels that learns from scratch."""
    vision = SamVisionConfig(
        hidden_size=96,
        output_channels=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=96,
        patch_size=8,
        window_size=5,
        global_attn_indexes=[1, 3],
        initializer_range=0.1,
    )
    decoder = SamMaskDecoderConfig(
        hidden_size=64, mlp_dim=128, num_attention_heads=4, iou_head_hidden_dim=64, layer_norm_eps=1e-5
    )
    return PromptedSAM(vision, decoder)


def _start(positions: Any) -> None:
    """Start a position table that transformers starts at 0.

    A patch of the mean colour would be 0 in every block, where a LayerNorm multiplies gradients by a thousand.
    """
    nn.init.normal_(positions, std=0.02)


def relative_positions(queries: int, keys: int, table: Tensor) -> Tensor:
    """Rows of a table [L, C] of relative positions for every pair: [queries, keys, C]; queries equals keys in SAM.

    In place of transformers' `get_rel_pos`, which makes the same indices on the CPU: two host-device synchronisations
    per layer.
    """
    resized = F.interpolate(table.T[None], size=2 * keys - 1, mode="linear")[0].T
    places = torch.arange(keys, device=table.device)
    return resized[places[:, None] - places + keys - 1]
