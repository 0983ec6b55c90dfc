"""Texture, knowing, balancing, attending: what decides where the model looks closely.

A specification of our own for the modules that the note names; their originals are described in
the lesson. Sizes here: B images, G x G = N cells, q of width D, K cells chosen.

Source: arr-coc-0-1; each class says what was kept of it.
Taught in: notebook 09, sections 3 and 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

CHANNELS = 13
BINS = 16  # of the histogram whose entropy is one of the scores
SCORES = ("information", "salience", "participation")
TENSIONS = ("particularize", "exploit", "focus")
_LUMA = (0.299, 0.587, 0.114)
_EPS = 1e-6


@dataclass(frozen=True)
class Look:
    """Where to look, and how that was decided.

    Attributes:
        scores: (B, 3, N) the three maps, each with mean 0 and spread 1 in its image, times its
            learned scale.
        relevance: (B, N).
        temperature: (B,) of the softmax over cells.
        weights: (B, 3) of the three maps; they sum to one.
        tensions: (B, 3) in (0, 1): particularize, exploit, focus.
        share: (B, N) K times the softmax, at most 1: the differentiable part of the choice.
        chosen: (B, N) bool, exactly K True in each row.
    """

    scores: Tensor
    relevance: Tensor
    temperature: Tensor
    weights: Tensor
    tensions: Tensor
    share: Tensor
    chosen: Tensor


def texture(images: Tensor, grid: int) -> Tensor:
    """Thirteen numbers for every cell: what can be said of it without looking closely.

    Colour (3), lightness, two opponent colours, Sobel's gradients across, down and their length,
    row, column, the spread of the lightness, and its entropy. All but row and column are
    averages over the cell, brought to mean 0 and spread 1 within their image, so that no image
    changes because of another one in its batch.

    Args:
        images: (B, 3, H, W), numbers from 0 to 1; H and W are multiples of ``grid``.

    Returns:
        (B, 13, G, G)

    Raises:
        ValueError: a size that the grid does not divide.

    Source: the channels of arr-coc-0-1's texture array, mended (two of its thirteen were copies,
    and it scaled over the batch). Taught in: notebook 09, section 3.
    """
    height, width = images.shape[-2:]
    if height % grid or width % grid:
        raise ValueError(f"images of {height} x {width} pixels cannot be cut into {grid} x {grid}")
    luma = (images * images.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    red, green, blue = images.unbind(1)
    opponent = torch.stack([red - green, (red + green) / 2 - blue], 1)
    across, down = _sobel(luma)
    length = (across**2 + down**2 + _EPS**2).sqrt()

    def mean(x: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(x, grid)

    spread = (mean(luma**2) - mean(luma) ** 2).clamp(min=0).sqrt()
    maps = torch.cat(
        [
            mean(images),
            mean(luma),
            mean(opponent),
            mean(across.abs()),
            mean(down.abs()),
            mean(length),
            spread,
            entropy(luma, grid),
        ],
        1,
    )
    line = torch.linspace(-1, 1, grid, device=images.device, dtype=images.dtype)
    place = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(images), -1, -1, -1)
    return torch.cat([standardised(maps.flatten(2)).view_as(maps), place], 1)


def entropy(luma: Tensor, grid: int) -> Tensor:
    """(B, 1, G, G) nats: Shannon's entropy of the lightness of a cell's pixels, in 16 bins."""
    size = luma.shape[-1] // grid
    cells = functional.unfold(luma, size, stride=size)  # B, pixels, N
    bins = (cells * BINS).long().clamp(0, BINS - 1)
    each = torch.full_like(cells, 1 / cells.shape[1])
    shares = cells.new_zeros(len(cells), BINS, cells.shape[2]).scatter_add_(1, bins, each)
    nats = -(shares * shares.clamp(min=_EPS).log()).sum(1)
    return nats.view(len(luma), 1, grid, grid)


def standardised(maps: Tensor) -> Tensor:
    """Mean 0 and spread 1 over the last axis; a flat map becomes zeros."""
    centred = maps - maps.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True).sqrt() + 1e-4)


class Knowing(nn.Module):
    """Three maps of what may matter: how much is there, what stands out, what was asked for.

    Information is the entropy of a cell, salience its gradients, participation the cosine
    between the cell's texture, through a small network, and the question.

    Source: the three scorers of arr-coc-0-1 (propositional, perspectival, participatory), as one
    module with a learned scale for each. Taught in: notebook 09, section 3.
    """

    def __init__(self, width: int, hidden: int = 32) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Conv2d(CHANNELS, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, width, 1)
        )
        self.log_scale = nn.Parameter(torch.zeros(len(SCORES)))
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(4.0)))

    def forward(self, cells: Tensor, question: Tensor) -> Tensor:
        """(B, 13, G, G) and (B, D) to (B, 3, N)."""
        seen = functional.normalize(self.project(cells).flatten(2), dim=1)
        asked = functional.normalize(question, dim=1).unsqueeze(1)
        alike = (asked @ seen).squeeze(1) * self.log_sharpness.exp()
        information, salience = cells[:, 10].flatten(1), cells[:, 8].flatten(1)
        # the cosine is not standardised: how clear the match is should count
        maps = torch.stack([information, salience, alike], 1)
        return maps * self.log_scale.exp().view(1, -1, 1)


class Balancing(nn.Module):
    """One map out of three, and three tensions between what is wanted of a look.

    Source: arr-coc-0-1's balancer gives three weights; its documents name the tensions, its code
    does not compute them. Taught in: notebook 09, section 3.
    """

    def __init__(
        self,
        width: int,
        hidden: int = 32,
        spread: float = 3.0,
        *,
        weights: list[float] | None = None,
        tensions: list[float | None] | None = None,
    ) -> None:
        super().__init__()
        self.weights, self.tensions = weights, tensions or [None] * len(TENSIONS)
        self.decide = nn.Sequential(
            nn.Linear(3 * len(SCORES) + width, hidden), nn.ReLU(), nn.Linear(hidden, 6)
        )
        self.spread = spread  # how many times as wide the least focused softmax is

    def forward(self, scores: Tensor, question: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, N) and (B, D) to relevance (B, N), breadth (B,), weights and tensions (B, 3)."""
        summary = torch.stack([scores.mean(-1), scores.amax(-1), scores.std(-1)], -1).flatten(1)
        decided = self.decide(torch.cat([summary, question], 1))
        weights, tensions = decided[:, :3].softmax(-1), decided[:, 3:].sigmoid()
        if self.weights is not None:
            weights = weights.new_tensor(self.weights).expand_as(weights)
        for i, value in enumerate(self.tensions):
            if value is not None:
                tensions = tensions.index_fill(1, torch.tensor(i), value)
        special = scores[:, 2] - scores[:, 0]
        relevance = (weights.unsqueeze(-1) * scores).sum(1)
        relevance = relevance + (2 * tensions[:, :1] - 1) * special
        breadth = self.spread ** (1 - tensions[:, 2])
        return relevance, breadth, weights, tensions


class Attending(nn.Module):
    """Chooses exactly K cells, and marks each visual token as coarse or fine.

    Source: arr-coc-0-1's allocator is a top-K without parameters, through which no gradient
    reaches the scores. Taught in: notebook 09, section 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.detail = nn.Embedding(2, width)  # coarse, fine
        self.log_temperature = nn.Parameter(torch.zeros(()))
        nn.init.normal_(self.detail.weight, std=0.5)

    def forward(
        self, relevance: Tensor, breadth: Tensor, cells: int, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Temperature (B,), share (B, N) and chosen (B, N) bool, K = ``cells`` True in a row.

        Args:
            noise: (B, N) added to the logits before the choice; Gumbel noise explores.
        """
        temperature = self.log_temperature.exp() * breadth
        logits = relevance / temperature.unsqueeze(1)
        if noise is not None:
            logits = logits + noise
        share = (cells * logits.softmax(-1)).clamp(max=1)
        best = logits.topk(cells, dim=1).indices
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, best, True)
        return temperature, share, chosen


def gumbel(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Noise with which a top-K of logits is a draw from their softmax without replacement.

    Source: Kool et al. 2019, "Stochastic Beams and Where to Find Them".
    """
    uniform = torch.rand(like.shape, generator=generator, device=like.device)
    return -(-(uniform.clamp(1e-9, 1 - 1e-7)).log()).log()


def _sobel(luma: Tensor) -> tuple[Tensor, Tensor]:
    kernel = luma.new_tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    both = torch.stack([kernel, kernel.T]).unsqueeze(1)
    edges = functional.conv2d(functional.pad(luma, (1, 1, 1, 1), mode="replicate"), both)
    return edges[:, :1], edges[:, 1:]
