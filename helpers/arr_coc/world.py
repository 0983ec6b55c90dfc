"""A synthetic world in which the right place to look depends on the question.

An image has sixteen cells. Each cell has a colour of its own, which a coarse look shows, and a
fine pattern, which it does not: every pattern averages to zero in each block of four by four
pixels. "Which pattern is in the red cell?" needs a close look at one cell, and the next question
about the same image needs another one.

Source: this course's own.
Taught in: notebook 09, section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helpers.given import generator, whole

SIDE, CELL, GRID = 64, 16, 4
CELLS = GRID**2
PAD = 0
KINDS = ("pattern", "colour", "count")
SHARES = (0.6, 0.25, 0.15)  # of the kinds among the questions
HUES = (
    ("red", (0.82, 0.18, 0.18)),
    ("green", (0.18, 0.7, 0.2)),
    ("blue", (0.18, 0.25, 0.82)),
    ("yellow", (0.82, 0.8, 0.18)),
    ("orange", (0.82, 0.5, 0.18)),
    ("purple", (0.5, 0.18, 0.75)),
    ("cyan", (0.18, 0.75, 0.8)),
    ("pink", (0.82, 0.5, 0.7)),
    ("brown", (0.45, 0.25, 0.18)),
    ("olive", (0.5, 0.5, 0.18)),
    ("navy", (0.18, 0.18, 0.45)),
    ("teal", (0.18, 0.45, 0.45)),
    ("maroon", (0.45, 0.18, 0.25)),
    ("lime", (0.6, 0.82, 0.2)),
    ("grey", (0.5, 0.5, 0.5)),
    ("white", (0.8, 0.8, 0.8)),
)
COLOURS = tuple(name for name, _ in HUES)
PATTERNS = ("rows", "columns", "bars", "posts", "dots", "tiles", "slope", "rise")
AMPLITUDE = (0.06, 0.16)
TRAP = 3.0  # times the contrast, of the two cells that are never asked about
ROWS = tuple(f"row{i}" for i in range(GRID))
COLUMNS = tuple(f"column{i}" for i in range(GRID))
_COUNTS = tuple(str(i) for i in range(GRID + 1))
WORDS = ("<pad>", "of", "cell", *KINDS, *COLOURS, *ROWS, *COLUMNS, *PATTERNS, *_COUNTS)
WORD = {word: i for i, word in enumerate(WORDS)}
QUESTION_WORDS = 4


@dataclass(frozen=True)
class Scenes:
    """Questions about images, one for each row.

    Attributes:
        images: (rows, 3, 64, 64), numbers from 0 to 1, a little beyond in the trap's cells.
        questions: (rows, 4) words; padded on the left with 0.
        answers: (rows,) the word to answer.
        kinds: (rows,) 0 pattern, 1 colour, 2 count.
        needed: (rows, 16) True for the cells that have to be seen closely to answer.
        colours, patterns: (rows, 16) what each cell holds.
    """

    images: Tensor
    questions: Tensor
    answers: Tensor
    kinds: Tensor
    needed: Tensor
    colours: Tensor
    patterns: Tensor

    def __len__(self) -> int:
        return len(self.answers)

    def rows(self, which: Tensor | slice) -> Scenes:
        """Some of the rows."""
        return Scenes(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


def scenes(rows: int, *, seed: int, kinds: tuple[str, ...] = KINDS, trap: bool = False) -> Scenes:
    """Draw images, and one question about each.

    Args:
        kinds: which kinds of questions; their shares are those of `SHARES`.
        trap: two cells, never asked about, have three times the contrast.

    Raises:
        ValueError: an unknown kind or none, or fewer than one row.

    Taught in: notebook 09, section 2.
    """
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"no kind of question {min(unknown)!r}; there is {', '.join(KINDS)}")
    if not kinds:
        raise ValueError(f"expected at least one kind of question; there is {', '.join(KINDS)}")
    whole("The number of rows", rows)
    start = generator(seed)
    colours = torch.rand(rows, CELLS, generator=start).argsort(1)
    patterns = torch.randint(len(PATTERNS), (rows, CELLS), generator=start)
    loud = torch.zeros(rows, CELLS, dtype=torch.bool)
    if trap:
        loud.scatter_(1, torch.rand(rows, CELLS, generator=start).argsort(1)[:, :2], True)
    images = _drawn(colours, patterns, loud, start)
    weights = torch.tensor([s * (k in kinds) for s, k in zip(SHARES, KINDS, strict=True)])
    drawn = torch.multinomial(weights, rows, replacement=True, generator=start)
    blank = Scenes(images, *(torch.empty(0),) * 2, drawn, torch.empty(0), colours, patterns)
    return _asked(blank, ~loud, start)


def asked_again(given: Scenes, *, seed: int) -> Scenes:
    """The same images, each with a question about the pattern of some other cell."""
    pattern = replace(given, kinds=torch.zeros_like(given.kinds))
    allowed = ~given.needed | (given.kinds != 0).unsqueeze(1)
    return _asked(pattern, allowed, generator(seed))


def renamed(given: Scenes) -> Scenes:
    """The same questions in a world that has other names for half of the patterns.

    Each of the first four is called by the next one's name, the fourth by the first one's. Who
    reads the pattern and does not know this is right in half of the questions.
    """
    first, half = WORD[PATTERNS[0]], len(PATTERNS) // 2
    index = given.answers - first
    moves = (given.kinds == KINDS.index("pattern")) & (index < half)
    return replace(given, answers=torch.where(moves, (index + 1) % half + first, given.answers))


def batches(
    rows: int, *, seed: int, kinds: tuple[str, ...] = KINDS, trap: bool = False
) -> Iterator[Scenes]:
    """Fresh scenes without end; no image comes twice."""
    step = 0
    while True:
        yield scenes(rows, seed=seed * 1_000_003 + step, kinds=kinds, trap=trap)
        step += 1


def in_words(row: Tensor) -> str:
    """A question, (4,) words, as text.

    Raises:
        ValueError: a number that is no word's.
    """
    ids = [whole("A word of a question", i, 0, len(WORDS) - 1) for i in row.flatten().tolist()]
    return " ".join(WORDS[i] for i in ids if i != PAD)


def _asked(given: Scenes, allowed: Tensor, generator: torch.Generator) -> Scenes:
    rows = len(given.kinds)
    cell = torch.multinomial(allowed.float(), 1, generator=generator).squeeze(1)
    row, column = cell // GRID, cell % GRID
    pattern = torch.randint(len(PATTERNS), (rows,), generator=generator)
    every = torch.arange(rows)
    colour, value = given.colours[every, cell], given.patterns[every, cell]
    in_row = torch.arange(CELLS).expand(rows, -1) // GRID == row.unsqueeze(1)
    count = ((given.patterns == pattern.unsqueeze(1)) & in_row).sum(1)
    one = torch.zeros(rows, CELLS, dtype=torch.bool).scatter_(1, cell.unsqueeze(1), True)
    fixed = {word: torch.full((rows,), WORD[word]) for word in ("of", "cell", *KINDS)}
    at_row, at_column = row + WORD[ROWS[0]], column + WORD[COLUMNS[0]]
    texts = (
        ("pattern", "cell", colour + WORD[COLOURS[0]]),
        ("colour", at_row, at_column),
        ("count", pattern + WORD[PATTERNS[0]], at_row),
    )
    words = [[fixed[w] if isinstance(w, str) else w for w in text] for text in texts]
    asked = torch.stack([torch.stack([kind, fixed["of"], a, b], 1) for kind, a, b in words])
    answers = (value + WORD[PATTERNS[0]], colour + WORD[COLOURS[0]], count + WORD[_COUNTS[0]])
    return replace(
        given,
        questions=asked[given.kinds, every],
        answers=torch.stack(answers)[given.kinds, every],
        needed=torch.stack([one, torch.zeros_like(one), in_row])[given.kinds, every],
    )


def _drawn(colours: Tensor, patterns: Tensor, loud: Tensor, generator: torch.Generator) -> Tensor:
    rows = len(colours)
    low, high = AMPLITUDE
    amplitude = low + (high - low) * torch.rand(rows, CELLS, generator=generator)
    sign = torch.randint(2, (rows, CELLS), generator=generator) * 2 - 1
    amplitude = amplitude * sign * torch.where(loud, TRAP, 1.0)
    hue = torch.tensor([rgb for _, rgb in HUES])[colours]  # rows, cells, 3
    fine = _textures()[patterns] * amplitude[..., None, None]  # rows, cells, 16, 16
    cells = hue[..., None, None] + fine.unsqueeze(2)  # rows, cells, 3, 16, 16
    grid = cells.view(rows, GRID, GRID, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(rows, 3, SIDE, SIDE)  # not clamped, or the trap would change the means


def _textures() -> Tensor:
    """(8, 16, 16) of +1 and -1; each averages to zero in each block of 4 by 4 pixels."""
    i, j = torch.meshgrid(torch.arange(CELL), torch.arange(CELL), indexing="ij")
    on = (
        i % 2 == 0,
        j % 2 == 0,
        i % 4 < 2,
        j % 4 < 2,
        (i + j) % 2 == 0,
        (i // 2 + j // 2) % 2 == 0,
        (i + j) % 4 < 2,
        (i - j) % 4 < 2,
    )
    return torch.stack(on).float() * 2 - 1
