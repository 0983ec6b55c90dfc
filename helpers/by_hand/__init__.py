"""The methods in a few readable lines each, as the lessons write them before they call peft."""

from helpers.by_hand.lora import LoRALinear

__all__ = ["LoRALinear"]
