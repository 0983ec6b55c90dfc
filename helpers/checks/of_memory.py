"""Checks of the exercises of lesson 03.

Source: QLoRA (Dettmers et al. 2023), section 3, for the bytes.
Taught in: notebook 03, exercises 1 and 2.
"""

from collections.abc import Callable, Sequence

from .exercises import Broken, Passed, plain, running

BLOCK, NESTED = 64, 256

# weights, double quantisation, the rule that it shows
PACKINGS = (
    (64, False, "one block"),
    (64 * 10, False, "a 32-bit scale for each block"),
    (64 * 1024, True, "8-bit scales, one 32-bit scale for 256 of them, one mean"),
    (64 * 1000, True, "the last block of scales is begun, so it has a scale"),
    (65, False, "the last block of weights is begun, so it has a scale"),
    (65, True, "the last byte and the last block are begun, with double quantisation too"),
    (4096 * 11_008, True, "a layer of Llama-2-7B"),
)

Events = Sequence[tuple[str, int]]

# events, the highest sum of whole blocks, the rule that it shows
TRACES: tuple[tuple[Events, int, str], ...] = (
    ((("a", 1024),), 1024, "a birth counts"),
    ((("a", 1024), ("a", 0)), 1024, "the highest moment, not the last one"),
    ((("a", 1024), ("a", 0), ("b", 512)), 1024, "what died does not count"),
    ((("a", 1), ("b", 513)), 1536, "whole blocks of 512 bytes"),
    ((("a", 512), ("a", 0), ("a", 2048), ("b", 512)), 2560, "a name may be born again"),
    (
        (("a", 1024), ("b", 512), ("c", 2048), ("b", 0), ("d", 1024)),
        4096,
        "a death frees that name and no other",
    ),
    (
        (("a", 512), ("b", 2048), ("a", 0), ("c", 1024)),
        3072,
        "a death frees that name and no other",
    ),
)
ONE_TOO_MANY = 1536, "1024 bytes are two whole blocks already"  # size // 512 + 1 of the first trace


def four_bit_bytes(answer: Callable[[int, bool], int]) -> Passed:
    """Checks `answer(weights, double)`: the bytes of that many numbers in 4 bits.

    Raises:
        Broken: names the rule and the number of weights that breaks it.

    Source: Dettmers et al. 2023, "QLoRA", section 3.
    Taught in: notebook 03, exercise 1.
    """
    for weights, double, rule in PACKINGS:
        given = f"{weights:,} weights, double={double}"
        with running(rule, f"the function, called with {given},"):
            found = plain(answer(weights, double))
        right = _packed(weights, double)
        if found != right:
            raise Broken(rule, f"{given}: {found!r}, not {right:,}{_slip(found, weights, double)}")
    return Passed(f"passed: {len(PACKINGS)} sizes, as bitsandbytes stores them")


def _packed(weights: int, double: bool) -> int:
    codes, scales = -(-weights // 2), -(-weights // BLOCK)
    return codes + (scales + 4 * -(-scales // NESTED) + 4 if double else 4 * scales)


def _slip(found: object, weights: int, double: bool) -> str:
    if found == -(-weights // 2):
        return "; the scales are missing"
    if found == _packed(weights, not double):
        return "; that is the size the other way, " + ("without" if double else "with") + " double"
    missing = _packed(weights, double) - found if double and isinstance(found, int | float) else 0
    seconds = 4 * -(-weights // (BLOCK * NESTED))
    if seconds == 4:  # as many bytes as the mean: which of the two is missing cannot be told
        return ""
    if missing == 4:
        return "; the mean of the scales is kept too, in 4 bytes"
    if missing == seconds:
        return "; the 32-bit scales of the scales are missing"
    return ""


def peak_bytes(answer: Callable[[Events], int]) -> Passed:
    """Checks `answer(events)`: the highest sum of bytes in use, in blocks of 512.

    Raises:
        Broken: names the rule and the events that break it.

    Source: PyTorch, notes "CUDA semantics: memory management".
    Taught in: notebook 03, exercise 2.
    """
    for events, right, rule in TRACES:
        with running(rule, f"the function, called with {list(events)},"):
            found = plain(answer(list(events)))
        if events == TRACES[0][0] and found == ONE_TOO_MANY[0]:
            rule = ONE_TOO_MANY[1]
        if found != right:
            raise Broken(rule, f"{list(events)} give {found!r}, not {right}")
    return Passed(f"passed: {len(TRACES)} traces peak where they should")
