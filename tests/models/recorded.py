"""Full-size weights and inputs that recorded cases describe by a recipe and do not store (CRIS, ETRIS, DETRIS)."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amltrain.records import Batch


def full_size_weights(keys: Path) -> dict[str, Tensor]:
    """Official weights for a key list: every tensor is a function of its name."""
    shapes = {key: shape for key, (shape, _) in json.loads(keys.read_text())["keys"].items()}
    return {key: _weight(key, shape) if shape else torch.zeros(()) for key, shape in shapes.items()}


def full_size_batch(input_ids: Tensor, size: int, sample: int) -> Batch:
    """One of the two recorded samples; padding is id 0."""
    images = np.random.default_rng(1).standard_normal((2, 3, size, size), dtype=np.float32)
    ids = input_ids[sample : sample + 1]
    return Batch(
        image=torch.from_numpy(images)[sample : sample + 1],
        input_ids=ids,
        text_mask=ids != 0,
        target=torch.zeros(1, size, size, dtype=torch.uint8),
        no_target=torch.zeros(1, dtype=torch.bool),
        sample_id=torch.zeros(1, dtype=torch.int64),
        random_key=torch.zeros(1, dtype=torch.int64),
        geometry=torch.zeros(1, 6, dtype=torch.float64),
    )


def _weight(key: str, shape: list[int]) -> Tensor:
    x = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, dtype=np.float32)
    if key.endswith("running_mean"):
        x = 0.1 * x
    elif key.endswith("running_var"):
        x = 0.5 + np.abs(x)
    elif key.endswith("bias"):
        x = 0.05 * x
    elif key.endswith("gamma"):
        x = 0.2 + 0.05 * x
    elif x.ndim == 1 and key.endswith("weight"):
        x = 1 + 0.1 * x
    elif ("embed" in key and "patch_embed" not in key) or "token" in key:
        x = 0.1 * x
    elif x.ndim >= 2:
        x = x / np.sqrt(np.float32(np.prod(shape[1:]))) * (0.12 if key == "proj.txt.weight" else 1)
    else:
        x = 0.1 * x
    return torch.from_numpy(np.asarray(x, dtype=np.float32))
