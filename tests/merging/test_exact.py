"""A merge changes nothing but the last digits, whatever the method, on tiny and on real models."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from helpers import merging, models
from helpers.merging import exact

IDS = {"input_ids": torch.arange(3, 19).reshape(2, 8)}
QV = ["q_proj", "v_proj"]
REAL = {
    "smollm2": (AutoModelForCausalLM, QV),
    "minilm": (AutoModel, ["query", "value"]),
    "dinov2": (AutoModel, QV),
}


def tiny(method: str = "LoRA"):
    torch.manual_seed(0)
    model = get_peft_model(models.tiny("llama"), exact.config(method, QV))
    return exact.disturbed(model, seed=1, size=0.05).eval()


def inputs(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if name == "dinov2":
        return {"pixel_values": torch.randn(1, 3, 84, 84, generator=generator)}
    return {"input_ids": torch.randint(1000, 20000, (1, 8), generator=generator)}


def test_lora_by_hand_in_two_by_two():
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    config = LoraConfig(r=1, lora_alpha=2, target_modules=["0"])
    model = get_peft_model(nn.Sequential(layer), config)
    lora = model.base_model.model[0]
    lora.lora_A.default.weight.data = torch.tensor([[1.0, -1.0]])
    lora.lora_B.default.weight.data = torch.tensor([[0.5], [2.0]])
    # alpha / r = 2, B A = [[0.5, -0.5], [2, -2]]
    wanted = torch.tensor([[2.0, 1.0], [7.0, 0.0]])
    assert torch.equal(model.merge_and_unload()[0].weight, wanted)


@pytest.mark.parametrize("method", merging.MERGEABLE)
def test_every_method_merges_on_a_tiny_model(method: str):
    error = merging.merge_error(tiny(method), IDS)
    assert error.effect > 1e-4, "an adapter that does nothing proves nothing"
    assert error.relative < 1e-5


@pytest.mark.parametrize("name", ["minilm", "dinov2"])
@pytest.mark.parametrize("method", merging.MERGEABLE)
def test_every_method_merges_on_the_encoders(name: str, method: str, bases):
    targets = REAL[name][1]
    wrapped = get_peft_model(bases(name), exact.config(method, targets))
    error = merging.merge_error(exact.disturbed(wrapped, seed=0), inputs(name))
    assert error.effect > 1e-5
    assert error.relative < 1e-5


@pytest.mark.parametrize("method", ["LoRA", "rsLoRA", "DoRA", "AdaLoRA", "(IA)³"])
def test_the_note_s_methods_merge_on_smollm2(method: str, bases):
    wrapped = get_peft_model(bases("smollm2"), exact.config(method, QV))
    error = merging.merge_error(exact.disturbed(wrapped, seed=0), inputs("smollm2"))
    assert error.relative < 1e-5


@pytest.fixture(scope="module")
def bases():
    """Real models by name; each call gives a copy, read from the disk once."""
    import copy

    loaded = {}

    def give(name: str):
        if name not in loaded:
            loaded[name] = REAL[name][0].from_pretrained(models.path(name))
        return copy.deepcopy(loaded[name])

    return give


def test_a_forgotten_adapter_is_seen():
    model = tiny()
    base = models.tiny("llama")
    base.load_state_dict(model.unload().state_dict())
    error = exact.compare(tiny(), base, IDS)
    assert error.share == pytest.approx(1)
    assert error.relative > 1e-3


def test_fewer_digits_lose_more_and_never_all():
    model = tiny()
    shares = [
        merging.merge_error(model, IDS, dtype).share
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
    assert shares == sorted(shares)
    assert shares[0] < 1e-4 < shares[1] < shares[2] < 0.2


def test_the_model_that_was_measured_is_as_before():
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merging.merge_error(model, IDS, torch.bfloat16)
    merging.round_trip(model, torch.bfloat16)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_taking_a_merge_back_leaves_rounding_behind():
    model = tiny()
    fine = merging.round_trip(model)
    coarse = merging.round_trip(model, torch.bfloat16)
    assert 0 < fine.largest < 1e-6 < coarse.largest
    assert coarse.changed > 0


def test_an_adapter_that_does_nothing_takes_nothing_along():
    model = get_peft_model(models.tiny("llama"), exact.config("LoRA", QV))
    assert merging.round_trip(model) == merging.RoundTrip(0.0, 0.0)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'LoRA'"):
        exact.config("lora", QV)


def test_safe_merge_refuses_what_a_plain_merge_takes():
    model = tiny()
    name = "model.layers.0.self_attn.q_proj"
    model.get_base_model().get_submodule(name).lora_B.default.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    # the weight is looked at, since attention on a CPU may hide an infinite row from the output
    assert not torch.isfinite(model.merge_and_unload().get_submodule(name).weight).all()
