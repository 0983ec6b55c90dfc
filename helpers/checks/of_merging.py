"""Checks for the exercises on merging and serving.

Source: this course's own.
Taught in: notebook 07, exercises 1 and 2.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .exercises import Broken, Passed, plain, running

Merge = Callable[[list[Tensor], list[Tensor], list[float], list[float]], tuple[Tensor, Tensor]]


@torch.no_grad()
def weighted_sum(merge: Merge) -> Passed:
    """Checks `merge(As, Bs, scalings, weights)`, which makes one LoRA adapter of several.

    Shapes: each A (rank, in), each B (out, rank), ranks may differ. The answer is a pair A, B,
    used with the scaling 1, whose update is the weighted sum of all updates.

    Raises:
        Broken: shapes, scaling, weights, cross terms, or the sum, with the usual slip when it is
            one.

    Source: peft, ``add_weighted_adapter`` with "cat". Taught in: notebook 07, exercise 1.
    """
    cases = (
        ((2, 2), (2.0, 3.0), (0.7, 0.4)),
        ((2, 3), (0.5, 4.0), (1.0, -0.5)),
        ((1, 2, 4), (2.0, 1.0, 0.25), (0.3, 0.3, 0.4)),
    )
    generator = torch.Generator().manual_seed(0)
    for ranks, scalings, weights in cases:
        given = (
            [torch.randn(rank, 6, generator=generator) for rank in ranks],
            [torch.randn(5, rank, generator=generator) for rank in ranks],
            list(scalings),
            list(weights),
        )
        _check_sum(merge, *given)
    return Passed("passed: B A is the weighted sum of all updates, for equal and unequal ranks")


def _check_sum(
    merge: Merge, a: list[Tensor], b: list[Tensor], scalings: list[float], weights: list[float]
) -> None:
    ranks = [len(one) for one in a]
    with running("merge", f"the function, called with adapters of ranks {ranks},"):
        found = merge([one.clone() for one in a], [one.clone() for one in b], scalings, weights)
    if not isinstance(found, tuple | list) or not all(isinstance(one, Tensor) for one in found):
        raise Broken("shapes", f"the answer is a pair of tensors A, B, not {type(found).__name__}")
    shapes = [tuple(one.shape) for one in found]
    rank = sum(ranks)
    if len(found) != 2 or shapes[0][1:] != (6,) or shapes[1] != (5, shapes[0][0]):
        raise Broken(
            "shapes",
            f"ranks {ranks} of A (rank, 6) and B (5, rank) fit into A ({rank}, 6) and B "
            f"(5, {rank}); the answer has {' and '.join(map(str, shapes))}",
        )
    if any(one.is_complex() for one in found):
        raise Broken(
            "weights",
            f"the weights {weights} have a negative one, whose root is no real number: multiply "
            "A alone, or B alone, by weight and scaling",
        )
    update = found[1] @ found[0]
    if torch.allclose(update, _summed(a, b, scalings, weights), rtol=1e-4, atol=1e-5):
        return
    for rule, why, slip in _sum_slips(a, b, scalings, weights):
        if torch.allclose(update, slip, rtol=1e-4, atol=1e-5):
            raise Broken(rule, why)
    gap = (update - _summed(a, b, scalings, weights)).abs().max().item()
    raise Broken("the sum", f"an entry of B A is off by {gap:.3g} for ranks {ranks}")


def _summed(
    a: list[Tensor], b: list[Tensor], scalings: list[float], weights: list[float]
) -> Tensor:
    factors = [s * w for s, w in zip(scalings, weights, strict=True)]
    return sum(f * two @ one for f, one, two in zip(factors, a, b, strict=True))


def _sum_slips(
    a: list[Tensor], b: list[Tensor], scalings: list[float], weights: list[float]
) -> list[tuple[str, str, Tensor]]:
    """Rule, sentence and result of each usual slip."""
    ones = [1.0] * len(a)
    squares = [w * w for w in weights], [s * s for s in scalings]
    slips = [
        ("scaling", "the updates were not multiplied by their scalings", (ones, weights)),
        ("weights", "the weights were not used", (scalings, ones)),
        (
            "weights",
            "each weight counts twice: put it on A or on B, not on both",
            (scalings, squares[0]),
        ),
        (
            "scaling",
            "each scaling counts twice: put it on A or on B, not on both",
            (squares[1], weights),
        ),
        (
            "weights",
            "weights and scalings count twice: put them on A or on B",
            (squares[1], squares[0]),
        ),
    ]
    found = [(rule, why, _summed(a, b, *factors)) for rule, why, factors in slips]
    if len({len(one) for one in a}) == 1:
        why = "A's and B's were added up, and (B1 + B2)(A1 + A2) has products of one with the other"
        factors = [s * w for s, w in zip(scalings, weights, strict=True)]
        for left, right in ((0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
            one = sum(f**left * x for f, x in zip(factors, a, strict=True))
            two = sum(f**right * x for f, x in zip(factors, b, strict=True))
            found.append(("cross terms", why, two @ one))
    return found


Rounds = list[dict[str, float]]
Verdict = Callable[[Rounds], str]

# What is tried, seconds of (base, base again, apart) in each round, the answer, the usual slip.
_TIMINGS = (
    (
        "a clear difference",
        ((1, 1.02, 1.2), (1, 0.98, 1.22), (1, 1.01, 1.19)),
        "slower",
        "the median of apart / base lies above every base again / base",
    ),
    (
        "a clear difference downwards",
        ((1, 1.01, 0.8), (1, 0.99, 0.82), (1, 1.0, 0.81)),
        "faster",
        "the median of apart / base lies below every base again / base",
    ),
    (
        "a difference inside the noise",
        ((1, 1.05, 1.03), (1, 0.97, 1.02), (1, 1.0, 1.04)),
        "undecided",
        "the same model against itself strays as far: compare with the control, not with 1",
    ),
    (
        "one round that something disturbed",
        ((1, 1.03, 1.0), (1, 0.98, 9.0), (1, 1.01, 1.01), (1, 0.99, 0.99), (1, 1.0, 1.0)),
        "undecided",
        "one slow round carries a mean away: take the median",
    ),
    (
        "a machine that became slow",
        ((1, 1.01, 1.1), (1, 0.99, 1.1), (10, 10, 9.5)),
        "slower",
        "seconds of different rounds were mixed: divide within a round, then take the median",
    ),
)


def timing_verdict(verdict: Verdict) -> Passed:
    """Checks `verdict(rounds)`: "slower", "faster" or "undecided" for an adapter apart.

    Each round is a dict of the seconds of "base", "base again" and "apart". The answer compares
    the median of apart / base with the range of base again / base.

    Raises:
        Broken: the kind of timing that was read wrongly, with the usual reason.

    Source: this course's own.
    Taught in: notebook 07, exercise 2.
    """
    for what, rows, right, why in _TIMINGS:
        rounds = [dict(zip(("base", "base again", "apart"), row, strict=True)) for row in rows]
        with running(what, f"the function, called with {len(rounds)} rounds,"):
            found = plain(verdict(rounds))
        if found != right:
            raise Broken(
                what, f"(base, base again, apart) = {rows} is {right!r}, not {found!r}: {why}"
            )
    return Passed(f"passed: {len(_TIMINGS)} timings, with noise, an outlier and a drift among them")
