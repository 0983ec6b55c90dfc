"""The methods in a few readable lines each, as the lessons write them before they call peft."""

from helpers.by_hand.dora import DoRALinear
from helpers.by_hand.ia3 import ScaledInput, ScaledOutput, add_ia3, merge_ia3
from helpers.by_hand.lora import LoRALinear
from helpers.by_hand.soft_prompts import (
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    embed,
    prefill,
)

__all__ = [
    "DoRALinear",
    "LoRALinear",
    "PTuning",
    "PTuningV2",
    "PrefixTuning",
    "PromptTuning",
    "ScaledInput",
    "ScaledOutput",
    "add_ia3",
    "embed",
    "merge_ia3",
    "prefill",
]
