"""One process or several: the little that a training loop has to know about it.

Source: accelerate and torch.distributed.
Taught in: notebook 06, section 8.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


class Team:
    """The processes that train one model together; one process where no accelerator is given.

    Attributes:
        count: how many processes there are.
        index: the number of this one.
        main: whether this is the one that writes files and shows progress.
    """

    def __init__(self, accelerator: Accelerator | None) -> None:
        self._accelerator = accelerator
        self.count = accelerator.num_processes if accelerator else 1
        self.index = accelerator.process_index if accelerator else 0
        self.main = self.index == 0

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights only (FSDP and the like)."""
        kind = str(getattr(self._accelerator, "distributed_type", ""))
        return any(name in kind for name in ("FSDP", "DEEPSPEED", "MEGATRON"))

    def wrap(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
        """The model that averages gradients over the processes, and its optimiser."""
        if self._accelerator is None:
            return model, optimizer
        return self._accelerator.prepare(model, optimizer)

    def waiting(self, model: torch.nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Inside, gradients stay with this process, but for the last batch of a step."""
        if self._accelerator is None or last:
            return contextlib.nullcontext()
        return self._accelerator.no_sync(model)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of the sum of all processes' losses; ``loss`` is a scalar."""
        if self._accelerator is None:
            loss.backward()
        else:  # the wrapped model takes the mean over the processes
            self._accelerator.backward(loss * self.count)

    def clip(self, weights: list[torch.nn.Parameter], max_norm: float) -> None:
        """Scale the gradients down to a norm of at most ``max_norm``."""
        if self._accelerator is None:
            torch.nn.utils.clip_grad_norm_(weights, max_norm)
        else:
            self._accelerator.clip_grad_norm_(weights, max_norm)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a number over the processes; a scalar gives a scalar."""
        return value if self.count == 1 else self._accelerator.reduce(value, "sum")

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()
