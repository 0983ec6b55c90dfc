"""The stand-in's base: it can read what it is shown, and has no policy of where to look.

Source: this course's own, made for the stand-in.
Taught in: notebook 09, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

from helpers import training
from helpers.assets import DATA
from helpers.atomic import whole_folder
from helpers.given import whole

from . import world
from .model import ArrCoc, ArrCocConfig
from .world import CELLS, GRID, PATTERNS, WORD, Scenes

FOLDER = DATA / "arr_coc"
SEED = 0
# (steps, learning rate), one after the other
SEE = ((200, 2e-3), (100, 1e-3))
READ = ((2500, 1e-3), (1000, 3e-4))
BATCH = 64
# how many cells a batch sees closely, drawn anew each time
SHOWN = (0, 1, 1, 1, *[2] * 10, *[4] * 5, 16)
NEEDED = 0.8  # of the rows see what they need, the others what chance gives


def base() -> ArrCoc:
    """The trained base, as it is stored; `python -m helpers.arr_coc` makes it again.

    Taught in: notebook 09, section 2.
    """
    return ArrCoc.from_pretrained(FOLDER)


def at_random(given: Scenes, cells: int, generator: torch.Generator, needed: float = 0.0) -> Tensor:
    """(rows, 16) bool: ``cells`` cells of each row, drawn without regard to the question.

    Args:
        needed: the share of rows in which the cells that the question needs come first; 1 is the
            oracle.

    Raises:
        ValueError: a number of cells that an image does not have.
    """
    whole("The number of cells", cells, 0, CELLS)
    score = torch.rand(len(given), CELLS, generator=generator)
    told = torch.rand(len(given), 1, generator=generator) < needed
    score = score + (given.needed & told)
    chosen = torch.zeros_like(given.needed)
    return chosen.scatter_(1, score.topk(cells, dim=1).indices, True) if cells else chosen


def reading(rows: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches with random cells: the base learns to read either grain, and no policy."""
    generator = torch.Generator().manual_seed(seed)
    for given in world.batches(rows, seed=seed):
        count = SHOWN[int(torch.randint(len(SHOWN), (1,), generator=generator))]
        yield {
            "images": given.images,
            "questions": given.questions,
            "answers": given.answers,
            "chosen": at_random(given, count, generator, NEEDED),
        }


def train_base(watch: Callable[[int, ArrCoc], None] | None = None) -> ArrCoc:
    """Train the base from nothing, about ten minutes of one core.

    First every visual token learns to point at the words for what it shows, then the decoder
    learns to read. The modules that look stay as they were made.
    """
    torch.manual_seed(SEED)
    model = ArrCoc(ArrCocConfig())
    model.knowing.requires_grad_(False)
    model.balancing.requires_grad_(False)
    model.attending.log_temperature.requires_grad_(False)
    seeing = _seeing(BATCH, SEED)
    follow = None if watch is None else (lambda step: watch(step, model))
    for steps, rate in SEE:
        training.train(
            _Sees(model), seeing, steps=steps, learning_rate=rate, warmup_steps=50, label="seeing"
        )
    for stage, (steps, rate) in enumerate(READ, 1):
        training.train(
            model,
            reading(BATCH, SEED + stage),
            steps=steps,
            learning_rate=rate,
            warmup_steps=50,
            watch=follow,
            label="reading",
        )
    return model.requires_grad_(True).eval()


def store(model: ArrCoc) -> None:
    """Put the base in its place in the repository, whole or not at all."""
    with whole_folder(FOLDER) as part:
        model.save_pretrained(part)


class _Sees(nn.Module):
    """Every visual token learns to point at the words for what it shows.

    A real connector does the same: it brings what the vision tower saw among the decoder's words.
    """

    def __init__(self, model: ArrCoc) -> None:
        super().__init__()
        self.vision, self.words = model.vision, model.language_model.get_input_embeddings()

    def forward(self, images: Tensor, colours: Tensor, patterns: Tensor) -> SimpleNamespace:
        coarse, fine = self.vision(images)
        tokens = torch.cat([coarse.unsqueeze(2), fine], 2)
        cells = torch.arange(CELLS, device=images.device).expand_as(colours)
        shown = (
            (tokens, colours, world.COLOURS),
            (tokens, cells // GRID, world.ROWS),
            (tokens, cells % GRID, world.COLUMNS),
            (fine, patterns, PATTERNS),
        )
        return SimpleNamespace(loss=sum(self._loss(*each) for each in shown))

    def _loss(self, tokens: Tensor, index: Tensor, names: tuple[str, ...]) -> Tensor:
        logits = tokens @ self.words.weight[[WORD[name] for name in names]].T
        index = index.unsqueeze(2).expand(logits.shape[:3])
        return functional.cross_entropy(logits.flatten(0, 2), index.flatten())


def _seeing(rows: int, seed: int) -> Iterator[dict[str, Tensor]]:
    for given in world.batches(rows, seed=seed):
        yield {"images": given.images, "colours": given.colours, "patterns": given.patterns}
