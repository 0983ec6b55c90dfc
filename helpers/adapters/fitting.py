"""Whether the tensors of an adapter's file fit a base model, worked out from shapes alone.

Source: peft, whose own functions name what it would save, on shapes without weights.
Taught in: notebook 07, section 8.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)
from torch import Tensor, nn

from .sizes import saved_tensors

Shapes = Mapping[str, tuple[int, ...]]
_PREFIX = "base_model.model."
_NAME = "default"  # of the adapter in the twin
_VOCABULARY = (".embed", ".wte.", "lm_head")  # in the names of what has a row for every token
_WRITERS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_BELOW = "it was made for the model with its head, and this base is only the part below it"


def misfit(config: PeftConfig, found: Shapes, base: nn.Module) -> str:
    """What does not fit when this adapter is put on this base; empty when all of it does.

    peft puts such an adapter on a copy of the base on the meta device, where a tensor has a shape
    and no bytes; the names and shapes that it would save are compared with the file's.

    Args:
        found: names and shapes of the tensors in the adapter's file.
        base: on any device, the meta device included; in 4 bits or not; with other adapters or
            not. It is left as it is.
    """
    model = _twin(base)
    own = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    try:
        model = _with_adapter(model, config)
    except (ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        headless = config.task_type in _WRITERS and not hasattr(base, "generate")
        return f"peft cannot put it there ({reason}); {_BELOW if headless else _made_for(config)}"
    tensors = saved_tensors(model, _NAME)
    difference = _compare(
        needed={name: tuple(t.shape) for name, t in tensors.items() if id(t) not in own},
        # An embedding that was resized or asked for is saved with the adapter, though the base's.
        allowed={name: tuple(t.shape) for name, t in (model.state_dict() | tensors).items()},
        found=_as_loaded(model, found),
    )
    if not difference:
        return ""
    if lost := _lost_copies(model, difference.missing):
        return (
            f"its file lacks the trained copy of {lost}, which adapter_config.json names in "
            "modules_to_save; save the trained model again, for that copy is nowhere else"
        )
    return f"{difference}; {_nearest(difference, base) or _made_for(config)}"


@dataclass(frozen=True)
class _Difference:
    """Between a file and what the base needs and has a place for; false when there is none."""

    found: Shapes
    allowed: Shapes
    missing: list[str]
    strangers: list[str]
    wrong: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.strangers or self.wrong)

    def __str__(self) -> str:
        parts = []
        if self.wrong:
            here, there = self.found[self.wrong[0]], self.allowed[self.wrong[0]]
            parts.append(f"{_first(self.wrong)} is {_size(here)} and has to be {_size(there)}")
        if self.strangers:
            parts.append(f"{_first(self.strangers)} has no place in the base")
        if self.missing:
            parts.append(f"{_first(self.missing)} is not in the file")
        return "; ".join(parts)


def _compare(needed: Shapes, allowed: Shapes, found: Shapes) -> _Difference:
    return _Difference(
        found=found,
        allowed=allowed,
        missing=sorted(set(needed) - set(found)),
        strangers=sorted(set(found) - set(allowed)),
        wrong=sorted(n for n in found if n in allowed and found[n] != allowed[n]),
    )


def _twin(base: nn.Module) -> nn.Module:
    """The base's modules and shapes on the meta device, without adapters and without bytes."""
    tensors = [*base.parameters(), *base.buffers()]
    memo: dict[int, object] = {id(tensor): _on_meta(tensor) for tensor in tensors}
    for module in base.modules():
        if isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes"):
            # packed codes have no shape to go by, the layer's own numbers do
            memo[id(module)] = nn.Linear(
                module.in_features, module.out_features, module.bias is not None, device="meta"
            )
    model = copy.deepcopy(base, memo)
    if not isinstance(model, PeftModel):
        return model
    return model.get_base_model() if model.active_peft_config.is_prompt_learning else model.unload()


def _on_meta(tensor: Tensor) -> Tensor:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if not isinstance(tensor, nn.Parameter):
        return plain
    return nn.Parameter(plain, tensor.requires_grad and tensor.is_floating_point())


def _with_adapter(model: nn.Module, config: PeftConfig) -> PeftModel:
    config = copy.deepcopy(config)
    config.base_model_name_or_path = None  # or peft looks for that folder, to compare embeddings
    config.inference_mode = False  # or a prompt's MLP, which says its shape, is left out
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # PiSSA and its kind compute with the base's weights
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # the same remarks appear when the adapter is loaded
        return get_peft_model(model, config, _NAME)


def _as_loaded(model: PeftModel, found: Shapes) -> Shapes:
    """The names that peft gives these tensors on loading, for older names of some models."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in found.items()}
    config = model.peft_config[_NAME]
    tensors = convert_peft_adapter_state_dict_for_transformers(model, config, tensors, _NAME)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _lost_copies(model: PeftModel, missing: list[str]) -> str:
    """Modules that train in full and are not in the file."""
    wrappers = [n for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    lost = [n for n in wrappers if any(name.startswith(f"{n}.") for name in missing)]
    return ", ".join(name.removeprefix(_PREFIX) for name in lost)


def _nearest(difference: _Difference, base: nn.Module) -> str:
    """The remedy for a base that is nearly the right one; empty where none is known."""
    body = getattr(base, "base_model_prefix", "")
    inner, found = f"{_PREFIX}{body}.", difference.found
    if {name.replace(_PREFIX, inner, 1) for name in found} <= set(difference.allowed):
        return f"it was made for the model without its head: put it on base.{body}"
    if {name.replace(inner, _PREFIX, 1) for name in found} <= set(difference.allowed):
        return _BELOW
    wrong = difference.wrong
    if wrong and all(any(part in name for part in _VOCABULARY) for name in wrong):
        rows = found[wrong[0]][0]
        return f"call base.resize_token_embeddings({rows}) before, as in training"
    return ""


def _made_for(config: PeftConfig) -> str:
    name = config.base_model_name_or_path
    base = f"the base that it was made for, {name}" if name else "the base that it was trained on"
    return f"load {base}, or take its files again from where they came from"


def _first(names: list[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return names[0].removeprefix(_PREFIX) + more


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
