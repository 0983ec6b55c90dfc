"""Equal budgets are equal, and alpha / rank stays the same in every layer."""

import pytest
from peft import get_peft_model
from torch import nn

from helpers import adapters, models
from helpers.experiments.targets import BUDGETS, TARGETS, adapter_parameters


def lora_layers(model) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}


def test_a_budget_by_hand():
    net = nn.ModuleDict({"narrow": nn.Linear(4, 4), "wide": nn.Linear(4, 12)})
    # rank 1 on both costs 8 + 16; 60 = 2 * 24 + 12, and 12 pays one more on narrow (8)
    config = adapters.config_for_budget(net, 60, ["narrow", "wide"])
    assert (config.r, config.rank_pattern) == (2, {"narrow": 3})
    assert config.alpha_pattern == {"narrow": 6}
    model = get_peft_model(net, config)
    assert adapter_parameters(model) == 3 * 8 + 2 * 16
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {2.0}


@pytest.mark.parametrize("parameters", BUDGETS)
@pytest.mark.parametrize("targets", TARGETS)
def test_the_arms_of_the_study_differ_by_two_percent_at_most(parameters, targets):
    from transformers import BertConfig, BertForTokenClassification

    shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    net = BertForTokenClassification(BertConfig(**shape, num_attention_heads=12, vocab_size=50))
    config = adapters.config_for_budget(net, parameters, TARGETS[targets], task_type="TOKEN_CLS")
    model = get_peft_model(net, config)
    assert adapter_parameters(model) == pytest.approx(parameters, rel=0.02)
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {2.0}


def test_a_budget_too_small_names_the_smallest():
    net = models.tiny("llama")
    with pytest.raises(ValueError, match=r"the smallest budget is"):
        adapters.config_for_budget(net, 3, ["q_proj"])
    with pytest.raises(ValueError, match="q_proj"):
        adapters.config_for_budget(net, 10_000, ["q_porj"])
