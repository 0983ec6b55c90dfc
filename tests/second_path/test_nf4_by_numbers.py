"""Four bits in NumPy, from the table that the QLoRA paper prints.

The lessons use helpers.quantization, which derives the levels, and layers of SmolLM2. Here the
levels are typed from appendix E, the search for a better book is a plain Lloyd iteration, and
bitsandbytes' functions get random weights.
"""

from __future__ import annotations

import functools

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from own_rules import agrees

PRINTED = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
INT4 = np.linspace(-1, 1, 15)
FP4 = np.unique([s * m / 12 for s in (1, -1) for m in (0, 1 / 16, 2, 3, 4, 6, 8, 12)])
BLOCK = 64


def gaussian(seed: int, blocks: int = 12_000) -> np.ndarray:
    """Normal weights over the largest of their block."""
    drawn = np.random.default_rng(seed).standard_normal((blocks, BLOCK))
    return (drawn / np.abs(drawn).max(1, keepdims=True)).ravel()


def codes(values: np.ndarray, book: np.ndarray) -> np.ndarray:
    """The nearest level of a sorted book, by the middles between neighbours."""
    return np.searchsorted((book[1:] + book[:-1]) / 2, values)


def error(values: np.ndarray, book: np.ndarray, power: int) -> float:
    return float((np.abs(values - book[codes(values, book)]) ** power).mean())


@functools.cache
def fitted(power: int) -> np.ndarray:
    """Lloyd's iteration from NF4: each level moves to the mean, or the median, of its values."""
    values, book = np.sort(gaussian(seed=100)), PRINTED.copy()
    for _ in range(150):
        edges = np.searchsorted(values, (book[1:] + book[:-1]) / 2)
        parts = np.split(values, edges)
        book = np.array([part.mean() if power == 2 else part[len(part) // 2] for part in parts])
    return book


def relative(power: int) -> list[float]:
    """Error of NF4 over that of the fitted book, on five samples that the fit has not seen."""
    samples = [gaussian(seed) for seed in range(5)]
    return [error(s, PRINTED, power) / error(s, fitted(power), power) for s in samples]


def bits(values: np.ndarray) -> float:
    """How much a code carries: its entropy."""
    parts = np.bincount(codes(values, PRINTED), minlength=16) / len(values)
    return float(-(parts * np.log2(parts)).sum())


@functools.cache
def layer() -> torch.Tensor:
    return 0.02 * torch.randn(128, 512, generator=torch.Generator().manual_seed(0))


def test_c070_nf4_is_optimal_for_normal_weights():
    agrees(
        "C070",
        {
            "all codes are used equally often": bits(gaussian(0)) >= 3.99,
            "no other book has less squared error": min(relative(2)) <= 1,
            "no other book has less absolute error": min(relative(1)) <= 1,
        },
    )


def test_c072_nf4_has_the_least_error():
    measures = {"absolute error": 1, "squared error": 2}
    agrees("C072", {name: np.mean(relative(p)) <= 1.01 for name, p in measures.items()})


def test_c073_fp4_has_uniform_levels():
    """From the bits of the format, and from what bitsandbytes hands out."""
    given = np.unique(bnb.get_4bit_type("fp4", device="cpu").numpy())
    np.testing.assert_allclose(given, FP4, atol=1e-6)
    agrees("C073", bool(np.allclose(np.diff(FP4), np.diff(FP4)[0])))


def test_c077_more_levels_near_zero():
    books = {"NF4": PRINTED, "INT4": INT4, "FP4": FP4}
    near = {name: int((np.abs(book) <= 0.25).sum()) for name, book in books.items()}
    far = {name: int((np.abs(book) > 0.5).sum()) for name, book in books.items()}
    errors = {name: error(gaussian(1), book, 2) for name, book in books.items()}
    agrees(
        "C077",
        {
            "more levels near zero than INT4": near["NF4"] > near["INT4"],
            "fewer at the extremes than INT4": far["NF4"] < far["INT4"],
            "the book with most levels near zero errs least": max(near, key=near.get)
            == min(errors, key=errors.get),
        },
    )


def test_c078_double_quantisation_step_by_step():
    """Codes, scales and second scales of a random layer, each step written out in NumPy."""
    packed, state = bnb.quantize_4bit(layer(), quant_type="nf4", compress_statistics=True)
    blocks = layer().numpy().reshape(-1, BLOCK)
    largest = np.abs(blocks).max(1)
    mine = codes((blocks / largest[:, None]).ravel(), PRINTED).astype(np.uint8)
    theirs = packed.flatten().numpy()
    again = (mine[0::2] << 4) | mine[1::2]  # the first of two weights has the higher four bits
    centred = (largest - largest.mean(dtype=np.float64)).reshape(-1, 256)
    second = np.abs(centred).max(1)
    eight = state.state2.code.numpy()
    near = np.abs(eight[None] - (centred / second[:, None]).reshape(-1, 1)).argmin(1)
    offset = float(state.offset)
    agrees(
        "C078",
        {
            "weights are NF4 codes": bool((theirs == again).mean() > 0.999)
            and np.allclose(state.code.numpy(), PRINTED),
            "scales are bytes with scales of their own": state.absmax.dtype == torch.uint8
            and len(state.state2.absmax) == len(largest) // 256,
            "by hand gives the same bytes": bool((state.absmax.numpy() == near).mean() > 0.99)
            and np.allclose(state.state2.absmax.numpy(), second, rtol=1e-4)
            and offset == pytest.approx(largest.mean(), rel=1e-5),
        },
    )


def test_c079_scales_without_double_quantisation():
    """What bitsandbytes stores, where the lesson counts our own."""
    _, state = bnb.quantize_4bit(layer(), quant_type="nf4", compress_statistics=False)
    assert len(state.absmax) == layer().numel() // BLOCK
    agrees("C079", 8 * state.absmax.nbytes / len(state.absmax) == 32)


def test_c080_scales_with_double_quantisation():
    """As C079: the bytes, their scales and the offset."""
    _, state = bnb.quantize_4bit(layer(), quant_type="nf4", compress_statistics=True)
    stored = state.absmax.nbytes + state.state2.absmax.nbytes + state.offset.nbytes
    agrees("C080", 7.5 <= 8 * stored / len(state.absmax) <= 8.5)


def largest_of(exponent: int, mantissa: int) -> float:
    """The largest number of an IEEE format with so many bits."""
    return (2 - 2.0**-mantissa) * 2.0 ** (2 ** (exponent - 1) - 1)


FORMATS = {"fp32": (8, 23), "bf16": (8, 7), "fp16": (5, 10)}  # bits of exponent and mantissa


def test_c083_fp16_overflows():
    """From the bits of the formats and in NumPy, where the lesson asks torch.finfo."""
    with np.errstate(over="ignore"):
        overflows = bool(np.isinf(np.float32(70_000).astype(np.float16)))
    agrees(
        "C083",
        {
            "narrower range than bf16": largest_of(*FORMATS["fp16"]) < largest_of(*FORMATS["bf16"]),
            "70,000 overflows": overflows and largest_of(*FORMATS["fp16"]) < 70_000,
        },
    )


def test_c085_bf16_has_fp32_s_range():
    """As C083: one bit of sign, then exponent and mantissa."""
    smallest = {name: 2.0 ** (2 - 2 ** (e - 1)) for name, (e, _) in FORMATS.items()}
    ratio = largest_of(*FORMATS["bf16"]) / largest_of(*FORMATS["fp32"])
    bytes_of = {name: (1 + e + m) / 8 for name, (e, m) in FORMATS.items()}
    agrees(
        "C085",
        {
            "the range of fp32": abs(ratio - 1) < 0.01 and smallest["bf16"] == smallest["fp32"],
            "the memory of fp16": bytes_of["bf16"] == bytes_of["fp16"],
        },
    )
