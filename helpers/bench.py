"""``python -m helpers.bench``: what the course's loop costs beside a bare one and the Trainer.

One process, the same model, the same batch, the routes taken in turn so that a noisy machine hits
all of them; the figure is a ratio of medians, never an absolute time.

Source: this course's own protocol: the variants take turns, and an A/A pair shows the noise.
Taught in: notebook 05, section 6.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from helpers import adapters, models, training


def bare_loop(model: torch.nn.Module, batch: training.Batch, steps: int) -> None:
    """The least that one can write in PyTorch, with the same optimiser and clipping."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def course_loop(model: torch.nn.Module, batch: training.Batch, steps: int) -> None:
    """The loop of the lessons."""
    training.train(model, [batch] * steps, steps=steps, learning_rate=1e-4)


def trainer_loop(model: torch.nn.Module, batch: training.Batch, steps: int) -> None:
    """transformers' Trainer on the same rows."""
    rows = [{k: v[i] for k, v in batch.items()} for i in range(len(batch["input_ids"]))]
    with tempfile.TemporaryDirectory() as folder:
        trainer = training.trainer(
            model,
            rows * steps,
            lambda items: {k: torch.stack([row[k] for row in items]) for k in items[0]},
            steps=steps,
            learning_rate=1e-4,
            batch_size=len(rows),
            seed=0,
            output_dir=Path(folder),
        )
        trainer.args.save_strategy = "no"
        trainer.train()


ROUTES: dict[str, Callable[[torch.nn.Module, training.Batch, int], None]] = {
    "bare": bare_loop,
    "course": course_loop,
    "Trainer": trainer_loop,
}


def rounds(count: int, steps: int, batch_size: int, length: int) -> Iterator[dict[str, float]]:
    """Tokens per second of each route, one dict a round; the order of the routes rotates."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(models.path("smollm2"), dtype=models.dtype())
    model = get_peft_model(base, adapters.config("lora", task_type="CAUSAL_LM"))
    ids = torch.randint(10, 40_000, (batch_size, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    bare_loop(model, batch, 1)  # the first step allocates
    calls = {name: partial(route, model, batch, steps) for name, route in ROUTES.items()}
    for seconds in interleaved(calls, count):
        yield {name: ids.numel() * steps / taken for name, taken in seconds.items()}


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int
) -> Iterator[dict[str, float]]:
    """Seconds of each call, one dict a round; the order rotates, so that noise hits all of them.

    Raises:
        ValueError: nothing to call.

    Taught in: notebook 05, section 6.
    """
    if not calls:
        raise ValueError("there is nothing to time: give at least one call with its name")
    names = list(calls)
    for i in range(rounds):
        seconds = {}
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            calls[name]()
            seconds[name] = time.perf_counter() - start
        yield seconds


def main() -> None:
    """Print the ratios course/bare and course/Trainer."""
    parser = argparse.ArgumentParser(prog="python -m helpers.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps a round")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens a row")
    args = parser.parse_args()
    seen = []
    for speeds in rounds(args.rounds, args.steps, args.batch, args.length):
        seen.append(speeds)
        print(" · ".join(f"{k} {v:.0f} tokens/s" for k, v in sorted(speeds.items())), flush=True)
    for other, target in (("bare", 0.97), ("Trainer", 1.0)):
        ratio = statistics.median(s["course"] / s[other] for s in seen)
        print(f"course loop / {other}: {ratio:.3f} (target: at least {target})")


if __name__ == "__main__":
    main()
