"""What one run of the training loop has done so far.

Source: this course's own.
Taught in: notebook 06, section 6.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class History:
    """What one run of :func:`train` did: loss per step (nats per target), tokens, seconds.

    The tokens are those of this process.
    """

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens that went through the model per second, padding included."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Run:
    """All that a training run changes, apart from random numbers.

    Attributes:
        model: of which the parameters that ask for a gradient change, and buffers may.
        optimizer: AdamW over these parameters.
        history: losses, tokens and seconds so far; its length is the number of steps done.
        position: how many batches of the data were passed.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    history: History
    position: int
