"""Layer replication: a longer stack from the same layers, which share their weights.

`LoraConfig(layer_replication=[[0, 4], [2, 5]])` stacks ranges of a model's layers. A layer that
comes out twice has its weights once; only the adapters are its own. So whatever writes into a
weight, as merging does, writes into every layer that holds it.

Source: peft's `layer_replication`; safetensors and torch's storages.
Taught in: notebook 04, section 11.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_STACKS = ("layers", "encoder.layer", "h")  # Llama and its kin, BERT, Falcon


@dataclass(frozen=True)
class Storages:
    """What a stack of layers keeps in memory, and what it would keep without sharing.

    Attributes:
        stored: how many different storages the layers' base weights lie in.
        held: how many weights the layers hold, a shared one once for every holder.
        stored_bytes: bytes of the different storages.
        held_bytes: bytes if every layer had weights of its own.
    """

    stored: int
    held: int
    stored_bytes: int
    held_bytes: int


def layers(replication: Sequence[Sequence[int]], count: int) -> list[int]:
    """Which layer of the old stack each layer of the new one is; both counted from 0.

    Args:
        replication: ranges ``[start, end]``, the end not included, stacked in this order; what
            ``LoraConfig.layer_replication`` takes.
        count: how many layers the model has.

    Raises:
        ValueError: no range, not a pair of whole numbers, a range that is empty or reversed, or
            one outside the model.

    Source: peft, ``LoraConfig.layer_replication``. Taught in: notebook 04, section 11.
    """
    if not replication:
        raise ValueError("layer_replication is empty; give ranges such as [[0, 4], [2, 5]]")
    return [source for pair in replication for source in range(*_range(pair, count))]


def _range(pair: Sequence[int], count: int) -> tuple[int, int]:
    if len(pair) != 2 or not all(type(number) is int for number in pair):
        raise ValueError(f"a range is two whole numbers such as [0, {count}], not {list(pair)}")
    start, end = pair
    if start >= end:
        more = f"[{end}, {start}]" if start > end else f"[{start}, {start + 1}]"
        raise ValueError(
            f"[{start}, {end}] holds no layer, since a range stops before its end; did you mean "
            f"{more}?"
        )
    if start < 0 or end > count:
        raise ValueError(
            f"[{start}, {end}] leaves a model of {count} layers; its widest range is [0, {count}]"
        )
    return start, end


def stack(model: nn.Module) -> nn.ModuleList:
    """The list of layers that peft replicates, of a model with or without an adapter.

    Raises:
        ValueError: none where peft looks for it (GPT-2, T5 and Falcon with a head, say).

    Source: peft, ``replicate_layers``.
    """
    net = model.get_base_model() if hasattr(model, "get_base_model") else model
    while hasattr(net, "model"):
        net = net.model
    net = getattr(net, "bert", net)
    for path in _STACKS:
        found = net
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise ValueError(
        f"{type(net).__name__} has no list of layers where peft looks for one "
        f"({', '.join(_STACKS)}); a Llama, Mistral or BERT has"
    )


def storages(model: nn.Module) -> Storages:
    """Count the storages and bytes of the base weights of a model's layers; adapters left out.

    Counts storages, not names, so it works on shared weights, and on the meta device, where a
    storage has a size but no memory. What bitsandbytes keeps beside a 4-bit weight is not counted.

    Raises:
        ValueError: the model has no list of layers (see `stack`).

    Taught in: notebook 04, section 11.
    """
    held = [p for layer in stack(model) for _, p in _base_weights(layer)]
    stored = {StorageWeakRef(p.untyped_storage()): _bytes(p) for p in held}
    return Storages(len(stored), len(held), sum(stored.values()), sum(map(_bytes, held)))


def shared_targets(model: nn.Module) -> list[list[str]]:
    """Groups of modules that have adapters of their own and one weight in common.

    Merging adds all adapters of a group into that one weight, so the merged model is another
    model. An empty list means that merging is safe in this respect; `separate` makes it so.

    Returns:
        Names in the base model, a list for each shared weight.

    Raises:
        ValueError: the model has no list of layers (see `stack`).

    Taught in: notebook 04, section 12.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inside = {id(module) for module in stack(model).modules()}
    groups: dict[StorageWeakRef, list[str]] = defaultdict(list)
    for name, module in base.named_modules():
        if id(module) in inside and hasattr(module, "lora_A"):
            groups[StorageWeakRef(module.get_base_layer().weight.untyped_storage())].append(name)
    return [names for names in groups.values() if len(names) > 1]


def separate(model: nn.Module) -> int:
    """Give every layer weights of its own, in place; the outputs stay as they are.

    Needed before merging, before training the base, and before saving a model whose adapters
    were taken off. Tied embeddings stay tied, they are outside the layers.

    Returns:
        The bytes that this added.

    Raises:
        ValueError: the model has no list of layers (see `stack`).

    Taught in: notebook 04, section 12.
    """
    seen: set[int] = set()
    added = 0
    for layer in stack(model):
        for module in layer.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                if id(weight) in seen:
                    # deepcopy keeps the class, which for 4-bit weights carries their scales
                    weight = copy.deepcopy(weight)
                    module.register_parameter(name, weight)
                    added += _bytes(weight)
                seen.add(id(weight))
    return added


def _base_weights(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, weight in layer.named_parameters(remove_duplicate=False):
        if "lora_" not in name:
            yield name, weight


def _bytes(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()
