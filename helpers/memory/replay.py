"""From a list of allocations to peaks: what is allocated and reserved, by category and phase.

Source: this course's own.
Taught in: notebook 03, sections 6 and 7.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from helpers.memory.allocator import Block, CachingAllocator
from helpers.memory.tracker import Trace

PHASES = ("forward", "backward", "optimizer")


@dataclass
class Peak:
    """The moment of a phase at which most is allocated.

    allocated: bytes, in whole blocks of the allocator; operator: what ran; categories: bytes as
    requested, by category.
    """

    allocated: int = 0
    operator: str = ""
    categories: dict[str, int] = field(default_factory=dict)


@dataclass
class Replayed:
    """Peaks of each phase of the second step, the most that was reserved, and the whole course.

    history: for each event of the second step its operator and the bytes of each category.
    """

    phases: dict[str, Peak]
    reserved: int
    history: list[tuple[str, str, dict[str, int]]]


def replay(trace: Trace, allocator: CachingAllocator | None = None) -> Replayed:
    """Run a trace through an allocator, by default the caching one without a limit.

    The first step only brings the optimiser's state into being; peaks are those of the second.
    `reserved` counts from the start, since PyTorch keeps what it once reserved.

    Raises:
        MemoryError: the trace does not fit into the allocator's capacity.
    """
    return _Replay(trace, allocator or CachingAllocator()).run()


class _Replay:
    def __init__(self, trace: Trace, allocator: CachingAllocator) -> None:
        self.trace = trace
        self.allocator = allocator
        self.blocks: dict[int, Block] = {}
        self.now: Counter[str] = Counter()
        self.phases = {phase: Peak() for phase in PHASES}
        self.history: list[tuple[str, str, dict[str, int]]] = []
        self.step, self.phase = 0, "load"

    def run(self) -> Replayed:
        for event in self.trace.events:
            if event.bytes == 0:
                self._mark(event.operator)
            elif self.trace.category[event.number] != "host":
                self._move(event.number, event.bytes, event.operator)
        return Replayed(self.phases, self.allocator.peak_reserved, self.history)

    def _mark(self, what: str) -> None:
        kind, _, name = what.partition(" ")
        if kind == "phase":
            self.phase = name
        elif kind == "step":
            self.step = int(name)
        else:
            self.allocator.empty_cache()

    def _move(self, number: int, size: int, operator: str) -> None:
        if size > 0:
            self.blocks[number] = self.allocator.request(size)
        else:
            self.allocator.release(self.blocks.pop(number))
        self.now[self.trace.category[number]] += size
        if self.step < 2:
            return
        self.history.append((self.phase, operator, dict(self.now)))
        peak = self.phases[self.phase]
        if self.allocator.allocated > peak.allocated:
            self.phases[self.phase] = Peak(self.allocator.allocated, operator, dict(self.now))
