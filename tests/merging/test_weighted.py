"""Weighted merges: exact where they say so, mended or refused where peft's are wrong."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from helpers import merging, models
from helpers.merging.weighted import METHODS, PRUNING, WeightedMergeError, known_answer, weighted

IDS = torch.arange(3, 19).reshape(2, 8)
TARGETS = ["q_proj", "v_proj"]


def tiny(*settings, names=("one", "two", "three")):
    """A tiny Llama with an adapter for each dict of settings, moved away from its start."""
    torch.manual_seed(0)
    model = models.tiny("llama")
    for name, extra in zip(names, settings, strict=False):
        chosen = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False}
        config = LoraConfig(**(chosen | extra))
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    for key, parameter in model.named_parameters():
        if "lora_" in key or parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def logits(model, name=None):
    if name:
        model.set_adapter(name, inference_mode=True)
    return model(input_ids=IDS).logits


def updates(model, name):
    return [
        layer.get_delta_weight(name).detach()
        for layer in model.modules()
        if hasattr(layer, "lora_A") and name in layer.lora_A
    ]


class Line(nn.Module):
    """One layer of 2 x 2, so that all numbers can be computed by hand."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 2, bias=False)

    def forward(self, x):
        return self.line(x)


def two_by_two():
    config = LoraConfig(r=1, lora_alpha=2, target_modules=["line"])  # scaling 2
    model = get_peft_model(Line(), config, adapter_name="one")
    model.add_adapter("two", config)
    layer = model.base_model.model.line
    layer.lora_A["one"].weight.data = torch.tensor([[1.0, 0.0]])
    layer.lora_B["one"].weight.data = torch.tensor([[1.0], [2.0]])
    layer.lora_A["two"].weight.data = torch.tensor([[0.0, 1.0]])
    layer.lora_B["two"].weight.data = torch.tensor([[3.0], [0.0]])
    return model, layer


def test_cat_is_the_sum_computed_by_hand():
    model, layer = two_by_two()
    made = weighted(model, {"one": 1.0, "two": 0.5}, "both")
    # 1.0 * 2 * [[1, 0], [2, 0]] + 0.5 * 2 * [[0, 3], [0, 0]]
    wanted = torch.tensor([[2.0, 3.0], [4.0, 0.0]])
    assert torch.allclose(layer.get_delta_weight("both"), wanted)
    assert (made.name, made.rank) == ("both", 2)
    assert made.distance < 1e-6


def test_linear_has_cross_terms_computed_by_hand():
    model, layer = two_by_two()
    made = weighted(model, {"one": 0.5, "two": 0.5}, "both", method="linear")
    # the factor of each is sqrt(0.5 * 2) = 1: (B1 + B2)(A1 + A2) = [[4], [2]] [[1, 1]]
    assert torch.allclose(layer.get_delta_weight("both"), torch.tensor([[4.0, 4.0], [2.0, 2.0]]))
    sum_ = torch.tensor([[1.0, 3.0], [2.0, 0.0]])
    gap = torch.tensor([[4.0, 4.0], [2.0, 2.0]]) - sum_
    assert made.distance == pytest.approx((gap.norm() / sum_.norm()).item(), rel=1e-5)


def test_exact_methods_give_the_sum_also_with_unequal_ranks_and_a_negative_weight():
    model = tiny({}, {"r": 2, "lora_alpha": 1}, {"alpha_pattern": {"v_proj": 32}})
    weights = {"one": 1.0, "two": -0.5, "three": 0.25}
    assert weighted(model, weights, "cat").distance < 1e-5
    assert weighted(model, weights, "svd", method="svd", rank=10).distance < 1e-5
    assert weighted(model, weights, "small", method="svd", rank=1).distance > 0.1
    model.base_model.set_adapter(["one", "two"])
    weighted(model, {"one": 1.0, "two": 1.0}, "pair")
    assert torch.allclose(logits(model), logits(model, "pair"), atol=1e-5)


@pytest.mark.parametrize(("method", "times"), [("cat", 1), ("svd", 1), ("linear", 2)])
def test_an_adapter_averaged_with_itself(method, times):
    model = tiny({}, {})
    numbers = dict(model.named_parameters())
    for key, parameter in numbers.items():
        if ".two." in key:
            parameter.data = numbers[key.replace(".two.", ".one.")].data.clone()
    weighted(model, {"one": 0.5, "two": 0.5}, "twin", method=method)
    for twin, one in zip(updates(model, "twin"), updates(model, "one"), strict=True):
        assert torch.allclose(twin, times * one, atol=1e-5)


KINDS = [
    {},
    {"use_rslora": True},
    {"alpha_pattern": {"v_proj": 32}},
    {"rank_pattern": {"v_proj": 2}},
    {"layers_to_transform": [1]},
    {"target_modules": ["embed_tokens", "q_proj"]},
]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_one_adapter_at_weight_one_is_itself_and_survives_the_file(settings, tmp_path):
    model = tiny(settings, settings)
    wanted = logits(model, "one")
    weighted(model, {"one": 1.0, "two": 0.0}, "merged")
    assert known_answer(model, "one", "merged", input_ids=IDS) < 1e-5
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    torch.manual_seed(0)
    back = PeftModel.from_pretrained(models.tiny("llama"), tmp_path / "merged").eval()
    assert torch.allclose(logits(back), wanted, atol=1e-5)


REFUSED = {
    "is DoRA": {"use_dora": True},
    "lora_bias=False": {"lora_bias": True},
    "has its own lm_head": {"modules_to_save": ["lm_head"]},
    "rows of the embedding": {"trainable_token_indices": [3, 4]},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_peft_gets_wrong_is_refused(reason):
    model = tiny(REFUSED[reason])
    with pytest.raises(WeightedMergeError, match=f"adapter 'one' .*{reason}"):
        weighted(model, {"one": 1.0}, "merged")
    assert list(model.peft_config) == ["one"]
    # the refusal is needed: peft makes another adapter without a word
    model.add_weighted_adapter(["one"], [1.0], "merged", combination_type="linear")
    assert known_answer(model, "one", "merged", input_ids=IDS) > 0.05


def test_rslora_as_peft_merges_it_is_wrong():
    model = tiny({"use_rslora": True})
    model.add_weighted_adapter(["one"], [1.0], "merged", combination_type="linear")
    for merged, one in zip(updates(model, "merged"), updates(model, "one"), strict=True):
        assert torch.allclose(merged, 2 * one, atol=1e-5)  # the root of rank 4


def test_a_classification_head_is_refused():
    torch.manual_seed(0)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    model = get_peft_model(models.tiny("bert", "seq_cls"), config, adapter_name="one")
    with pytest.raises(WeightedMergeError, match="has its own classifier"):
        weighted(model, {"one": 1.0}, "merged")


TOGETHER = [
    ({"layers_to_transform": [0]}, {"layers_to_transform": [1]}, "cat", "layers_to_transform is"),
    ({}, {"r": 2}, "linear", "needs equal ranks"),
    ({}, {"rank_pattern": {"v_proj": 2}}, "linear", "rank_pattern"),
]


@pytest.mark.parametrize(("one", "two", "method", "reason"), TOGETHER)
def test_adapters_that_do_not_fit_together(one, two, method, reason):
    with pytest.raises(WeightedMergeError, match=reason):
        weighted(tiny(one, two), {"one": 1.0, "two": 1.0}, "merged", method=method)


def test_peft_loses_the_second_adapters_layers():
    model = tiny({"layers_to_transform": [0]}, {"layers_to_transform": [1]})
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "merged", combination_type="cat")
    assert len(updates(model, "merged")) == 2  # of the four that are adapted


ASKED = [
    ({"one": 1.0}, "two", {}, "has an adapter 'two' already"),
    ({"ones": 1.0}, "new", {}, "Unknown adapter 'ones'; did you mean 'one'"),
    ({}, "new", {}, "weights is empty"),
    ({"one": float("nan")}, "new", {}, "not a finite number"),
    ({"one": 1.0}, "new", {"method": "tie"}, "Unknown method 'tie'; did you mean 'ties'"),
    ({"one": 1.0}, "new", {"method": "ties"}, "give density between 0 and 1, not None"),
    ({"one": 1.0}, "new", {"method": "ties", "density": 1.5}, "not 1.5"),
    ({"one": 1.0}, "new", {"density": 0.5}, "cat does not prune"),
    ({"one": 1.0}, "new", {"rank": 4}, "not 4 for cat"),
    ({"one": 1.0}, "1", {}, "'1' is a part of this model's names"),
]


@pytest.mark.parametrize(("weights", "name", "more", "reason"), ASKED)
def test_what_is_asked_wrongly(weights, name, more, reason):
    with pytest.raises(WeightedMergeError, match=reason):
        weighted(tiny({}, {}), weights, name, **more)


def test_without_lora_and_while_merged():
    with pytest.raises(WeightedMergeError, match="for LoRA adapters"):
        weighted(models.tiny("llama"), {"one": 1.0}, "merged")
    config = IA3Config(target_modules=TARGETS, feedforward_modules=[])
    with pytest.raises(WeightedMergeError, match="for LoRA adapters"):
        weighted(get_peft_model(models.tiny("llama"), config), {"default": 1.0}, "merged")
    model = tiny({}, {})
    model.merge_adapter()
    with pytest.raises(WeightedMergeError, match="unmerge_adapter"):
        weighted(model, {"one": 1.0}, "merged")


def test_a_name_that_is_taken_makes_peft_do_nothing():
    model = tiny({}, {})
    before = logits(model, "two")
    model.add_weighted_adapter(["one"], [1.0], "two", combination_type="linear")
    assert torch.equal(logits(model, "two"), before)


def test_an_adapter_called_like_a_layer_robs_the_files_of_the_others(tmp_path):
    model = tiny({}, {}, names=("one", "1"))
    model.save_pretrained(tmp_path, selected_adapters=["one"])
    stored = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert {key.split(".layers.")[1][0] for key in stored} == {"0"}  # of two layers


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_leaves_the_rest_alone(method):
    model = tiny({}, {})
    model.set_adapter("two")
    before, state = logits(model), torch.random.get_rng_state()
    density = 0.5 if method in PRUNING else None
    made = weighted(model, {"one": 0.5, "two": 0.5}, "merged", method=method, density=density)
    assert torch.equal(logits(model), before)
    assert model.active_adapter == "two"
    assert torch.equal(torch.random.get_rng_state(), state)
    again = weighted(model, {"one": 0.5, "two": 0.5}, "again", method=method, density=density)
    assert made.distance == again.distance
    assert (made.distance < 1e-5) == (method == "cat")


def test_another_seed_prunes_other_numbers():
    model = tiny({}, {})
    weights, how = {"one": 0.5, "two": 0.5}, {"method": "dare_linear", "density": 0.5}
    one, two = (weighted(model, weights, f"seed{s}", seed=s, **how).distance for s in (0, 1))
    assert one != two


def test_a_merge_that_fails_leaves_no_half_adapter(monkeypatch):
    model = tiny({}, {})

    def fail(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(
        type(model.base_model), "_svd_generalized_task_arithmetic_weighted_adapter", fail
    )
    with pytest.raises(RuntimeError, match="no memory"):
        weighted(model, {"one": 0.5, "two": 0.5}, "merged", method="svd")
    assert list(model.peft_config) == ["one", "two"]
    assert merging.weighted(model, {"one": 0.5, "two": 0.5}, "merged").distance < 1e-5


def test_weights_that_cancel():
    model = tiny({}, {})
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.zero_()
    assert weighted(model, {"one": 1.0}, "nothing").distance == 0
