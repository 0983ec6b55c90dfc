"""Where vision, connector and language are in published models, and the note's three strategies.

Names are those of the installed transformers. A pattern names the tower and the layer and leaves
out what is in between, which is what moves from one version to the next.

Source: transformers' models of those names.
Taught in: notebook 08, section 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from helpers import models
from helpers.given import one_of

LLAMA = "(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
CLIP = "(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
EVA = "(qkv|projection|fc1|fc2)"
STRATEGIES = ("conservative", "moderate", "aggressive")
VISION_RANK, LANGUAGE_RANK = 32, 16  # the note's: 32 to 64, and 8 to 16


@dataclass(frozen=True)
class Layout:
    """The parts of a vision-language model, as peft's options want them.

    Attributes:
        vision, language: regular expressions for `target_modules`: every linear layer of the
            tower's blocks.
        connector: names for `modules_to_save`.
        vision_part, connector_part, language_part: regular expressions for parameters' names.
    """

    vision: str
    language: str
    connector: tuple[str, ...]
    vision_part: str
    connector_part: str
    language_part: str


def _layout(
    vision: str, language: str, connector: tuple[str, ...], *, layers: str, text: str, bridge: str
) -> Layout:
    return Layout(
        vision=rf".*{vision}.*\.{layers}",
        language=rf".*{language}.*\.{text}",
        connector=connector,
        vision_part=rf"(.*\.)?{vision.split('.')[0]}\..*",
        connector_part=bridge,
        language_part=rf"((.*\.)?{language}|lm_head)\..*",
    )


_MERGERS = ("merger", *(f"deepstack_merger_list.{i}" for i in range(3)))
_QFORMER = r"(qformer|language_projection)\..*|query_tokens"
LAYOUTS: dict[str, Layout] = {
    "llava-1.5-7b": _layout(
        *("vision_tower", "language_model", ("multi_modal_projector",)),
        **{"layers": CLIP, "text": LLAMA, "bridge": r".*multi_modal_projector\..*"},
    ),
    "blip-2-opt-2.7b": _layout(
        *("vision_model", "language_model", ("qformer", "language_projection")),
        **{"layers": EVA, "text": CLIP, "bridge": _QFORMER},
    ),
    "instructblip-vicuna-7b": _layout(
        *("vision_model", "language_model", ("qformer", "language_projection")),
        **{"layers": EVA, "text": LLAMA, "bridge": _QFORMER},
    ),
    "qwen2-vl-7b": _layout(
        *("visual.blocks", "language_model", ("merger",)),
        **{"layers": "(qkv|proj|fc1|fc2)", "text": LLAMA, "bridge": r".*visual\.merger\..*"},
    ),
    "qwen3-vl-8b": _layout(
        *("visual.blocks", "language_model", _MERGERS),
        **{"layers": "(qkv|proj|linear_fc1|linear_fc2)", "text": LLAMA},
        bridge=r".*visual\.(merger|deepstack_merger_list)\..*",
    ),
    "smolvlm2-2.2b": _layout(
        *("vision_model", "text_model", ("connector",)),
        **{"layers": CLIP, "text": LLAMA, "bridge": r".*\.connector\..*"},
    ),
}


def layout(name: str) -> Layout:
    """The layout of one of `LAYOUTS`.

    Raises:
        ValueError: unknown name; the message gives the nearest.
    """
    return LAYOUTS[one_of("vision-language model", name, LAYOUTS)]


def config(of: Layout, strategy: str) -> LoraConfig:
    """The note's strategy for a model of this layout, at the note's ranks, alpha twice the rank.

    conservative: LoRA on the decoder. moderate: that and the connector in full. aggressive: LoRA
    on the decoder and, with its own rank, on the vision tower.

    Raises:
        ValueError: unknown strategy.

    Taught in: notebook 08, section 2.
    """
    both = one_of("strategy", strategy, STRATEGIES) == "aggressive"
    return LoraConfig(
        r=LANGUAGE_RANK,
        lora_alpha=2 * LANGUAGE_RANK,
        target_modules=f"{of.language}|{of.vision}" if both else of.language,
        rank_pattern={of.vision: VISION_RANK} if both else {},
        alpha_pattern={of.vision: 2 * VISION_RANK} if both else {},
        modules_to_save=list(of.connector) if strategy == "moderate" else None,
    )


def wrapped(name: str, strategy: str) -> PeftModel:
    """A published model's shapes with a strategy applied; weights and memory there are none."""
    with torch.device("meta"):
        return get_peft_model(models.full_size(name), config(layout(name), strategy))


def part_of(of: Layout, parameter: str) -> str:
    """vision, connector, language or other, for a parameter's name, peft's additions included."""
    plain = parameter.removeprefix("base_model.model.")
    for part in ("connector", "vision", "language"):
        if re.fullmatch(getattr(of, f"{part}_part"), plain):
            return part
    return "other"


def sizes(model: nn.Module, of: Layout, *, trainable: bool = False) -> dict[str, int]:
    """Parameters of vision, connector and language, all of them or those that train."""
    out = dict.fromkeys(("vision", "connector", "language", "other"), 0)
    for name, parameter in model.named_parameters():
        if ".original_module." not in name and (parameter.requires_grad or not trainable):
            out[part_of(of, name)] += parameter.numel()
    return out


def overview(names: Iterable[str] = tuple(LAYOUTS)) -> pd.DataFrame:
    """How large the parts of published models are, and how wide their towers.

    Returns:
        A row per model; vision, connector, language in parameters; the connector's share; the
        length of a vector inside the vision tower and inside the decoder.

    Taught in: notebook 08, section 2.
    """
    rows = {}
    for name in names:
        of, model = layout(name), models.full_size(name)
        counts = sizes(model, of)
        del counts["other"]
        share = counts["connector"] / sum(counts.values())
        widths = {
            "vision width": _width(model, of.vision),
            "text width": _width(model, of.language),
        }
        rows[name] = counts | {"connector's share": share} | widths
    return pd.DataFrame.from_dict(rows, orient="index")


def _width(model: nn.Module, pattern: str) -> int:
    return next(m.in_features for n, m in model.named_modules() if re.fullmatch(pattern, n))


def trainable(name: str) -> pd.DataFrame:
    """What trains under each strategy, in which part.

    Returns:
        A row per strategy; columns vision, connector, language, total, in parameters.

    Taught in: notebook 08, section 2.
    """
    rows = {s: sizes(wrapped(name, s), layout(name), trainable=True) for s in STRATEGIES}
    table = pd.DataFrame(rows).T
    table["total"] = table.sum(axis=1)
    return table.drop(columns="other")
