"""Merging adapters into weights: exactly, onto the right base, and into a folder that others load.

`exact` measures what a merge costs in each dtype, `routes` are the ways to merge an adapter that
was trained on four bits, `deploy` takes the right one, checks what it made and writes it. `many`
keeps several adapters on one base, `weighted` makes one adapter of several.
"""

from .deploy import Deployed, MergeRefused, merge_for_deployment
from .exact import MERGEABLE, MergeError, RoundTrip, disturbed, merge_error, round_trip
from .export import ExportError, run_onnx, to_onnx
from .many import LiveAdapter, Memory, SwapError, memory
from .routes import (
    NF4,
    ROUTES,
    FourBits,
    Route,
    into_four_bits,
    kept_apart,
    onto_dequantised,
    onto_full_precision,
    requantised,
)
from .weighted import PRUNING, Weighted, WeightedMergeError, known_answer, weighted

__all__ = [
    "MERGEABLE",
    "NF4",
    "PRUNING",
    "ROUTES",
    "Deployed",
    "ExportError",
    "FourBits",
    "LiveAdapter",
    "Memory",
    "MergeError",
    "MergeRefused",
    "RoundTrip",
    "Route",
    "SwapError",
    "Weighted",
    "WeightedMergeError",
    "disturbed",
    "into_four_bits",
    "kept_apart",
    "known_answer",
    "memory",
    "merge_error",
    "merge_for_deployment",
    "onto_dequantised",
    "onto_full_precision",
    "requantised",
    "round_trip",
    "run_onnx",
    "to_onnx",
    "weighted",
]
