"""Rows of random tokens, and a tiny model with an adapter, for the tests of training."""

import torch
from peft import LoraConfig, get_peft_model

from helpers import models, training


def lm_rows(n: int = 12, length: int = 6) -> list[dict]:
    generator = torch.Generator().manual_seed(7)
    rows = []
    for _ in range(n):
        ids = torch.randint(3, 90, (length,), generator=generator)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return rows


def stack(rows: list[dict]) -> training.Batch:
    return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}


def tiny_lora(dropout: float = 0.0) -> torch.nn.Module:
    """A tiny Llama with LoRA on queries and values, the same at every call."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=dropout
    )
    return get_peft_model(models.tiny("llama"), config)
