"""One training loop, one route through transformers' Trainer, and evaluation.

The loop is what every lesson uses: it is short enough to read in one minute and adds nothing to the
time that the model itself needs (``make bench`` shows the ratio to a bare PyTorch loop).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from helpers.data import IGNORED, chat_prompt

Batch = dict[str, torch.Tensor]
Collate = Callable[[list[dict]], Batch]


class TrainingError(RuntimeError):
    """A run that cannot give a result; the message says why and what to change."""


@dataclass
class History:
    """What one run of :func:`train` did: loss per step (nats per target), tokens, seconds."""

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens that went through the model per second, padding included."""
        return self.tokens / self.seconds if self.seconds else 0.0


def batches(
    dataset, collate: Collate, *, batch_size: int, seed: int, device: torch.device | None = None
) -> Iterator[Batch]:
    """Endless shuffled batches: epoch after epoch, each in a new order fixed by ``seed``.

    Raises:
        TrainingError: the data set is empty.
    """
    if len(dataset) == 0:
        raise TrainingError("the data set has no rows, so there is nothing to train on")
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        dataset, batch_size=batch_size, shuffle=True, collate_fn=collate, generator=order
    )
    for _ in itertools.count():
        for batch in loader:
            yield to_device(batch, device)


def ordered_batches(
    dataset, collate: Collate, *, batch_size: int, device: torch.device | None = None
) -> Iterator[Batch]:
    """Each row once, in order: for evaluation."""
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collate):
        yield to_device(batch, device)


def to_device(batch: Batch, device: torch.device | None) -> Batch:
    """The same batch on ``device``; untouched when ``device`` is None."""
    return batch if device is None else {k: v.to(device) for k, v in batch.items()}


def train(
    model: torch.nn.Module,
    data: Iterable[Batch],
    *,
    steps: int,
    learning_rate: float,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    label: str = "training",
) -> History:
    """Train every parameter that asks for a gradient with AdamW for ``steps`` steps.

    The learning rate rises linearly for ``warmup_steps`` and then stays. AdaLoRA's
    ``update_and_allocate`` is called after each step, as peft's documentation asks for (the
    Trainer does not do it). A progress line shows the loss and the time left.

    Args:
        model: returns an output with ``.loss`` when called with a batch.
        data: batches; :func:`batches` makes them.
        steps: optimiser steps.
        learning_rate: AdamW's rate after warm-up.

    Raises:
        TrainingError: nothing trains, the data end too early, a batch has no target, or the loss
            is no longer finite.

    Taught in: notebook 01, section 3.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise TrainingError("no parameter asks for a gradient: wrap the model with an adapter")
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (warmup_steps + 1))
    )
    allocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)
    history, losses = History(), []
    model.train()
    start = time.perf_counter()
    with tqdm(total=steps, desc=label, leave=False, mininterval=0.5) as bar:
        for step, batch in zip(range(steps), data, strict=False):
            check_targets(batch)
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, max_grad_norm)
            optimizer.step()
            schedule.step()
            if allocate is not None:
                allocate(step)
            optimizer.zero_grad()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise TrainingError(
                    f"the loss is {losses[-1]} at step {step}: lower the learning rate "
                    f"({learning_rate:g}) or use a wider dtype than {trainable[0].dtype}"
                )
            history.tokens += token_count(batch)
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    history.losses, history.seconds = losses, time.perf_counter() - start
    if len(losses) < steps:
        raise TrainingError(f"the data ended after {len(losses)} of {steps} steps")
    return history


def check_targets(batch: Batch) -> None:
    """Refuse a batch whose labels are all masked: its loss would be NaN."""
    labels = batch.get("labels")
    if labels is not None and not labels.is_floating_point() and bool((labels == IGNORED).all()):
        raise TrainingError(
            "every label of this batch is masked (-100): the answers were cut off or never marked; "
            "raise max_length or check how the labels are made"
        )


def token_count(batch: Batch) -> int:
    """Input positions in a batch, padding included; rows where there are no token ids."""
    ids = batch.get("input_ids")
    return ids.numel() if ids is not None else len(next(iter(batch.values())))


@torch.no_grad()
def answer_loss(model: torch.nn.Module, data: Iterable[Batch]) -> float:
    """Mean loss per target token (nats) of a language model, weighted over batches of any size.

    Raises:
        TrainingError: there is no target in the data.
    """
    model.eval()
    total, targets = 0.0, 0
    for batch in data:
        # a decoder predicts position t+1 at t, so the first label of a row is never a target
        n = int((batch["labels"][:, 1:] != IGNORED).sum())
        if n:
            total += model(**batch).loss.item() * n
            targets += n
    if not targets:
        raise TrainingError("no target token in the evaluation data")
    return total / targets


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Iterable[Batch]) -> float:
    """Share of right labels, for sequence classification (B,) and token classification (B, T)."""
    model.eval()
    right, total = 0, 0
    for batch in data:
        labels = batch["labels"]
        guesses = model(**batch).logits.argmax(-1)
        counted = labels != IGNORED
        right += int((guesses == labels)[counted].sum())
        total += int(counted.sum())
    if not total:
        raise TrainingError("no label in the evaluation data")
    return right / total


@torch.no_grad()
def span_accuracy(model: torch.nn.Module, data: Iterable[Batch]) -> float:
    """Share of rows whose answer span (first and last token) is found exactly."""
    model.eval()
    right, total = 0, 0
    for batch in data:
        out = model(**batch)
        first = out.start_logits.argmax(-1) == batch["start_positions"]
        last = out.end_logits.argmax(-1) == batch["end_positions"]
        right += int((first & last).sum())
        total += len(first)
    if not total:
        raise TrainingError("no row in the evaluation data")
    return right / total


@torch.no_grad()
def answer(model, tokenizer, questions: list[str], *, max_new_tokens: int = 32) -> list[str]:
    """The model's greedy answers to chat questions, one string each, special tokens removed.

    The questions run as one batch padded on the left, so that each answer follows its question.

    Taught in: notebook 01, section 3.
    """
    model.eval()
    prompts = [chat_prompt(question, tokenizer) for question in questions]
    inputs = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    inputs = inputs.to(next(model.parameters()).device)
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def trainer(
    model,
    dataset,
    collate: Collate,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    output_dir: Path,
):
    """A transformers Trainer with the same optimiser, clipping and order rule as :func:`train`.

    It reports nowhere, saves when it ends, and writes into ``output_dir`` only.

    Taught in: notebook 06.
    """
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        save_strategy="steps",
        save_steps=steps,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    return Trainer(model=model, args=args, train_dataset=dataset, data_collator=collate)
