"""Swin against timm where timm is exact, and its own properties where timm is not."""

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from amltrain.models.backbones.swin import Swin, shift_mask

SIZES = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}


def build(window_size: int = 4, drop_path_rate: float = 0.0) -> Swin:
    torch.manual_seed(0)
    model = Swin(**SIZES, window_size=window_size, drop_path_rate=drop_path_rate)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.3)  # so that padding and position matter
    return model


def timm_twin(model: Swin, window_size: int) -> SwinTransformer:
    twin = SwinTransformer(
        **SIZES, img_size=128, window_size=window_size, num_classes=0, strict_img_size=False, always_partition=True
    )
    state = {}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) + 1)
        state[".".join(parts)] = value
    report = twin.load_state_dict(state, strict=False)
    assert set(report.missing_keys) == {"norm.weight", "norm.bias"}
    return twin.eval()


@pytest.mark.parametrize("size", [(128, 128), (128, 256), (256, 128)])
def test_equal_to_timm_where_no_window_is_padded(size: tuple[int, int]) -> None:
    model = build().eval()
    twin = timm_twin(model, 4)
    image = torch.randn(2, 3, *size)
    ours = model(image)
    x = twin.patch_embed(image)
    for i, stage in enumerate(twin.layers):
        x = stage(x)
        torch.testing.assert_close(ours[i], model.normed(i, x))


def attend_one_by_one(model: Swin, x: Tensor) -> Tensor:
    """Stage 0's second block written out per window of the padded and rolled map: [1, H, W, C] -> the same."""
    block, window = model.layers[0].blocks[1], 4
    _, height, width, channels = x.shape
    rows, columns = height + -height % window, width + -width % window
    padded = torch.zeros(rows, columns, channels)
    padded[:height, :width] = block.norm1(x)[0]
    out = torch.zeros_like(padded)
    table = block.attn.relative_position_bias_table
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            cells = [(top + i, left + j) for i in range(window) for j in range(window)]
            source = [((r + 2) % rows, (c + 2) % columns) for r, c in cells]
            tokens = torch.stack([padded[r, c] for r, c in source])
            query, key, value = block.attn.qkv(tokens).chunk(3, dim=-1)
            scores = query @ key.T * channels**-0.5  # one head
            for a, (ra, ca) in enumerate(cells):
                for b, (rb, cb) in enumerate(cells):
                    scores[a, b] += table[(ra - rb + 3) * 7 + ca - cb + 3, 0]
                    # cells that the roll brought round from the other side are no neighbours
                    if (ra >= rows - 2) != (rb >= rows - 2) or (ca >= columns - 2) != (cb >= columns - 2):
                        scores[a, b] -= 100
            result = block.attn.proj(scores.softmax(-1) @ value)
            for (r, c), token in zip(source, result, strict=True):
                out[r, c] = token
    y = x + out[None, :height, :width]
    return y + block.mlp(block.norm2(y))


@pytest.mark.parametrize("size", [(4, 4), (3, 2), (5, 9), (8, 6)])
@torch.no_grad()
def test_a_shifted_block_pads_first_and_rolls_afterwards(size: tuple[int, int]) -> None:
    model = build().eval()
    x = torch.randn(1, *size, 16)
    mask = shift_mask(size[0] + -size[0] % 4, size[1] + -size[1] % 4, 4, 2, like=x)
    torch.testing.assert_close(model.layers[0].blocks[1](x, mask), attend_one_by_one(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(33, 70), (4, 4), (97, 31)])
def test_any_size(size: tuple[int, int]) -> None:
    maps = build(window_size=7)(torch.randn(1, 3, *size))
    cells = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in (4, 8, 16, 32)]
    assert [tuple(m.shape[-2:]) for m in maps] == cells
    assert all(m.isfinite().all() for m in maps)


def test_drop_path_grows_evenly_over_all_blocks() -> None:
    model = build(drop_path_rate=0.7)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])
    assert all(
        getattr(block.drop_path2, "drop_prob", 0.0) == getattr(block.drop_path1, "drop_prob", 0.0)
        for stage in model.layers
        for block in stage.blocks
    )


def test_checkpointing_changes_nothing() -> None:
    model, image = build().train(), torch.randn(1, 3, 40, 56)
    model(image)[3].sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_gradient_checkpointing(True)
    model(image)[3].sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
