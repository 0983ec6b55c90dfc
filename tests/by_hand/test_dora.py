"""DoRA by hand: the same numbers as peft's use_dora, and the properties that define the method."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from helpers.by_hand import DoRALinear

RANK, ALPHA = 3, 12.0


class GradientThroughLengths(DoRALinear):
    """The wrong one: the lengths take part in the gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.base.weight + self.delta()
        return F.linear(x, weight, None) * (self.magnitude / weight.norm(dim=1)) + self.base.bias


def twins(cls: type[DoRALinear] = DoRALinear, bias: bool = True) -> tuple[DoRALinear, nn.Module]:
    """Our layer and peft's with the same base, A, B and magnitude, all away from the start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5, bias=bias))
    mine = cls(nn.Linear(8, 5, bias=bias), rank=RANK, alpha=ALPHA)
    mine.base.load_state_dict(model[0].state_dict())
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=True)
    theirs = get_peft_model(model, config).base_model.model[0]
    a, b, magnitude = trained(theirs)
    with torch.no_grad():
        nn.init.normal_(mine.B)
        nn.init.uniform_(mine.magnitude, 0.5, 2.0)
        a.copy_(mine.A), b.copy_(mine.B), magnitude.copy_(mine.magnitude)
    return mine, theirs


def trained(layer: nn.Module) -> list[nn.Parameter]:
    return [
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.lora_magnitude_vector["default"].weight,
    ]


def gradients(layer: nn.Module, tensors: list[nn.Parameter]) -> list[torch.Tensor]:
    """Of the input first, then of the tensors."""
    torch.manual_seed(1)
    x = torch.randn(2, 7, 8, requires_grad=True)
    (layer(x) * torch.randn(2, 7, 5)).sum().backward()
    return [x.grad, *(tensor.grad for tensor in tensors)]


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_two_by_two_by_hand() -> None:
    layer = DoRALinear(nn.Linear(2, 2, bias=False), rank=1, alpha=1.0)
    layer.base.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
    layer.A.copy_(torch.tensor([[0.0, 1.0]]))
    layer.B.copy_(torch.tensor([[4.0], [1.0]]))
    layer.magnitude.copy_(torch.tensor([10.0, 1.0]))
    # V = [[3, 4], [0, 3]] has rows of length 5 and 3
    assert layer.lengths().tolist() == [5.0, 3.0]
    assert layer.merge().weight.tolist() == [[6.0, 8.0], [0.0, 1.0]]
    assert layer(torch.tensor([[1.0, 1.0]])).tolist() == [[14.0, 1.0]]


@pytest.mark.parametrize("bias", [True, False])
def test_forward_gradients_and_merge_equal_peft(bias: bool) -> None:
    mine, theirs = twins(bias=bias)
    x = torch.randn(4, 6, 8)
    close(mine(x), theirs(x))
    ours = gradients(mine, [mine.A, mine.B, mine.magnitude])
    for left, right in zip(ours, gradients(theirs, trained(theirs)), strict=True):
        close(left, right)
    before, merged = mine(x), mine.merge()
    theirs.merge()
    close(merged.weight, theirs.base_layer.weight)
    torch.testing.assert_close(merged(x), before, rtol=0, atol=1e-5)
    assert type(merged) is nn.Linear and torch.equal(mine(x), before)


def test_lengths_in_the_gradient_change_a_and_b_but_not_the_forward() -> None:
    wrong, theirs = twins(GradientThroughLengths)
    x = torch.randn(4, 8)
    close(wrong(x), theirs(x))
    ours = gradients(wrong, [wrong.A, wrong.B, wrong.magnitude])
    peft = gradients(theirs, trained(theirs))
    for place in (0, 3):  # of the input and of the magnitude
        close(ours[place], peft[place])
    for place in (1, 2):  # of A and B
        with pytest.raises(AssertionError):
            torch.testing.assert_close(ours[place], peft[place], rtol=0.1, atol=0.1)


def test_comparison_with_peft_notices_a_wrong_axis() -> None:
    torch.manual_seed(0)
    square = DoRALinear(nn.Linear(5, 5), rank=2)
    config = LoraConfig(r=2, target_modules=["0"], use_dora=True)
    model = get_peft_model(nn.Sequential(square.base), config)
    theirs = model.base_model.model[0].lora_magnitude_vector["default"].weight
    close(square.magnitude, theirs)
    with pytest.raises(AssertionError):
        close(square.base.weight.norm(dim=0), theirs)


def test_starts_as_its_base_and_trains_three_tensors() -> None:
    base = nn.Linear(8, 5)
    x = torch.randn(4, 8)
    expected = base(x)
    layer = DoRALinear(base, rank=2)
    close(layer(x), expected)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"A", "B", "magnitude"}
    assert layer.magnitude.shape == (5,)


def test_without_its_magnitude_it_cannot_change_a_length() -> None:
    mine, _ = twins()
    with torch.no_grad():
        mine.magnitude.copy_(mine.base.weight.norm(dim=1))
    close(mine.merge().weight.norm(dim=1), mine.base.weight.norm(dim=1))


def test_checks_are_those_of_lora_under_its_own_name() -> None:
    with pytest.raises(TypeError, match="DoRALinear wraps"):
        DoRALinear(nn.Embedding(8, 5))
    with pytest.raises(ValueError, match="rank"):
        DoRALinear(nn.Linear(8, 5), rank=6)
