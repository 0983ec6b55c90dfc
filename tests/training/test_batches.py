"""Batches: their order, and going to any place in it."""

import itertools

import torch
from tiny_rows import stack

from helpers import training


def test_batches_depend_on_the_seed_and_cover_every_row_once_an_epoch():
    rows = [{"x": torch.tensor([i])} for i in range(10)]

    def order(seed):
        found = itertools.islice(training.batches(rows, stack, batch_size=5, seed=seed), 4)
        return [b["x"].flatten().tolist() for b in found]

    assert order(0) == order(0) != order(1)
    first, second = ([i for batch in half for i in batch] for half in (order(0)[:2], order(0)[2:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def numbers(batches: training.Batches, count: int) -> list[list[int]]:
    return [b["x"].flatten().tolist() for b in itertools.islice(batches, count)]


def test_any_place_is_reached_without_collating_what_lies_before():
    rows = [{"x": torch.tensor([i])} for i in range(10)]
    collated = []

    def counting(some):
        collated.append(len(some))
        return stack(some)

    batches = training.batches(rows, counting, batch_size=4, seed=0)
    nine = numbers(batches, 9)
    assert batches.position == 9
    collated.clear()
    batches.seek(7)
    assert numbers(batches, 2) == nine[7:] and len(collated) == 2 and batches.position == 9
    batches.seek(2)
    assert numbers(batches, 1) == nine[2:3]


def test_two_processes_share_the_batches_in_turn():
    rows = [{"x": torch.tensor([i])} for i in range(10)]
    whole = numbers(training.batches(rows, stack, batch_size=2, seed=0), 8)
    shares = []
    for index in (0, 1):
        batches = training.batches(rows, stack, batch_size=2, seed=0)
        batches.seek(2, index, 2)
        shares.append(numbers(batches, 3))
        assert batches.position == 8
    assert shares == [whole[2::2], whole[3::2]]
