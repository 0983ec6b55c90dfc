"""The exercise check on timings passes the right answer and names what is wrong with others."""

import statistics

import pytest

from helpers import checks


def right(rounds):
    ratio = statistics.median(r["apart"] / r["base"] for r in rounds)
    control = [r["base again"] / r["base"] for r in rounds]
    if ratio > max(control):
        return "slower"
    return "faster" if ratio < min(control) else "undecided"


def read_by(middle, against):
    """A verdict from a way to sum up apart / base, and a way to get the limits."""

    def verdict(rounds):
        ratio, (low, high) = middle(rounds), against(rounds)
        return "slower" if ratio > high else "faster" if ratio < low else "undecided"

    return verdict


def control(rounds):
    ratios = [r["base again"] / r["base"] for r in rounds]
    return min(ratios), max(ratios)


def paired(rounds):
    return statistics.median(r["apart"] / r["base"] for r in rounds)


def mean(rounds):
    return statistics.fmean(r["apart"] / r["base"] for r in rounds)


def sums(rounds):
    return sum(r["apart"] for r in rounds) / sum(r["base"] for r in rounds)


def test_the_right_verdict_passes():
    assert "5 timings" in checks.timing_verdict(right)
    assert "passed" in checks.timing_verdict(read_by(paired, control))


@pytest.mark.parametrize(
    ("answer", "rule", "says"),
    [
        (lambda rounds: "undecided", "a clear difference", "above every"),
        (lambda rounds: "slower", "a clear difference downwards", "below every"),
        (read_by(paired, lambda rounds: (1, 1)), "a difference inside", "control, not with 1"),
        (read_by(mean, control), "one round", "take the median"),
        (read_by(lambda r: min(sums(r), paired(r)), control), "a machine", "within a round"),
        (lambda rounds: 1 / 0, "a clear difference", "raises ZeroDivisionError"),
        (lambda rounds: None, "a clear difference", "not None"),
    ],
)
def test_other_verdicts_are_named(answer, rule, says):
    with pytest.raises(checks.Broken, match=says) as caught:
        checks.timing_verdict(answer)
    assert caught.value.rule.startswith(rule)
