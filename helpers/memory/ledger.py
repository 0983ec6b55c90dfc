"""Where the bytes of a real step go, on this machine: every allocation watched and labelled.

Source: torch's TorchDispatchMode and profiler.
Taught in: notebook 03, section 5.
"""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers.utils import ModelOutput

from helpers.memory import build
from helpers.memory.allocator import PlainAllocator
from helpers.memory.replay import Replayed, replay
from helpers.memory.step import step, watch_gradients
from helpers.memory.tracker import Trace, Tracker


def measure(
    model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer | None = None
) -> Replayed:
    """Two optimiser steps of a real model, the second one measured: bytes by category and phase.

    An optimiser that is given changes the weights, and AdaLoRA's scores of importance move. What
    an operator takes inside itself and gives back before it returns is not seen.

    Args:
        model: takes the batch and returns an output with a loss, ().
        batch: tensors to call it with, such as ``input_ids`` (rows, length).
        optimizer: over what trains; default AdamW with a learning rate of zero, which leaves the
            weights as they are.

    Source: PyTorch, torch.utils._python_dispatch.
    Taught in: notebook 03, section 6.
    """
    chosen = optimizer or torch.optim.AdamW(_trained(model), lr=0.0, weight_decay=0.0)
    tracker = Tracker(Trace())
    _claim(model, tracker)
    tracker.claim(batch.values(), "activations")
    hooks = watch_gradients(model, tracker)
    outputs: list[ModelOutput] = []
    try:
        for number in (1, 2):
            tracker.trace.mark(f"step {number}")
            with tracker:
                step(model, chosen, batch, tracker, outputs)
            outputs.clear()
    finally:
        tracker.forget()
        for hook in hooks:
            hook.remove()
        chosen.zero_grad()
    return replay(tracker.trace, PlainAllocator())


def _claim(model: nn.Module, tracker: Tracker) -> None:
    """Label what exists before the step."""
    packed = [m for m in model.modules() if isinstance(m, Linear4bit)]
    tracker.claim((t for layer in packed for t in build.quantised_tensors(layer)), "weights")
    tracker.claim((*model.parameters(), *model.buffers()), "weights")
    if isinstance(model, PeftModel):
        tracker.claim(_trained(model), "adapters")


def _trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def profiler_peak(
    model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> int:
    """Peak bytes above what was there before, of one step on the processor, by PyTorch's profiler.

    Run one step before, so that the optimiser's state exists.

    Args:
        model: takes the batch and returns an output with a loss, ().
        batch: tensors to call it with, such as ``input_ids`` (rows, length).
        optimizer: over what trains; its step changes the weights.

    Source: PyTorch, torch.profiler with profile_memory.
    Taught in: notebook 09, section 7.
    """
    optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        output = model(**batch)  # bound to a name, as in a loop: logits live on in backward
        output.loss.backward()
        optimizer.step()
    now = peak = 0
    for change in _memory_changes(profiled):
        now += change
        peak = max(peak, now)
    return peak


def _memory_changes(profiled: profile) -> list[int]:
    """Bytes of each allocation (positive) and free (negative), in order."""
    events = profiled.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return [size for _, size in sorted(changes, key=lambda change: change[0])]
