"""(IA)3 by hand: the same numbers as peft's, and merging that changes nothing."""

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import nn

from helpers import models
from helpers.by_hand import ScaledInput, ScaledOutput, add_ia3, merge_ia3

IDS = torch.arange(3, 19).reshape(2, 8)
EXACT = {"rtol": 0, "atol": 1e-6}


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    return models.tiny("llama")


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def twins() -> tuple[nn.Module, nn.Module]:
    """Ours and peft's on equal bases with equal factors, away from one."""
    mine = add_ia3(tiny_llama())
    theirs = get_peft_model(tiny_llama(), IA3Config(task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for ours, other in zip(trained(mine), trained(theirs), strict=True):
        ours.data.uniform_(0.5, 2)
        other.data = ours.detach().clone().view_as(other)
    return mine, theirs


def test_two_by_two_by_hand() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data, layer.bias.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2)
    rows, columns = ScaledOutput(layer), ScaledInput(layer)
    rows.factors.data = columns.factors.data = torch.tensor([2.0, 10.0])
    x = torch.tensor([1.0, 1.0])
    assert rows(x).tolist() == [8.0, 80.0]  # 2 * (1 + 2 + 1), 10 * (3 + 4 + 1)
    assert columns(x).tolist() == [23.0, 47.0]  # 2 + 20 + 1, 6 + 40 + 1
    assert rows.merge().weight.tolist() == [[2.0, 4.0], [30.0, 40.0]]
    assert rows.merge().bias.tolist() == [2.0, 10.0]
    assert columns.merge().weight.tolist() == [[2.0, 20.0], [6.0, 40.0]]
    assert columns.merge().bias.tolist() == [1.0, 1.0]


def test_starts_as_its_base() -> None:
    model = tiny_llama()
    before = model(IDS).logits
    assert torch.equal(add_ia3(model)(IDS).logits, before)


def test_loss_logits_and_gradients_equal_peft() -> None:
    mine, theirs = twins()
    ours, other = mine(IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(ours.logits, other.logits, **EXACT)
    torch.testing.assert_close(ours.loss, other.loss, **EXACT)
    ours.loss.backward()
    other.loss.backward()
    for left, right in zip(trained(mine), trained(theirs), strict=True):
        assert left.grad.any()
        torch.testing.assert_close(left.grad, right.grad.flatten(), **EXACT)


def test_a_changed_factor_is_noticed() -> None:
    mine, theirs = twins()
    trained(mine)[0].data[0] *= 1.1
    with pytest.raises(AssertionError):
        torch.testing.assert_close(mine(IDS).logits, theirs(input_ids=IDS).logits, **EXACT)


def test_generation_equals_peft() -> None:
    mine, theirs = twins()
    with torch.no_grad():  # a random model's words hardly hang on its layers: scale harder
        for factors in (*trained(mine), *trained(theirs)):
            factors *= 30
    ours = mine.generate(IDS[:1], max_new_tokens=12, do_sample=False)
    other = theirs.generate(input_ids=IDS[:1], max_new_tokens=12, do_sample=False)
    plain = tiny_llama().generate(IDS[:1], max_new_tokens=12, do_sample=False)
    assert ours.tolist() == other.tolist() != plain.tolist()


def test_merging_equals_peft_and_keeps_the_logits() -> None:
    mine, theirs = twins()
    before = mine(IDS).logits
    ours, other = merge_ia3(mine), theirs.merge_and_unload()
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, other.state_dict()[name], **EXACT)
    torch.testing.assert_close(ours(IDS).logits, before, **EXACT)
    assert not any(isinstance(m, ScaledInput | ScaledOutput) for m in ours.modules())


def test_one_factor_an_activation() -> None:
    model = add_ia3(tiny_llama())
    config = model.config
    keys = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    each = 2 * keys + config.intermediate_size
    assert sum(p.numel() for p in trained(model)) == config.num_hidden_layers * each


def test_impossible_bases() -> None:
    with pytest.raises(TypeError, match="given Embedding"):
        ScaledOutput(nn.Embedding(4, 4))
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"torch\.uint8"):
        ScaledInput(packed)
    with pytest.raises(TypeError, match="layers of Llama"):
        add_ia3(models.tiny("bert"))
