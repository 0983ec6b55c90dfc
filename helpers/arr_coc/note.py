"""The note's configuration for ARR-COC, mended so that it runs, and its variant in four bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig

from helpers import quantization
from helpers.adapters.methods import parse_task
from helpers.given import whole
from helpers.quantization import HEADS

from .model import ArrCoc
from .selectors import MODULES

LAYERS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # the note's choice
DECODER = rf".*language_model.*\.({'|'.join(LAYERS)})"
# What stays as it is when the base goes into four bits: what trains in full, and what is small.
KEPT = ("vision", *MODULES, *HEADS)


def config(*, rank: int = 32, dropout: float = 0.05, task_type: str | None = None) -> LoraConfig:
    """The note's LoRA for ARR-COC: its ranks and targets, as one pattern instead of a list.

    Args:
        rank: alpha is twice as much.
        task_type: the note's is "CAUSAL_LM", for which peft wants a model that generates.

    Raises:
        ValueError: a rank below 1, a dropout outside 0 to 1, or an unknown task_type.

    Source: the note, section 8. Taught in: notebook 09, section 7.
    """
    whole("The rank", rank)
    if not 0 <= dropout <= 1:
        raise ValueError(f"The dropout must be a share from 0 to 1, but was {dropout!r}.")
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=DECODER,
        modules_to_save=list(MODULES),
        lora_dropout=dropout,
        bias="none",
        task_type=parse_task(task_type),
    )


def in_four_bits(
    folder: Path | str,
    *,
    kept: Sequence[str] = KEPT,
    compute_dtype: torch.dtype = torch.float32,
    storage: torch.dtype = torch.uint8,
) -> ArrCoc:
    """A stand-in with the linear layers of its decoder in NF4, double quantised.

    Args:
        folder: of the base, as `ArrCoc.save_pretrained` wrote it.
        kept: parts that keep their dtype. Without the three modules among them, their linear
            layers are packed before peft copies them, and a packed weight gets no gradient.
        storage: dtype in which the packed codes are stored.

    Source: transformers, ``BitsAndBytesConfig.llm_int8_skip_modules``.
    Taught in: notebook 09, section 8.
    """
    return quantization.load_in_4bit(
        folder, ArrCoc, compute_dtype=compute_dtype, kept=kept, storage=storage
    )
