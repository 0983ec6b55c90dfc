"""PyTorch's CUDA caching allocator in a page of Python: what is reserved for what is asked for.

Source: PyTorch, c10/cuda/CUDACachingAllocator.cpp.
Taught in: notebook 03, section 7.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

MIB = 1024**2
ROUND = 512  # every request is rounded up to this many bytes
SMALL = MIB  # requests up to this size live in the small pool
SMALL_SEGMENT = 2 * MIB
MIDDLE = 10 * MIB  # requests below this size share segments of LARGE_SEGMENT
LARGE_SEGMENT = 20 * MIB
LARGE_ROUND = 2 * MIB


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment; its neighbours in the segment are linked, so that it can merge."""

    address: int
    size: int
    small: bool
    free: bool = True
    before: Block | None = None
    after: Block | None = None


def rounded(size: int) -> int:
    """Bytes of the block for a request of `size` bytes, before any block is cut."""
    return max(ROUND, -(-size // ROUND) * ROUND)


def segment_size(size: int) -> int:
    """Bytes that are asked of the driver when no free block holds `size` (rounded) bytes."""
    if size <= SMALL:
        return SMALL_SEGMENT
    if size < MIDDLE:
        return LARGE_SEGMENT
    return -(-size // LARGE_ROUND) * LARGE_ROUND


@dataclass
class CachingAllocator:
    """Replays requests and returns; counts allocated and reserved bytes and their peaks.

    Best fit among the free blocks of a pool, the rest of a block split off if it is worth it,
    neighbours merged when freed. With a `capacity` it gives unused segments back before it fails,
    as PyTorch does.

    Args:
        capacity: bytes of the card, None for no limit.

    Raises:
        MemoryError: a request that does not fit into `capacity`.

    Source: PyTorch, c10/cuda/CUDACachingAllocator.cpp, and its notes "CUDA semantics: memory
    management".
    Taught in: notebook 03, section 7.
    """

    capacity: int | None = None
    allocated: int = 0
    reserved: int = 0
    peak_allocated: int = 0
    peak_reserved: int = 0
    _pools: dict[bool, list[tuple[int, int, Block]]] = field(
        default_factory=lambda: {True: [], False: []}
    )
    _lowest: int = 0

    def request(self, size: int) -> Block:
        """A block of at least `size` bytes.

        Raises:
            MemoryError: it does not fit into `capacity`.
        """
        size = rounded(size)
        block = self._best_fit(size) or self._new_segment(size)
        self._split(block, size)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """Gives a block back to its pool; it merges with free neighbours."""
        self.allocated -= block.size
        block.free = True
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._remove(other)
                block = _merged(*sorted((block, other), key=lambda b: b.address))
        self._insert(block)

    def empty_cache(self) -> None:
        """Gives every segment that is wholly free back to the driver."""
        for pool in self._pools.values():
            whole = [item for item in pool if item[2].before is None and item[2].after is None]
            self.reserved -= sum(size for size, _, _ in whole)
            gone = {address for _, address, _ in whole}
            pool[:] = [item for item in pool if item[1] not in gone]

    def _best_fit(self, size: int) -> Block | None:
        pool = self._pools[size <= SMALL]
        at = bisect.bisect_left(pool, size, key=lambda item: item[0])
        return pool.pop(at)[2] if at < len(pool) else None

    def _new_segment(self, size: int) -> Block:
        segment = segment_size(size)
        if self.capacity is not None and self.reserved + segment > self.capacity:
            self.empty_cache()
            if self.reserved + segment > self.capacity:
                raise MemoryError(
                    f"{segment / MIB:.0f} MiB more do not fit: {self.reserved / MIB:.0f} MiB of "
                    f"{self.capacity / MIB:.0f} MiB are in use."
                )
        self._lowest -= segment  # the driver hands addresses out from the top down
        block = Block(self._lowest, segment, small=size <= SMALL)
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _split(self, block: Block, size: int) -> None:
        rest = block.size - size
        if rest < ROUND if block.small else rest <= SMALL:
            return
        tail = Block(block.address + size, rest, block.small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = tail
        block.after, block.size = tail, size
        self._insert(tail)

    def _insert(self, block: Block) -> None:
        bisect.insort(self._pools[block.small], (block.size, block.address, block), key=_order)

    def _remove(self, block: Block) -> None:
        pool = self._pools[block.small]
        at = bisect.bisect_left(pool, (block.size, block.address), key=_order)
        del pool[at]


def _order(item: tuple[int, int, Block]) -> tuple[int, int]:
    return item[:2]


def _merged(left: Block, right: Block) -> Block:
    left.size += right.size
    left.after = right.after
    if right.after is not None:
        right.after.before = left
    return left


class PlainAllocator(CachingAllocator):
    """Counts what is asked for, byte by byte, as the processor's allocator hands it out."""

    def request(self, size: int) -> Block:
        """A block of exactly `size` bytes."""
        self.allocated += size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return Block(0, size, small=False, free=False)

    def release(self, block: Block) -> None:
        """Gives a block back."""
        self.allocated -= block.size
