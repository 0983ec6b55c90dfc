"""Weighted merges: one new LoRA adapter from several, and a refusal where peft's would be wrong.

`PeftModel.add_weighted_adapter` copies the settings of the first adapter and computes new A and B.
Whatever else an adapter has (a magnitude, a bias, a head, token rows) is not merged, and nothing
says so. `weighted` mends what can be mended and refuses the rest.

Source: peft's add_weighted_adapter.
Taught in: notebook 07, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor

from helpers.given import one_of
from helpers.merging.many import parts

EXACT = ("cat", "svd")  # they work on the updates B A; svd with enough rank
PRUNING = (
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)
METHODS = (*EXACT, "linear", *PRUNING)

# What peft copies from the first adapter for all of them, although it decides what is adapted.
_SHARED = ("layers_to_transform", "layers_pattern", "exclude_modules", "fan_in_fan_out")


class WeightedMergeError(ValueError):
    """Adapters that cannot be merged as asked; the message is one sentence that says why."""


@dataclass(frozen=True)
class Weighted:
    """A merged adapter.

    Attributes:
        name: under which it is in the model; `set_adapter(name)` switches to it.
        rank: its rank; that of "cat" is the sum of all ranks.
        distance: how far its updates are from the weighted sum of the adapters' updates, as a
            share of that sum (Frobenius norms over all layers); 0 is the exact sum.
    """

    name: str
    rank: int
    distance: float


def weighted(
    model: PeftModel,
    weights: Mapping[str, float],
    name: str,
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Weighted:
    """Add the weighted merge of several LoRA adapters to a model as a new adapter.

    It is not activated, and the adapters that it was made of stay.

    Args:
        model: has every adapter of ``weights``.
        weights: adapter to weight; 1.0 each adds the updates up, 1/n each averages them.
        name: of the new adapter.
        method: one of `METHODS`, as peft calls them. "cat" is exact.
        rank: of the result, for the methods on whole updates ("svd" and names that end in it);
            by default the largest rank of the adapters.
        density: the share of numbers that a pruning method keeps.
        seed: for the DARE methods, which prune at random.

    Raises:
        WeightedMergeError: an unknown adapter or method, a name that is taken, a setting that the
            method does not have, or an adapter that peft would merge to something else.

    Source: peft, ``LoraModel.add_weighted_adapter``; Yadav et al. 2023 (TIES); Yu et al. 2024
    (DARE).
    Taught in: notebook 07, section 5.
    """
    _check(model, weights, name, method, rank, density)
    first = model.peft_config[next(iter(weights))]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.add_weighted_adapter(
                list(weights),
                list(weights.values()),
                name,
                combination_type=method,
                svd_rank=rank,
                svd_full_matrices=False,  # the same result, without the columns that are cut off
                density=density,
            )
    except BaseException:
        if name in model.peft_config:  # peft registers the adapter before it computes it
            model.delete_adapter(name)
        raise
    if first.use_rslora:
        _without_rslora(model, name)
    return Weighted(name, model.peft_config[name].r, _distance(model, weights, name))


def _check(
    model: PeftModel,
    weights: Mapping[str, float],
    name: str,
    method: str,
    rank: int | None,
    density: float | None,
) -> None:
    """Refuse what peft would merge to something else, or not at all."""
    if not isinstance(getattr(model, "base_model", None), LoraModel):
        raise WeightedMergeError(
            f"weighted merges are for LoRA adapters, and this {type(model).__name__} has none"
        )
    _check_names(model, weights, name)
    _check_settings(method, rank, density)
    for adapter in weights:
        if reason := _unmergeable(model, adapter):
            raise WeightedMergeError(f"adapter {adapter!r} {reason}")
    _check_together({adapter: model.peft_config[adapter] for adapter in weights}, method)


@torch.no_grad()
def known_answer(model: PeftModel, name: str, merged: str, **batch: Tensor) -> float:
    """How far a merge of one adapter at weight 1.0 is from that adapter; it should be 0.

    Args:
        model: has both adapters, and gives logits.
        name: the adapter.
        merged: what was made of it.
        batch: an input of the model, such as ``input_ids`` of (rows, length).

    Returns:
        The distance of the logits as a share of the adapter's own effect on them.

    Raises:
        WeightedMergeError: the model has no such adapter.

    Taught in: notebook 07, section 5.
    """
    logits = {}
    for adapter in (name, merged):
        if adapter not in model.peft_config:
            there = ", ".join(model.peft_config)
            raise WeightedMergeError(f"the model has no adapter {adapter!r}; it has: {there}")
        model.set_adapter(adapter, inference_mode=True)
        logits[adapter] = model(**batch).logits
    with model.disable_adapter():
        effect = logits[name] - model(**batch).logits
    return ((logits[merged] - logits[name]).norm() / effect.norm()).item()


def _check_names(model: PeftModel, weights: Mapping[str, float], name: str) -> None:
    if not weights:
        raise WeightedMergeError("weights is empty; give an adapter and its weight, as {'a': 1.0}")
    if name in model.peft_config:  # peft would return at once and merge nothing
        raise WeightedMergeError(f"the model has an adapter {name!r} already; take another name")
    if name in parts(model):
        raise WeightedMergeError(
            f"{name!r} is a part of this model's names, and peft would then save too little of the "
            "other adapters; take another name"
        )
    for adapter, weight in weights.items():
        one_of("adapter", adapter, model.peft_config, WeightedMergeError)
        if not math.isfinite(weight):
            raise WeightedMergeError(f"the weight of {adapter!r} is {weight}, not a finite number")


def _check_settings(method: str, rank: int | None, density: float | None) -> None:
    one_of("method", method, METHODS, WeightedMergeError)
    if method in PRUNING and (density is None or not 0 < density <= 1):
        raise WeightedMergeError(
            f"{method} keeps a share of the numbers: give density between 0 and 1, not {density}"
        )
    if method not in PRUNING and density is not None:
        raise WeightedMergeError(f"{method} does not prune, so it takes no density")
    if rank is not None and (not method.endswith("svd") or rank < 1):
        raise WeightedMergeError(
            f"a rank of at least 1 can be chosen for svd and its kin, not {rank} for {method}"
        )


def _unmergeable(model: PeftModel, adapter: str) -> str | None:
    """Why peft would lose a part of this adapter, None if it would not."""
    config = model.peft_config[adapter]
    if config.use_dora:
        return (
            "is DoRA: its update depends on the length of W + B A, so updates do not add up; "
            "merge it into the weights alone"
        )
    if config.bias != "none" or config.lora_bias:
        return "trains biases, which peft does not merge; train with bias='none', lora_bias=False"
    if config.modules_to_save:
        return (
            f"has its own {', '.join(sorted(config.modules_to_save))}, and the merged adapter "
            "would get the untrained one; keep the head outside the adapter"
        )
    if config.trainable_token_indices:
        return "trains rows of the embedding, which peft does not merge"
    if any(adapter in layer.lora_variant for layer in _layers(model)):
        return "is a variant of LoRA of which peft merges A and B only"
    if any(layer.merged for layer in _layers(model)):
        return "cannot be merged with others while an adapter is merged; call unmerge_adapter first"
    return None


def _check_together(configs: Mapping[str, LoraConfig], method: str) -> None:
    """Refuse adapters each of which is well, but that do not fit together."""
    (first, base), *others = configs.items()
    for adapter, config in others:
        for setting in _SHARED:
            ours, theirs = getattr(base, setting), getattr(config, setting)
            if ours != theirs:
                raise WeightedMergeError(
                    f"{setting} is {ours} in {first!r} and {theirs} in {adapter!r}; peft would "
                    "take the first for both"
                )
    if method == "cat" or method.endswith("svd"):
        return
    if any(config.rank_pattern for config in configs.values()):
        raise WeightedMergeError(
            f"{method} leaves the ranks of rank_pattern out of the stored settings, so the file "
            "would not load again; take 'cat' or 'svd'"
        )
    ranks = {adapter: config.r for adapter, config in configs.items()}
    if len(set(ranks.values())) > 1:
        raise WeightedMergeError(f"{method} needs equal ranks, not {ranks}; take 'cat' or 'svd'")


def _without_rslora(model: PeftModel, name: str) -> None:
    """Give the merged adapter the scaling 1 that its numbers were computed for.

    peft sets alpha to the rank, which is 1 under alpha / r, and keeps the first adapter's
    use_rslora, under which it is the root of the rank.
    """
    model.peft_config[name] = replace(model.peft_config[name], use_rslora=False)
    for layer in _layers(model):
        if name in layer.scaling:
            layer.scaling[name] = 1.0


def _distance(model: PeftModel, weights: Mapping[str, float], name: str) -> float:
    wrong = total = 0.0
    for layer in _layers(model):
        updates = {adapter: _update(layer, adapter) for adapter in weights}
        parts = [weights[a] * update for a, update in updates.items() if update is not None]
        if parts:
            wanted = torch.stack(parts).sum(dim=0)
            wrong += (_update(layer, name) - wanted).square().sum().item()
            total += wanted.square().sum().item()
    if total == 0:
        return 0.0 if wrong == 0 else math.inf
    return math.sqrt(wrong / total)


@torch.no_grad()
def _update(layer: LoraLayer, adapter: str) -> Tensor | None:
    """The update scaling * B A of one layer in fp32, None where the adapter has none."""
    if adapter not in layer.lora_A and adapter not in layer.lora_embedding_A:
        return None
    return layer.get_delta_weight(adapter).float()


def _layers(model: PeftModel) -> Iterator[LoraLayer]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))
