"""The exercise checks of lesson 03 pass right answers and name what is wrong with others."""

import pytest
import torch

from helpers import checks, quantization
from helpers.checks import of_memory


def packed(weights, double):
    scales = -(-weights // 64)
    return -(-weights // 2) + (scales + 4 * -(-scales // 256) + 4 if double else 4 * scales)


def highest(events):
    alive, top = {}, 0
    for name, size in events:
        alive[name] = -(-size // 512) * 512
        top = max(top, sum(alive.values()))
    return top


def test_right_answers_pass():
    assert "passed" in checks.four_bit_bytes(packed)
    assert "passed" in checks.peak_bytes(highest)


@pytest.mark.parametrize("weights", [64, 640, 64 * 256, 64 * 1000])
def test_the_check_counts_what_the_quantiser_stores(weights):
    plain = quantization.quantize(torch.linspace(-1, 1, weights), "nf4")
    assert of_memory._packed(weights, double=False) == plain.bytes
    assert of_memory._packed(weights, double=True) == quantization.double_quantize(plain).bytes


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda weights, double: -(-weights // 2), "the scales are missing"),
        (lambda weights, double: packed(weights, not double), "the other way"),
        (lambda weights, double: packed(weights, double) - 4 * double, "the mean of the scales"),
        (lambda weights, double: weights // 2 + 4 * (weights // 64), "8-bit scales|is begun"),
        (lambda weights, double: packed(weights - weights % 64, double), "is begun"),
        (lambda weights, double: floored(weights, double, codes=True), "^the last byte"),
        (lambda weights, double: floored(weights, double, scales=True), "^the last byte"),
        (lambda weights, double: packed(weights, double) - seconds(weights) * double, "scales of"),
        (lambda weights: weights / 2, "raises TypeError"),
        (lambda weights, double: None, "None"),
    ],
)
def test_other_sizes_are_named(answer, says):
    with pytest.raises(checks.Broken, match=says):
        checks.four_bit_bytes(answer)


def seconds(weights):
    """Bytes of the 32-bit scales of the 8-bit scales."""
    return 4 * -(-weights // (64 * 256))


def floored(weights, double, codes=False, scales=False):
    """Right without double quantisation; with it what is only begun is left out."""
    if not double:
        return packed(weights, double)
    number = weights // 64 if scales else -(-weights // 64)
    return (weights // 2 if codes else -(-weights // 2)) + number + seconds(weights) + 4


def test_the_mean_and_the_second_scales_are_told_apart_where_they_can_be():
    one = of_memory._packed(64 * 256, True) - 4  # one second scale is as large as the mean
    many = of_memory._packed(64 * 1000, True)
    assert of_memory._slip(one, 64 * 256, True) == ""
    assert "mean" in of_memory._slip(many - 4, 64 * 1000, True)
    assert "scales of the scales" in of_memory._slip(many - 16, 64 * 1000, True)


FREED = "a death frees that name and no other"


def one_too_many(events):
    return highest([(name, size and 512 * (size // 512 + 1)) for name, size in events])


def freeing(events, free):
    """The highest sum where `free` takes from those alive what it takes for the dead one."""
    alive, top = {}, 0
    for name, size in events:
        if size:
            alive[name] = -(-size // 512) * 512
        else:
            free(alive, name)
        top = max(top, sum(alive.values()))
    return top


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        (lambda events: 0, "a birth counts"),
        (lambda events: sum(dict(events).values()), "the highest moment, not the last one"),
        (lambda events: sum(-(-n // 512) * 512 for _, n in events), "what died does not count"),
        (lambda events: max(n for _, n in events), "whole blocks of 512 bytes"),
        (one_too_many, "1024 bytes are two whole blocks already"),
        (lambda events: freeing(events, lambda alive, name: alive.clear()), FREED),
        (lambda events: freeing(events, lambda alive, name: alive.popitem()), FREED),
        (lambda events: freeing(events, lambda alive, name: alive.pop(next(iter(alive)))), FREED),
    ],
)
def test_other_peaks_are_named(answer, rule):
    with pytest.raises(checks.Broken) as caught:
        checks.peak_bytes(answer)
    assert caught.value.rule == rule


def test_freeing_the_right_one_passes():
    assert "7 traces" in checks.peak_bytes(lambda events: freeing(events, dict.pop))


def test_a_name_that_is_born_again():
    def once(events):
        first = [(name, n) for i, (name, n) in enumerate(events) if i < 2 or name != "a"]
        return highest(first) if len(events) == 4 else highest(events)

    with pytest.raises(checks.Broken, match="born again"):
        checks.peak_bytes(once)
