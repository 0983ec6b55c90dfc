"""Checks for the exercises on ranks: what an adapter costs, and which module has which rank."""

from torch import nn

from helpers import adapters
from helpers.given import whole

from .exercises import Broken, Passed, plain, running


def adapter_size(answer: int, model: nn.Module, rank: int, target_modules: list[str]) -> Passed:
    """Checks a learner's count of the parameters that LoRA trains in a whole model.

    The model may be on the meta device; it is not changed.

    Raises:
        Broken: the answer is another number; names the usual slip when it is one.
        ValueError: the targets match nothing, or the rank is no whole number from 1.

    Source: Hu et al. 2021, "LoRA", section 4.2. Taught in: notebook 02, exercise 1.
    """
    layers = [model.get_submodule(name) for name in adapters.match(model, target_modules).matched]
    if not layers:
        raise ValueError(
            f"the targets {target_modules} match no module, so there is nothing to count"
        )
    whole("rank", rank)
    right = sum(rank * (layer.in_features + layer.out_features) for layer in layers)
    with running("one number", "reading the answer"):
        answer = plain(answer)
    if answer == right:
        return Passed(f"passed: {right:,} parameters in {len(layers)} layers")
    widest = max(layer.in_features + layer.out_features for layer in layers)
    slips = {
        rank * widest * len(layers): "that takes all targets for as large as the largest; some "
        "have fewer outputs",
        right // rank: "that is rank 1; multiply by the rank",
    }
    why = next(
        (text for slip, text in slips.items() if slip == answer),
        "add rank x (in + out) over all matched layers",
    )
    raise Broken("every target counts by its shape", f"{answer!r} is not right: {why}")


def lora_ranks(model: nn.Module, expected: dict[str, int], scaling: float) -> Passed:
    """Checks which modules of a wrapped model have which rank, all with the same scaling.

    Args:
        model: from `get_peft_model`.
        expected: a module's full name in the base model, and its rank.
        scaling: alpha / rank of each of them.

    Raises:
        Broken: a module is missing, one too many, has another rank or another scaling.

    Source: peft, `LoraConfig.rank_pattern` and `alpha_pattern`. Taught in: notebook 02, exercise 2.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = {name: m for name, m in base.named_modules() if hasattr(m, "lora_A")}
    if missed := sorted(set(expected) - set(layers)):
        raise Broken("reaches all of them", f"{len(missed)} are missing, such as {missed[0]}")
    if extra := sorted(set(layers) - set(expected)):
        raise Broken("reaches nothing else", f"{len(extra)} too many, such as {extra[0]}")
    for name, rank in expected.items():
        found = layers[name].r["default"]
        if found != rank:
            raise Broken("rank_pattern", f"{name} has rank {found}, it should be {rank}")
        factor = layers[name].scaling["default"]
        if factor != scaling:
            raise Broken(
                "alpha_pattern",
                f"{name} has scaling {factor:g}, it should be {scaling:g}; alpha does not follow "
                "rank_pattern by itself",
            )
    return Passed(f"passed: {len(expected)} modules, each with its rank and scaling {scaling:g}")
