"""Where the bytes of a training step go: measured on this machine, predicted for any card."""

from .counts import four_bit_bytes, kept_per_token, saved_storages

__all__ = ["four_bit_bytes", "kept_per_token", "saved_storages"]
