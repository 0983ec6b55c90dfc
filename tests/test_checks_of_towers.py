"""The exercise on ranks of two towers: the right answer passes, each usual slip is named."""

import math

import pytest

from helpers import checks, models


def price(layers):
    return sum(ins + outs for ins, outs in layers)


def answer(rank):
    return lambda vision, language, budget, times: (
        times * (low := rank(price(vision), price(language), budget, times)),
        low,
    )


def product(vision, language, budget, times):
    low = budget // sum(ins * outs for ins, outs in [*vision, *language])
    return times * low, low


SLIPS = {
    "largest: one rank of a layer costs in \\+ out": product,
    "budget: the vision rank counts as often": answer(lambda v, t, b, k: b // (v + t)),
    "budget: round down": answer(lambda v, t, b, k: math.ceil(b / (k * v + t))),
    "budget: both towers pay": answer(lambda v, t, b, k: b // t),
    "budget: ranks": answer(lambda v, t, b, k: 3 + b // (k * v + t)),
    "largest: ranks": answer(lambda v, t, b, k: b // (k * v + t) - 1),
    "ratio: vision gets": lambda v, t, b, k: (b // price([*v, *t]),) * 2 if k == 1 else (1, 1),
    "pair: the answer": lambda v, t, b, k: b / (k * price(v) + price(t)),
    "ranks: the function": lambda v, t, b, k: b // 0,
}


def test_the_right_answer_passes():
    assert "passed" in checks.tower_ranks(answer(lambda v, t, b, k: b // (k * v + t)))


@pytest.mark.parametrize("rule", SLIPS)
def test_a_slip_is_named(rule):
    with pytest.raises(checks.Broken, match=rule):
        checks.tower_ranks(SLIPS[rule])


PATTERN = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
WRONG = {
    "kind: the answer is one string": [PATTERN],
    "matches: no module": "language_model.layers",
    "towers: it reaches .*vision_tower": r".*\.(q_proj|k_proj|v_proj)",
    "all: it misses .*down_proj": PATTERN.replace("|down_proj", ""),
}


def test_the_right_pattern_passes():
    assert "14 linear layers" in checks.tower_pattern(PATTERN, models.tiny("llava"))


@pytest.mark.parametrize("rule", WRONG)
def test_a_wrong_pattern_is_named(rule):
    with pytest.raises(checks.Broken, match=rule):
        checks.tower_pattern(WRONG[rule], models.tiny("llava"))
