"""The check of the exercise on a hybrid: modules in full beside LoRA."""

from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .exercises import Broken, Passed, running

Freeze = Callable[[PeftModel], object]


class _Net(nn.Module):
    """Two modules that train in full, and a frozen one whose name holds another's name."""

    def __init__(self, *, trap: bool) -> None:
        super().__init__()
        self.knowing = nn.Linear(4, 4)
        self.balancing = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        other = "knowing_when" if trap else "decoder"
        self.language_model = nn.ModuleDict({other: nn.Linear(4, 4), "up_proj": nn.Linear(4, 4)})


def hybrid_flags(freeze: Freeze) -> Passed:
    """Checks `freeze(model)`, which decides what of a peft model trains.

    Afterwards exactly LoRA's matrices and the trainable copies of `modules_to_save` ask for a
    gradient, whatever did before.

    Raises:
        Broken: LoRA trains, modules train, base frozen, originals frozen, or name trap.

    Source: peft, ``ModulesToSaveWrapper``. Taught in: notebook 09, exercise 1.
    """
    for trap, before in ((False, False), (False, True), (True, True)):
        torch.manual_seed(0)
        config = LoraConfig(
            r=2, target_modules=["up_proj"], modules_to_save=["knowing", "balancing"]
        )
        model = get_peft_model(_Net(trap=trap), config)
        model.requires_grad_(before)
        with running("freeze", f"the function, called with everything set to {before},"):
            freeze(model)
        _check_flags(model)
    return Passed(
        "passed: LoRA and the copies that train, and nothing else, whatever trained before"
    )


def _check_flags(model: PeftModel) -> None:
    wrappers = {n for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    for name, parameter in model.named_parameters():
        inside = any(name.startswith(f"{wrapper}.") for wrapper in wrappers)
        trains = parameter.requires_grad
        if "lora_" in name:
            _demand(trains, "LoRA trains", f"{name} is frozen")
        elif inside and ".modules_to_save." in name:
            _demand(trains, "modules train", f"{name} is frozen")
        elif inside:
            why = "is kept for switching the adapter off, and gets no gradient"
            _demand(not trains, "originals frozen", f"{name} {why}")
        elif "knowing_when" in name:
            why = "trains, since its name contains 'knowing'; compare whole parts of a name"
            _demand(not trains, "name trap", f"{name} {why}")
        else:
            _demand(not trains, "base frozen", f"{name} trains")


def _demand(holds: bool, rule: str, why: str) -> None:
    if not holds:
        raise Broken(rule, why)


Draw = Callable[[Tensor, list[int]], float]


def log_of_draw(answer: Draw) -> Passed:
    """Checks `answer(logits, order)`: the log of the chance to draw these cells, in this order.

    Args:
        answer: gets logits (N,) and the indices of the cells drawn one after the other, none twice.

    Raises:
        Broken: one cell, replacement, order or number, with the usual slip when it is one.

    Source: Plackett 1975, Luce 1959. Taught in: notebook 09, exercise 2.
    """
    logits = torch.tensor([1.5, 0.0, -0.5, 0.7])
    for order in ([0], [0, 1], [1, 0], [3, 0, 2]):
        with running("a draw", f"the function, called with the order {order},"):
            found = float(answer(logits.clone(), list(order)))
        rest, right = logits.clone(), 0.0
        for cell in order:
            right += rest.log_softmax(-1)[cell].item()
            rest[cell] = -torch.inf
        if abs(found - right) < 1e-4:
            continue
        if abs(found - logits.log_softmax(-1)[order].sum().item()) < 1e-4:
            raise Broken(
                "replacement",
                "a cell that was drawn cannot be drawn again: the others "
                "share its probability from then on",
            )
        if abs(found - logits[order].sum().item()) < 1e-4:
            raise Broken("one cell", "logits are no logarithms of probabilities yet: log_softmax")
        raise Broken("number", f"the log for {order} is {right:.3f}, not {found:.3f}")
    return Passed("passed: each cell is drawn from those that are left")
