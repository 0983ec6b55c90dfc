"""The exercise checks of lesson 04 pass right answers and name what is wrong with others."""

import pytest
import torch

from helpers import checks


def schedule(step, start, target, tinit, tfinal, total_step, *, power=3):
    if step <= tinit:
        return start
    end = total_step - tfinal
    if step > end:
        return target
    return int((start - target) * (1 - (step - tinit) / (end - tinit)) ** power + target)


def test_the_schedule_passes():
    assert "4 schedules" in checks.rank_schedule(schedule)


def read_as_the_end(step, start, target, tinit, tfinal, total_step):
    if tfinal <= tinit:
        return target
    return schedule(step, start, target, tinit, total_step - tfinal, total_step)


@pytest.mark.parametrize(
    ("answer", "rule", "says"),
    [
        (read_as_the_end, "cubic fall", "it is not the step where pruning ends"),
        (lambda *given: schedule(*given, power=1), "cubic fall", "cubic, not linear"),
        (lambda *given: schedule(*given, power=2), "cubic fall", "cubic, not square"),
        (lambda *given: schedule(*given) + 1, "warm-up", "gives 109, not 108"),
        (lambda step, start, *rest: schedule(step, start, *rest) / 36, "warm-up", "gives 3.0"),
        (
            lambda step, start, target, tinit, *rest: schedule(step, start, target, 0, *rest),
            "warm-up",
            "the first tinit steps keep the start",
        ),
        (
            lambda step, start, target, *rest: (
                schedule(step, start, target, *rest) if step < 70 else target - 1
            ),
            "final phase",
            "step 70",
        ),
        (lambda step: step, "every step", "raises TypeError"),
        (lambda *given: None, "warm-up", "gives None, not 108"),
    ],
)
def test_other_schedules_are_named(answer, rule, says):
    with pytest.raises(checks.Broken, match=says) as caught:
        checks.rank_schedule(answer)
    assert caught.value.rule == rule


def unrounded(step, start, target, tinit, tfinal, total_step):
    left = 1 - (step - tinit) / (total_step - tfinal - tinit)
    return target + (start - target) * min(1.0, max(0.0, left)) ** 3


def test_parts_of_a_rank_are_named():
    with pytest.raises(checks.Broken, match="a whole number, rounded down"):
        checks.rank_schedule(unrounded)
    with pytest.raises(checks.Broken, match=": it is rounded down"):
        checks.rank_schedule(lambda *given: round(unrounded(*given)))


def rows_to(length, matrix):
    return length.unsqueeze(1) * matrix / matrix.norm(dim=1, keepdim=True)


def test_the_merged_weight_passes():
    given = torch.get_rng_state()
    assert "passed" in checks.dora_weight(lambda w, a, b, s, m: rows_to(m, w + s * b @ a))
    assert torch.equal(torch.get_rng_state(), given)


@pytest.mark.parametrize(
    ("answer", "rule", "says"),
    [
        (lambda w, a, b, s, m: w + s * b @ a, "magnitude", "LoRA's merge"),
        (lambda w, a, b, s, m: rows_to(m, w + b @ a), "scaling", "not multiplied by scaling"),
        (lambda w, a, b, s, m: rows_to(m, w), "update", "still point along W"),
        (lambda w, a, b, s, m: rows_to(m / m, w + s * b @ a), "magnitude", "length 1: multiply"),
        (lambda w, a, b, s, m: m.unsqueeze(1) * (w + s * b @ a), "magnitude", "without being"),
        (
            lambda w, a, b, s, m: m.unsqueeze(1) * (w + s * b @ a) / w.norm(dim=1, keepdim=True),
            "lengths after the update",
            "W's lengths",
        ),
        (
            lambda w, a, b, s, m: m.unsqueeze(1) * (w + s * b @ a) / (w + s * b @ a).norm(dim=0),
            "one length for each output",
            "dim=0",
        ),
        (
            lambda w, a, b, s, m: m.unsqueeze(1) * (w + s * b @ a) / (w + s * b @ a).norm(),
            "one length for each output",
            "whole matrix",
        ),
        (lambda w, a, b, s, m: rows_to(m, w + s * b @ a) + 1, "magnitude / length", "off by 1"),
        (lambda w, a, b, s, m: m / (w + s * b @ a).norm(dim=1), "shape", r"\(4, 6\) like W"),
        (lambda w, a, b, s, m: None, "shape", "not None"),
        (lambda w, a, b, s, m: m * w, "merge", "raises RuntimeError"),
    ],
)
def test_other_merges_are_named(answer, rule, says):
    with pytest.raises(checks.Broken, match=says) as caught:
        checks.dora_weight(answer)
    assert caught.value.rule.startswith(rule)
