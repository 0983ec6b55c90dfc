"""One loop that trains and resumes, short enough to read in one minute.

It adds nothing to the time that the model itself needs (``make bench`` shows the ratio to a bare
PyTorch loop).

Source: torch.optim.AdamW, after a warm-up in a straight line.
Taught in: notebook 01, section 3.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from helpers.given import number, whole
from helpers.training.batches import Batch, TrainingError, position, start_at
from helpers.training.checkpoints import Checkpoints, Settings, fingerprint
from helpers.training.inspection import check_batch, max_positions, target_count, token_count
from helpers.training.run import History, Run
from helpers.training.team import Team

if TYPE_CHECKING:
    from accelerate import Accelerator

BAR = {"leave": False, "mininterval": 0.5}


def train(
    model: torch.nn.Module,
    data: Iterable[Batch],
    *,
    steps: int,
    learning_rate: float,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    accumulate: int = 1,
    checkpoints: Path | None = None,
    save_every: int = 100,
    accelerator: Accelerator | None = None,
    watch: Callable[[int], None] | None = None,
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
        accumulate: batches per step. Each counts by its targets, so that four batches of four
            rows give the gradient of one batch of sixteen.
        checkpoints: a folder. The run is saved there every ``save_every`` steps and at its end,
            and a run with the same settings and the same folder goes on from what was saved,
            to the bit. More ``steps`` than before are allowed.
        accelerator: of a program under ``accelerate launch``; its processes share the batches,
            and a step takes ``accumulate`` of them from each.
        watch: called after every step with the number of steps done, to evaluate for instance.

    Raises:
        TrainingError: nothing trains, the data end too early, a batch has no rows, no target or
            rows longer than the model's positions, the checkpoints are of another run, or the
            loss is no longer finite.
        ValueError: a setting that is no whole number, not finite, or below its least value.

    Taught in: notebook 01, section 3, and notebook 06, section 3.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise TrainingError("no parameter asks for a gradient: wrap the model with an adapter")
    counts = {"accumulate": accumulate, "save_every": save_every, "steps": steps}
    for name, count in (counts | {"warmup_steps": warmup_steps}).items():
        whole(name, count, least=int(name in ("accumulate", "save_every")))
    rates = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    for name, rate in rates.items():
        number(name, rate, least=0)
    if max_grad_norm != math.inf:  # which clips nothing, and is a choice
        number("max_grad_norm", max_grad_norm, least=1e-30)
    team = Team(accelerator)
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=weight_decay)
    run = Run(model, optimizer, History(), position(data))
    settings = {"learning_rate": learning_rate, "warmup_steps": warmup_steps}
    settings |= {"weight_decay": weight_decay, "max_grad_norm": max_grad_norm}
    settings |= {"accumulate": accumulate, "processes": team.count}
    saved = resumed(checkpoints, run, settings, data, team)
    stream = start_at(data, run.position, team.index, team.count)
    positions = max_positions(model)
    allocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)
    wrapped, stepper = team.wrap(model, optimizer)
    wrapped.train()
    losses, start = run.history.losses, time.perf_counter() - run.history.seconds
    with tqdm(total=steps, initial=len(losses), desc=label, **BAR, disable=not team.main) as bar:
        for step in range(len(losses), steps):
            group = list(itertools.islice(stream, accumulate))
            if len(group) < accumulate:
                raise TrainingError(f"the data ended after {step} of {steps} steps")
            for batch in group:
                check_batch(batch, positions)
            for parameters in stepper.param_groups:
                parameters["lr"] = learning_rate * min(1.0, (step + 1) / (warmup_steps + 1))
            loss = gradients(model, wrapped, group, team)
            team.clip(wrapped.parameters() if team.sharded else weights, max_grad_norm)
            stepper.step()
            if allocate is not None:
                allocate(step)
            stepper.zero_grad()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise TrainingError(
                    f"the loss is {losses[-1]} at step {step}: lower the learning rate "
                    f"({learning_rate:g}) or use a wider dtype than {weights[0].dtype}"
                )
            run.position += accumulate * team.count
            run.history.tokens += sum(map(token_count, group))
            run.history.seconds = time.perf_counter() - start
            if watch is not None:  # before saving: it may draw random numbers
                watch(step + 1)
                wrapped.train()
            if saved is not None and ((step + 1) % save_every == 0 or step + 1 == steps):
                saved.save(run)
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    return run.history


def resumed(
    folder: Path | None, run: Run, settings: Settings, data: Iterable[Batch], team: Team
) -> Checkpoints | None:
    """The checkpoints of a run that has one, after going on from the newest of them."""
    if folder is None:
        return None
    saved = Checkpoints(folder, settings | fingerprint(run.model, data), team)
    saved.resume(run)
    return saved


def gradients(
    model: torch.nn.Module, wrapped: torch.nn.Module, group: list[Batch], team: Team
) -> torch.Tensor:
    """Leave the gradients of the mean loss over all targets of all batches; return it, a scalar.

    The loss is one number, (), in nats per target, without a gradient.

    The mean of the batches' losses would be another number where they have unequal numbers of
    targets.

    Args:
        model: tells which labels are targets.
        wrapped: the same model as the team wrapped it.
        group: the batches of one step, of this process.
        team: the processes, whose batches count too.

    Taught in: notebook 06, section 3.
    """
    if len(group) == team.count == 1:
        loss = wrapped(**group[0]).loss
        team.backward(loss)
        return loss.detach()
    device = next(iter(group[0].values())).device
    targets = [target_count(model, batch) for batch in group]
    total = team.total(torch.tensor(float(sum(targets)), device=device))
    mean = torch.zeros((), device=device)
    for i, (batch, count) in enumerate(zip(group, targets, strict=True)):
        with team.waiting(wrapped, last=i == len(group) - 1):
            loss = wrapped(**batch).loss * (count / total)
            team.backward(loss)
        mean += loss.detach()
    return team.total(mean)
