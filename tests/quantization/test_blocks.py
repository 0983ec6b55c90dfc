"""By hand is what bitsandbytes stores on a CPU: every byte, every scale, every value."""

from collections.abc import Iterator

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, quantize_4bit
from torch import Tensor

from helpers import quantization
from helpers.quantization import NestedAbsmax, Quantized, blocks

TYPES = quantization.QUANT_TYPES
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def without_compilation() -> Iterator[None]:
    """bitsandbytes compiles its way for odd rows; eager, it takes the same steps at once."""
    with torch.compiler.set_stance("force_eager"):
        yield


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.1 * torch.randn(shape, generator=generator)).to(dtype)


def by_hand(weights: Tensor, quant_type: str, size: int, double: bool) -> Quantized:
    plain = quantization.quantize(weights, quant_type, size)
    return quantization.double_quantize(plain) if double else plain


def differences(weights: Tensor, quant_type: str, size: int, double: bool) -> list[str]:
    """What in the two results is not equal to the last bit."""
    mine = by_hand(weights, quant_type, size, double)
    packed, state = quantize_4bit(
        weights, blocksize=size, quant_type=quant_type, compress_statistics=double
    )
    pairs = {
        "packed": (mine.packed, packed.flatten()),
        "values": (
            quantization.dequantize(mine),
            dequantize_4bit(packed, state).reshape(weights.shape),  # a vector comes back as a row
        ),
    }
    if double:
        pairs |= {
            "codes of the absmax": (mine.absmax.codes, state.absmax),
            "second absmax": (mine.absmax.absmax, state.state2.absmax),
            "offset": (mine.absmax.offset, state.offset),
        }
    else:
        pairs["absmax"] = (mine.absmax, state.absmax)
    return [name for name, (one, other) in pairs.items() if not torch.equal(one, other)]


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("size", [32, 64, 128, 256, 1024, 4096])
def test_equals_bitsandbytes(quant_type: str, dtype: torch.dtype, double: bool, size: int) -> None:
    assert differences(random((24, 4096), dtype), quant_type, size, double) == []


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (63,), (65,), (5, 37), (3, 128)])
def test_odd_lengths_and_unfinished_blocks(
    quant_type: str, double: bool, shape: tuple[int, ...]
) -> None:
    assert differences(random(shape), quant_type, 64, double) == []


@pytest.mark.parametrize("shape", [(3, 96), (129, 66), (24, 576)])
def test_blocks_that_go_over_the_end_of_a_row(shape: tuple[int, ...]) -> None:
    """bitsandbytes quantises across rows; its fast CPU way back starts a block with each row.

    Where a row is no multiple of the block the two do not fit together. Its plain way, which it
    takes for rows of odd length, is the inverse: it is reached through one odd vector.
    """
    weights = random(shape)
    wrong = differences(weights, "nf4", 128, double=False)
    assert wrong in ([], ["values"])  # [] once bitsandbytes mends it
    odd = torch.cat([weights.flatten(), torch.zeros(1)])
    assert len(odd) % 2 and differences(odd, "nf4", 128, double=False) == []
    back = quantization.dequantize(quantization.quantize(odd, block_size=128))[:-1]
    mine = quantization.dequantize(quantization.quantize(weights, block_size=128))
    assert (back - mine.flatten()).abs().max() < 1e-6


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("double", [False, True])
def test_many_scales_with_outliers(quant_type: str, double: bool) -> None:
    """Scales over several orders of magnitude use the whole 8-bit table."""
    weights = random((700, 64)) * 10 ** torch.linspace(-4, 1, 700)[:, None]
    assert differences(weights, quant_type, 64, double) == []


def ties(quant_type: str) -> Tensor:
    """A block for each midpoint, its float32 neighbours, and a 1 that leaves them as they are."""
    order = quantization.levels(quant_type).sort().values
    middle = (order[:-1] + order[1:]) / 2
    up, down = (torch.nextafter(middle, torch.full_like(middle, end)) for end in (9.0, -9.0))
    rows = torch.zeros(15, 64)
    rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] = 1, middle, up, down
    return rows


@pytest.mark.parametrize("quant_type", TYPES)
def test_halfway_between_two_levels(quant_type: str) -> None:
    assert differences(ties(quant_type), quant_type, 64, double=False) == []


def test_the_other_side_at_a_tie_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""

    def upper(scaled: Tensor, book: Tensor) -> Tensor:
        order = book.argsort(stable=True)
        return order[torch.bucketize(scaled, blocks.midpoints(book[order]), right=True)]

    monkeypatch.setattr(blocks, "nearest", upper)
    assert "packed" in differences(ties("nf4"), "nf4", 64, double=False)


def test_swapped_nibbles_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the first code in the lower four bits."""
    right = blocks.pack

    def swapped(codes: Tensor) -> Tensor:
        return right(codes.view(-1, 2).flip(1))

    monkeypatch.setattr(blocks, "pack", swapped)
    assert {"packed", "values"} <= set(differences(random((64, 64)), "nf4", 64, double=False))


def test_exact_rounding_of_the_scales_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the nearest 8-bit level, without the table of places."""
    weights = random((6400, 64))
    assert differences(weights, "nf4", 64, double=True) == []
    nested = quantization.quantize(weights).absmax
    rows = blocks.blocks(nested - nested.mean(), 256)
    _, scaled = blocks.scale(rows, whole=len(rows))
    exact = quantization.nearest(scaled, create_dynamic_map()).flatten()[: len(nested)]
    stored = quantization.quantize_absmax(nested).codes.long()
    assert 0 < (exact != stored).sum() < 0.02 * len(stored)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("count", [64, 100])
def test_zeros(quant_type: str, double: bool, count: int) -> None:
    zeros = torch.zeros(count)
    assert differences(zeros, quant_type, 64, double) == []
    assert torch.equal(quantization.dequantize(by_hand(zeros, quant_type, 64, double)), zeros)


def test_one_block_by_hand() -> None:
    weights = torch.tensor([0.5, -1.0, 2.0, 0.0])
    quantized = quantization.quantize(weights, "fp4", block_size=4)
    # over absmax 2: 0.25 is code 7 (3/12), -0.5 code 13 (-6/12), 1 code 3 (12/12), 0 code 0
    assert quantized.absmax.tolist() == [2.0]
    assert quantized.packed.tolist() == [7 * 16 + 13, 3 * 16 + 0]
    assert quantization.dequantize(quantized).tolist() == weights.tolist()


def test_packing_by_hand() -> None:
    packed = quantization.pack(torch.tensor([1, 2, 15, 0]))
    assert packed.dtype == torch.uint8 and packed.tolist() == [0x12, 0xF0]
    assert quantization.unpack(packed).tolist() == [1, 2, 15, 0]


def test_bytes_by_hand() -> None:
    weights = torch.zeros(64, 64 * 300)
    plain = quantization.quantize(weights)
    assert plain.bytes == weights.numel() / 2 + 4 * 64 * 300
    # 19,200 scales: a byte each, 4 bytes for each 256 of them, 4 for their mean
    assert quantization.double_quantize(plain).bytes == weights.numel() / 2 + 19_200 + 4 * 75 + 4


def test_error_is_at_most_half_a_gap_of_the_block() -> None:
    weights = random((64, 64), seed=3)
    quantized = quantization.quantize(weights)
    gap = quantization.normal_float().diff().max()
    error = (quantization.dequantize(quantized) - weights).abs().view(-1, 64)
    assert (error <= (gap / 2 + 1e-6) * quantized.absmax[:, None]).all()


def test_scales_in_8_bits_are_close() -> None:
    absmax = quantization.quantize(random((640, 64))).absmax
    again = quantization.dequantize_absmax(quantization.quantize_absmax(absmax))
    assert isinstance(quantization.quantize_absmax(absmax), NestedAbsmax)
    assert ((again - absmax).abs() / absmax).max() < 0.02


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Unknown quant_type 'nf5'; did you mean 'nf4'"):
        quantization.quantize(torch.ones(4), "nf5")
    with pytest.raises(ValueError, match="not 0 values .* in blocks of 64"):
        quantization.quantize(torch.ones(0))
    with pytest.raises(ValueError, match="block's size must be .* but was 0"):
        quantization.quantize(torch.ones(4), block_size=0)
    with pytest.raises(ValueError, match="between 0 and 15, not 3 to 16"):
        quantization.pack(torch.tensor([3, 16]))
    twice = quantization.double_quantize(quantization.quantize(torch.ones(4)))
    with pytest.raises(ValueError, match="in 8 bits already"):
        quantization.double_quantize(twice)
