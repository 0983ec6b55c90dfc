"""How good sixteen levels can be: code books fitted to the data, and errors beside the best one.

Values come as blocks that were divided by their absmax, so that the largest of each is 1 or -1. The
error of a weight is absmax times the error of its scaled value; the fits below weigh by it, so that
"optimal" means the error of the weights themselves.

Source: Lloyd 1982 and Max 1960, on the least squared error; Yoshida 2023, on NF4.
Taught in: notebook 03, section 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn

from helpers.given import one_of, whole
from helpers.quantization.blocks import blocks, midpoints, nearest
from helpers.quantization.code_books import normal_float, small_float, whole_numbers

Measure = Literal["squared", "absolute"]
POWER: dict[Measure, int] = {"squared": 2, "absolute": 1}
STEPS = 1000  # rounds of a fit at most
STILL = 1e-6  # a fit ends when no level moves further


@dataclass(frozen=True)
class Scaled:
    """Blocks over their absmax, flat and in ascending order, with the absmax of each value."""

    values: Tensor  # (n,), float64, -1 to 1
    absmax: Tensor  # (n,), float64


def scaled(weights: Tensor, block_size: int = 64) -> Scaled:
    """Cuts into blocks and divides by absmax; an unfinished last block is left out.

    Args:
        weights: any shape.
        block_size: weights that share one absmax.

    Raises:
        ValueError: fewer weights than one block, a block of zeros, or a weight that is not finite.
    """
    flat = weights.flatten()
    whole("A block's size", block_size)
    if flat.is_meta or not flat.isfinite().all():
        raise ValueError("A weight is infinite, not a number or on meta: its block has no scale.")
    rows = blocks(flat[: len(flat) // block_size * block_size], block_size).double()
    absmax = rows.abs().amax(1, keepdim=True)
    if (absmax == 0).any():
        raise ValueError("A block of zeros has no scale; leave such blocks out.")
    values, order = (rows / absmax).flatten().sort()
    return Scaled(values, absmax.expand_as(rows).flatten()[order])


def error(data: Scaled, book: Tensor, measure: Measure) -> float:
    """Mean squared or absolute error of the weights when each takes the level nearest to it.

    ``book`` is (levels,), in any order.

    Raises:
        ValueError: an unknown measure, no data, or a book that is no row of levels.

    Taught in: notebook 03, section 2.
    """
    _check(data, measure)
    book = book.double()
    gap = (data.values - book[nearest(data.values, book)]).abs() * data.absmax
    return (gap ** POWER[measure]).mean().item()


def fit(data: Scaled, measure: Measure, fixed: tuple[float, ...] = ()) -> Tensor:
    """Sixteen levels with the smallest error on this data that Lloyd's algorithm finds.

    It starts from INT4, NF4 and FP4, and keeps the best of the three ends: each is the best among
    its neighbours, and nothing proves that there is no better one elsewhere.

    Args:
        data: of `scaled`.
        measure: "squared" (Lloyd-Max, or k-means) or "absolute" (k-medians).
        fixed: levels that the book has to have, such as (-1.0, 0.0, 1.0).

    Returns:
        (16,) float32, in ascending order.

    Raises:
        ValueError: an unknown measure, no data, or fixed levels that are too many or outside -1
            to 1.

    Source: Lloyd, Least squares quantization in PCM (1982); Max, Quantizing for minimum distortion
    (1960); Yoshida, NF4 Isn't Information Theoretically Optimal (2023), for medians and fixed ends.
    Taught in: notebook 03, section 2.
    """
    _check(data, measure)
    if len(fixed) > 16 or not all(-1 <= level <= 1 for level in fixed):
        raise ValueError(f"Sixteen levels from -1 to 1 cannot have {fixed} among them.")
    starts = (torch.linspace(-1, 1, 16), normal_float(), small_float())
    ends = [_lloyd(data, measure, start.double().sort().values, fixed) for start in starts]
    return min(ends, key=lambda book: error(data, book, measure)).float()


def _check(data: Scaled, measure: Measure) -> None:
    one_of("measure", measure, POWER)
    if not len(data.values):
        raise ValueError("There are no weights, so there is no error to measure.")


def _lloyd(data: Scaled, measure: Measure, book: Tensor, fixed: tuple[float, ...]) -> Tensor:
    """Every value to its nearest level, every level to the mean or median of its values; again.

    Means weigh by absmax squared, medians by absmax: then they are those of the weights' errors.
    """
    still = torch.tensor(fixed, dtype=torch.float64)
    book = book.clone()
    book[nearest(still, book)] = still
    held = torch.isin(book, still)
    power = data.absmax ** POWER[measure]
    weight = nn.functional.pad(power.cumsum(0), (1, 0))
    moment = nn.functional.pad((data.values * power).cumsum(0), (1, 0))
    for _ in range(STEPS):
        inner = torch.searchsorted(data.values, midpoints(book), right=True)
        edges = nn.functional.pad(inner, (1, 1))
        edges[-1] = len(data.values)
        low, high = weight[edges[:-1]], weight[edges[1:]]
        if measure == "squared":
            centre = (moment[edges[1:]] - moment[edges[:-1]]) / (high - low)
        else:
            half = torch.searchsorted(weight, (low + high) / 2) - 1
            centre = data.values[half.clamp(0, len(data.values) - 1)]
        moved = torch.where(held | (edges[:-1] == edges[1:]), book, centre)
        if (moved - book).abs().max() < STILL:
            break
        book = moved
    return book


def code_entropy(data: Scaled, book: Tensor) -> float:
    """Bits of information a code carries: 4 when all sixteen are used equally often.

    ``book`` is (16,), in any order.

    Raises:
        ValueError: no data, or a book that is no row of levels.

    Taught in: notebook 03, section 2.
    """
    _check(data, "squared")
    share = torch.bincount(nearest(data.values, book.double()), minlength=16) / len(data.values)
    return -(share * share.clamp(min=1e-12).log2()).sum().item()


def compare(
    samples: Mapping[tuple[str, int], Tensor], gaussian: Tensor, block_size: int = 64
) -> pd.DataFrame:
    """The errors of every code book on every sample, absolute and over the fitted book's.

    Args:
        samples: weights of any shape, by the name of their origin and the seed (or the layer's
            number).
        gaussian: a sample on which "fitted on Gaussian" is fitted; take another seed than those
            of `samples`, so that no book has seen its test.
        block_size: weights that share one absmax.

    Returns:
        One row for each sample, measure and book, with the columns origin, seed, measure ("squared"
        or "absolute"), book ("nf4", "fp4", "int4", "fitted", "fitted, -1 0 1 kept",
        "fitted on Gaussian"), error and relative (over the error of "fitted", which has seen the
        sample itself: the best that Lloyd's algorithm found).

    Taught in: notebook 03, section 2.
    """
    normal = scaled(gaussian, block_size)
    rows = []
    for measure in POWER:
        learned = fit(normal, measure)
        for (origin, seed), weights in samples.items():
            data = scaled(weights, block_size)
            best = error(data, fitted := fit(data, measure), measure)
            books = {
                "nf4": normal_float(),
                "fp4": small_float(),
                "int4": whole_numbers(),
                "fitted": fitted,
                "fitted, -1 0 1 kept": fit(data, measure, fixed=(-1.0, 0.0, 1.0)),
                "fitted on Gaussian": learned,
            }
            for name, book in books.items():
                found = error(data, book, measure)
                rows.append((origin, seed, measure, name, found, found / best))
    return pd.DataFrame(rows, columns=["origin", "seed", "measure", "book", "error", "relative"])
