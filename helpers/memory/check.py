"""What a real run would trip over and a run without data does not notice.

Source: what the installed transformers, peft and bitsandbytes refuse, as the tests show.
Taught in: notebook 03, section 7.
"""

from __future__ import annotations

import copy

import torch
from peft import PeftType
from torch import nn
from transformers import PreTrainedModel

from helpers import adapters, training
from helpers.memory import build
from helpers.memory.simulate import Plan


def check(plan: Plan) -> None:
    """Refuse a run that the libraries would refuse, or that would not be the one that was meant.

    Looked at: whether the architecture has fused attention, whether the method goes with
    checkpointing, whether each target matches a module (peft is silent about one that does not, if
    another does), whether the model has positions for the rows. Takes a fraction of a
    second; the model is built on the meta device.

    Raises:
        ValueError: one sentence that says what to change.
    """
    _check_attention(plan)
    _check_prefix(plan)
    with torch.device("meta"):
        model = build.base(copy.deepcopy(plan.config), plan.dtype, plan.attention)
    _check_targets(plan, model)
    _check_positions(plan, model)


def _check_attention(plan: Plan) -> None:
    kind = build.auto_class(plan.config)._model_mapping[type(plan.config)]
    if plan.attention == "sdpa" and not kind._supports_sdpa:
        raise ValueError(
            f"transformers has no fused attention for {plan.config.model_type!r}; "
            "give the attention 'eager'."
        )


def _check_prefix(plan: Plan) -> None:
    """Checkpointing switches off the cache, which is how a prefix gets into the layers."""
    if plan.checkpointing and getattr(plan.adapter, "peft_type", None) == PeftType.PREFIX_TUNING:
        raise ValueError(
            "Prefix tuning, p-tuning v2 included, does not go with checkpointing, as peft says "
            "too; leave checkpointing out."
        )


def _check_targets(plan: Plan, model: PreTrainedModel) -> None:
    targets = getattr(plan.adapter, "target_modules", None)
    if not targets:
        return
    found = adapters.match(model, targets, task_type=build.task_type(plan.config))
    for entry, advice in found.advice.items():
        raise ValueError(f"{entry!r} matches no module of {plan.config.model_type!r}: {advice}")
    if found.raises:
        raise ValueError(" ".join(found.raises.split()))


def _check_positions(plan: Plan, model: PreTrainedModel) -> None:
    limit = training.max_positions(model)
    virtual = getattr(plan.adapter, "num_virtual_tokens", None) or 0
    if limit is None or plan.seq + virtual <= limit or not _has_table(model, limit):
        return
    beside = f" and {virtual} virtual ones" if virtual else ""
    raise ValueError(
        f"{plan.config.model_type!r} has {limit} learned positions, too few for rows of {plan.seq} "
        f"tokens{beside}; give a seq of at most {limit - virtual}."
    )


def _has_table(model: PreTrainedModel, limit: int) -> bool:
    """Whether positions are learned, so that the table ends; rotary ones go on."""
    return any(
        isinstance(module, nn.Embedding)
        and module.num_embeddings >= limit
        and ("position" in name or name.endswith("wpe"))
        for name, module in model.named_modules()
    )
