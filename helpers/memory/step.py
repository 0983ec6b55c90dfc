"""One optimiser step under watch, the same for real tensors and for fake ones.

Source: PyTorch, ``register_post_accumulate_grad_hook``.
Taught in: notebook 03, section 6.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils import ModelOutput

from helpers.memory.tracker import Tracker


def watch_gradients(model: nn.Module, tracker: Tracker) -> list[RemovableHandle]:
    """Label each gradient at the moment at which it is complete; returns the hooks to remove."""

    def claim(param: Tensor) -> None:
        tracker.claim([param.grad], "gradients")

    trained = (param for param in model.parameters() if param.requires_grad)
    return [param.register_post_accumulate_grad_hook(claim) for param in trained]


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    tracker: Tracker,
    outputs: list[ModelOutput],
    autocast: torch.dtype | None = None,
) -> None:
    """Forward, backward and the optimiser, marked in the trace; run it inside the tracker.

    What `outputs` holds is alive until the new output takes its place, as a name in a loop is.
    """
    record = tracker.trace
    record.mark("phase forward")
    optimizer.zero_grad()
    with _precision(autocast):
        outputs[:] = [model(**batch)]
    tracker.keep_alive_as("activations")
    record.mark("phase backward")
    outputs[0].loss.backward()
    record.mark("phase optimizer")
    update(optimizer, tracker)
    score_ranks(model, tracker)


def update(optimizer: torch.optim.Optimizer, tracker: Tracker) -> None:
    """The optimiser's own step, its state labelled."""
    optimizer.step()
    for state in optimizer.state.values():
        tensors = [t for t in state.values() if isinstance(t, Tensor)]
        tracker.claim((t for t in tensors if t.dim()), "optimizer state")
        tracker.claim((t for t in tensors if not t.dim()), "host")  # AdamW counts there


def score_ranks(model: nn.Module, tracker: Tracker) -> None:
    """AdaLoRA's importance scores, three numbers for each one it trains; nothing for others.

    Step 0 of its schedule scores and never prunes.

    Source: peft, ``AdaLoraModel.update_and_allocate``, to be called after each optimiser step.
    """
    tuner = getattr(model, "base_model", None)
    if not hasattr(tuner, "update_and_allocate"):
        return
    tuner.update_and_allocate(0)
    scores = tuner.rankallocator
    for kind in (scores.ipt, scores.exp_avg_ipt, scores.exp_avg_unc):
        tracker.claim(kind.values(), "optimizer state")


def _precision(dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)
