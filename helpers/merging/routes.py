"""The ways to merge an adapter that was trained on a 4-bit base.

The adapter corrects the rounded weights Q that it saw in training. Added to other weights, such as
the full-precision W, or rounded again after the addition, it makes another model.

Source: QLoRA (Dettmers et al. 2023), section 3; peft's merge for bitsandbytes layers.
Taught in: notebook 07, section 3.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from helpers import quantization
from helpers.adapters.files import load
from helpers.given import model_folder
from helpers.quantization.loading import AutoClass

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype again, if the sum of weight and adapter can be kept in it.

    Raises:
        ValueError: it cannot.
    """
    if dtype not in DTYPES:
        raise ValueError(f"A merged weight is kept in one of {DTYPES}, not in {dtype}.")
    return dtype


@dataclass(frozen=True)
class FourBits:
    """How a base was rounded for training. The adapter's folder does not record it."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True

    def load(self, folder: Path | str, auto: type[AutoClass]) -> PreTrainedModel:
        """A base in these four bits, see `quantization.load_in_4bit`."""
        return quantization.load_in_4bit(
            folder, auto, quant_type=self.quant_type, double_quant=self.double_quant
        ).eval()


NF4 = FourBits()


def kept_apart(
    base: Path | str, adapter: Path | str, auto: type[AutoClass], bits: FourBits = NF4
) -> PeftModel:
    """The model as it was trained: the 4-bit base with the adapter beside it.

    Raises:
        ValueError: no whole base, or an adapter that is not whole or does not fit it.

    Taught in: notebook 07, section 3.
    """
    return load(bits.load(base, auto), adapter).eval()


def into_four_bits(
    base: Path | str, adapter: Path | str, auto: type[AutoClass], bits: FourBits = NF4
) -> PreTrainedModel:
    """peft's merge on a 4-bit base: each target is dequantised, added to and rounded again.

    Raises:
        ValueError: as `kept_apart`.

    Source: peft, ``tuners/lora/bnb.py``, ``Linear4bit.merge``. Taught in: notebook 07, section 3.
    """
    return merged(kept_apart(base, adapter, auto, bits))


def onto_full_precision(
    base: Path | str,
    adapter: Path | str,
    auto: type[AutoClass],
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The adapter on weights that were never rounded to four bits, merged in ``dtype``.

    With fp16 this is the workflow of the note: right for an adapter that was trained on such a
    base, and another model for one that was trained on four bits.

    Raises:
        ValueError: as `kept_apart`, or a dtype that is not a wide enough floating-point one.

    Taught in: notebook 07, section 3.
    """
    net = auto.from_pretrained(model_folder(base), dtype=check_dtype(dtype))
    return merged(load(net, adapter))


def onto_dequantised(
    base: Path | str,
    adapter: Path | str,
    auto: type[AutoClass],
    dtype: torch.dtype = torch.float32,
    bits: FourBits = NF4,
) -> PreTrainedModel:
    """The adapter on the numbers that the four bits stand for; merged in fp32, then cast.

    These are the weights that the adapter saw in training, so nothing is lost but the last cast.

    Raises:
        ValueError: as `onto_full_precision`.

    Taught in: notebook 07, section 3.
    """
    net = bits.load(base, auto).dequantize(dtype=torch.float32).float()
    return merged(load(net, adapter)).to(check_dtype(dtype))


def requantised(
    model: PreTrainedModel, auto: type[AutoClass], bits: FourBits = NF4
) -> PreTrainedModel:
    """A merged model written to a folder and loaded in four bits again.

    Taught in: notebook 07, section 3.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return bits.load(folder, auto)


def merged(model: PeftModel) -> PreTrainedModel:
    """The base with its active adapter in the weights, changed in place, in eval mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that four bits round: here it is measured
        return model.merge_and_unload().eval()


Route = Callable[[Path, Path, type[AutoClass]], nn.Module]

ROUTES: dict[str, Route] = {
    "kept apart": kept_apart,
    "into four bits": into_four_bits,
    "full precision": onto_full_precision,
    "full precision, requantised": lambda base, adapter, auto: requantised(
        onto_full_precision(base, adapter, auto), auto
    ),
    "dequantised": onto_dequantised,
    "dequantised, bf16": lambda base, adapter, auto: onto_dequantised(
        base, adapter, auto, torch.bfloat16
    ),
}
