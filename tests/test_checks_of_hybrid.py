"""The check of the exercise on what may train passes a right loop and names what is wrong."""

import pytest
import torch

from helpers import checks

MODULES = ("knowing", "balancing")


def right(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name or "modules_to_save" in name.split(".")


def by_name(model):
    """The note's loop."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora" in name or any(module in name for module in MODULES)


def by_part(model):
    for name, parameter in model.named_parameters():
        trains = any(module in name for module in MODULES) and "original_module" not in name
        parameter.requires_grad = "lora" in name or trains


def never_freezes(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.requires_grad = True


def only_lora(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name


def only_modules(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "modules_to_save" in name


def test_a_right_loop_passes():
    assert "nothing else" in checks.hybrid_flags(right)


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        (by_name, "originals frozen"),
        (by_part, "name trap"),
        (never_freezes, "originals frozen"),
        (only_lora, "modules train"),
        (only_modules, "LoRA trains"),
        (lambda model: model.requires_grad_(True), "originals frozen"),
        (lambda model: None, "modules train"),
    ],
)
def test_other_loops_are_named(answer, rule):
    with pytest.raises(checks.Broken) as caught:
        checks.hybrid_flags(answer)
    assert caught.value.rule == rule


def test_an_error_inside_is_named():
    with pytest.raises(checks.Broken, match="raises"):
        checks.hybrid_flags(lambda: None)


def drawn(logits, order):
    total, left = 0.0, logits
    for cell in order:
        total += left.log_softmax(-1)[cell]
        left = left.index_fill(0, torch.tensor([cell]), float("-inf"))
    return total


OTHERS = {
    "replacement": lambda logits, order: logits.log_softmax(-1)[order].sum(),
    "one cell": lambda logits, order: logits[order].sum(),
    "number": lambda logits, order: 2 * drawn(logits, order),
    "a draw": lambda logits, order: 1 / 0,
}


def test_the_right_chance_of_a_draw_passes():
    assert "passed" in checks.log_of_draw(drawn)


@pytest.mark.parametrize("rule", OTHERS)
def test_a_wrong_chance_of_a_draw_is_named(rule):
    with pytest.raises(checks.Broken, match=rule):
        checks.log_of_draw(OTHERS[rule])
