"""The optimisers of a prediction: PyTorch's own AdamW, and the state of bitsandbytes' versions.

Source: PyTorch, ``AdamW``; bitsandbytes, optim/optimizer.py.
Taught in: notebook 03, sections 6 and 7.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd")
SMALLEST_8BIT = 4096  # parameters below this many numbers keep a 32-bit state
SMALLEST_PAGED = 100_000  # and below this many, a state on the card
BLOCK = 256  # numbers of an 8-bit state that share a constant


class BitsandbytesState(torch.optim.Optimizer):
    """Allocates what bitsandbytes' AdamW keeps, without its kernels, which need a card.

    A paged state lives in memory that CUDA moves to and from the card by itself; it is no
    allocation of PyTorch's, so it is counted in `paged_bytes` alone.

    Source: bitsandbytes, optim/optimizer.py (Optimizer2State.init_state, get_state_buffer).
    Taught in: notebook 03, section 6.
    """

    def __init__(self, params: Iterable[Tensor], *, bits: int, paged: bool) -> None:
        super().__init__(params, {})
        self.bits, self.paged = bits, paged
        self.paged_bytes = 0
        self._tables: list[Tensor] = []

    @torch.no_grad()
    def step(self) -> None:
        """Makes the state of each parameter that has a gradient and no state yet."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and not self.state[param]:
                    self.state[param] = self._state(param)

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        if self.bits == 32 or param.numel() < SMALLEST_8BIT:
            return self._moments(param, torch.float32)
        if not self._tables:  # one table of values for each moment, shared by all parameters
            self._tables = [param.new_empty(256, dtype=torch.float32) for _ in range(2)]
        state = self._moments(param, torch.uint8)
        for name in ("absmax1", "absmax2"):
            blocks = math.ceil(param.numel() / BLOCK)
            state[name] = param.new_zeros(blocks, dtype=torch.float32)
        return state

    def _moments(self, param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        if self.paged and param.numel() >= SMALLEST_PAGED:
            self.paged_bytes += 2 * param.numel() * dtype.itemsize
            return {"paged": param.new_empty(0)}
        return {name: torch.zeros_like(param, dtype=dtype) for name in ("state1", "state2")}


def make(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """An optimiser over what trains. `adamw` takes the route that PyTorch takes on a card."""
    params = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(params, foreach=True)
    if name == "sgd":
        return torch.optim.SGD(params, foreach=True)
    return BitsandbytesState(
        params, bits=8 if name.endswith("8bit") else 32, paged=name.startswith("paged")
    )
