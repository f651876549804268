"""Selective scan of Mamba over maps and sequences, in plain PyTorch, with `mamba_ssm`'s CUDA kernel where there is one.

Papers: Gu and Dao, Mamba (arXiv 2312.00752); Liu et al., VMamba (arXiv 2401.10166). For every channel with input s_t:

    h_t = exp(dt_t A) h_(t-1) + dt_t B_t s_t,    y_t = <C_t, h_t> + D s_t,    h_0 = 0

dt, B and C are linear functions of the input at t. Always computes outside of autocast, in float32.

Dimensions: B batch, K = 4 scan directions, D channels of one direction, N state size, R rank of dt, T sequence length,
H W a map's size.
"""

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amltrain.models.layers.hub_kernels import HubKernel, equal_or_none, is_asked, load

DIRECTIONS = 4
CHUNK = 16

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


KERNEL = HubKernel("kernels-community/mamba-ssm", version=5)


@cache
def find_kernel(device: torch.device) -> Scan | None:
    """`mamba_ssm`'s compiled scan for a CUDA device: of the package where it is installed, of the Hub where that is
    asked for. None where there is neither, or it is not equal to `selective_scan`.
    """
    if device.type != "cuda" or not (find_spec("mamba_ssm") or is_asked(device)):
        return None
    return equal_or_none("mamba_ssm", compiled_scan, lambda scan: largest_difference(scan, selective_scan, device))


def compiled_scan() -> Scan:
    """The scan of the installed package, else of the Hub. Raises whatever their import raises."""
    if find_spec("mamba_ssm") is None:
        return scan_of(load(KERNEL).selective_scan_fn)
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return scan_of(selective_scan_fn)


def scan_of(function: Callable[..., Tensor]) -> Scan:
    """Wrap `selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)`."""

    def scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor) -> Tensor:
        return function(u, delta, a, b, c, d, delta_bias=bias, delta_softplus=True)

    return scan


def largest_difference(one: Scan, other: Scan, device: torch.device) -> float:
    """Largest relative difference of outputs and gradients on random inputs, for a state of 1 and of 8."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for states in (1, 8):
        drawn = (
            torch.randn(2, 12, 37, generator=generator),
            torch.randn(2, 12, 37, generator=generator),
            -torch.rand(12, states, generator=generator) - 0.1,
            torch.randn(2, 4, states, 37, generator=generator),
            torch.randn(2, 4, states, 37, generator=generator),
            torch.randn(12, generator=generator),
            torch.randn(12, generator=generator),
        )
        results = []
        for scan in (one, other):
            inputs = [part.to(device).requires_grad_() for part in drawn]
            output = scan(*inputs)
            results.append((output.detach(), *torch.autograd.grad(output.square().sum(), inputs)))
        found += [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True)]
    return max(found)


def choose_scan(device: torch.device) -> Scan:
    """The CUDA kernel where there is one that is equal, except in a graph, which cannot hold it."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return selective_scan
    return find_kernel(device) or selective_scan


def selective_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor) -> Tensor:
    """Scan groups of channels; channels of one group share B and C.

    u      [B, G*D, T] float32, the input; group after group
    delta  [B, G*D, T], dt before bias and softplus
    a      [G*D, N], negative; d, bias [G*D]
    b, c   [B, G, N, T]
    Returns [B, G*D, T].
    """
    groups = b.shape[1]
    step = F.softplus(delta + bias[:, None]).unflatten(1, (groups, -1))  # [B, G, D, T]
    decay = (step[:, :, :, None] * a.unflatten(0, (groups, -1))[..., None]).exp()  # [B, G, D, N, T]
    drive = (step * u.unflatten(1, (groups, -1)))[:, :, :, None] * b[:, :, None]
    state = linear_recurrence(decay, drive)
    y = (state * c[:, :, None]).sum(dim=3).flatten(1, 2)
    return y + d[:, None] * u


@torch.library.custom_op("amltrain::linear_recurrence", mutates_args=())
def linear_recurrence(a: Tensor, x: Tensor) -> Tensor:
    """h_t = a_t h_(t-1) + x_t over the last dimension, h before the first step 0. a, x [..., T] -> [..., T].

    One operator for `torch.compile`, whose tracing would otherwise follow every step. The backward pass is the same
    recurrence run backwards in time, so only a and h are kept.
    """
    return recur(a, x).contiguous()


@linear_recurrence.register_fake
def _(a: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _recur_backwards(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    a, state = ctx.saved_tensors
    later = F.pad(a[..., 1:], (0, 1))  # what carries h_t into h_(t+1)
    of_x = linear_recurrence(later.flip(-1), gradient.flip(-1)).flip(-1)
    return of_x * F.pad(state[..., :-1], (1, 0)), of_x


linear_recurrence.register_autograd(_recur_backwards, setup_context=_keep)


def recur(a: Tensor, x: Tensor) -> Tensor:
    """Solve the recurrence chunk by chunk: all chunks at once, then the chunks' ends. a, x [..., T] -> [..., T]."""
    length = x.shape[-1]
    if length <= CHUNK:
        return _steps(a.movedim(-1, 0), x.movedim(-1, 0))[0].movedim(0, -1)
    missing = -length % CHUNK
    # steps first and contiguous: every step reads whole lines of memory
    a, x = (F.pad(t, (0, missing)).unflatten(-1, (-1, CHUNK)).movedim(-1, 0).contiguous() for t in (a, x))
    inside, decay = _steps(a, x)
    ends = recur(decay[-1], inside[-1])
    before = F.pad(ends[..., :-1], (1, 0))
    return (inside + decay * before).movedim(0, -1).flatten(-2)[..., :length]


def _steps(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """One step after the other: the states and the products of all decays so far, both [T, ...]."""
    states, decays = [x[0]], [a[0]]
    for i in range(1, len(x)):
        states.append(a[i] * states[-1] + x[i])
        decays.append(a[i] * decays[-1])
    return torch.stack(states), torch.stack(decays)


def map_orders(x: Tensor) -> Tensor:
    """Read a map row by row, column by column, and both backwards: [B, D, H, W] -> [B, 4, D, H*W]."""
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    return torch.stack((rows, columns, rows.flip(-1), columns.flip(-1)), dim=1)


def merge_map(y: Tensor, height: int, width: int) -> Tensor:
    """Undo `map_orders` and add the four: [B, 4, D, H*W] -> [B, D, H*W], row by row."""
    rows = y[:, 0] + y[:, 2].flip(-1)
    columns = y[:, 1] + y[:, 3].flip(-1)
    return rows + columns.unflatten(-1, (width, height)).transpose(2, 3).flatten(2)


def sequence_orders(x: Tensor) -> Tensor:
    """Read a sequence twice forwards and twice backwards: [B, D, T] -> [B, 4, D, T]."""
    return torch.stack((x, x, x.flip(-1), x.flip(-1)), dim=1)


def merge_sequence(y: Tensor) -> Tensor:
    """Undo `sequence_orders` and add the four: [B, 4, D, T] -> [B, D, T]."""
    return y[:, 0] + y[:, 1] + (y[:, 2] + y[:, 3]).flip(-1)


class SelectiveScan(nn.Module):
    """Projection, depth-wise convolution, four scans, norm and projection (VMamba's SS2D without a gate).

    `gated` and `sequence` make it ReMamber's scan over channels: a height of 1, read twice in each direction, times the
    SiLU of a second half of the projection.
    """

    def __init__(self, in_dim: int, dim: int, *, state: int = 1, gated: bool = False, sequence: bool = False) -> None:
        """in_dim: width of the input. dim: width of the output; the scan is twice as wide."""
        super().__init__()
        inner, self.rank, self.state = 2 * dim, math.ceil(dim / 16), state
        self.gated, self.sequence = gated, sequence
        self.in_proj = nn.Linear(in_dim, 2 * inner if gated else inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.x_proj_weight = nn.Parameter(torch.empty(DIRECTIONS, self.rank + 2 * state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(DIRECTIONS, inner, self.rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(DIRECTIONS, inner))
        self.A_logs = nn.Parameter(torch.empty(DIRECTIONS * inner, state))
        self.Ds = nn.Parameter(torch.ones(DIRECTIONS * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As published: A = -(1, 2, ...), D = 1, and dt between 0.001 and 0.1, log-uniform."""
        bound = self.x_proj_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        nn.init.uniform_(self.dt_projs_weight, -(self.rank**-0.5), self.rank**-0.5)
        low, high = math.log(1e-3), math.log(0.1)
        step = torch.empty_like(self.dt_projs_bias).uniform_(low, high).exp().clamp(min=1e-4)
        self.dt_projs_bias.copy_(step + (-torch.expm1(-step)).log())  # the inverse of softplus
        self.A_logs.copy_(torch.arange(1, self.state + 1, dtype=torch.float32).log().expand_as(self.A_logs))

    def forward(self, x: Tensor) -> Tensor:
        """X [B, H, W, C_in] -> [B, H, W, C]."""
        height, width = x.shape[1:3]
        x = self.in_proj(x)
        gate = None
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2)))
        merged = self.scan(x).transpose(1, 2).unflatten(1, (height, width))
        y = self.out_norm(merged).to(x.dtype)
        return self.out_proj(y if gate is None else y * F.silu(gate))

    def scan(self, x: Tensor) -> Tensor:
        """[B, D, H, W] -> the four scans added, [B, D, H*W] in at least float32."""
        exact = torch.promote_types(self.A_logs.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(exact)
            read = sequence_orders(x.flatten(2)) if self.sequence else map_orders(x)  # [B, K, D, T]
            parameters = torch.einsum("bkdt,kcd->bkct", read, self.x_proj_weight.to(exact))
            low_rank, b, c = parameters.split([self.rank, self.state, self.state], dim=2)
            delta = torch.einsum("bkrt,kdr->bkdt", low_rank, self.dt_projs_weight.to(exact))
            y = choose_scan(x.device)(
                read.flatten(1, 2),
                delta.flatten(1, 2),
                -self.A_logs.to(exact).exp(),
                b.contiguous(),
                c.contiguous(),
                self.Ds.to(exact),
                self.dt_projs_bias.to(exact).flatten(),
            ).unflatten(1, (DIRECTIONS, -1))
            return merge_sequence(y) if self.sequence else merge_map(y, *x.shape[-2:])
