"""Checks for the exercises on vision-language models."""

from collections.abc import Callable

from torch import nn

from helpers import adapters

from .exercises import Broken, Passed, running

Shapes = list[tuple[int, int]]
Ranks = Callable[[Shapes, Shapes, int, int], tuple[int, int]]

# vision layers, language layers, parameters at most, how many times the language rank vision gets
_CASES = (
    ([(8, 8)] * 4, [(8, 8)] * 4, 1000, 1),
    ([(16, 16), (16, 64), (64, 16)], [(32, 32)] * 4, 20_000, 4),
    ([(10, 30)], [(100, 50), (50, 100), (100, 100)], 5_400, 2),
    ([(1024, 1024)] * 48, [(4096, 4096)] * 64, 40_000_000, 4),
)


def tower_ranks(ranks: Ranks) -> Passed:
    """Checks `ranks(vision, language, budget, times)`, which shares a budget between two towers.

    Args:
        ranks: gets the (in, out) of every layer of either tower, the most parameters that LoRA may
            train, and how many times the language rank the vision rank is to be; returns the pair
            vision rank, language rank: the largest that the budget pays for.

    Raises:
        Broken: pair, ratio, budget, or largest, with the usual slip when it is one.

    Source: Hu et al. 2021, "LoRA", section 4.2. Taught in: notebook 08, exercise 2.
    """
    for vision, language, budget, times in _CASES:
        with running("ranks", f"the function, called with a budget of {budget:,},"):
            found = ranks(list(vision), list(language), budget, times)
        _check(found, vision, language, budget, times)
    return Passed("passed: the ratio holds, the budget holds, and one rank more would break it")


def tower_pattern(pattern: str, model: nn.Module) -> Passed:
    """Checks a `target_modules` string: all linear layers of the decoder's blocks, nothing else.

    Args:
        model: a vision-language model, with or without weights, whose decoder is called
            ``language_model``.

    Raises:
        Broken: kind, matches, towers, or all, with names of the first layer that is wrong.
        ValueError: the model has no such decoder.

    Source: peft, ``LoraConfig.target_modules``. Taught in: notebook 08, exercise 1.
    """
    if not isinstance(pattern, str):
        raise Broken(
            "kind",
            f"the answer is one string, not {type(pattern).__name__}: peft reads "
            "a list as endings of names, and no regular expression in it matches",
        )
    wanted = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and "language_model" in name
    }
    if not wanted:
        raise ValueError(f"{type(model).__name__} has no decoder called language_model")
    with running("matches", "matching the string"):
        found = set(adapters.match(model, pattern).matched)
    if not found:
        raise Broken(
            "matches",
            f"no module matches; the string has to fit a whole name, such as {min(wanted)}",
        )
    if strange := found - wanted:
        raise Broken("towers", f"it reaches {min(strange)}, which is no layer of the decoder")
    if missed := wanted - found:
        raise Broken("all", f"it misses {min(missed)} and {len(missed) - 1} more")
    return Passed(f"passed: {len(found)} linear layers, all of the decoder")


def _check(found: object, vision: Shapes, language: Shapes, budget: int, times: int) -> None:
    whole = isinstance(found, tuple | list) and all(type(one) is int for one in found)
    if not whole or len(found) != 2:
        raise Broken("pair", f"the answer is two whole numbers, not {found!r}")
    high, low = found
    if high != times * low:
        raise Broken("ratio", f"vision gets {times} times the language rank, not {high} and {low}")
    price = _price(vision), _price(language)
    best = budget // (times * price[0] + price[1])
    if low == best:
        return
    for why, slip in _slips(vision, language, budget, times).items():
        if low == slip:
            raise Broken("budget" if low > best else "largest", why)
    spent = high * price[0] + low * price[1]
    if low > best:
        raise Broken("budget", f"ranks {high} and {low} train {spent:,}, more than {budget:,}")
    raise Broken("largest", f"ranks {high} and {low} train {spent:,}, and {budget:,} pay for more")


def _price(layers: Shapes) -> int:
    """Parameters of one rank on every layer."""
    return sum(ins + outs for ins, outs in layers)


def _slips(vision: Shapes, language: Shapes, budget: int, times: int) -> dict[str, int]:
    """The language rank that each usual slip ends at."""
    one, two = _price(vision), _price(language)
    whole = sum(ins * outs for ins, outs in [*vision, *language])
    return {
        "one rank of a layer costs in + out, not in times out": budget // whole,
        "the vision rank counts as often as it is larger": budget // (one + two),
        "round down: the next rank up is over the budget": budget // (times * one + two) + 1,
        "both towers pay from one budget": budget // two,
    }
