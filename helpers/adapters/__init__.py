"""Adapters: method name to configuration, what matches, what trains, what will be saved."""

from .budget import config_for_budget
from .doctor import Finding, Report, inspect
from .matching import Match, match
from .methods import DEFAULT_RANK, DEFAULT_VIRTUAL_TOKENS, METHODS, config
from .sizes import Count, count, saved_bytes

__all__ = [
    "DEFAULT_RANK",
    "DEFAULT_VIRTUAL_TOKENS",
    "METHODS",
    "Count",
    "Finding",
    "Match",
    "Report",
    "config",
    "config_for_budget",
    "count",
    "inspect",
    "match",
    "saved_bytes",
]
