"""Train two steps on fake tensors and write down every allocation.

Source: PyTorch, ``FakeTensorMode``.
Taught in: notebook 03, section 7.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal
from unittest import mock

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.utils import ModelOutput

from helpers.memory import build, optimizers
from helpers.memory.cuda_like import Extra, cuda_like
from helpers.memory.gpus import Gpu
from helpers.memory.inputs import fake_batch
from helpers.memory.step import score_ranks, step, update, watch_gradients
from helpers.memory.tracker import Trace, Tracker

_ADAM = importlib.import_module("torch.optim.adam")  # hidden from torch.optim


@dataclass(frozen=True)
class Plan:
    """A training run, complete: what `predict` is asked, checked and spelled out.

    loading: "installed" follows the installed libraries with a device_map (one block asked for
    in advance, tensors by name, the cache emptied after 4-bit preparation); "plain" is one tensor
    after the other in the model's order, as older versions and `model.cuda()` do it.
    The last five fields describe other people's scripts and matter to reserved bytes only.
    """

    config: PreTrainedConfig
    adapter: PeftConfig | None
    batch: int
    seq: int
    dtype: torch.dtype
    gpu: Gpu
    autocast: torch.dtype | None = None
    quant_type: str | None = None
    double_quant: bool = True
    checkpointing: bool = False
    optimizer: str = "adamw"
    attention: str = "sdpa"
    padded: bool = False
    use_cache: bool = False
    repeat_heads: bool = False
    loading: Literal["installed", "plain"] = "installed"
    first_seq: int | None = None  # tokens of the first step's rows, if they differ
    keeps_output: bool = False  # a loop that binds the output to a name has two of them in forward
    emptied: bool = False  # `torch.cuda.empty_cache` between the two steps
    frozen: str = ""  # parameters with this in their name do not train


def simulate(plan: Plan, *, first_step: bool = True) -> Trace:
    """All allocations of loading and of two optimiser steps, the second with the state in place.

    Without the first step its optimiser's state is made at once: what is allocated in the second
    is the same in half the time, what is reserved is not.
    """
    record = Trace()
    extra = Extra(record, plan.gpu)
    with cuda_like(plan.gpu, repeat_heads=plan.repeat_heads), fake_tensors():
        tracker = Tracker(record, extra)
        model = _loaded(plan, tracker)
        optimizer = optimizers.make(plan.optimizer, model)
        unreached = set() if first_step else _unreached(plan, model)
        watch_gradients(model, tracker)
        outputs: list[ModelOutput] = []  # the name to which a loop binds the model's output
        for number, seq in ((1, plan.first_seq or plan.seq), (2, plan.seq)):
            if number == 2 and plan.emptied:
                record.mark("empty_cache")
            record.mark(f"step {number}")
            if number == 1 and not first_step:
                _make_state(model, optimizer, tracker, unreached)
                continue
            batch = fake_batch(plan.config, model, plan.batch, seq, padded=plan.padded)
            tracker.claim(batch.values(), "activations")
            with tracker, _unchecked(model):
                step(model, optimizer, batch, tracker, outputs, plan.autocast)
            if not plan.keeps_output:
                outputs.clear()
        tracker.forget()
    record.paged = getattr(optimizer, "paged_bytes", 0)
    return record


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors without data, made without initialisation; the optimiser does not ask for values."""
    with (
        mock.patch.object(PreTrainedModel, "init_weights", lambda _: None),
        mock.patch.object(_ADAM, "_get_value", lambda _: 1.0),
        mock.patch.object(nn.Module, "_apply", _apply),
        # It looks at values to find several texts in one row; a fake tensor has none.
        mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda *_, **__: None),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module._apply` by new parameters: PyTorch's swaps fake tensors, and cannot if watched."""
    for child in module.children() if recurse else ():
        _apply(child, fn)
    for name, old in module._parameters.items():
        if old is not None:
            with torch.no_grad():
                new = fn(old)
            if new is not old:
                module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
    for name, old in module._buffers.items():
        module._buffers[name] = None if old is None else fn(old)
    return module


def _loaded(plan: Plan, tracker: Tracker) -> nn.Module:
    """Build the model, load it in the order in which a card would see it, add the adapter."""
    tracker.trace.mark("phase load")
    model = build.base(copy.deepcopy(plan.config), plan.dtype, plan.attention)
    model.config.use_cache = plan.use_cache
    four_bit = plan.quant_type is not None
    model.is_loaded_in_4bit = four_bit  # peft chooses its layers by it
    _load(model, plan, tracker)
    with tracker:
        model = build.adapted(
            model,
            copy.deepcopy(plan.adapter),  # peft completes it in place
            four_bit=four_bit,
            checkpointing=plan.checkpointing,
        )
    if four_bit and plan.loading == "installed":  # prepare_model_for_kbit_training ends with it
        tracker.trace.mark("empty_cache")
    for name, param in model.named_parameters():
        if plan.frozen and plan.frozen in name:
            param.requires_grad = False
    tracker.claim((*model.parameters(), *model.buffers()), "weights")
    tracker.claim(build.buffers_on_the_host(model), "host")
    if isinstance(model, PeftModel):
        tracker.claim((p for p in model.parameters() if p.requires_grad), "adapters")
    return model


def _load(model: PreTrainedModel, plan: Plan, tracker: Tracker) -> None:
    """Each tensor in its turn; a weight in 4 bits arrives whole and is packed on the card."""
    packed = build.linear_layers(model) if plan.quant_type is not None else {}
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    if plan.loading == "installed":
        _warm_up(tensors, packed, tracker.trace)
    for name in sorted(tensors, key=_natural) if plan.loading == "installed" else tensors:
        layer, _, kind = name.rpartition(".")
        if layer in packed and kind == "weight":
            whole = tracker.trace.allocate(tensors[name].nbytes, "temporaries", "load")
            new = build.pack(model, layer, plan.dtype, plan.quant_type, plan.double_quant)
            tracker.claim(build.quantised_tensors(new), "weights")
            tracker.trace.free(whole)
        else:
            tracker.claim([tensors[name]], "weights")


def _natural(name: str) -> list[tuple[int, str]]:
    """transformers loads by name, numbers in the name as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _warm_up(tensors: dict[str, Tensor], packed: dict[str, nn.Module], record: Trace) -> None:
    """transformers asks for one block as large as all weights, to spare many small requests."""
    total = sum(
        t.numel() // 2 if name.rpartition(".")[0] in packed else t.nbytes
        for name, t in tensors.items()
    )
    record.free(record.allocate(total, "temporaries", "warm-up"))


def _unreached(plan: Plan, model: nn.Module) -> set[nn.Parameter]:
    """What trains but gets no gradient: the vision tower of a model that is fed text alone.

    An unwatched step tells, which only a model with such a tower is asked for.
    """
    if getattr(plan.config, "vision_config", None) is None:
        return set()
    batch = fake_batch(plan.config, model, plan.batch, plan.seq, padded=plan.padded)
    if "pixel_values" in batch:
        return set()
    with _unchecked(model):
        model(**batch).loss.backward()
    found = {param for param in model.parameters() if param.requires_grad and param.grad is None}
    model.zero_grad()
    return found


def _make_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tracker: Tracker,
    unreached: set[nn.Parameter],
) -> None:
    """The optimiser's state, by a step on gradients from nowhere."""
    tracker.trace.mark("phase optimizer")
    with tracker:
        for param in model.parameters():
            if param.requires_grad and param not in unreached:
                param.grad = torch.empty_like(param)
                tracker.claim([param.grad], "gradients")
        update(optimizer, tracker)
        score_ranks(model, tracker)


@contextlib.contextmanager
def _unchecked(model: nn.Module) -> Iterator[None]:
    """Models that see pictures count the picture's tokens in the text; a fake text has none."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    module = sys.modules[type(core).__module__]
    if not hasattr(module, "torch_compilable_check"):
        yield
        return
    with mock.patch.object(module, "torch_compilable_check", lambda *_: None):
        yield
