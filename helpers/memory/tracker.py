"""Watch a training step allocate: every storage's birth and death, with what it is used for.

Source: PyTorch, ``TorchDispatchMode``.
Taught in: notebook 03, sections 6 and 7.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CATEGORIES = (
    "weights",
    "adapters",
    "gradients",
    "optimizer state",
    "activations",
    "temporaries",
    "workspace",
)


Sizes = tuple[int, ...]
Extra = Callable[[torch._ops.OpOverload, tuple, dict], tuple[Sizes, Sizes]]


@dataclass(slots=True)
class Event:
    """One thing that happened: an allocation (bytes > 0), a free (bytes < 0) or a mark (0).

    `number` names the storage; a mark is "phase NAME" or "empty_cache" in `operator`.
    """

    number: int
    bytes: int
    operator: str


@dataclass
class Trace:
    """Events in order, the category and the size of each storage by its number.

    paged: bytes of a paged optimiser's state, which is no allocation of PyTorch's; phase: the one
    that was marked last.
    """

    events: list[Event] = field(default_factory=list)
    category: dict[int, str] = field(default_factory=dict)
    size: dict[int, int] = field(default_factory=dict)
    paged: int = 0
    phase: str = ""

    def allocate(self, bytes: int, category: str, operator: str) -> int:
        """Record a storage's birth; returns its number."""
        number = len(self.size)
        self.size[number] = bytes
        self.category[number] = category
        self.events.append(Event(number, bytes, operator))
        return number

    def free(self, number: int, operator: str = "") -> None:
        """Record a storage's death."""
        self.events.append(Event(number, -self.size[number], operator))

    def mark(self, what: str) -> None:
        """Record the start of a phase ("phase NAME"), or "empty_cache"."""
        self.events.append(Event(-1, 0, what))
        kind, _, name = what.partition(" ")
        if kind == "phase":
            self.phase = name


class Tracker(TorchDispatchMode):
    """Records what a piece of code allocates; works on real and on fake tensors.

    A storage that an operator returns and that is not known yet was allocated by it; it is freed
    when its last reference goes. Storages start as "temporaries" and are relabelled when something
    claims them: `claim`, or `keep_alive_as` for all that is alive at a moment.

    Args:
        trace: where the events go.
        extra: what an operator needs inside itself, beside its outputs: a function of the operator,
            its arguments and its keywords that gives the sizes allocated before the outputs, and
            those allocated after them.

    Source: PyTorch, torch.utils._python_dispatch; xMem (arXiv 2510.21048) for the idea of replaying
    a run's allocations.
    Taught in: notebook 03, sections 6 and 7.
    """

    def __init__(self, trace: Trace, extra: Extra | None = None) -> None:
        super().__init__()
        self.trace = trace
        self.extra = extra or (lambda func, args, kwargs: ((), ()))
        self.alive: dict[int, tuple[int, weakref.ref]] = {}
        self._operator = ""

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: tuple[type, ...],
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        kwargs = kwargs or {}
        self._operator = func._overloadpacket.__name__
        result = func(*args, **kwargs)
        before, after = self.extra(func, args, kwargs)
        inside = [self.trace.allocate(n, "temporaries", self._operator) for n in before]
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                for part in _dense(leaf):
                    self.see(part, "temporaries")
        inside += [self.trace.allocate(n, "temporaries", self._operator) for n in after]
        for number in inside:
            self.trace.free(number, self._operator)
        return result

    def see(self, tensor: Tensor, category: str) -> int | None:
        """Record a tensor's storage if it is new; returns its number, None if it has no bytes."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return self.alive[key][0]
        size = storage.nbytes()
        if not size:
            return None
        number = self.trace.allocate(size, category, self._operator)
        self.alive[key] = (number, weakref.ref(storage, lambda _: self._gone(key)))
        return number

    def _gone(self, key: int) -> None:
        number, _ = self.alive.pop(key)
        self.trace.free(number, self._operator)

    def claim(self, tensors: Iterable[Tensor], category: str) -> None:
        """Label the tensors' storages, whatever they were called before."""
        for tensor in tensors:
            number = self.see(tensor, category)
            if number is not None:
                self.trace.category[number] = category

    def keep_alive_as(self, category: str) -> None:
        """Label all temporaries that are alive now, such as what forward leaves for backward."""
        for number, _ in self.alive.values():
            if self.trace.category[number] == "temporaries":
                self.trace.category[number] = category

    def forget(self) -> None:
        """Stop watching; storages that die later are not recorded."""
        self.alive.clear()


def _dense(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold a tensor's numbers: itself, or the two of a sparse one."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    return (tensor,)
