"""The exercise on weighted merges: the right answer passes, each usual slip is named."""

import pytest
import torch

from helpers import checks


def merge(side=lambda f: (f, 1.0), factor=lambda s, w: s * w):
    def answer(a, b, scalings, weights):
        sides = [side(factor(s, w)) for s, w in zip(scalings, weights, strict=True)]
        one = torch.cat([f * x for (f, _), x in zip(sides, a, strict=True)])
        return one, torch.cat([f * x for (_, f), x in zip(sides, b, strict=True)], dim=1)

    return answer


def test_both_right_answers_pass():
    assert "passed" in checks.weighted_sum(merge())
    assert "passed" in checks.weighted_sum(merge(side=lambda f: (1.0, f)))


def added(a, b, scalings, weights):
    factors = [(s * w) ** 0.5 for s, w in zip(scalings, weights, strict=True)]
    return tuple(sum(f * x for f, x in zip(factors, part, strict=True)) for part in (a, b))


SLIPS = {
    "scaling: the updates were not multiplied": merge(factor=lambda s, w: w),
    "weights: the weights were not used": merge(factor=lambda s, w: s),
    "weights: each weight counts twice": merge(factor=lambda s, w: s * w * w),
    "scaling: each scaling counts twice": merge(factor=lambda s, w: s * s * w),
    "weights: weights and scalings count twice": merge(side=lambda f: (f, f)),
    "weights: the weights .* have a negative one": merge(side=lambda f: (f**0.5, f**0.5)),
    "cross terms": added,
    "the sum: an entry": merge(factor=lambda s, w: s + w),
    "shapes: ranks": lambda a, b, s, w: (a[0], torch.cat(b, dim=1)),
    "shapes: the answer is a pair": lambda a, b, s, w: torch.cat(a),
    "merge: the function": lambda a, b, s, w: torch.cat(a, dim=7),
}


@pytest.mark.parametrize("rule", SLIPS)
def test_a_slip_is_named(rule):
    with pytest.raises(checks.Broken, match=rule):
        checks.weighted_sum(SLIPS[rule])
