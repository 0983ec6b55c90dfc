"""LoRA by hand: a frozen linear layer and a trainable product of two thin matrices."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from helpers.given import number


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update: ``y = W x + b + (alpha / r) B A x``.

    Shapes: the base weight W is (out, in), A is (rank, in), B is (out, rank), x is (..., in).
    A starts random and B at zero, so the layer starts out identical to its base. The base is
    frozen in place; A and B take its dtype and device.

    Raises: TypeError for a base that is not a linear layer with floating-point weights,
    ValueError for a rank outside 1 ... min(in, out), or an alpha that is not finite.
    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", equation 3.
    Taught in: notebook 01, section 1.
    """

    def __init__(self, base: nn.Linear, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__()
        _check_base(base, type(self).__name__)
        _check_rank(rank, base)
        weight = base.weight
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(weight.new_empty(rank, base.in_features))
        self.B = nn.Parameter(weight.new_zeros(base.out_features, rank))
        self.scaling = number("alpha", alpha) / rank
        # sqrt(5) is the constant of nn.Linear: uniform in +-1/sqrt(in), the same start as peft's.
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x of shape (..., in) to (..., out): two thin products, never the full B A."""
        return self.base(x) + (x @ self.A.T @ self.B.T) * self.scaling

    def delta(self) -> Tensor:
        """The update of the weight, (alpha / r) B A, of shape (out, in) and rank at most r."""
        return self.B @ self.A * self.scaling

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain linear layer with the update added to its weight; this layer stays as it is."""
        merged = copy.deepcopy(self.base)
        merged.weight += self.delta()
        return merged


def _check_base(base: nn.Module, wrapper: str) -> None:
    if not isinstance(base, nn.Linear):
        raise TypeError(
            f"{wrapper} wraps a torch.nn.Linear, but was given {type(base).__name__}; "
            "peft.LoraConfig also handles Conv1D, Embedding and convolutions."
        )
    if not base.weight.is_floating_point():
        raise TypeError(
            f"{wrapper} adds to floating-point weights, but this layer's are {base.weight.dtype}; "
            "use peft, which dequantises the base on the fly."
        )


def _check_rank(rank: int, base: nn.Linear) -> None:
    largest = min(base.in_features, base.out_features)
    # bool is an int in Python; True would silently become rank 1.
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= largest:
        raise ValueError(
            f"The rank must be a whole number from 1 to min(in, out) = {largest} for this "
            f"{base.in_features} -> {base.out_features} layer, but was {rank!r}: B A can never "
            "have a higher rank than the weight it is added to."
        )
