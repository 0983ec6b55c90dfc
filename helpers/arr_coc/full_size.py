"""What the hybrid would cost on a published model: counted on shapes without weights.

Source: transformers' Qwen2-VL; the modules' sizes are arr-coc-0-1's.
Taught in: notebook 09, section 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from helpers import models
from helpers.memory.build import linear_layers
from helpers.memory.counts import NF4_BYTES

from .modules import Attending, Balancing, Knowing
from .note import config
from .selectors import MODULES

ADAMW = 8  # bytes of AdamW's two moments, in 32 bits


@dataclass(frozen=True)
class Cost:
    """Numbers of parameters, and bytes of the base as it is loaded.

    Attributes:
        lora_attention, lora_mlp: of the adapter on the decoder.
        modules: of knowing, balancing and attending, trained in full.
        attention, mlp: weights of the decoder's layers; norms are in neither.
        base_16_bits, base_4_bits: bytes of the base alone; in four bits, embeddings, norms and
            head keep 16.
    """

    lora_attention: int
    lora_mlp: int
    modules: int
    attention: int
    mlp: int
    base_16_bits: int
    base_4_bits: int

    @property
    def lora(self) -> int:
        """Parameters of the adapter."""
        return self.lora_attention + self.lora_mlp

    @property
    def trained(self) -> int:
        """Parameters that train."""
        return self.lora + self.modules

    @property
    def optimizer(self) -> int:
        """Bytes of AdamW's moments, in 32 bits."""
        return ADAMW * self.trained


def hybrid(name: str, *, rank: int = 32) -> PeftModel:
    """A published model on the meta device with the three modules and the note's LoRA.

    The modules are attributes of the model, made for the width of its decoder; nothing calls them.

    Args:
        name: such as "qwen2-vl-7b", one of `models.FULL_SIZE` that sees images.

    Taught in: notebook 09, sections 7 and 8.
    """
    base = models.full_size(name)
    width = base.config.get_text_config().hidden_size
    with torch.device("meta"):
        for part, kind in zip(MODULES, (Knowing, Balancing, Attending), strict=True):
            base.add_module(part, kind(width))
        return get_peft_model(base, config(rank=rank, task_type="CAUSAL_LM"))


def cost(name: str, *, rank: int = 32) -> Cost:
    """Counts of `hybrid`.

    Taught in: notebook 09, section 8.
    """
    base, wrapped = models.full_size(name), hybrid(name, rank=rank)
    trained = {name: p.numel() for name, p in wrapped.named_parameters() if p.requires_grad}
    lora = {name: size for name, size in trained.items() if "lora_" in name}
    in_mlp = sum(size for name, size in lora.items() if ".mlp." in name)
    packed = sum(layer.weight.numel() for layer in linear_layers(base).values())
    rest = base.num_parameters() - packed
    return Cost(
        lora_attention=sum(lora.values()) - in_mlp,
        lora_mlp=in_mlp,
        modules=sum(trained.values()) - sum(lora.values()),
        attention=_weights(base, "self_attn"),
        mlp=_weights(base, "mlp"),
        base_16_bits=2 * base.num_parameters(),
        base_4_bits=round(NF4_BYTES * packed + 2 * rest),
    )


def as_in_the_repository(width: int) -> nn.Module:
    """Layers of the shapes that arr-coc-0-1's scorer and balancer have; its allocator has none.

    Args:
        width: of the decoder's vectors.

    Source: arr-coc-0-1, ``knowing.py`` and ``balancing.py``. Taught in: notebook 09, section 8.
    """
    with torch.device("meta"):
        scorer = nn.Sequential(nn.Conv2d(13, 64, 1), nn.ReLU(), nn.Conv2d(64, width, 1))
        balancer = nn.Sequential(
            *(nn.Linear(width + 9, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()),
            nn.Linear(128, 3),
        )
    return nn.ModuleDict({"participatory_scorer": scorer, "balancer": balancer})


def _weights(base: nn.Module, part: str) -> int:
    return sum(
        layer.weight.numel()
        for name, layer in base.named_modules()
        if isinstance(layer, nn.Linear) and "language_model" in name and f".{part}." in name
    )
