"""DoRA by hand: LoRA turns the rows of a weight, and a vector of its own says how long they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.by_hand.lora import LoRALinear


class DoRALinear(LoRALinear):
    """A frozen linear layer whose weight is taken apart: ``y = (m / |V|) V x + b`` for every row,
    with ``V = W + (alpha / r) B A``.

    Shapes: as LoRALinear's, and the magnitude m is (out,): one length for each output, taken over
    its inputs. (The paper writes weights as (in, out) and speaks of columns; nn.Linear stores
    the same numbers as rows.) m starts as the length of W's rows and B at zero, so the layer starts
    out identical to its base.

    The lengths |V| count as constants for the gradient, as in the paper's section 4.3 and in peft:
    backward then needs to keep no copy of V. A row of zeros has no direction and gives NaN, here as
    in peft.

    Raises: as LoRALinear.
    Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equations 5 and 11.
    Taught in: notebook 04, section 1.
    """

    def __init__(self, base: nn.Linear, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__(base, rank, alpha)
        self.magnitude = nn.Parameter(base.weight.detach().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """x of shape (..., in) to (..., out)."""
        turned = F.linear(x, self.base.weight) + x @ self.A.T @ self.B.T * self.scaling
        scaled = turned * (self.magnitude / self.lengths())
        return scaled if self.base.bias is None else scaled + self.base.bias

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """The length of each row of V, of shape (out,); takes no part in the gradient."""
        return (self.base.weight + self.delta()).norm(dim=1)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain linear layer with weight (m / |V|) V; this layer stays as it is."""
        merged = super().merge()
        merged.weight *= (self.magnitude / self.lengths()).unsqueeze(1)
        return merged
