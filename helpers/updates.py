"""What training added to a weight: the size of LoRA's update and the rank it really uses."""

from __future__ import annotations

import pandas as pd
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

ENERGY = 0.9


def update(layer: LoraLayer, adapter: str = "default") -> torch.Tensor:
    """The update of one adapted layer, ``scaling * B A``, shape (out, in), in fp32.

    Raises:
        ValueError: the layer has no adapter of that name.

    Source: Hu et al., "LoRA" (2021), equation 3.
    Taught in: notebook 02, section 3.
    """
    if adapter not in layer.lora_A:
        known = ", ".join(layer.lora_A) or "none"
        raise ValueError(f"no adapter {adapter!r} in this layer; there is: {known}")
    return layer.get_delta_weight(adapter).detach().float()


def used_rank(matrix: torch.Tensor, energy: float = ENERGY) -> int:
    """How many singular values hold ``energy`` of a matrix's squared Frobenius norm.

    0 for a matrix of zeros. An update of rank r uses at most r.

    Raises:
        ValueError: energy is not above 0 and at most 1.

    Taught in: notebook 02, section 3.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy is a share above 0 and at most 1, not {energy}")
    squares = torch.linalg.svdvals(matrix.float()).square()
    if not squares.sum() > 0:
        return 0
    held = squares.cumsum(0) / squares.sum()
    return int((held < energy - 1e-6).sum()) + 1


def singular_values(layer: LoraLayer, adapter: str = "default") -> torch.Tensor:
    """The singular values of a layer's update that can differ from 0: r of them, largest first.

    Taught in: notebook 02, section 3.
    """
    rank = layer.r[adapter]
    return torch.linalg.svdvals(update(layer, adapter))[:rank]


def table(model: PeftModel, adapter: str = "default") -> pd.DataFrame:
    """One row per adapted layer: rank, norm of the update, norm relative to the weight, used rank.

    Raises:
        ValueError: the model has no LoRA layer.

    Taught in: notebook 02, section 3.
    """
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            added = update(layer, adapter)
            weight = layer.get_base_layer().weight.detach().float()
            found[name] = {
                "rank": layer.r[adapter],
                "norm": added.norm().item(),
                "relative_norm": (added.norm() / weight.norm()).item(),
                "used_rank": used_rank(added),
            }
    if not found:
        raise ValueError(f"no LoRA layer with an adapter {adapter!r} in this model")
    return pd.DataFrame.from_dict(found, orient="index")
