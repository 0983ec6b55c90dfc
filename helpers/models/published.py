"""Published models in full size on the meta device: shapes and dtypes without memory.

Source: the models' published config.json; torch's meta device.
Taught in: notebook 00, section 2.
"""

import json
import re

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from helpers import assets
from helpers.given import letters, unknown

FULL_SIZE: tuple[str, ...] = (
    "llama-2-7b",
    "llama-2-13b",
    "llama-65b",
    "llama-3.2-3b",
    "mistral-7b",
    "llava-1.5-7b",
    "qwen2-vl-7b",
    "qwen3-vl-8b",
    "blip-2-opt-2.7b",
    "instructblip-vicuna-7b",
    "smolvlm2-2.2b",
)
CONFIGS: tuple[str, ...] = (*FULL_SIZE, "qwen2.5-7b", "gpt2", "bert-base", "t5-small")


def full_size(name: str) -> PreTrainedModel:
    """A published model's exact shapes and dtype on the meta device: no weights, no memory.

    The configuration is `data/configs/NAME.json`. Names as the authors publish them, such as
    "meta-llama/Llama-2-7b-hf", are understood; an instruct or chat version has the same shapes.

    Raises:
        ValueError: unknown name; the message gives the nearest.

    Taught in: notebook 00, section 2, and notebook 03, section 1.
    """
    config = _read(_known(name, FULL_SIZE))
    auto = next(
        auto
        for auto in (AutoModelForImageTextToText, AutoModelForCausalLM)
        if type(config) in auto._model_mapping
    )
    with torch.device("meta"):
        return auto.from_config(config).eval()


def published_config(name: str) -> PreTrainedConfig:
    """The configuration of a published model, one of `CONFIGS`; names as `full_size` takes them.

    Raises:
        ValueError: unknown name; the message gives the nearest.

    Taught in: notebook 03, section 7.
    """
    return _read(_known(name, CONFIGS))


def _read(name: str) -> PreTrainedConfig:
    return AutoConfig.for_model(
        **json.loads((assets.DATA / "configs" / f"{name}.json").read_text())
    )


def _known(name: str, names: tuple[str, ...]) -> str:
    """Only what leaves the shapes alone is stripped: Mistral 0.3, say, has another vocabulary."""
    plain = re.sub(r"[ _]+", "-", name.rsplit("/", 1)[-1].lower())
    plain = re.sub(r"-v(?=\d)", "-", plain)
    plain = re.sub(r"(-(hf|instruct|chat|base|uncased))+$", "", plain)
    if plain.startswith("mistral"):
        plain = plain.removesuffix("-0.1")
    known = {letters(full): full for full in names} | {"bert": "bert-base"}
    if letters(plain) not in known or known[letters(plain)] not in names:
        raise ValueError(unknown("full-size model", name, names))
    return known[letters(plain)]
