"""Claims of section 2 that need no lesson: the options of LoraConfig, each one tried."""

from __future__ import annotations

import ast
import dataclasses
import math

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import claims, models

IDS = torch.arange(3, 15).reshape(2, 6)
QV = ["q_proj", "v_proj"]

# The note's snippet, section "LoRAConfig Parameters", without its comments.
SNIPPET = """
config = LoraConfig(
    r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, bias="none",
    task_type=TaskType.CAUSAL_LM, init_lora_weights=True, use_rslora=False, use_dora=False,
    modules_to_save=None, layers_to_transform=None, layers_pattern=None,
)
"""


def tiny_llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.tiny("llama")


def test_the_snippet_needs_an_import_that_it_does_not_show():
    def runs(imports: str) -> bool:
        try:
            exec(f"from peft import {imports}\n{SNIPPET}", {})
        except NameError:
            return False
        return True

    claims.settle(
        "C026",
        {
            "as written": runs("LoraConfig"),
            "after importing TaskType": runs("LoraConfig, TaskType"),
        },
    )


def test_the_snippet_shows_some_of_the_options():
    shown = len(ast.parse(SNIPPET).body[0].value.keywords)
    assert shown == 12
    inherited = {field.name for field in dataclasses.fields(PeftConfig)} - {"task_type"}
    options = {field.name for field in dataclasses.fields(LoraConfig)} - inherited
    claims.settle("C027", len(options))


@torch.no_grad()
def test_the_default_start():
    plain = tiny_llama().eval()
    before = plain(input_ids=IDS).logits
    model = get_peft_model(plain, LoraConfig(r=8, target_modules=QV)).eval()
    a = torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])
    b = torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_B" in name])
    # kaiming_uniform_ with a = sqrt(5) is uniform on ±1/sqrt(inputs)
    bound = 1 / math.sqrt(plain.config.hidden_size)
    spread = a.abs().max() <= bound and abs(a.std() / (bound / math.sqrt(3)) - 1) < 0.05
    claims.settle(
        "C028",
        {
            "A has the Kaiming-uniform spread": bool(spread),
            "B is zero": not b.any().item(),
            "the wrapped model starts as the plain one": torch.equal(
                model(input_ids=IDS).logits, before
            ),
        },
    )


def test_bias():
    def trained(bias: str) -> set[str]:
        shape = models.tiny("llama").config.to_dict() | {"attention_bias": True}
        model = LlamaForCausalLM(LlamaConfig(**shape))
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], bias=bias))
        names = [n for n, p in model.named_parameters() if p.requires_grad and "bias" in n]
        return {name.split("self_attn.")[1].split(".")[0] for name in names}

    every = {"q_proj", "k_proj", "v_proj", "o_proj"}
    claims.settle(
        "C029",
        {
            "none": trained("none") == set(),
            "all": trained("all") == every,
            "lora_only": trained("lora_only") == {"q_proj"},
        },
    )
    with pytest.raises(NotImplementedError):
        trained("some")


@torch.no_grad()
def test_dropout():
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=4, target_modules=QV, lora_dropout=0.5, init_lora_weights=False)
    )
    plain = get_peft_model(
        tiny_llama(), LoraConfig(r=4, target_modules=QV, lora_dropout=0.0, init_lora_weights=False)
    )
    plain.load_state_dict(model.state_dict())
    differs = {}
    for mode in (True, False):
        torch.manual_seed(1)
        outputs = [m.train(mode)(input_ids=IDS).logits for m in (model, plain)]
        differs[mode] = not torch.allclose(*outputs)
    claims.settle(
        "C030",
        {
            "it changes the output in training": differs[True],
            "it changes nothing in evaluation": not differs[False],
        },
    )


def layers(**options) -> list[str]:
    config = LoraConfig(r=2, target_modules=["q_proj"], **options)
    return get_peft_model(tiny_llama(), config).targeted_module_names


def test_layers_to_transform():
    second = ["model.layers.1.self_attn.q_proj"]
    claims.settle("C031", layers(layers_to_transform=[1]) == second and len(layers()) == 2)


def test_layers_pattern():
    second = ["model.layers.1.self_attn.q_proj"]
    found = layers(layers_to_transform=[1], layers_pattern=r"lay\w+")
    claims.settle("C032", found == second)
    with pytest.raises(ValueError, match="layers_to_transform"):
        layers(layers_pattern="layers")
    with pytest.raises(ValueError):
        layers(layers_to_transform=[1], layers_pattern="blocks")
