"""Ways to train where to look, and the choices that need no training.

All of them end in the same choice of K cells, and all are evaluated by leaving out what was not
chosen. They differ in how the answer's loss reaches the three modules.

Source: Williams 1992 (REINFORCE); Kool et al. 2019 (sampling without replacement); the choices
without training are this course's own.
Taught in: notebook 09, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import get_scheduler

from helpers.given import whole

from .base import at_random
from .model import ArrCoc
from .modules import gumbel, texture
from .world import CELLS, KINDS, Scenes

MODULES = ("knowing", "balancing", "attending")
UNSURE = 4.0  # temperature of the answer's logits
Loss = Callable[[ArrCoc, Scenes], Tensor]


def answer_loss(selection: str, temperature: float = 1.0) -> Loss:
    """Cross-entropy of the answer, with the gradient that `model.SELECTIONS` names.

    Args:
        temperature: divides the answer's logits. A frozen reader that is right is sure of it, and
            the loss is flat where it is sure: a little more or less attention changes nothing. A
            higher temperature makes it unsure.

    Taught in: notebook 09, section 5.
    """

    def loss(model: ArrCoc, given: Scenes) -> Tensor:
        model.config.selection = selection
        logits = model(given.images, given.questions).logits
        return functional.cross_entropy(logits / temperature, given.answers)

    return loss


def reinforce(model: ArrCoc, given: Scenes) -> Tensor:
    """The choice is a draw; what answers better than the batch's mean becomes likelier.

    The reward is the probability of the right answer. Its logarithm would do while the reader is
    good; one that is often wrong and sure of it makes a look at the right place cost more than a
    look elsewhere, and the modules would learn to avoid what was asked for.

    Source: Williams 1992, with the mean reward as the baseline and its spread as the unit; the
    draw's probability is Plackett and Luce's, cell after cell without replacement.
    """
    noise = gumbel(given.images.new_empty(len(given), CELLS))
    look = model.look(given.images, given.questions, noise=noise)
    logits = look.relevance / look.temperature.unsqueeze(1)
    scale = 1 - look.tensions[:, 1:2]  # the noise was damped by it, so the draw is sharper
    order = (logits + noise * scale).topk(model.config.cells, dim=1).indices
    drawn = _log_probability(logits / scale.clamp(min=0.05), order)
    answer = model.read(given.images, given.questions, look.chosen)
    each = functional.cross_entropy(answer, given.answers, reduction="none")
    reward = (-each.detach()).exp()
    advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
    return each.mean() - (advantage * drawn).mean()


def proxy(model: ArrCoc, given: Scenes) -> Tensor:
    """Cross-entropy of the softmax over cells against the needed ones: it is told where to look."""
    look = model.look(given.images, given.questions)
    log = (look.relevance / look.temperature.unsqueeze(1)).log_softmax(-1)
    needed = given.needed.float()
    asked = needed.sum(1) > 0
    return -((log * needed).sum(1) / needed.sum(1).clamp(min=1))[asked].mean()


LOSSES: dict[str, Loss] = {
    "sparse gate": answer_loss("sparse"),
    "log-gate": answer_loss("dense"),
    "soft": answer_loss("soft"),
    "reinforce": reinforce,
    "proxy": proxy,
    "plain top-K": answer_loss("topk"),
    "sparse gate, unsure": answer_loss("sparse", UNSURE),
    "weighted, unsure": answer_loss("weighted", UNSURE),
    "log-gate, unsure": answer_loss("dense", UNSURE),
    "soft, unsure": answer_loss("soft", UNSURE),
}


def learn(
    model: nn.Module,
    batches: Iterator[Scenes],
    loss: Callable[[nn.Module, Scenes], Tensor],
    *,
    steps: int,
    rates: Sequence[tuple[str, float]],
    cosine: bool = False,
    weight_decay: float = 0.0,
    watch: Callable[[int], None] | None = None,
    label: str = "learning to look",
) -> list[float]:
    """Train what asks for a gradient; the first text that a name contains sets its rate.

    ``loss`` gives a scalar for a batch. Returns the losses. A loss without a gradient (plain top-K
    on a frozen reader) changes nothing.

    Raises:
        ValueError: nothing that trains has a rate.
    """
    groups = []
    for i, (part, rate) in enumerate(rates):
        earlier = [text for text, _ in rates[:i]]
        weights = [
            p
            for name, p in model.named_parameters()
            if p.requires_grad and part in name and not any(text in name for text in earlier)
        ]
        if weights:
            groups.append({"params": weights, "lr": rate})
    if not groups:
        parts = ", ".join(part for part, _ in rates) or "none is given"
        raise ValueError(f"no parameter that trains has one of these in its name: {parts}")
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
    schedule = get_scheduler("cosine" if cosine else "constant", optimizer, 0, steps)
    every = [p for group in groups for p in group["params"]]
    losses = []
    model.train()
    for step in tqdm(range(steps), desc=label, leave=False, mininterval=0.5):
        value = loss(model, next(batches))
        optimizer.zero_grad()
        if value.requires_grad:
            value.backward()
            nn.utils.clip_grad_norm_(every, 1.0)
            optimizer.step()
            schedule.step()
        losses.append(value.item())
        if watch is not None:
            watch(step + 1)
            model.train()
    return losses


def with_new_modules(reader: ArrCoc, seed: int, **settings: object) -> ArrCoc:
    """The same reader with modules that never looked, from this seed, and other settings."""
    torch.manual_seed(seed)
    model = ArrCoc(type(reader.config).from_dict(reader.config.to_dict() | settings))
    learned = ("knowing.", "balancing.", "attending.log_temperature")
    kept = {n: t for n, t in reader.state_dict().items() if not n.startswith(learned)}
    model.load_state_dict(kept, strict=False)
    return model


def only_modules(model: ArrCoc) -> ArrCoc:
    """Freeze all but knowing, balancing and attending."""
    model.requires_grad_(False)
    for name in MODULES:
        getattr(model, name).requires_grad_(True)
    return model


@dataclass(frozen=True)
class Score:
    """How well a choice answers.

    Attributes:
        accuracy: share of right answers, for each kind of question that is there.
        loss: nats per question.
        hit: how often a pattern's cell is among the chosen; NaN without such questions.
    """

    accuracy: dict[str, float]
    loss: float
    hit: float


@torch.no_grad()
def chosen(model: ArrCoc, given: Scenes, cells: int | None = None) -> Tensor:
    """(rows, 16) bool: the model's own choice, with another K if asked for.

    Raises:
        ValueError: a number of cells that an image does not have.
    """
    if cells is not None:
        whole("The number of cells", cells, 1, CELLS)
    model.eval()
    before, model.config.cells = model.config.cells, cells or model.config.cells
    try:
        return model.look(given.images, given.questions).chosen
    finally:
        model.config.cells = before


def without_training(name: str, given: Scenes, cells: int, seed: int = 0) -> Tensor:
    """(rows, 16) bool: "random", "oracle", "salience", "information", "fixed" or "everything".

    Raises:
        ValueError: another name, or a number of cells that an image does not have.
    """
    whole("The number of cells", cells, 0, CELLS)
    generator = torch.Generator().manual_seed(seed)
    if name == "everything":
        return torch.ones_like(given.needed)
    if name in ("random", "oracle"):
        return at_random(given, cells, generator, needed=float(name == "oracle"))
    if name == "fixed":
        score = torch.zeros(len(given), CELLS)
        score[:, torch.arange(0, CELLS, 5)[:cells] if cells <= 4 else torch.arange(cells)] = 1
    elif name in ("salience", "information"):
        score = texture(given.images, 4).flatten(2)[:, 8 if name == "salience" else 10]
    else:
        raise ValueError(
            f"no choice {name!r}; there is random, oracle, salience, information, fixed, everything"
        )
    return torch.zeros_like(given.needed).scatter_(1, score.topk(cells, 1).indices, True)


@torch.no_grad()
def score(model: nn.Module, given: Scenes, where: Tensor) -> Score:
    """How the reader answers, whatever it was trained on, when it sees these cells closely.

    ``where`` is (rows, 16), True for such a cell.

    Raises:
        ValueError: it has another shape or dtype.
    """
    _check_choices((len(given), CELLS), where)
    model.eval()
    logits = torch.cat(
        [
            model.read(given.images[rows], given.questions[rows], where[rows])
            for rows in torch.arange(len(given)).split(256)
        ]
    )
    right = (logits.argmax(-1) == given.answers).float()
    found = (where & given.needed)[given.kinds == KINDS.index("pattern")].any(1)
    accuracy = {
        kind: right[given.kinds == i].mean().item()
        for i, kind in enumerate(KINDS)
        if (given.kinds == i).any()
    }
    loss = functional.cross_entropy(logits, given.answers).item()
    return Score(accuracy, loss, found.float().mean().item())


def sensitivity(one: Tensor, other: Tensor) -> float:
    """1 - Jaccard's index of two choices, mean over rows: how much the question moves the look.

    Both are (rows, 16), True for a cell that is seen closely.

    Raises:
        ValueError: one has another shape or dtype.
    """
    _check_choices((*one.shape, 1, 1)[:2], one, other)
    both, either = (one & other).sum(1), (one | other).sum(1)
    return (1 - both / either).mean().item()


def _check_choices(shape: tuple[int, int], *choices: Tensor) -> None:
    for where in choices:
        if where.shape != shape or where.dtype != torch.bool:
            raise ValueError(
                f"a choice is {shape} of True and False, not {tuple(where.shape)} of {where.dtype}"
            )


def _log_probability(logits: Tensor, order: Tensor) -> Tensor:
    """(rows,) log of the chance to draw these cells one after the other."""
    total = logits.new_zeros(len(logits))
    left = torch.zeros_like(logits)
    for column in order.T:
        log = (logits + left).log_softmax(-1)
        total = total + log.gather(1, column.unsqueeze(1)).squeeze(1)
        left = left.scatter(1, column.unsqueeze(1), float("-inf"))
    return total
