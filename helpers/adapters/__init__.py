"""Adapters: name to configuration, what matches, what trains, what is saved, what may be loaded."""

from .adalora import AllocateRanks, live_ranks, rank_budget
from .budget import config_for_budget
from .doctor import Finding, Report, inspect
from .files import AdapterFileError, AdapterFolder, check_folder, load, save
from .inference import AtInference, at_inference, cache_bytes_per_token
from .matching import Match, match
from .methods import DEFAULT_RANK, DEFAULT_VIRTUAL_TOKENS, METHODS, config
from .sizes import Count, count, saved_bytes

__all__ = [
    "DEFAULT_RANK",
    "DEFAULT_VIRTUAL_TOKENS",
    "METHODS",
    "AdapterFileError",
    "AdapterFolder",
    "AllocateRanks",
    "AtInference",
    "Count",
    "Finding",
    "Match",
    "Report",
    "at_inference",
    "cache_bytes_per_token",
    "check_folder",
    "config",
    "config_for_budget",
    "count",
    "inspect",
    "live_ranks",
    "load",
    "match",
    "rank_budget",
    "save",
    "saved_bytes",
]
