"""4-bit base models through bitsandbytes, with the trap of repacked weights switched off.

Source: transformers, ``BitsAndBytesConfig``; bitsandbytes, ``Linear4bit``.
Taught in: notebook 03, sections 1 to 5.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import bitsandbytes
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from helpers import models
from helpers.given import model_folder, one_of
from helpers.quantization.code_books import QUANT_TYPES

# Heads stay as they are: a new one is not in the file, and bitsandbytes would never quantise it.
HEADS = ("lm_head", "classifier", "score", "qa_outputs")


class AutoClass(Protocol):
    """Anything with transformers' `from_pretrained`, such as `AutoModelForCausalLM`."""

    @classmethod
    def from_pretrained(
        cls, folder: Path, *, quantization_config: BitsAndBytesConfig, device_map: dict[str, str]
    ) -> PreTrainedModel:
        """A model from a folder, as transformers loads it."""
        ...


def load_in_4bit(
    folder: Path | str,
    auto_class: type[AutoClass],
    *,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.float32,
    kept: Sequence[str] = HEADS,
    storage: torch.dtype = torch.uint8,
) -> PreTrainedModel:
    """A model from a safetensors folder with its linear layers in 4 bits, ready for QLoRA.

    Blocks of 64 weights share one absmax; with `double_quant` the absmaxes are 8-bit numbers
    themselves. Embeddings, norms and the output head keep their dtype. Runs on CUDA if
    `models.device()` says so, else on the CPU.

    Args:
        folder: such as `models.path("smollm2")`.
        auto_class: such as `AutoModelForCausalLM`.
        quant_type: "nf4" (levels at the quantiles of a normal distribution) or "fp4".
        double_quant: quantise the absmaxes too.
        compute_dtype: dtype of the matrix products; fp32 is the exact one on a CPU.
        kept: modules that keep their dtype.
        storage: dtype in which the packed codes are stored.

    Raises:
        ValueError: another quant_type, or a folder without a whole model.

    Source: Dettmers et al., QLoRA (2023), section 3; bitsandbytes, Linear4bit.
    Taught in: notebook 03, sections 2 and 3.
    """
    one_of("quant_type", quant_type, QUANT_TYPES)
    folder = model_folder(folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=list(kept),
    )
    target = "cuda" if models.device().type == "cuda" else "cpu"
    model = auto_class.from_pretrained(folder, quantization_config=config, device_map={"": target})
    return keep_weights_unpacked(model)


def keep_weights_unpacked(model: nn.Module) -> nn.Module:
    """Stops bitsandbytes from rearranging 4-bit weights at the first evaluation; returns `model`.

    On a CPU with AVX512-BF16 the first forward in eval mode repacks the stored bytes for a faster
    kernel. Merging and dequantising do not know the new order: they then give scrambled weights,
    without a warning, and further training gets no gradient. Layers narrower than a block of 64
    crash instead. Call it before the first forward;
    on other machines it changes nothing.

    Source: bitsandbytes 0.50, Linear4bit.forward.
    Taught in: notebook 03, section 4, and notebook 10, failure 18.
    """
    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    return model
