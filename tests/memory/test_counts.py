"""Bytes from shapes, against a count by hand."""

import pytest
import torch

from helpers import memory, models


def test_a_4_bit_llama_by_hand():
    # 32 layers of 4 * 4096 * 4096 + 3 * 4096 * 11008 in 4.127 bits; the rest in 32 bits
    llama = models.full_size("llama-2-7b").to(torch.bfloat16)
    packed = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    rest = llama.num_parameters() - packed
    assert memory.four_bit_bytes(llama) == pytest.approx(packed * 4.127 / 8 + 4 * rest)
