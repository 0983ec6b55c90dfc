"""The checks of the exercises on failures: losses to trust, and what a save leaves out.

Source: this course's own.
Taught in: notebook 10, exercises 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from helpers import models

from .exercises import Broken, Passed, plain, running

Trust = Callable[[list[float]], bool]
Lost = Callable[[PeftModel], list[str]]

_RUNS = (
    ("falls", [3.0, 2.5, 2.0, 1.5, 1.2, 1.0, 0.9, 0.8], True),
    ("falls with noise", [3.0, 2.0, 2.6, 2.1, 1.4, 2.2, 1.3, 1.5, 1.0], True),
    ("is flat", [2.0] * 8, False),
    ("rises", [1.0, 1.1, 1.3, 1.2, 1.6, 1.9, 2.4, 3.0], False),
    ("has a NaN", [3.0, 2.0, math.nan, 1.0, 0.9, 0.8, 0.7, 0.6], False),
    ("ends in NaN", [3.0, 2.0, 1.5, 1.0, 0.9, 0.8, 0.7, math.nan], False),
    ("has an infinity", [math.inf, 2.0, 1.5, 1.0, 0.9, 0.8, 0.7, 0.6], False),
    ("is too short", [3.0, 2.0, 1.0], False),
    ("is empty", [], False),
)


def trustworthy_losses(answer: Trust) -> Passed:
    """Checks `answer(losses)`: whether a list of losses is that of a run that learns.

    Raises:
        Broken: the rule is what the list does ("falls", "has a NaN", ...).

    Source: this course's own.
    Taught in: notebook 10, exercise 1.
    """
    for what, losses, expected in _RUNS:
        with running("no error", f"the function, called with a list that {what},"):
            found = plain(answer(list(losses)))
        if bool(found) is not expected:
            raise Broken(what, f"{losses} should give {expected}, not {found}")
    return Passed(f"passed: {len(_RUNS)} lists, with noise, NaN and too few steps among them")


def lost_on_save(answer: Lost) -> Passed:
    """Checks `answer(model)`: names of what trains and `save_pretrained` leaves out.

    Raises:
        Broken: nothing lost, base weight, original head, or head.

    Source: peft, ``get_peft_model_state_dict``. Taught in: notebook 10, exercise 2.
    """
    healthy = _classifier(task_type="SEQ_CLS")
    base = _classifier(task_type="SEQ_CLS")
    base.get_parameter("base_model.model.bert.pooler.dense.bias").requires_grad_(True)
    original = _classifier(task_type="SEQ_CLS")
    original.requires_grad_(False)
    for name, parameter in original.named_parameters():
        parameter.requires_grad_("classifier" in name or "lora_" in name)
    head = _classifier()
    head.base_model.model.classifier.requires_grad_(True)
    cases = (
        ("nothing lost", healthy, set()),
        ("base weight", base, {"base_model.model.bert.pooler.dense.bias"}),
        (
            "original head",
            original,
            {f"base_model.model.classifier.original_module.{n}" for n in ("weight", "bias")},
        ),
        ("head", head, {f"base_model.model.classifier.{n}" for n in ("weight", "bias")}),
    )
    for rule, model, expected in cases:
        with running("no error", f"the function, called with a model for {rule!r},"):
            found = {str(name) for name in answer(model)}
        if missed := expected - found:
            raise Broken(rule, f"{min(missed)} trains and is not in the file, and was not named")
        if more := found - expected:
            parameter = dict(model.named_parameters()).get(min(more))
            if parameter is None:
                raise Broken(rule, f"{min(more)!r} is no parameter's name")
            why = "is in the file" if parameter.requires_grad else "does not train"
            raise Broken(rule, f"{min(more)} {why}")
    return Passed("passed: nothing lost, a base weight, an original under its copy, and a head")


def _classifier(**settings: object) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["query"], **settings)
    return get_peft_model(models.tiny("bert", "seq_cls"), config)
