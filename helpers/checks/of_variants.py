"""Checks for the exercises on LoRA's variants: DoRA and AdaLoRA's schedule."""

from collections.abc import Callable
from functools import partial

import torch
from peft import AdaLoraConfig
from torch import Tensor, nn

from helpers import adapters
from helpers.by_hand import DoRALinear

from .exercises import Broken, Passed, plain, running

# average rank at the start and at the end, modules, tinit, tfinal, total_step
SCHEDULES = (
    (3, 2, 36, 8, 24, 80),
    (12, 8, 8, 0, 30, 100),
    (6, 4, 5, 10, 5, 40),
    (2, 1, 7, 3, 0, 20),
)
Budget = Callable[[int, int, int, int, int, int], int]


def rank_schedule(budget: Budget) -> Passed:
    """Checks `budget(step, start, target, tinit, tfinal, total_step)`, AdaLoRA's rank budget.

    `start` and `target` are the sums of the ranks over all modules, and so is the answer, a whole
    number. It is compared at every step of four schedules with peft's own.

    Raises:
        Broken: warm-up, final phase, cubic fall or whole number, with the step that shows it;
            names the usual slip when it is one.

    Source: Zhang et al. 2023, "AdaLoRA", section 3.3. Taught in: notebook 04, exercise 2.
    """
    for start, target, modules, tinit, tfinal, total in SCHEDULES:
        given = (start * modules, target * modules, tinit, tfinal, total)
        config = AdaLoraConfig(
            init_r=start, target_r=target, tinit=tinit, tfinal=tfinal, total_step=total
        )
        right = adapters.rank_budget(config, modules)["rank"].tolist()
        with running("every step", f"the function, called with 0 to {total - 1} and {given},"):
            found = [plain(budget(step, *given)) for step in range(total)]
        step = next((i for i in range(total) if found[i] != right[i]), None)
        if step is not None:
            rule = _phase(step, tinit, tfinal, total)
            raise Broken(
                rule,
                f"step {step} with start, target, tinit, tfinal, total_step = {given} gives "
                f"{found[step]!r}, not {right[step]}{_schedule_slip(found, given)}",
            )
    return Passed(f"passed: {len(SCHEDULES)} schedules are peft's at every step")


def _phase(step: int, tinit: int, tfinal: int, total: int) -> str:
    if step <= tinit:
        return "warm-up"
    return "final phase" if step > total - tfinal else "cubic fall"


def _fall(power: int, given: tuple[int, ...], step: int) -> float:
    """The budget before it is rounded, falling with that power of the share that is left."""
    start, target, tinit, tfinal, total = given
    left = 1 - (step - tinit) / (total - tfinal - tinit)
    return target + (start - target) * min(1.0, max(0.0, left)) ** power


def _ends_at_tfinal(given: tuple[int, ...], step: int) -> int:
    start, target, tinit, tfinal, total = given
    if tfinal <= tinit:
        return target
    return int(_fall(3, (start, target, tinit, total - tfinal, total), step))


def _schedule_slip(found: list, given: tuple[int, ...]) -> str:
    slips: dict[str, Callable[[int], float]] = {
        "tfinal counts the last steps, it is not the step where pruning ends": partial(
            _ends_at_tfinal, given
        ),
        "the fall is cubic, not linear": lambda step: int(_fall(1, given, step)),
        "the fall is cubic, not square": lambda step: int(_fall(2, given, step)),
        "a rank is a whole number, rounded down": lambda step: _fall(3, given, step),
        "it is rounded down": lambda step: round(_fall(3, given, step)),
        "the first tinit steps keep the start": lambda step: int(
            _fall(3, (*given[:2], 0, *given[3:]), step)
        ),
    }
    for why, slip in slips.items():
        if found == [slip(step) for step in range(len(found))]:
            return f": {why}"
    return ""


Merge = Callable[[Tensor, Tensor, Tensor, float, Tensor], Tensor]


@torch.no_grad()
def dora_weight(merge: Merge) -> Passed:
    """Checks `merge(W, A, B, scaling, magnitude)`, the weight (out, in) that DoRA merges into.

    Shapes: W (out, in), A (rank, in), B (out, rank), magnitude (out,).

    Raises:
        Broken: scaling, update, lengths after the update, one length for each output, or magnitude,
            with the usual slip when it is one; also for a result that is no such tensor.

    Source: Liu et al. 2024, "DoRA", equation 5. Taught in: notebook 04, exercise 1.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for ins, outs, rank, alpha in ((6, 4, 2, 6.0), (5, 5, 1, 0.5)):
            layer = DoRALinear(nn.Linear(ins, outs), rank, alpha)
            layer.B.normal_()
            layer.magnitude.uniform_(0.5, 2.0)
            _check_merge(merge, layer)
    return Passed("passed: the rows point along W + scaling B A and are as long as the magnitude")


def _check_merge(merge: Merge, layer: DoRALinear) -> None:
    given = (layer.base.weight, layer.A, layer.B, layer.scaling, layer.magnitude)
    copies = [value.detach().clone() if isinstance(value, Tensor) else value for value in given]
    shapes = f"W {tuple(given[0].shape)}, A {tuple(given[1].shape)} and B {tuple(given[2].shape)}"
    with running("merge", f"the function, called with {shapes},"):
        found = merge(*copies)
    right = layer.merge().weight
    if not isinstance(found, Tensor) or found.shape != right.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else repr(found)
        raise Broken("shape", f"the merged weight is {tuple(right.shape)} like W, not {got}")
    if _same(found, right):
        return
    for rule, why, slip in _merge_slips(*copies):
        if _same(found, slip):
            raise Broken(rule, why)
    gap = (found - right).abs().max().item()
    raise Broken("magnitude / length times V", f"an entry is off by {gap:.3g} for {shapes}")


def _same(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def _merge_slips(
    w: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor
) -> list[tuple[str, str, Tensor]]:
    """Rule, sentence and result of each usual slip."""
    v, m = w + scaling * b @ a, magnitude.unsqueeze(1)

    def unit(matrix: Tensor) -> Tensor:
        return matrix / matrix.norm(dim=1, keepdim=True)

    return [
        ("magnitude", "that is LoRA's merge: the rows keep whatever length W + B A gives them", v),
        ("magnitude", "the rows have length 1: multiply each by its magnitude", unit(v)),
        ("magnitude", "the rows were scaled without being brought to length 1 first", m * v),
        ("scaling", "the update B A was not multiplied by scaling", m * unit(w + b @ a)),
        (
            "lengths after the update",
            "the rows were divided by W's lengths; divide by those of W + scaling B A",
            m * v / w.norm(dim=1, keepdim=True),
        ),
        ("update", "the update is missing: the rows still point along W", m * unit(w)),
        (
            "one length for each output",
            "the lengths were taken over the outputs (dim=0); take them over the inputs (dim=1)",
            m * v / v.norm(dim=0, keepdim=True),
        ),
        (
            "one length for each output",
            "one length was taken for the whole matrix",
            m * v / v.norm(),
        ),
    ]
