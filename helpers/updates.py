"""What training did to a weight: the size of LoRA's update, the rank it uses, length and turn.

Source: Hu et al. 2021, section 7; the share of 0.9 that counts as used is this course's own.
Taught in: notebook 02, section 3.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

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
    """How many singular values hold ``energy`` of a (rows, columns) matrix's squared norm.

    The norm is Frobenius'. 0 for a matrix of zeros. An update of rank r uses at most r.

    Args:
        matrix: (out, in).
        energy: the share to be held, above 0 and at most 1.

    Raises:
        ValueError: no matrix, a number in it that is not finite, or an energy outside 0 to 1.

    Taught in: notebook 02, section 3.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy is a share above 0 and at most 1, not {energy}")
    if matrix.dim() != 2 or not matrix.isfinite().all():
        raise ValueError(f"expected a matrix of finite numbers, not shape {tuple(matrix.shape)}")
    squares = torch.linalg.svdvals(matrix.float()).square()
    if not squares.sum() > 0:
        return 0
    held = squares.cumsum(0) / squares.sum()
    return int((held < energy - 1e-6).sum()) + 1


def singular_values(layer: LoraLayer, adapter: str = "default") -> torch.Tensor:
    """The singular values of a layer's update that can differ from 0: (r,), largest first.

    Of shape (r,), in the unit of the weights.

    Raises:
        ValueError: the layer has no adapter of that name.

    Taught in: notebook 02, section 3.
    """
    return torch.linalg.svdvals(update(layer, adapter))[: layer.r[adapter]]


@dataclass(frozen=True)
class Change:
    """How far a weight moved, as a mean over its outputs.

    magnitude: change of a row's length, in the weight's own unit, whether longer or shorter;
    direction: 1 - cosine between a row before and after, from 0 (same) to 2 (opposite).
    """

    magnitude: float
    direction: float


def magnitude_and_direction(before: torch.Tensor, after: torch.Tensor) -> Change:
    """By how much a weight's rows changed in length, and by how much they turned.

    Weights are (out, in) as in nn.Linear; a row holds the weights of one output over all its
    inputs. That is what peft's DoRA scales. The paper writes weights as (in, out) and so says
    "column" for the same numbers.

    Raises:
        ValueError: the two are not matrices of one shape, or a row is zero and has no direction.

    Source: Liu et al., "DoRA" (2024), equations 3 and 4.
    Taught in: notebook 04, sections 1 and 2.
    """
    if before.shape != after.shape or before.ndim != 2:
        raise ValueError(
            f"a weight before and after is two matrices of one shape (out, in), not "
            f"{tuple(before.shape)} and {tuple(after.shape)}"
        )
    before, after = before.detach().double(), after.detach().double()
    short, long = before.norm(dim=1), after.norm(dim=1)
    if not (short.all() and long.all()):
        raise ValueError("a row of zeros has no direction; leave that output out")
    cosine = (before * after).sum(1) / (short * long)
    return Change((long - short).abs().mean().item(), (1 - cosine).mean().item())


def merged_weight(layer: LoraLayer) -> torch.Tensor:
    """The weight (out, in) that peft would merge LoRA or DoRA into; the layer stays as it is.

    Taught in: notebook 04, sections 1 and 2.
    """
    copied = copy.deepcopy(layer)
    copied.merge()
    return copied.get_base_layer().weight.detach()


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
