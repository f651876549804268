"""DINOv2 against timm's and transformers', its position table, and its weights in both key layouts."""

from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from amltrain.errors import UserError
from amltrain.models.backbones.dinov2 import DINOv2, load_dinov2


def tiny_vision(table_size: int = 4) -> DINOv2:
    torch.manual_seed(0)
    vision = DINOv2(embed_dim=24, depth=3, num_heads=2, table_size=table_size)
    for name, parameter in vision.named_parameters():
        if name != "mask_token":
            nn.init.normal_(parameter, std=0.3)
    return vision.eval()


def timm_vision() -> VisionTransformer:
    """A tiny twin of timm's vit_*_patch14_reg4_dinov2."""
    torch.manual_seed(1)
    vision = VisionTransformer(
        img_size=56,
        patch_size=14,
        embed_dim=24,
        depth=3,
        num_heads=2,
        init_values=1.0,
        reg_tokens=4,
        no_embed_class=True,
        num_classes=0,
        global_pool="",
    )
    for parameter in vision.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vision.eval()


def save_official(vision: DINOv2, path: Path) -> None:
    torch.save({**vision.state_dict(), "mask_token": torch.randn(1, 24)}, path)


def test_equal_to_timm_where_no_table_is_resampled(tmp_path: Path) -> None:
    theirs, ours = timm_vision(), tiny_vision()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    load_dinov2(ours, str(tmp_path / "timm.pth"))
    image = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        *taps, last = ours(image, (0, 1))
        expected = theirs.forward_intermediates(image, indices=[0, 1], norm=False, intermediates_only=True)
        normed = theirs.forward_features(image)[:, 5:].transpose(1, 2).unflatten(2, (4, 4))
    for a, b in zip([*taps, last], [*expected, normed], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_the_table_is_sampled_where_the_release_samples_it() -> None:
    """Bicubic weights (a = -0.75) at source position (i + 0.5) * 37 / (g + 0.1) - 0.5, written out for one axis."""
    vision = DINOv2(embed_dim=8, depth=0, num_heads=1, table_size=37)
    ramp = torch.randn(37)
    with torch.no_grad():
        vision.pos_embed[:, 1:] = ramp[None, :, None, None].expand(1, 37, 37, 8).flatten(1, 2)

    def cubic(distance: float) -> float:
        a, x = -0.75, abs(distance)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    table = vision.position((32, 16))
    assert table.shape == (1, 8, 32, 16)
    for row in (0, 1, 15, 31):
        source = (row + 0.5) * 37 / 32.1 - 0.5
        base = int(source // 1)
        taps = range(base - 1, base + 3)
        expected = sum(cubic(source - k) * ramp[min(max(k, 0), 36)].item() for k in taps)
        torch.testing.assert_close(table[0, :, row], torch.full((8, 16), expected), atol=1e-4, rtol=0)


def test_a_table_of_the_grids_own_size_is_untouched() -> None:
    vision = tiny_vision()
    expected = vision.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    assert torch.equal(vision.position((4, 4)), expected)


@pytest.mark.parametrize(("size", "grid"), [((70, 70), (5, 5)), ((42, 84), (3, 6)), ((57, 43), (5, 4))])
def test_any_size(size: tuple[int, int], grid: tuple[int, int]) -> None:
    *taps, last = tiny_vision()(torch.randn(1, 3, *size), (0, 2))
    assert [m.shape for m in (*taps, last)] == [(1, 24, *grid)] * 3


def test_an_adapter_works_beside_the_mlp() -> None:
    vision, image, seen = tiny_vision(), torch.randn(1, 3, 56, 56), []

    def adapter(normed: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        seen.append((normed.shape, grid))
        return normed * 0 + 1

    with torch.no_grad():
        plain, _ = vision(image, (2,))
        adapted, _ = vision(image, (2,), {2: adapter})
    assert seen == [((1, 21, 24), (4, 4))]
    # one added to the MLP's output passes the block's LayerScale
    torch.testing.assert_close(adapted - plain, vision.blocks[2].ls2.gamma[None, :, None, None].expand_as(plain))


def test_the_official_file(tmp_path: Path) -> None:
    source, path = tiny_vision(), tmp_path / "dinov2_vits14_reg4_pretrain.pth"
    save_official(source, path)
    vision = DINOv2(embed_dim=24, depth=3, num_heads=2, table_size=4)
    load_dinov2(vision, str(path))
    for key, value in source.state_dict().items():
        assert key == "mask_token" or torch.equal(vision.state_dict()[key], value)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    save_official(tiny_vision(), tmp_path / "official.pth")
    with pytest.raises(UserError, match=r"pos_embed is \[1, 17, 24\], this DINOv2 has \[1, 26, 24\]"):
        load_dinov2(tiny_vision(table_size=5), str(tmp_path / "official.pth"))
    with pytest.raises(UserError, match="does not exist"):
        load_dinov2(tiny_vision(), str(tmp_path / "absent.pth"))
