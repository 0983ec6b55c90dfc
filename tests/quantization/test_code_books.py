"""The levels, from their rules, are the published tables to the last bit."""

import pytest
import torch
from bitsandbytes.functional import get_4bit_type

from helpers import quantization


@pytest.mark.parametrize("quant_type", quantization.QUANT_TYPES)
def test_levels_are_those_of_bitsandbytes(quant_type: str) -> None:
    assert torch.equal(quantization.levels(quant_type), get_4bit_type(quant_type, "cpu"))


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: quantiles of the unrounded probability are not the table."""
    monkeypatch.setattr("helpers.quantization.code_books.OUTERMOST", 1 - (1 / 32 + 1 / 30) / 2)
    unrounded = quantization.normal_float()
    assert not torch.equal(unrounded, get_4bit_type("nf4", "cpu"))
    assert torch.allclose(unrounded, get_4bit_type("nf4", "cpu"), atol=1e-6)


def test_int4_is_evenly_spaced_and_names_zero_twice() -> None:
    sevenths = (7 * quantization.whole_numbers()).sort().values
    assert torch.allclose(sevenths, torch.tensor([*range(-7, 1), *range(8)]).float())


def test_fp4_by_hand() -> None:
    twelfths = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3])
    assert torch.equal(quantization.small_float()[:8] * 12, twelfths)
    assert torch.equal(quantization.small_float()[8:], -quantization.small_float()[:8])


def test_nf4_has_a_zero_and_both_ends() -> None:
    book = quantization.normal_float()
    assert {-1.0, 0.0, 1.0} <= set(book.tolist())
    assert (book > 0).sum() == 8 and (book < 0).sum() == 7


def test_unknown_type_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="Unknown quant_type 'fp8'; did you mean 'fp4'"):
        quantization.levels("fp8")
