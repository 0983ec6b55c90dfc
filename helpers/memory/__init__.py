"""Where the bytes of a training step go: measured on this machine, predicted for any card."""

from .counts import four_bit_bytes, kept_per_token, saved_storages
from .gpus import GIB, GPUS, MIB, Gpu, gpu
from .optimizers import OPTIMIZERS
from .predict import METHODS, Prediction, predict
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
    "four_bit_bytes",
    "gpu",
    "kept_per_token",
    "predict",
    "saved_storages",
]
