"""Where the bytes of a training step go: measured on this machine, predicted for any card."""

from ._quiet import quiet
from .counts import four_bit_bytes
from .fit import cards_that_fit, largest_batch
from .gpus import GIB, GPUS, MIB, Gpu, gpu
from .ledger import measure, profiler_peak
from .optimizers import OPTIMIZERS
from .predict import METHODS, Prediction, predict
from .report import alt, as_dict, picture, summary, table, verdict
from .tracker import CATEGORIES

__all__ = [
    "CATEGORIES",
    "GIB",
    "GPUS",
    "METHODS",
    "MIB",
    "OPTIMIZERS",
    "Gpu",
    "Prediction",
    "alt",
    "as_dict",
    "cards_that_fit",
    "four_bit_bytes",
    "gpu",
    "largest_batch",
    "measure",
    "picture",
    "predict",
    "profiler_peak",
    "quiet",
    "summary",
    "table",
    "verdict",
]
