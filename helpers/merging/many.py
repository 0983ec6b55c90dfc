"""Many adapters on one base: what they take in memory, and how one is replaced while it serves.

Source: peft.utils.hotswap.
Taught in: notebook 07, section 4.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.utils.hotswap import hotswap_adapter
from torch.multiprocessing.reductions import StorageWeakRef

from helpers.adapters.files import AdapterFolder, check_folder
from helpers.adapters.sizes import saved_tensors

# What belongs to an adapter and is not in A, B and one alpha / rank for all layers.
_OWN_PARTS = (
    "bias",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "rank_pattern",
    "alpha_pattern",
)


class SwapError(ValueError):
    """An adapter that cannot take the place of another; the message says why."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the parameters and buffers of a model with adapters, shared ones counted once.

    Attributes:
        base: of everything that belongs to no adapter.
        adapters: of each adapter, by name.
    """

    base: int
    adapters: dict[str, int]

    @property
    def together(self) -> int:
        """One base with all its adapters."""
        return self.base + sum(self.adapters.values())

    @property
    def merged(self) -> int:
        """One merged copy of the base for each adapter."""
        return self.base * len(self.adapters)


def memory(model: PeftModel) -> Memory:
    """Count what one base with its adapters takes; also on the meta device.

    What bitsandbytes keeps beside a 4-bit weight is not counted.

    Raises:
        TypeError: the model has no adapter.
        ValueError: an adapter is called like a part of the model (`ambiguous_names`).

    Taught in: notebook 07, section 4.
    """
    if not getattr(model, "peft_config", None):
        raise TypeError(
            f"memory needs a model with adapters, but {type(model).__name__} has none; wrap it "
            "with peft.get_peft_model first"
        )
    if names := ambiguous_names(model):
        raise ValueError(f"an adapter is called {names[0]!r}, like a part of the model; rename it")
    own = {
        name: _storages(t for t in saved_tensors(model, name).values() if torch.is_tensor(t))
        for name in model.peft_config
    }
    everything = _storages([*model.parameters(), *model.buffers()])
    of_adapters = set().union(*own.values())
    base = sum(size for key, size in everything.items() if key not in of_adapters)
    return Memory(base, {name: sum(found.values()) for name, found in own.items()})


def ambiguous_names(model: PeftModel) -> list[str]:
    """Adapters that are called like a part of the model, such as "1" or "layers".

    peft tells adapters apart by the parts of a parameter's name: with an adapter "1" in the model,
    the files of all others lack layer 1, and nothing warns.

    Taught in: notebook 07, section 4.
    """
    return [name for name in model.peft_config if name in parts(model)]


def parts(model: torch.nn.Module) -> set[str]:
    """The parts of the names of a model's own parameters and buffers, adapters left out."""
    return {part for key in model.state_dict() for part in key.split(".lora_")[0].split(".")}


def _storages(tensors) -> dict[StorageWeakRef, int]:
    return {StorageWeakRef(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}


class LiveAdapter:
    """A model that answers requests, and one of its LoRA adapters that can be replaced meanwhile.

    `peft.utils.hotswap` writes tensor after tensor into the running model, so that a request in
    the middle of its forward pass would see an adapter half old and half new. Here a request and
    a swap wait for each other. It also brings the model's settings up to date, which peft leaves
    as they were, so that the adapter can be saved again.

    Args:
        model: with LoRA adapters; put into evaluation mode.
        name: of the adapter; it is activated.

    Raises:
        SwapError: no such adapter.

    Taught in: notebook 07, section 4.
    """

    def __init__(self, model: PeftModel, name: str = "default") -> None:
        if name not in getattr(model, "peft_config", {}):
            there = ", ".join(getattr(model, "peft_config", {})) or "none"
            raise SwapError(f"there is no adapter {name!r}; adapters of the model: {there}")
        model.set_adapter(name, inference_mode=True)
        self.model, self.name = model.eval(), name
        self._turn = threading.Lock()

    @torch.no_grad()
    def __call__(self, **batch):
        """The model's output for one request, with one whole adapter."""
        with self._turn:
            return self.model(**batch)

    def swap(self, folder: str | Path) -> None:
        """Replace the adapter with the one in a folder; if that fails, the old one stays.

        Raises:
            AdapterFileError: no adapter lies there, or its file is damaged.
            SwapError: peft would refuse it, or put it in wrongly; says why.
        """
        found = check_folder(folder)
        if mistaken := _mistaken(self.model, self.name):
            raise SwapError(f"peft would take {mistaken} for {self.name!r}; give it another name")
        if reason := _unfit(self.model, self.name, found):
            raise SwapError(f"{found.folder.name} cannot replace {self.name!r}: it {reason}")
        with self._turn:
            hotswap_adapter(
                self.model, found.folder, adapter_name=self.name, torch_device=_device(self.model)
            )
            old = self.model.peft_config[self.name]
            self.model.peft_config[self.name] = _settings(old, found.config)


def _settings(old: LoraConfig, new: LoraConfig) -> LoraConfig:
    """The new settings, for tensors that keep the larger rank: peft fills it up with zeros."""
    rank = max(old.r, new.r)
    ratio = rank / new.r
    alpha = new.lora_alpha * (math.sqrt(ratio) if new.use_rslora else ratio)
    return replace(new, r=rank, lora_alpha=alpha, inference_mode=True)


def _mistaken(model: PeftModel, name: str) -> str | None:
    """What peft would confuse with this adapter in a swap, None if nothing.

    peft looks for the tensors of "task1" by that text, finds those of "task10" too, misses them in
    the new file, and fills them with zeros.
    """
    if name in ambiguous_names(model):
        return "a part of the model"
    held = [key for key in model.state_dict() if "lora_" in key]
    others = (other for other in model.peft_config if other != name)
    return next(
        (f"the adapter {o!r}" for o in others if any(f".{o}." in k and name in k for k in held)),
        None,
    )


def _unfit(model: PeftModel, name: str, new: AdapterFolder) -> str | None:
    """Why peft would refuse to swap this adapter in, or would do it wrongly; None if it fits."""
    if any(getattr(module, "merged", False) for module in model.modules()):
        return "would be swapped under merged weights; call unmerge_adapter first"
    old, config = model.peft_config[name], new.config
    if (ours := old.peft_type) != (theirs := config.peft_type) or ours != PeftType.LORA:
        return f"is {theirs.value} and the old one {ours.value}; only LoRA can be swapped for LoRA"
    for setting in ("use_rslora", "use_dora", "lora_dropout"):
        if getattr(old, setting) != getattr(config, setting):
            return f"has {setting}={getattr(config, setting)} and the old one does not"
    for setting in _OWN_PARTS:
        if getattr(config, setting) not in (None, False, "none", {}, []):
            return f"has {setting}, which peft does not swap; load it as another adapter"
    shapes = {key: tuple(t.shape) for key, t in saved_tensors(model, name).items()}
    for key, shape in new.shapes.items():
        if key not in shapes:
            return f"adapts {key.rsplit('.lora_', 1)[0]}, which the old one does not"
        side = (
            1 if "A" in key.rpartition("lora_")[2] else 0
        )  # the other one is the rank, which may change
        if shape[side] != shapes[key][side]:
            return f"was made for another base: {key} is {shape}, not {shapes[key]}"
    return None


def _device(model: PeftModel) -> str:
    return str(next(model.parameters()).device)
