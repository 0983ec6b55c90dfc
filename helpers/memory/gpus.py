"""Named cards: what they hold and how PyTorch uses them.

Source: the vendors' data sheets, and torch's reports on such cards.
Taught in: notebook 03, section 9.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from helpers.given import letters, unknown

MIB = 1024**2
GIB = 1024**3
_SMALL_WORKSPACE = 8 * MIB + 128 * 1024  # 2 x 4 MiB and 8 x 16 KiB
_LARGE_WORKSPACE = 32 * MIB  # Hopper and later


@dataclass(frozen=True)
class Gpu:
    """A card.

    Args:
        name: as the command line knows it.
        memory: bytes in all, as `torch.cuda.get_device_properties` reports them.
        capability: compute capability, such as (8, 0).
    """

    name: str
    memory: int
    capability: tuple[int, int]

    @property
    def flash(self) -> bool:
        """Whether PyTorch's flash attention runs on it."""
        return self.capability >= (8, 0)

    @property
    def bf16(self) -> bool:
        """Whether it has units for bfloat16; older cards can only emulate it."""
        return self.capability >= (8, 0)

    @property
    def workspace(self) -> int:
        """Bytes of one workspace of the matrix library, cuBLAS."""
        return _LARGE_WORKSPACE if self.capability >= (9, 0) else _SMALL_WORKSPACE

    @property
    def usable(self) -> int:
        """Bytes left for PyTorch after CUDA has taken its own share (about half a GiB)."""
        return self.memory - CONTEXT


CONTEXT = 512 * MIB  # CUDA's context and kernels: between 140 MiB and 600 MiB, not simulated
_CARDS = (
    ("rtx-3060", 11.75, (8, 6)),
    ("t4", 14.56, (7, 5)),
    ("v100-16gb", 15.77, (7, 0)),
    ("rtx-4080", 15.69, (8, 9)),
    ("l4", 22.03, (8, 9)),
    ("a10g", 22.06, (8, 6)),
    ("rtx-3090", 23.69, (8, 6)),
    ("rtx-4090", 23.64, (8, 9)),
    ("rtx-5090", 31.36, (12, 0)),
    ("a100-40gb", 39.39, (8, 0)),
    ("l40s", 44.39, (8, 9)),
    ("a6000", 47.43, (8, 6)),
    ("a100-80gb", 79.14, (8, 0)),
    ("h100", 79.10, (9, 0)),
    ("h200", 139.80, (9, 0)),
    ("b200", 178.35, (10, 0)),
)
GPUS: dict[str, Gpu] = {
    name: Gpu(name, int(gib * GIB), capability) for name, gib, capability in _CARDS
}


def gpu(name: str) -> Gpu:
    """The card of that name; capitals, spaces and dashes do not matter.

    Raises:
        ValueError: unknown name; the message gives the nearest, for a number the cards of about
            so many GiB.
    """
    known = {letters(card): card for card in GPUS}
    known |= {"a100": "a100-80gb", "3090": "rtx-3090", "4090": "rtx-4090", "v100": "v100-16gb"}
    if letters(name) not in known:
        size = re.fullmatch(r"(\d+)(gi?b?)?", letters(name))
        near = _about(int(size[1])) if size else []
        if near:
            raise ValueError(
                f"Unknown GPU {name!r}; cards of about {size[1]} GiB: {', '.join(near)}."
            )
        raise ValueError(unknown("GPU", name, GPUS))
    return GPUS[known[letters(name)]]


def _about(gib: int) -> list[str]:
    """The cards within a tenth of that size, since makers and drivers count differently."""
    return [card.name for card in GPUS.values() if abs(card.memory / GIB - gib) <= gib / 10]
