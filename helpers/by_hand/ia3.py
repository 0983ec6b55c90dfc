"""(IA)3 by hand: a learned factor for every key, every value and every feed-forward activation.

Source: (IA)3: Liu et al. 2022, section 3.3.
Taught in: notebook 05, section 5.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class ScaledOutput(nn.Module):
    """A frozen linear layer whose outputs are each multiplied by a factor: ``y = l * (W x + b)``.

    The factors, of shape (out,), start at one, so the layer starts out identical to its base.

    Raises: TypeError for a base that is not a linear layer with floating-point weights.
    Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
    In-Context Learning", section 3.3.
    Taught in: notebook 05, section 2.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        _check_base(base)
        self.base = base.requires_grad_(False)
        self.factors = nn.Parameter(base.weight.new_ones(base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """x of shape (..., in) to (..., out)."""
        return self.base(x) * self.factors

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain linear layer with the factors in its rows; this layer stays as it is."""
        merged = copy.deepcopy(self.base)
        merged.weight *= self.factors.unsqueeze(1)
        if merged.bias is not None:
            merged.bias *= self.factors
        return merged


class ScaledInput(nn.Module):
    """A frozen linear layer whose inputs are each multiplied by a factor: ``y = W (l * x) + b``.

    The factors, of shape (in,), start at one, so the layer starts out identical to its base.

    Raises: TypeError for a base that is not a linear layer with floating-point weights.
    Source: Liu et al. 2022, section 3.3.
    Taught in: notebook 05, section 2.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        _check_base(base)
        self.base = base.requires_grad_(False)
        self.factors = nn.Parameter(base.weight.new_ones(base.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x of shape (..., in) to (..., out)."""
        return self.base(x * self.factors)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain linear layer with the factors in its columns; this layer stays as it is."""
        merged = copy.deepcopy(self.base)
        merged.weight *= self.factors
        return merged


def add_ia3(model: PreTrainedModel) -> PreTrainedModel:
    """Put (IA)3 into a Llama, in place: on keys, values and the input of ``down_proj``.

    Everything else is frozen. Returns the same model.

    Raises: TypeError for a model without Llama's layers.
    Source: Liu et al. 2022, section 3.3.
    Taught in: notebook 05, section 2.
    """
    layers = _layers(model)
    model.requires_grad_(False)
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.k_proj = ScaledOutput(attention.k_proj)
        attention.v_proj = ScaledOutput(attention.v_proj)
        mlp.down_proj = ScaledInput(mlp.down_proj)
    return model


def merge_ia3(model: PreTrainedModel) -> PreTrainedModel:
    """Put plain linear layers, with the factors in them, in the place of those of `add_ia3`.

    Raises: TypeError for a model that `add_ia3` did not change.
    Source: Liu et al. 2022, section 3.3.
    Taught in: notebook 05, section 2.
    """
    layers = _layers(model)
    if not isinstance(layers[0].mlp.down_proj, ScaledInput):
        raise TypeError("merge_ia3 merges what add_ia3 put in, and this model has none of it.")
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.k_proj, attention.v_proj = attention.k_proj.merge(), attention.v_proj.merge()
        mlp.down_proj = mlp.down_proj.merge()
    return model


def _layers(model: nn.Module) -> nn.ModuleList:
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None or not hasattr(layers[0].mlp, "down_proj"):
        raise TypeError(
            f"add_ia3 knows the layers of Llama, but was given {type(model).__name__}; "
            "peft.IA3Config takes the names of other models' layers."
        )
    return layers


def _check_base(base: nn.Module) -> None:
    if not isinstance(base, nn.Linear):
        raise TypeError(
            f"(IA)3 scales a torch.nn.Linear here, but was given {type(base).__name__}; "
            "peft.IA3Config also handles Conv1D, Embedding and convolutions."
        )
    if not base.weight.is_floating_point():
        raise TypeError(
            f"(IA)3 scales floating-point layers here, but this layer's weights are "
            f"{base.weight.dtype}; use peft, which knows quantised layers."
        )
