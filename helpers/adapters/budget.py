"""LoRA with a given number of parameters, whatever the targets: for comparisons at equal cost."""

from __future__ import annotations

from collections.abc import Sequence

from peft import LoraConfig
from torch import nn

from helpers.given import whole

from .matching import match
from .methods import parse_task

ALPHA_PER_RANK = 2


def config_for_budget(
    model: nn.Module,
    parameters: int,
    target_modules: Sequence[str] | str,
    *,
    task_type: str | None = None,
) -> LoraConfig:
    """A ``LoraConfig`` whose A and B matrices have ``parameters`` numbers, as nearly as they can.

    Every matched linear layer (in, out) costs in + out parameters per rank. All layers get the same
    rank, and what is left is spent as one rank more for as many of them as it pays for, first the
    cheap ones: ``rank_pattern``. alpha / rank is 2 everywhere: ``alpha_pattern``.

    Raises:
        ValueError: the budget is no whole number, or does not pay rank 1 everywhere, or the
            pattern matches no linear layer; the message names the smallest budget or the closest
            names.

    Source: peft, ``LoraConfig.rank_pattern`` and ``alpha_pattern``.
    Taught in: notebook 02, section 7.
    """
    parameters = whole("The budget", parameters)
    costs = _costs(model, target_modules)
    once = sum(costs.values())
    if parameters < once:
        raise ValueError(
            f"{parameters:,} parameters do not pay rank 1 on the {len(costs)} matched modules; "
            f"the smallest budget is {once:,}"
        )
    rank, left = divmod(parameters, once)
    more = _one_more(costs, left)
    return LoraConfig(
        task_type=parse_task(task_type),
        r=rank,
        lora_alpha=ALPHA_PER_RANK * rank,
        rank_pattern=dict.fromkeys(more, rank + 1),
        alpha_pattern=dict.fromkeys(more, ALPHA_PER_RANK * (rank + 1)),
        lora_dropout=0.0,
        target_modules=list(costs),
    )


def _costs(model: nn.Module, target_modules: Sequence[str] | str) -> dict[str, int]:
    """Parameters per rank of each matched linear layer.

    Raises:
        ValueError: none matches.
    """
    found = match(model, target_modules)
    modules = dict(model.named_modules())
    costs = {
        name: modules[name].in_features + modules[name].out_features
        for name in found.matched
        if isinstance(modules[name], nn.Linear)
    }
    if not costs:
        raise ValueError(f"no linear layer to adapt: {found}")
    return costs


def _one_more(costs: dict[str, int], left: int) -> list[str]:
    """The modules that get one rank more, so that their costs come nearest to ``left``."""
    more = []
    for name in sorted(costs, key=costs.__getitem__):
        if left < costs[name] / 2:
            break
        more.append(name)
        left -= costs[name]
    return more
