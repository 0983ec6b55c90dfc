"""Checks that a learner calls: of the machine in lesson 00, of the answers to the exercises.

An exercise check returns a line that says "passed", or raises `Broken` with one sentence that
names the rule that was broken and the values that broke it.
"""

from .exercises import Broken, Passed, lora_layer, targets, trainable_parameters
from .of_failures import lost_on_save, trustworthy_losses
from .of_hybrid import hybrid_flags, log_of_draw
from .of_memory import four_bit_bytes, peak_bytes
from .of_merging import timing_verdict, weighted_sum
from .of_prompts import cache_bytes, merged_input, prompt_loss
from .of_ranks import adapter_size, lora_ranks
from .of_towers import tower_pattern, tower_ranks
from .of_training import early_stopping, group_loss
from .of_variants import dora_weight, rank_schedule
from .room import NoRoom, room
from .this_machine import Machine, look, machine

__all__ = [
    "Broken",
    "Machine",
    "NoRoom",
    "Passed",
    "adapter_size",
    "cache_bytes",
    "dora_weight",
    "early_stopping",
    "four_bit_bytes",
    "group_loss",
    "hybrid_flags",
    "log_of_draw",
    "look",
    "lora_layer",
    "lora_ranks",
    "lost_on_save",
    "machine",
    "merged_input",
    "peak_bytes",
    "prompt_loss",
    "rank_schedule",
    "room",
    "targets",
    "timing_verdict",
    "tower_pattern",
    "tower_ranks",
    "trainable_parameters",
    "trustworthy_losses",
    "weighted_sum",
]
