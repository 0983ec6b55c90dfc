"""Runs that would fail for real are refused; those that only look alike are not."""

import pytest
import torch
from transformers import GPTJConfig, PreTrainedConfig, RobertaConfig

from helpers import adapters, memory, models
from helpers.memory.check import check
from helpers.memory.simulate import Plan

LLAMA = models.published_config("llama-2-7b")
GPT2 = models.published_config("gpt2")


def plan(config: PreTrainedConfig, method: str = "lora", **changes: object) -> Plan:
    targets = changes.pop("targets", None)
    task = changes.pop("task_type", "CAUSAL_LM")
    adapter = adapters.config(method, task_type=task, target_modules=targets)
    settings = {"batch": 1, "seq": 8, "dtype": torch.bfloat16, "gpu": memory.GPUS["t4"]}
    return Plan(config=config, adapter=adapter, **(settings | changes))


@pytest.mark.parametrize(
    "fine",
    [
        plan(GPT2, seq=1024),
        plan(GPT2, "prompt", seq=1008),
        plan(GPT2, "prompt", checkpointing=True),
        plan(GPT2, "prefix"),
        plan(LLAMA, seq=100_000),  # rotary positions go on
        plan(LLAMA, targets="all-linear"),
        plan(LLAMA, targets=["self_attn.q_proj", "down_proj"]),
        plan(LLAMA, targets=r".*\.[qv]_proj"),
        plan(GPTJConfig(n_layer=1), attention="eager"),
        plan(RobertaConfig(num_hidden_layers=1), task_type="SEQ_CLS", seq=510),
    ],
)
def test_runs_that_are_fine(fine):
    check(fine)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (plan(GPT2, seq=1025), "a seq of at most 1024"),
        (plan(GPT2, "prompt", seq=1009), "16 virtual ones; give a seq of at most 1008"),
        (plan(GPT2, "prefix", checkpointing=True), "leave checkpointing out"),
        (plan(GPT2, "p-tuning-v2", checkpointing=True), "leave checkpointing out"),
        (plan(LLAMA, targets=["q_proj", "w_proj"]), "'w_proj' matches no module of 'llama'"),
        (plan(LLAMA, targets=r"q_proj"), "regular expression for the whole name"),
        (plan(LLAMA, targets=["input_layernorm"]), "LlamaRMSNorm"),
        (plan(GPTJConfig(n_layer=1)), "give the attention 'eager'"),
        (plan(RobertaConfig(num_hidden_layers=1), task_type="SEQ_CLS", seq=511), "at most 510"),
    ],
)
def test_runs_that_would_fail(wrong, says):
    with pytest.raises(ValueError, match=says):
        check(wrong)
