"""LoRA by hand: the same numbers as peft's layer, and the properties that define the method."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers.by_hand import LoRALinear

RANK, ALPHA = 3, 12.0


class Pair(nn.Module):
    """A module with one linear layer, for peft to wrap."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 5, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def twins(bias: bool = True) -> tuple[LoRALinear, nn.Module]:
    """Our layer and peft's on the same base, A and B, with B away from zero."""
    torch.manual_seed(0)
    base = Pair(bias)
    mine = LoRALinear(nn.Linear(8, 5, bias=bias), rank=RANK, alpha=ALPHA)
    mine.base.load_state_dict(base.proj.state_dict())
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["proj"])
    theirs = get_peft_model(base, config).base_model.model.proj
    with torch.no_grad():
        nn.init.normal_(mine.B)
        theirs.lora_A["default"].weight.copy_(mine.A)
        theirs.lora_B["default"].weight.copy_(mine.B)
    return mine, theirs


def gradients(layer: nn.Module, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, 7, 8, requires_grad=True)
    (layer(x) * torch.randn(2, 7, 5)).sum().backward()
    return [x.grad, *(tensor.grad for tensor in tensors)]


def test_two_by_two_by_hand() -> None:
    layer = LoRALinear(nn.Linear(2, 2, bias=False), rank=1, alpha=2.0)
    with torch.no_grad():
        layer.base.weight.copy_(torch.eye(2))
        layer.A.copy_(torch.tensor([[1.0, 2.0]]))
        layer.B.copy_(torch.tensor([[3.0], [4.0]]))
    # W + 2 B A = I + 2 [[3, 6], [4, 8]]
    assert layer.delta().tolist() == [[6.0, 12.0], [8.0, 16.0]]
    assert layer(torch.tensor([[1.0, 0.0]])).tolist() == [[7.0, 8.0]]
    assert layer.merge().weight.tolist() == [[7.0, 12.0], [8.0, 17.0]]


@pytest.mark.parametrize("bias", [True, False])
def test_forward_equals_peft(bias: bool) -> None:
    mine, theirs = twins(bias)
    x = torch.randn(4, 6, 8)
    torch.testing.assert_close(mine(x), theirs(x), rtol=0, atol=1e-6)


def test_gradients_equal_peft() -> None:
    mine, theirs = twins()
    ours = gradients(mine, [mine.A, mine.B])
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    for left, right in zip(ours, gradients(theirs, [a, b]), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


def test_merge_equals_peft_and_the_unmerged_layer() -> None:
    mine, theirs = twins()
    x = torch.randn(4, 8)
    before = mine(x)
    merged = mine.merge()
    theirs.merge()
    torch.testing.assert_close(merged.weight, theirs.base_layer.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged(x), before, rtol=0, atol=1e-5)
    assert type(merged) is nn.Linear
    assert torch.equal(mine(x), before)


def test_comparison_with_peft_notices_a_wrong_scaling() -> None:
    mine, theirs = twins()
    mine.scaling *= 1.01
    x = torch.randn(4, 8)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(mine(x), theirs(x), rtol=0, atol=1e-6)


def test_starts_as_its_base() -> None:
    base = nn.Linear(8, 5)
    x = torch.randn(4, 8)
    expected = base(x)
    assert torch.equal(LoRALinear(base, rank=2)(x), expected)


def test_starts_with_a_spread_as_peft_does() -> None:
    torch.manual_seed(3)
    wide = nn.Sequential(nn.Linear(400, 60))
    mine = LoRALinear(nn.Linear(400, 60), rank=50)
    config = LoraConfig(r=50, target_modules=["0"])
    theirs = get_peft_model(wide, config).base_model.model[0].lora_A["default"].weight
    bound = 1 / 400**0.5
    for a in (mine.A, theirs):
        assert a.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not mine.B.any()


def test_update_has_at_most_rank_r() -> None:
    mine, _ = twins()
    assert torch.linalg.matrix_rank(mine.delta()) == RANK


def test_a_step_moves_a_and_b_only() -> None:
    mine, _ = twins()
    frozen = {name: value.clone() for name, value in mine.base.state_dict().items()}
    a, b = mine.A.detach().clone(), mine.B.detach().clone()
    optimiser = torch.optim.AdamW([p for p in mine.parameters() if p.requires_grad], lr=0.1)
    mine(torch.randn(4, 8)).square().sum().backward()
    optimiser.step()
    assert all(torch.equal(frozen[name], value) for name, value in mine.base.state_dict().items())
    assert not torch.equal(a, mine.A) and not torch.equal(b, mine.B)
    assert {n for n, p in mine.named_parameters() if p.requires_grad} == {"A", "B"}


def test_takes_dtype_and_device_of_its_base() -> None:
    base = nn.Linear(8, 5, dtype=torch.bfloat16, device="meta")
    layer = LoRALinear(base, rank=2)
    assert layer.A.dtype == layer.B.dtype == torch.bfloat16
    assert layer.A.is_meta and layer.B.is_meta


@pytest.mark.parametrize("rank", [0, -1, 6, 2.0, True])
def test_impossible_rank(rank: object) -> None:
    with pytest.raises(ValueError, match=rf"1 to min\(in, out\) = 5 .* was {rank!r}"):
        LoRALinear(nn.Linear(8, 5), rank=rank)


def test_impossible_base() -> None:
    with pytest.raises(TypeError, match="given Embedding"):
        LoRALinear(nn.Embedding(8, 5), rank=2)
    packed = nn.Linear(8, 5)
    packed.weight = nn.Parameter(torch.zeros(5, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"torch\.uint8"):
        LoRALinear(packed, rank=2)
