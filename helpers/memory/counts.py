"""The bytes of a 4-bit base, counted from shapes: the account one makes before a prediction."""

from __future__ import annotations

from torch import nn

NF4_BYTES = 0.5 + 0.127 / 8  # a code, and its share of the doubly quantised block constants


def four_bit_bytes(model: nn.Module) -> float:
    """Bytes of a base loaded in NF4 and prepared for k-bit training.

    The linear layers of the decoder take four bits and their share of constants; embeddings, head
    and norms are 32-bit after ``prepare_model_for_kbit_training``.

    Source: bitsandbytes, ``Linear4bit``; peft, ``prepare_model_for_kbit_training``.
    Taught in: notebook 03, section 1.
    """
    packed = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}"
    )
    rest = sum(p.numel() for p in model.parameters()) - packed
    return NF4_BYTES * packed + 4 * rest
