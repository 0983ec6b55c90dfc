"""Four bits by hand, in plain torch: blocks, scales, codes, packing, and scales quantised again.

    quantized = quantize(weights, "nf4", block_size=64)
    smaller = double_quantize(quantized)
    weights_again = dequantize(smaller)

Code for code and bit for bit what bitsandbytes stores on a CPU.

Source: QLoRA (Dettmers et al. 2023), section 3; bitsandbytes' blocks of 64.
Taught in: notebook 03, section 2.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from bitsandbytes.functional import create_dynamic_map
from torch import Tensor

from helpers.given import whole
from helpers.quantization.code_books import levels

NESTED_BLOCK = 256  # absmaxes that share one constant of the second quantisation
PLACES = 65_536  # bitsandbytes looks an 8-bit code up in a table of so many places from -1 to 1


@dataclass(frozen=True)
class NestedAbsmax:
    """Scales in 8 bits: `table[codes] * absmax + offset`, with one absmax for 256 of them."""

    codes: Tensor  # (blocks,), uint8, one a block of weights
    absmax: Tensor  # (blocks / 256,), float32, one for 256 codes
    offset: Tensor  # a scalar, float32, the mean of the scales

    @property
    def bytes(self) -> int:
        """Bytes of codes, scales and offset, without the table of 256 levels (1 KiB)."""
        return _bytes(self.codes) + _bytes(self.absmax) + _bytes(self.offset)


@dataclass(frozen=True)
class Quantized:
    """A tensor in 4 bits: what has to be stored to get its values back.

    ``shape`` and ``dtype`` are the weights'; ``block_size`` counts weights, ``bytes`` bytes.
    """

    packed: Tensor  # (weights / 2,), uint8, two codes a byte, the first in the upper four bits
    absmax: Tensor | NestedAbsmax  # (blocks,), the scale of each block
    shape: torch.Size
    dtype: torch.dtype
    quant_type: str
    block_size: int

    @property
    def bytes(self) -> int:
        """Bytes of codes and scales, without the tables, which are the same for every tensor."""
        nested = isinstance(self.absmax, NestedAbsmax)
        return _bytes(self.packed) + (self.absmax.bytes if nested else _bytes(self.absmax))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def blocks(values: Tensor, size: int) -> Tensor:
    """The values in rows of `size`, float32; the last row is filled up with zeros.

    Raises:
        ValueError: nothing to quantise, no real numbers or no data, or a size below 1.

    Taught in: notebook 03, section 2.
    """
    whole("A block's size", size)
    if not values.numel() or values.is_complex() or values.is_meta:
        raise ValueError(
            f"Expected at least one value, a real number with data, not {values.numel()} values of "
            f"{values.dtype} on {values.device} in blocks of {size}."
        )
    flat = values.detach().flatten().float()
    size = min(size, len(flat))  # one unfinished block is not filled up to whatever was asked for
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def scale(rows: Tensor, whole: int) -> tuple[Tensor, Tensor]:
    """The absmax of each row, and the rows divided by it, between -1 and 1.

    Args:
        rows: (rows, block size).
        whole: how many rows are full.

    Rows of zeros stay zeros. Rounding follows bitsandbytes: full rows are multiplied by 1 / absmax,
    an unfinished last one is divided by absmax.
    """
    absmax = rows.abs().amax(1)
    absmax[whole:] = absmax[whole:].clamp(min=1e-38)
    safe = absmax.clamp(min=1e-38)[:, None]
    scaled = torch.cat([rows[:whole] * (1 / safe[:whole]), rows[whole:] / safe[whole:]])
    return absmax, scaled.clamp(-1, 1)


def nearest(scaled: Tensor, book: Tensor) -> Tensor:
    """The code of the level nearest to each number; halfway between two, the lower level.

    Args:
        scaled: any shape, between -1 and 1.
        book: (levels,), in the order of its codes.

    Returns:
        Codes of the same shape, int64.

    Raises:
        ValueError: the book is no row of levels.

    Taught in: notebook 03, section 2.
    """
    if book.dim() != 1 or not len(book):
        raise ValueError(f"A code book is one row of levels, not of shape {tuple(book.shape)}.")
    order = book.argsort(stable=True)
    return order[torch.bucketize(scaled, midpoints(book[order]))]


def midpoints(ordered: Tensor) -> Tensor:
    """Where the nearest level changes, for levels in ascending order: one fewer than levels."""
    return (ordered[:-1] + ordered[1:]) / 2


def pack(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the first in the upper half; their number is even.

    Args:
        codes: any shape, whole numbers from 0 to 15.

    Returns:
        (codes / 2,), uint8.

    Raises:
        ValueError: a code that needs more than four bits, or an odd number of codes.

    Taught in: notebook 03, section 2.
    """
    if codes.is_complex() or codes.is_meta:
        raise ValueError(f"Codes are whole numbers with data, not {codes.dtype} on {codes.device}.")
    if codes.numel() and not 0 <= codes.min() <= codes.max() <= 15:
        raise ValueError(f"Codes lie between 0 and 15, not {codes.min()} to {codes.max()}.")
    if codes.numel() % 2:
        raise ValueError(f"A byte holds two codes, and {codes.numel()} is odd; add a code of 0.")
    codes = codes.flatten().to(torch.uint8)
    return (codes[::2] << 4) | codes[1::2]


def unpack(packed: Tensor) -> Tensor:
    """The codes of `pack`, int64, two for each byte: (bytes,) to (2 * bytes,).

    Raises:
        ValueError: no bytes.

    Taught in: notebook 03, section 2.
    """
    if packed.dtype != torch.uint8:
        raise ValueError(f"pack gives bytes (uint8), and these are {packed.dtype}.")
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()


def quantize(weights: Tensor, quant_type: str = "nf4", block_size: int = 64) -> Quantized:
    """Each weight as the code of the level nearest to weight / absmax of its block.

    Args:
        weights: any shape, of a floating-point dtype; cut into blocks in the order of its memory.
        quant_type: "nf4" or "fp4".
        block_size: weights that share one absmax.

    Raises:
        ValueError: another quant_type, no weights, or a block size below 1.

    Source: Dettmers et al., QLoRA (2023), equation 1; bitsandbytes, quantize_4bit.
    Taught in: notebook 03, section 2.
    """
    book = levels(quant_type)
    count = weights.numel()
    absmax, scaled = scale(blocks(weights, block_size), whole=count // block_size)
    even = count + count % 2
    flat = torch.nn.functional.pad(scaled.flatten(), (0, 1))[:even]
    packed = pack(nearest(flat, book))
    return Quantized(packed, absmax, weights.shape, weights.dtype, quant_type, block_size)


def dequantize(quantized: Quantized) -> Tensor:
    """Every weight again as level * absmax, in the same shape and dtype as before quantising.

    Source: Dettmers et al., QLoRA (2023), equations 2 and 6; bitsandbytes, dequantize_4bit.
    Taught in: notebook 03, section 2.
    """
    absmax = quantized.absmax
    if isinstance(absmax, NestedAbsmax):
        absmax = dequantize_absmax(absmax)
    count = quantized.shape.numel()
    values = levels(quantized.quant_type)[unpack(quantized.packed)[:count]]
    spread = absmax.repeat_interleave(min(quantized.block_size, count))[:count]
    return (values * spread).to(quantized.dtype).view(quantized.shape)


def double_quantize(quantized: Quantized) -> Quantized:
    """The same codes with their scales in 8 bits.

    Raises:
        ValueError: the scales are 8-bit ones already, or not finite.

    Source: Dettmers et al., QLoRA (2023), section 3, "Double Quantization".
    Taught in: notebook 03, section 3.
    """
    if isinstance(quantized.absmax, NestedAbsmax):
        raise ValueError("The scales are in 8 bits already; give what quantize returned.")
    return replace(quantized, absmax=quantize_absmax(quantized.absmax))


def quantize_absmax(absmax: Tensor) -> NestedAbsmax:
    """Scales less their mean, over the largest of 256, as codes of the 8-bit dynamic table.

    ``absmax`` is (blocks,), float32. Scales are positive, so that their mean is taken off first to
    use both signs of the table. On a CPU bitsandbytes rounds to one of 65,536 places before it
    takes the nearest level; close to zero, where levels lie denser than places, that is not always
    the nearest one.

    Args:
        absmax: (blocks,), float32.

    Raises:
        ValueError: no row of finite numbers.

    Source: Dettmers et al., QLoRA (2023), section 3; Dettmers et al., 8-bit Optimizers (2022),
    section 2; bitsandbytes, quantize_blockwise.
    Taught in: notebook 03, section 3.
    """
    fits = absmax.dtype == torch.float32 and absmax.dim() == 1 and not absmax.is_meta
    if not fits or not absmax.isfinite().all():
        raise ValueError(
            f"Expected a row of finite float32 scales, not {absmax.dtype} of shape "
            f"{tuple(absmax.shape)}: a weight that is not finite leaves its block without one."
        )
    offset = absmax.mean()
    rows = blocks(absmax - offset, NESTED_BLOCK)
    second = rows.abs().amax(1)
    scaled = rows * (1 / second.where(second > 0, 1))[:, None]
    place = ((scaled.clamp(-1, 1) + 1) * 0.5 * (PLACES - 1) + 0.5).long()
    codes = _code_at_each_place()[place]
    codes[second == 0] = 0  # as bitsandbytes does; any code times a scale of zero is zero
    return NestedAbsmax(codes.flatten()[: len(absmax)].to(torch.uint8), second, offset)


@cache
def _code_at_each_place() -> Tensor:
    return nearest(torch.linspace(-1, 1, PLACES), create_dynamic_map())


def dequantize_absmax(nested: NestedAbsmax) -> Tensor:
    """The scales, float32, one for each block of weights: (blocks,).

    Taught in: notebook 03, section 3.
    """
    second = nested.absmax.repeat_interleave(NESTED_BLOCK)[: len(nested.codes)]
    return create_dynamic_map()[nested.codes.long()] * second + nested.offset
