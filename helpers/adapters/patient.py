"""A model with its adapters, looked at once: whose each parameter is, what will be saved.

Source: peft, ``BaseTunerLayer``, ``AuxiliaryTrainingWrapper``, ``get_peft_model_state_dict``.
Taught in: notebook 10, section 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .sizes import count, saved_tensors

BASE = "base weights"
PROMPT_MLP = "prompt MLP (not saved)"
PREFIX_TYPES = ("PREFIX_TUNING", "CARTRIDGE")  # their virtual tokens live in the cache


@dataclass(frozen=True)
class Parameter:
    """One weight of a model: whose it is (``part``, ``adapter``; "" for the base)."""

    name: str
    tensor: nn.Parameter
    part: str
    adapter: str


@dataclass(frozen=True)
class Patient:
    """A model, looked at once, so that every check reads the same picture."""

    model: nn.Module
    configs: dict[str, PeftConfig]
    active: list[str]
    parameters: list[Parameter]
    tuner_layers: dict[str, BaseTunerLayer]
    saved: set[int]

    def trainable(self, part: str | None = None) -> list[Parameter]:
        """The weights that train, of one part or of all."""
        return [p for p in self.parameters if p.tensor.requires_grad and part in (None, p.part)]


def look_at(model: nn.Module) -> Patient:
    """The picture that every check reads; the model is not changed."""
    configs = dict(getattr(model, "peft_config", None) or {})
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    saved = {id(t) for name in configs for t in saved_tensors(model, name).values()}
    return Patient(
        model=model,
        configs=configs,
        active=_active(model, configs, layers),
        parameters=_sorted_out(model, set(configs)),
        tuner_layers=layers,
        saved=saved,
    )


def _active(
    model: nn.Module, configs: dict[str, PeftConfig], layers: dict[str, BaseTunerLayer]
) -> list[str]:
    if layers:
        names = {name for layer in layers.values() for name in layer.active_adapters}
    else:
        names = {model.active_adapter} if configs else set()
    return [name for name in configs if name in names]


def kind_of(config: PeftConfig) -> str:
    """The method's name as peft spells it, and whether LoRA has DoRA's magnitudes."""
    name = str(config.peft_type.value)
    return "LORA with DoRA" if getattr(config, "use_dora", False) else name


def _sorted_out(model: nn.Module, adapters: set[str]) -> list[Parameter]:
    owners = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    }
    found = []
    for name, tensor in model.named_parameters():
        part, adapter = _part_of(name, owners, adapters)
        found.append(Parameter(name, tensor, part, adapter))
    return found


def _part_of(name: str, owners: dict[str, nn.Module], adapters: set[str]) -> tuple[str, str]:
    """The part of the model that a parameter belongs to, and its adapter ("" for the base)."""
    pieces = name.split(".")
    if pieces[0] == "prompt_encoder" and pieces[1] in adapters:
        inner = "prompt embeddings" if pieces[2] == "embedding" else PROMPT_MLP
        return inner, pieces[1]
    for end in range(len(pieces) - 1, 0, -1):
        owner = owners.get(".".join(pieces[:end]))
        if owner is None:
            continue
        inside = pieces[end:]
        adapter = next((piece for piece in inside if piece in adapters), "")
        if inside[0] in ("base_layer", "original_module"):
            return BASE, ""
        if inside[0] == "modules_to_save":
            return "copy in modules_to_save", adapter
        return inside[0], adapter
    return BASE, ""


def size_of(tensor: Tensor) -> int:
    """How many numbers a weight of any shape stands for, two in each byte of a 4-bit one."""
    holder = nn.Module()
    holder.register_parameter("p", tensor)
    return count(holder).total


def dtype_of(tensor: Tensor) -> str:
    """The dtype in words, or bitsandbytes' class for a quantised weight."""
    name = type(tensor).__name__
    return name if is_quantised(tensor) else str(tensor.dtype).removeprefix("torch.")


def is_quantised(tensor: Tensor) -> bool:
    """Whether a weight is stored in 8 or 4 bits."""
    # bitsandbytes may keep 4-bit weights in a floating-point storage type, so the class decides.
    return type(tensor).__name__ in ("Params4bit", "Int8Params") or not (
        tensor.is_floating_point() or tensor.is_complex()
    )


def names_of(parameters: list[Parameter], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(p.name for p in parameters[:limit])
    rest = len(parameters) - limit
    return shown + (f" and {rest} more" if rest > 0 else "")


def embedding_of(model: nn.Module) -> nn.Module | None:
    """The word embedding, possibly inside an adapter or a copy to save; None without one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        found = base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    wrapped = isinstance(found, BaseTunerLayer | AuxiliaryTrainingWrapper)
    return found if wrapped or isinstance(found, nn.Embedding) else None
