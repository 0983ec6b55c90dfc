"""The caching allocator, against cases counted by hand from PyTorch's rules."""

import pytest

from helpers.memory.allocator import MIB, CachingAllocator, rounded, segment_size


@pytest.mark.parametrize(
    ("asked", "block"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)]
)
def test_requests_are_rounded_up_to_512_bytes(asked, block):
    assert rounded(asked) == block


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB),
    ],
)
def test_segments_by_size(size, segment):
    assert segment_size(size) == segment


def test_small_requests_share_a_segment():
    allocator = CachingAllocator()
    for _ in range(3):
        allocator.request(600 * 1024)
    assert (allocator.allocated, allocator.reserved) == (3 * 600 * 1024, 2 * MIB)
    allocator.request(600 * 1024)
    assert allocator.reserved == 4 * MIB


def test_the_rest_of_a_large_block_is_split_off_above_one_mib_only():
    allocator = CachingAllocator()
    allocator.request(9 * MIB)  # of a segment of 20
    allocator.request(10 * MIB)  # 1 MiB is left, too little to be a block of its own
    assert (allocator.allocated, allocator.reserved) == (20 * MIB, 20 * MIB)


def test_best_fit_takes_the_smallest_block_that_holds_it():
    allocator = CachingAllocator()
    blocks = [allocator.request(size * MIB) for size in (40, 12, 30)]
    for block in blocks:
        allocator.release(block)
    assert allocator.request(12 * MIB) is blocks[1]


def test_freed_neighbours_merge():
    allocator = CachingAllocator()
    first, second = allocator.request(2 * MIB), allocator.request(2 * MIB)
    allocator.release(first)
    allocator.release(second)
    allocator.request(20 * MIB)
    assert allocator.reserved == 20 * MIB


def test_peaks_stay_and_empty_cache_gives_whole_segments_back():
    allocator = CachingAllocator()
    block = allocator.request(30 * MIB)
    kept = allocator.request(4 * MIB)
    allocator.release(block)
    allocator.empty_cache()
    assert (allocator.reserved, allocator.peak_reserved) == (20 * MIB, 50 * MIB)
    allocator.release(kept)
    allocator.empty_cache()
    assert allocator.reserved == 0


def test_a_full_card_gives_its_cache_back_before_it_fails():
    allocator = CachingAllocator(capacity=50 * MIB)
    allocator.release(allocator.request(40 * MIB))
    allocator.request(44 * MIB)  # only fits because the 40 are returned
    with pytest.raises(MemoryError, match="10 MiB more do not fit"):
        allocator.request(10 * MIB)


def test_newer_segments_lie_below_older_ones():
    """Of two free blocks of one size the newer is taken; published figures tell the difference."""
    allocator = CachingAllocator()
    older, newer = allocator.request(12 * MIB), allocator.request(12 * MIB)
    allocator.release(older)
    allocator.release(newer)
    assert allocator.request(12 * MIB) is newer
