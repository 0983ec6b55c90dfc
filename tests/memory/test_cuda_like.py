"""What a card does otherwise than a processor."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.memory.cuda_like import cuda_like
from helpers.memory.gpus import GPUS


def kept_by_the_first_rows_of_an_svd() -> int:
    """Bytes behind `V[:2]` of an 8 x 8 weight in 32 bits."""
    third = torch.linalg.svd(torch.empty(8, 8), full_matrices=False)[2]
    return third[:2].contiguous().untyped_storage().nbytes()


def test_on_a_card_a_few_rows_of_an_svd_keep_the_whole_factor():
    with FakeTensorMode():
        assert kept_by_the_first_rows_of_an_svd() == 2 * 8 * 4  # a processor's lies in columns
    FakeTensorMode.cache_clear()  # results of fake operators are remembered over modes
    with cuda_like(GPUS["l40s"], repeat_heads=False), FakeTensorMode():
        assert kept_by_the_first_rows_of_an_svd() == 8 * 8 * 4
    FakeTensorMode.cache_clear()
