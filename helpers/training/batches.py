"""Batches from a data set: shuffled for training, in order for evaluation.

Source: torch's DataLoader.
Taught in: notebook 01, section 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader

from helpers.given import LARGEST_SEED, generator, whole

Batch = dict[str, torch.Tensor]
Collate = Callable[[list[dict]], Batch]
Rows = Sequence[dict]  # or a `datasets.Dataset`


class TrainingError(RuntimeError):
    """A run that cannot give a result; the message says why and what to change.

    Taught in: notebook 06, section 9.
    """


class Batches(Iterator[Batch]):
    """Endless shuffled batches that can go to any position without building what lies before.

    Attributes:
        position: how many batches were passed so far, over all epochs.
        settings: what fixes the order: rows, batch size and seed.
    """

    def __init__(
        self,
        dataset: Rows,
        collate: Collate,
        batch_size: int,
        seed: int,
        device: torch.device | None,
    ) -> None:
        self._dataset, self._collate, self._device = dataset, collate, device
        self.settings = {"rows": len(dataset), "batch_size": batch_size, "seed": seed}
        self.seek(0)

    def seek(self, position: int, index: int = 0, count: int = 1) -> None:
        """Make ``position`` the number of batches already passed, in either direction.

        Of ``count`` processes that share the batches, the one numbered ``index`` then gets every
        ``count``-th of them.

        Raises:
            ValueError: a position that is no whole number from 0.
        """
        self.position, self._stride = whole("The position", position, 0), count
        self._rows = itertools.islice(self._order(), position + index, None, count)

    def _order(self) -> Iterator[list[int]]:
        """Row numbers of one batch after the other, epoch after epoch."""
        loader = DataLoader(
            range(self.settings["rows"]),
            batch_size=self.settings["batch_size"],
            shuffle=True,
            collate_fn=list,
            generator=generator(self.settings["seed"]),
        )
        for _ in itertools.count():
            yield from loader

    def __next__(self) -> Batch:
        numbers = next(self._rows)
        self.position += self._stride
        at_once = getattr(self._dataset, "__getitems__", None)
        rows = at_once(numbers) if at_once else [self._dataset[i] for i in numbers]
        return to_device(self._collate(rows), self._device)


def batches(
    dataset: Rows,
    collate: Collate,
    *,
    batch_size: int,
    seed: int,
    device: torch.device | None = None,
) -> Batches:
    """Endless shuffled batches: epoch after epoch, each in a new order fixed by ``seed``.

    Args:
        dataset: with a length, and a row at each number, such as a `datasets.Dataset`.
        collate: makes a batch, tensors of (batch size, …), of a list of rows.
        batch_size: rows; the last batch of an epoch may have fewer.

    Raises:
        TrainingError: the data set is empty.
        ValueError: ``batch_size`` is no whole number from 1, or ``seed`` none from 0.
    """
    if len(dataset) == 0:
        raise TrainingError("the data set has no rows, so there is nothing to train on")
    whole("batch_size", batch_size)
    whole("seed", seed, 0, LARGEST_SEED)
    return Batches(dataset, collate, batch_size, seed, device)


def ordered_batches(
    dataset: Rows, collate: Collate, *, batch_size: int, device: torch.device | None = None
) -> Iterator[Batch]:
    """Each row once, in order, ``batch_size`` rows a batch: for evaluation.

    Raises:
        ValueError: ``batch_size`` is no whole number from 1.
    """
    whole("batch_size", batch_size)
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collate):
        yield to_device(batch, device)


def position(data: Iterable[Batch]) -> int:
    """How many batches of the data were passed; 0 for data that do not count."""
    return data.position if isinstance(data, Batches) else 0


def start_at(data: Iterable[Batch], place: int, index: int = 0, count: int = 1) -> Iterator[Batch]:
    """The batches from ``place`` on, or every ``count``-th of them for the process ``index``.

    Cheap for :class:`Batches`; any other data are read through.
    """
    if isinstance(data, Batches):
        data.seek(place, index, count)
        return data
    return itertools.islice(data, place + index, None, count)


def to_device(batch: Batch, device: torch.device | None) -> Batch:
    """The same batch on ``device``; untouched when ``device`` is None."""
    return batch if device is None else {k: v.to(device) for k, v in batch.items()}
