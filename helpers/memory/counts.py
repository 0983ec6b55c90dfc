"""What a training step keeps in memory, counted from shapes without any memory."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

LOGIT_BYTES = 2 + 4 + 4  # 16-bit logits, their 32-bit copy, and the gradient of that copy
NF4_BYTES = 0.5 + 0.127 / 8  # a code, and its share of the doubly quantised block constants


def kept_per_token(model: PreTrainedModel | PeftModel, *, tokens: int = 512) -> float:
    """Bytes that backward keeps for one token of a Llama-type decoder, on the meta device.

    One decoder layer runs in bfloat16 and what autograd saves is added up, each storage once and
    weights left out; times the number of layers, plus the logits. The table of attention scores
    (tokens x tokens) is left out, because a fused kernel does not keep it. On the meta device
    attention keeps 32-bit copies of query, key and value, a fused kernel 16-bit ones: the count is
    up to a third too high.

    Args:
        model: its layers are in ``model.layers``; wrapped by peft or not.
        tokens: length of the row that is tried; another number than the width of a head.

    Source: PyTorch, ``torch.autograd.graph.saved_tensors_hooks``.
    Taught in: notebook 06, section 3.
    """
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    kept = saved_storages(core, tokens)
    layers = core.config.num_hidden_layers * sum(kept.values()) / tokens
    return layers + core.config.vocab_size * LOGIT_BYTES


def saved_storages(core: PreTrainedModel, tokens: int) -> dict[int, int]:
    """Bytes of each storage that the second decoder layer saves for backward, weights left out."""
    weights = {p.untyped_storage()._cdata for p in core.parameters()}
    sizes: dict[int, int] = {}
    alive = []  # a freed storage's number would be given to the next one

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage()
        if place._cdata not in weights and tensor.shape[-2:] != (tokens, tokens):
            sizes[place._cdata] = place.nbytes()
            alive.append(tensor)
        return tensor

    shape = (1, tokens, core.config.hidden_size)
    hidden = torch.zeros(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)
    angles = core.model.rotary_emb(hidden, torch.arange(tokens, device="meta")[None])
    layer = core.model.layers[1].train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(hidden, attention_mask=None, position_embeddings=angles)
    return sizes


def four_bit_bytes(model: nn.Module) -> float:
    """Bytes of a base loaded in NF4 and prepared for k-bit training.

    The linear layers of the decoder take four bits and their share of constants; embeddings, head
    and norms are 32-bit after ``prepare_model_for_kbit_training``.

    Source: bitsandbytes, ``Linear4bit``; peft, ``prepare_model_for_kbit_training``.
    Taught in: notebook 06, section 3.
    """
    packed = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}"
    )
    rest = sum(p.numel() for p in model.parameters()) - packed
    return NF4_BYTES * packed + 4 * rest
