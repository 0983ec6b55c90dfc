"""Train the base of the ARR-COC stand-in and store it in data/arr_coc (about ten minutes).

python -m helpers.arr_coc
"""

from __future__ import annotations

import argparse

import torch

from . import selectors, world
from .base import FOLDER, at_random, store, train_base
from .model import ArrCoc

SHOWN = {"nothing": (0, 0.0), "two at random": (2, 0.0), "two, with the needed": (2, 1.0)}


def report(step: int, model: ArrCoc) -> None:
    """Every 250 steps, what the base reads when it is shown nothing, chance, or what it needs."""
    if step % 250:
        return
    given, generator = world.scenes(1024, seed=3 * 10**9), torch.Generator().manual_seed(0)
    for name, (cells, needed) in SHOWN.items():
        where = at_random(given, cells, generator, needed)
        accuracy = selectors.score(model, given, where).accuracy
        shares = ", ".join(f"{kind} {share:.3f}" for kind, share in accuracy.items())
        print(f"{step:5} {name:22} {shares}", flush=True)


def main() -> None:
    """Train, report, store."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    store(train_base(report))
    print(f"{FOLDER.name}: stored")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
