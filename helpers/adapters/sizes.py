"""How many parameters train, and how many bytes an adapter takes on disk.

Source: peft's get_nb_trainable_parameters.
Taught in: notebook 01, section 1.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class Count:
    """Numbers of parameters: those that train, and all of them."""

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """The trainable share in percent, 0 for a model without parameters."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters train ({self.percent:.4f} %)"


def count(model: nn.Module) -> Count:
    """Count parameters as peft's ``print_trainable_parameters`` does, for any module.

    Works with and without an adapter, on the meta device, and on 4-bit models, whose weights
    store two parameters in a byte.

    Source: ``PeftModel.get_nb_trainable_parameters``. Taught in: notebook 01, section 2.
    """
    # peft's method reads nothing but named_parameters(), so it serves plain modules as well.
    return Count(*PeftModel.get_nb_trainable_parameters(model))


def saved_bytes(model: nn.Module) -> int:
    """Bytes of the weight files that ``save_pretrained`` writes for the adapters of this model.

    Exact, header included, and worked out from shapes: nothing is written, and the meta device
    will do. With several adapters it is the sum of their files.

    Raises: TypeError for a model without an adapter.
    Source: the format description of safetensors. Taught in: notebook 01, section 3.
    """
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        raise TypeError(
            f"saved_bytes needs a model with an adapter, but {type(model).__name__} has none; "
            "wrap it with peft.get_peft_model first."
        )
    return sum(_file_bytes(saved_tensors(model, name)) for name in adapters)


def saved_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """What ``save_pretrained`` puts into one adapter's file: key in the file to tensor."""
    # Given our own state dict, peft hands back the very objects of it, which tells parameters
    # that are saved from parameters that are not, even on the meta device.
    state = model.state_dict(keep_vars=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same remarks appear when the user really saves
        if _is_meta_prompt(model, adapter):
            return _meta_prompt_tensors(model, adapter)
        return get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter)


def _is_meta_prompt(model: nn.Module, adapter: str) -> bool:
    if not model.peft_config[adapter].is_prompt_learning:
        return False
    return next(model.prompt_encoder[adapter].parameters()).is_meta


def _meta_prompt_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """peft copies a prompt to the CPU before saving, which the meta device cannot do."""
    rows = model.prompt_tokens[adapter].to("meta").unsqueeze(0)
    if model.peft_config[adapter].peft_type == "PREFIX_TUNING":
        rows = rows[:, : model.peft_config[adapter].num_virtual_tokens]
    tensors = {"prompt_embeddings": model.prompt_encoder[adapter](rows)[0]}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            copies = module.adapter_state_dict(adapter, module.state_dict())
            tensors |= {f"{name}.{key}": value for key, value in copies.items()}
    return tensors


def _file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of a safetensors file: 8 bytes of length, a JSON header filled up to 8, the data."""
    # The format puts wide types first, then goes by name; offsets are part of the header.
    order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in order:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end
