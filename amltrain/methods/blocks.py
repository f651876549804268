"""Square blocks of an image that a method masks: a decision [B, r, c] per block, spread to the image's pixels."""

from torch import Tensor


def spread_blocks(blocks: Tensor, size: tuple[int, int], block: int) -> Tensor:
    """[B, r, c] -> [B, H, W], every block's value on its pixels; differentiable for floating blocks."""
    rows = blocks.repeat_interleave(block, dim=1, output_size=blocks.shape[1] * block)
    pixels = rows.repeat_interleave(block, dim=2, output_size=blocks.shape[2] * block)
    return pixels[:, : size[0], : size[1]]


def mask_image(image: Tensor, blocks: Tensor, block: int) -> Tensor:
    """image [B, 3, H, W] with the blocks [B, r, c] bool set to zero, which is the mean colour once normalised."""
    pixels = spread_blocks(blocks, (image.shape[-2], image.shape[-1]), block)
    return image.masked_fill(pixels[:, None], 0.0)
