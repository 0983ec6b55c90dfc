"""The sixteen numbers that four bits can name: NF4, FP4 and the uniform INT4, from their rules.

A code book is a tensor of 16 float32 levels between -1 and 1, in the order of their codes 0 to 15.

Source: QLoRA (Dettmers et al. 2023), appendix E; bitsandbytes' create_normal_map.
Taught in: notebook 03, section 2.
"""

import torch
from torch import Tensor

from helpers.given import one_of

QUANT_TYPES = ("nf4", "fp4")
# bitsandbytes rounds the paper's 1 - (1/32 + 1/30) / 2 to seven digits before it takes quantiles.
OUTERMOST = 0.9677083


def levels(quant_type: str) -> Tensor:
    """The levels of NF4 or FP4, (16,) float32, in the order of their codes; the largest is 1.

    Raises:
        ValueError: another quant_type.

    Source: Dettmers et al., QLoRA (2023), section 3; bitsandbytes, get_4bit_type.
    Taught in: notebook 03, section 2.
    """
    one_of("quant_type", quant_type, QUANT_TYPES)
    return normal_float() if quant_type == "nf4" else small_float()


def normal_float() -> Tensor:
    """NF4: zero, eight positive and seven negative quantiles of a normal distribution, over its
    largest one.

    Each half is cut evenly in probability, from the median out to `OUTERMOST`. (16,) float32.

    Source: Dettmers et al., QLoRA (2023), equation 4 and appendix E; bitsandbytes,
    create_normal_map.
    Taught in: notebook 03, section 2.
    """
    positive = _quantiles(torch.linspace(OUTERMOST, 0.5, 9)[:-1])
    negative = -_quantiles(torch.linspace(OUTERMOST, 0.5, 8)[:-1])
    table = torch.cat([negative, torch.zeros(1), positive]).sort().values
    return table / table.max()


def _quantiles(probabilities: Tensor) -> Tensor:
    # float32 probabilities, float64 quantiles: so the published table was made.
    return torch.special.ndtri(probabilities.double()).float()


def small_float() -> Tensor:
    """FP4: one bit of sign, two of exponent, one of mantissa, over the largest number.

    The exponent is stored so that 0 means "no exponent": there the mantissa bit alone says 0 or
    1/16. The others count down from 8, as powers of two in the order 8, 4, 2, and the mantissa bit
    multiplies by 1 or 1.5. A set sign bit negates, which leaves two codes for zero. (16,) float32.

    Source: bitsandbytes, get_4bit_type.
    Taught in: notebook 03, section 2.
    """
    positive = [0.0, 1 / 16]
    for exponent in (3, 2, 1):
        positive += [2**exponent, 2**exponent * 1.5]
    table = torch.tensor([*positive, *(-number for number in positive)])
    return table / table.max()


def whole_numbers() -> Tensor:
    """INT4, (16,) float32: -7 to 7 over 7, evenly spaced; the last code names zero once more.

    Taught in: notebook 03, section 2.
    """
    return torch.cat([torch.arange(-7.0, 8.0), torch.zeros(1)]) / 7
