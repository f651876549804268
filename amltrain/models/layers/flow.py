"""A normalising flow on the shortcut of a transformer block: an affine step and planar steps, close to the identity.

Papers: Rezende and Mohamed, Variational Inference with Normalizing Flows, ICML 2015; Wang et al., BarLeRIa, ICLR 2024.
The log-determinant is not computed, because nothing reads it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
