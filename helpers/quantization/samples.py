"""What code books are tried on: random numbers of four distributions, and real weights.

Source: this course's own.
Taught in: notebook 03, section 2.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Laplace, StudentT
from transformers import AutoModel

from helpers import models
from helpers.given import LARGEST_SEED, one_of, whole

# SmolLM2 is not among them: its weights come from a 4-bit file, whose levels they would show.
FULL_PRECISION = ("minilm", "dinov2")
_DRAWS: dict[str, Callable[[int], Tensor]] = {
    "Gaussian": lambda count: torch.randn(count),
    "Laplace": lambda count: Laplace(0.0, 1.0).sample((count,)),
    "uniform": lambda count: 2 * torch.rand(count) - 1,
    "Student-t": lambda count: StudentT(5.0).sample((count,)),  # heavy tails: 5 degrees of freedom
}
DISTRIBUTIONS = tuple(_DRAWS)


def draw(distribution: str, count: int, seed: int) -> Tensor:
    """Random numbers, (count,) float32, of one of `DISTRIBUTIONS`; their spread does not matter.

    Raises:
        ValueError: unknown distribution, or a count or seed that is no whole number from 0.

    Taught in: notebook 03, section 2.
    """
    one_of("distribution", distribution, DISTRIBUTIONS)
    whole("The count", count, 0)
    whole("seed", seed, 0, LARGEST_SEED)
    # torch.distributions takes no generator; the caller's random state is put back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _DRAWS[distribution](count)


def linear_weights(name: str) -> dict[str, Tensor]:
    """The weights (out, in) of a real model's linear layers, by the layer's name.

    Args:
        name: one of `FULL_PRECISION`, whose weights were published in 32 bits.

    Raises:
        ValueError: unknown name.

    Taught in: notebook 03, section 2.
    """
    one_of("model with weights in full precision", name, FULL_PRECISION)
    layers = AutoModel.from_pretrained(models.path(name)).named_modules()
    return {name: layer.weight.detach() for name, layer in layers if type(layer) is nn.Linear}
