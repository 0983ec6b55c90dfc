"""Four bits: bitsandbytes' models, the same arithmetic by hand, and how good its levels are."""

from .blocks import (
    NestedAbsmax,
    Quantized,
    dequantize,
    dequantize_absmax,
    double_quantize,
    nearest,
    pack,
    quantize,
    quantize_absmax,
    unpack,
)
from .code_books import QUANT_TYPES, levels, normal_float, small_float, whole_numbers
from .loading import HEADS, keep_weights_unpacked, load_in_4bit
from .optimal import Scaled, code_entropy, compare, error, fit, scaled
from .samples import DISTRIBUTIONS, draw, linear_weights

__all__ = [
    "DISTRIBUTIONS",
    "HEADS",
    "QUANT_TYPES",
    "NestedAbsmax",
    "Quantized",
    "Scaled",
    "code_entropy",
    "compare",
    "dequantize",
    "dequantize_absmax",
    "double_quantize",
    "draw",
    "error",
    "fit",
    "keep_weights_unpacked",
    "levels",
    "linear_weights",
    "load_in_4bit",
    "nearest",
    "normal_float",
    "pack",
    "quantize",
    "quantize_absmax",
    "scaled",
    "small_float",
    "unpack",
    "whole_numbers",
]
