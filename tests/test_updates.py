"""Updates of known size and rank, by hand and through peft."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from helpers import models, updates


def wrapped(rank: int = 4, alpha: int = 8) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj"])
    return get_peft_model(models.tiny("llama"), config)


def layer_of(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


@torch.no_grad()
def test_the_update_is_scaling_times_b_a():
    layer = layer_of(wrapped())
    layer.lora_B["default"].weight.normal_()
    by_hand = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(updates.update(layer), by_hand)
    assert updates.singular_values(layer).shape == (4,)
    assert updates.singular_values(layer).square().sum() == pytest.approx(
        by_hand.square().sum().item(), rel=1e-4
    )


def test_used_rank_by_hand():
    # squares 9, 1, 0: the first holds exactly nine tenths
    assert updates.used_rank(torch.diag(torch.tensor([3.0, 1.0, 0.0]))) == 1
    assert updates.used_rank(torch.diag(torch.tensor([3.0, 1.1, 0.0]))) == 2
    assert updates.used_rank(torch.eye(10)) == 9
    assert updates.used_rank(torch.eye(10), energy=1.0) == 10
    assert updates.used_rank(torch.zeros(3, 3)) == 0
    with pytest.raises(ValueError, match="share"):
        updates.used_rank(torch.eye(2), energy=0.0)


@torch.no_grad()
def test_the_table_has_a_row_for_each_adapted_layer():
    model = wrapped()
    before = updates.table(model)
    assert before["norm"].eq(0).all() and before["used_rank"].eq(0).all()
    layer_of(model).lora_B["default"].weight.normal_()
    after = updates.table(model)
    assert after["rank"].tolist() == [4, 4]
    assert (after["norm"] > 0).tolist() == [True, False]
    assert 1 <= after["used_rank"].iloc[0] <= 4
    weight = layer_of(model).get_base_layer().weight
    assert after["relative_norm"].iloc[0] == pytest.approx(
        (after["norm"].iloc[0] / weight.norm()).item(), rel=1e-5
    )


def test_magnitude_and_direction_by_hand():
    before = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    # the first row doubles without turning, the second turns by 90 degrees without growing
    after = torch.tensor([[6.0, 8.0], [0.0, 1.0]])
    change = updates.magnitude_and_direction(before, after)
    assert change.magnitude == pytest.approx((5 + 0) / 2)
    assert change.direction == pytest.approx((0 + 1) / 2)
    # shorter and longer do not cancel; opposite is 2
    change = updates.magnitude_and_direction(torch.eye(2), torch.diag(torch.tensor([-3.0, 0.5])))
    assert change == updates.Change(magnitude=(2 + 0.5) / 2, direction=(2 + 0) / 2)
    assert updates.magnitude_and_direction(before, before) == updates.Change(0.0, 0.0)


def test_rows_are_outputs():
    wide = torch.ones(1, 4)
    longer = updates.magnitude_and_direction(wide, 2 * wide)
    assert longer.magnitude == pytest.approx(2.0)
    assert updates.magnitude_and_direction(wide.T, 2 * wide.T).magnitude == pytest.approx(1.0)


def test_what_has_no_direction_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        updates.magnitude_and_direction(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="no direction"):
        updates.magnitude_and_direction(torch.eye(2), torch.ones(2, 2).tril(-1))


@torch.no_grad()
@pytest.mark.parametrize("dora", [False, True])
def test_the_merged_weight_leaves_the_layer_alone(dora):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=dora)
    layer = layer_of(get_peft_model(models.tiny("llama"), config))
    layer.lora_B["default"].weight.normal_()
    before = layer.base_layer.weight.clone()
    merged = updates.merged_weight(layer)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged
    x = torch.randn(2, before.shape[1])
    assert torch.allclose(x @ merged.T, layer(x), atol=1e-5)
    # DoRA's magnitude has not moved, so no row has another length than before
    change = updates.magnitude_and_direction(before, merged)
    assert (change.magnitude < 1e-6) == dora and change.direction > 0


def test_what_has_no_update_is_refused():
    with pytest.raises(ValueError, match="no adapter 'other'"):
        updates.update(layer_of(wrapped()), "other")
    ia3 = get_peft_model(
        models.tiny("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match="no LoRA layer"):
        updates.table(ia3)
