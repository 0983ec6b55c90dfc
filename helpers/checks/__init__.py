"""Checks that a learner calls: of the machine in lesson 00, of the answers to the exercises.

An exercise check returns a line that says "passed", or raises `Broken` with one sentence that
names the rule that was broken and the values that broke it.
"""

from .exercises import Broken, Passed, lora_layer, targets, trainable_parameters
from .this_machine import Machine, look, machine

__all__ = [
    "Broken",
    "Machine",
    "Passed",
    "look",
    "lora_layer",
    "machine",
    "targets",
    "trainable_parameters",
]
