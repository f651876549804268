"""Decide whether a tensor agrees with a recorded one, rounding apart.

A float32 result depends on the CPU: which instructions it has and in which order it adds. So a tensor is judged in two
steps. First its distance from the recorded one, relative to its largest value, against a narrow tolerance. What is
beyond is computed again in float64 ("exact") and a few times in float32 with weights and image moved by their last bit.
The largest distance of those from exact is what rounding costs this tensor ("noise"). The recorded tensor passes if it
lies within three times that noise, or within the tolerance, of exact. A tensor that is 0 in exact arithmetic (a key's
bias before a softmax) has no size of its own: the case's largest gradient or value takes its place. A ReLU at 0 makes a
jump of rounding; a jump is explained where a run of ours makes one as large, and another run makes none.

An error in the code moves exact itself, so it shows however large the tolerance of a sum in float32 is.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amltrain.records import Batch

NUDGES = (range(4), range(4, 8), range(8, 16))
"""Seeds of the float32 runs whose weights and image are moved by their last bit, as many as it takes; one more run has
them as they are. A jump that rounding makes in one run of ten is found by a few runs only with luck."""
ZERO, NOTHING = 1e-12, 1e-6
"""Shares of the case's largest gradient (or value) that count as 0, in float64 and in float32."""
TIMES = 3
"""How many times its noise a recorded tensor may be off: two runs' noise differs by chance."""
JUMP = 0.1
"""A distance above this share of the tensor is a jump: the recorded tensor's may be no larger than our own."""


class Row(NamedTuple):
    """One compared tensor: its largest distance, absolute and relative to its largest value, and the verdict."""

    name: str
    absolute: float
    relative: float
    tolerance: str
    passed: bool
    reason: str = ""


def row(name: str, ours: Tensor, theirs: Tensor, tolerance: float, relative: bool, scale: float = 0.0) -> Row:
    """Compare two tensors of the same number of elements.

    relative: the tolerance is a share of the tensor's largest value. scale: the case's largest value of that kind; a
    tensor below ZERO of it is compared on that scale.
    """
    ours, theirs = ours.detach().reshape(theirs.shape).double(), theirs.double()
    difference, largest = largest_of(ours - theirs), largest_of(theirs)
    size = max(scale if largest < ZERO * scale else largest, 1e-12)
    measured = difference / size if relative else difference
    passed = bool(measured <= tolerance)  # NaN fails
    return Row(name, difference, difference / size, f"{'rel' if relative else 'abs'} {tolerance:.0e}", passed)


def largest_of(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def kind_of(name: str) -> str:
    """Gradients have a scale of their own; activations, outputs and statistics share one."""
    return "grad" if name.startswith("grad.") else "value"


def scale_of(tensors: Mapping[str, Tensor], kind: str) -> float:
    """The largest value of a kind in a case."""
    return max((largest_of(t.double()) for name, t in tensors.items() if kind_of(name) == kind), default=0.0)


def nudged(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Move every value of a floating tensor up, down or not at all by one unit in its last place."""
    if not tensor.is_floating_point():
        return tensor
    step = torch.randint(-1, 2, tensor.shape, generator=generator)
    away = torch.where(step > 0, torch.inf, -torch.inf).to(tensor.dtype)
    return torch.where(step == 0, tensor, torch.nextafter(tensor, away))


def nudged_case(weights: Mapping[str, Tensor], batch: Batch, seed: int) -> tuple[dict[str, Tensor], Batch]:
    """A case whose weights and image differ from the given ones in their last bit."""
    generator = torch.Generator().manual_seed(seed)
    moved = {name: nudged(tensor, generator) for name, tensor in weights.items()}
    return moved, batch._replace(image=nudged(batch.image, generator))


class Exact:
    """Our own results of a case in float64 and, several times, in float32."""

    def __init__(self, exact: Mapping[str, Tensor], singles: Sequence[Mapping[str, Tensor]]) -> None:
        self.exact, self.singles = exact, singles
        self.scale = {kind: scale_of(exact, kind) for kind in ("grad", "value")}
        shares: dict[str, list[float]] = {"grad": [], "value": []}
        for name, truth in exact.items():
            largest = largest_of(truth.double())
            if largest > ZERO * self.scale[kind_of(name)]:
                shares[kind_of(name)].append(self.noise(name) / largest)
        self.usual = {kind: sorted(found)[len(found) // 2] if found else 0.0 for kind, found in shares.items()}
        """The median noise of the case's tensors, as a share of each: no tensor is expected to have less."""

    def noise(self, name: str) -> float:
        return max(self.distances(name))

    def distances(self, name: str) -> list[float]:
        """How far every float32 run of ours is from exact."""
        return [largest_of(single[name].double() - self.exact[name].double()) for single in self.singles]

    def judge(self, row: Row, theirs: Tensor, tolerance: float) -> Row:
        """Judge a recorded float32 tensor that is beyond its tolerance (a share of its largest value)."""
        kind, truth = kind_of(row.name), self.exact[row.name].double()
        distance, noise = largest_of(theirs.double().reshape(truth.shape) - truth), self.noise(row.name)
        largest, scale = largest_of(truth), self.scale[kind]
        if largest < ZERO * scale:
            passed = distance <= max(NOTHING * scale, TIMES * noise) and noise <= tolerance * scale
            reason = (
                f"0 in float64: recorded {distance / scale:.1e} of the case's scale, our float32 {noise / scale:.1e}"
            )
        else:
            distance, noise = distance / largest, noise / largest
            rounding = max(min(TIMES * max(noise, self.usual[kind]), JUMP), noise)
            passed = distance <= max(tolerance, rounding) and min(self.distances(row.name)) <= JUMP * largest
            reason = f"from our float64: recorded {distance:.1e}, our float32 {noise:.1e}"
        return row._replace(passed=passed, reason=reason)
