"""Counter-based randomness: a number is a function of its key, so resuming or spreading a run changes none of them.

The mixer is SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), written once for Python integers and once for tensors.
"""

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MUL1, _MUL2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MUL1) & _MASK
    value = ((value ^ (value >> 27)) * _MUL2) & _MASK
    return value ^ (value >> 31)


def random_key(*parts: int) -> int:
    """Hash integers (seed, epoch, sample, ...) into one key in the range of a signed 64-bit integer; order matters."""
    state = 0
    for part in parts:
        state = _mix((state + _GOLDEN + (part & _MASK)) & _MASK)
    return _signed(state)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)  # logical shift: torch's is arithmetic


def uniform(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """`count` independent uniform numbers in [0, 1) for every key; the same on every device and in every batch.

    keys: [B] int64. stream: draw another, independent set from the same keys. Returns [B, count] float32.
    """
    counter = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64)
    state = keys[:, None] + (counter + stream * (1 << 32)) * _signed(_GOLDEN)  # [B, count]; int64 wraps, as wanted
    state = (state ^ _shift_right(state, 30)) * _signed(_MUL1)
    state = (state ^ _shift_right(state, 27)) * _signed(_MUL2)
    state = state ^ _shift_right(state, 31)
    return _shift_right(state, 40).to(torch.float32) * (1.0 / (1 << 24))
