"""What a merge changes: nothing but rounding, and how much that is in each dtype.

Source: Hu et al. 2021, section 4.1; peft's merge_adapter and unmerge_adapter.
Taught in: notebook 07, section 2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    ShiraConfig,
)
from torch import Tensor, nn

from helpers.given import generator, one_of

from .routes import check_dtype, merged

Batch = Mapping[str, Tensor]

# Each takes the names of the target modules. (IA)3 rescales outputs here, see `adapters.config`.
MERGEABLE: dict[str, Callable[[list[str]], PeftConfig]] = {
    "LoRA": lambda names: LoraConfig(r=8, lora_alpha=16, target_modules=names),
    "rsLoRA": lambda names: LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=names),
    "DoRA": lambda names: LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=names),
    "AdaLoRA": lambda names: AdaLoraConfig(
        init_r=12, target_r=8, total_step=100, target_modules=names
    ),
    "(IA)³": lambda names: IA3Config(target_modules=names, feedforward_modules=[]),
    "LoHa": lambda names: LoHaConfig(r=8, alpha=16, target_modules=names),
    "LoKr": lambda names: LoKrConfig(r=8, alpha=16, target_modules=names),
    "OFT": lambda names: OFTConfig(r=0, oft_block_size=8, target_modules=names),
    "BOFT": lambda names: BOFTConfig(boft_block_size=8, target_modules=names),
    "HRA": lambda names: HRAConfig(r=8, target_modules=names),
    "MiSS": lambda names: MissConfig(r=8, target_modules=names),
    "SHiRA": lambda names: ShiraConfig(r=8, target_modules=names),
    "FourierFT": lambda names: FourierFTConfig(n_frequency=500, target_modules=names),
}


def config(method: str, target_modules: list[str]) -> PeftConfig:
    """The peft configuration of one of the `MERGEABLE` methods on these modules.

    Raises:
        ValueError: unknown method; names the nearest one.

    Taught in: notebook 07, section 2.
    """
    return MERGEABLE[one_of("method that merges", method, MERGEABLE)](target_modules)


def disturbed(model: PeftModel, *, seed: int, size: float = 0.02) -> PeftModel:
    """Adds normal noise to everything that trains, in place: an adapter that does something.

    Most new adapters change nothing, and a merge that forgot them would go unnoticed.

    Args:
        seed: of the noise.
        size: its standard deviation, in the unit of the weights.

    Raises:
        ValueError: the seed is no whole number from 0.
    """
    start = generator(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=start)
            parameter.data += size * noise.to(parameter)
    return model


@dataclass(frozen=True)
class MergeError:
    """How far the merged model's outputs are from the unmerged one's.

    Attributes:
        largest: largest absolute difference, in the outputs' unit.
        scale: largest absolute output.
        distance: root mean square difference.
        effect: root mean square difference that switching the adapter off makes.
    """

    largest: float
    scale: float
    distance: float
    effect: float

    @property
    def relative(self) -> float:
        """The largest difference in units of the largest output."""
        return self.largest / self.scale

    @property
    def share(self) -> float:
        """The distance in units of the adapter's effect; 1 is as bad as no adapter."""
        return self.distance / self.effect if self.effect else float("inf")


def merge_error(model: PeftModel, batch: Batch, dtype: torch.dtype = torch.float32) -> MergeError:
    """Merges a copy of the model with its base in ``dtype``, and compares the outputs.

    Both sides start from base weights that were rounded to ``dtype`` and compute in fp32, so only
    the rounding of the sum counts: what a stored merged model has lost.

    Args:
        model: with an active adapter; it is not changed.
        batch: what the model is called with.

    Raises:
        TypeError: a model without an adapter in its weights.
        ValueError: a dtype that is not a wide enough floating-point one.

    Taught in: notebook 07, section 2.
    """
    kept = rounded_base(copy.deepcopy(model).eval(), dtype)
    sum_ = merged(copy.deepcopy(kept))
    return compare(kept.float(), sum_.float(), batch)


def compare(unmerged: PeftModel, plain: nn.Module, batch: Batch) -> MergeError:
    """The error of ``plain``, a merged model, against the model with its adapter beside it."""
    on, off = on_and_off(unmerged, batch)
    return difference(output(plain, batch), on, off)


def on_and_off(model: PeftModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """A model's outputs with its adapter and without."""
    on = output(model, batch)
    with model.disable_adapter():
        return on, output(model, batch)


def difference(found: Tensor, on: Tensor, off: Tensor) -> MergeError:
    """The error of the outputs ``found``, given those with the adapter and without."""
    gap = found - on
    return MergeError(
        largest=gap.abs().max().item(),
        scale=on.abs().max().item(),
        distance=gap.square().mean().sqrt().item(),
        effect=(on - off).square().mean().sqrt().item(),
    )


@torch.no_grad()
def output(model: nn.Module, batch: Batch) -> Tensor:
    """A model's logits, or its last hidden state where it has no head; fp32, (batch size, …)."""
    found = model(**batch)
    value = found.logits if "logits" in found else found.last_hidden_state
    return value.float()


def rounded_base(model: PeftModel, dtype: torch.dtype) -> PeftModel:
    """Casts the floating-point weights of the base, in place; the adapter stays as it is.

    That is what peft makes of a base that was loaded in ``dtype``: its adapters are fp32.

    Raises:
        TypeError: a model without an adapter in its weights.
        ValueError: a dtype that is not a wide enough floating-point one.
    """
    if not hasattr(getattr(model, "base_model", None), "prefix"):
        raise TypeError(
            f"A merge needs a model with an adapter in its weights, not {type(model).__name__}."
        )
    check_dtype(dtype)
    prefix = model.base_model.prefix
    for name, parameter in model.named_parameters():
        if prefix not in name and "modules_to_save" not in name and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


@dataclass(frozen=True)
class RoundTrip:
    """What merging and unmerging left of the base weights.

    Attributes:
        changed: share of the merged weights that are not what they were.
        largest: the largest change of a weight.
    """

    changed: float
    largest: float


def round_trip(model: PeftModel, dtype: torch.dtype = torch.float32) -> RoundTrip:
    """Merges a copy in place, takes the merge back, and compares the weights it went through.

    Subtracting what was added does not undo a rounding.

    Raises:
        TypeError: a model without an adapter in its weights.
        ValueError: a dtype that is not a wide enough floating-point one.

    Taught in: notebook 07, section 2.
    """
    there = rounded_base(copy.deepcopy(model), dtype)
    before = {name: weight.clone() for name, weight in _base_weights(there)}
    there.merge_adapter()
    now = dict(_base_weights(there))
    touched = {name for name in now if not torch.equal(now[name], before[name])}
    there.unmerge_adapter()
    gaps = [
        (weight.float() - before[name].float()).abs()
        for name, weight in _base_weights(there)
        if name in touched
    ]
    if not gaps:
        return RoundTrip(0.0, 0.0)
    changed = sum(int((gap > 0).sum()) for gap in gaps) / sum(gap.numel() for gap in gaps)
    return RoundTrip(changed, max(gap.max().item() for gap in gaps))


def _base_weights(model: PeftModel) -> list[tuple[str, Tensor]]:
    return [(n, p.data) for n, p in model.named_parameters() if ".base_layer." in n]
