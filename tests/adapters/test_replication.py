"""Layer replication: which layers come out, what they share, and what merging and saving do."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from helpers import adapters, models, quantization
from helpers.adapters import replication

NOTE = [[0, 4], [2, 5]]
IDS = torch.tensor([[5, 9, 33, 70, 12, 8], [3, 4, 90, 41, 41, 6]])
QV = ["q_proj", "v_proj"]


def llama(layers: int = 5) -> torch.nn.Module:
    config = models.tiny("llama").config
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def replicated(ranges: list[list[int]] = NOTE) -> PeftModel:
    """A tiny Llama, replicated, with adapters that do something (B is not zero)."""
    config = LoraConfig(
        r=4,
        target_modules=QV,
        layer_replication=ranges,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    return get_peft_model(llama(), config).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


# ------------------------------------------------------------------------- which layers come out


def test_the_note_by_hand():
    assert replication.layers(NOTE, 5) == [0, 1, 2, 3, 2, 3, 4]


@pytest.mark.parametrize("ranges", [NOTE, [[0, 5]], [[1, 3]], [[2, 5], [0, 3]], [[0, 1]] * 3])
def test_as_peft_stacks_them(ranges):
    net = llama()
    weights = [layer.mlp.up_proj.weight for layer in net.model.layers]
    config = LoraConfig(r=4, target_modules=QV, layer_replication=ranges)
    stacked = replication.stack(get_peft_model(net, config))
    found = [
        next(i for i, weight in enumerate(weights) if weight is layer.mlp.up_proj.weight)
        for layer in stacked
    ]
    assert found == replication.layers(ranges, 5)
    assert [layer.self_attn.layer_idx for layer in stacked] == list(range(len(found)))
    assert net.config.num_hidden_layers == len(found)


@pytest.mark.parametrize(
    ("ranges", "says"),
    [
        ([], r"is empty; give ranges such as \[\[0, 4\], \[2, 5\]\]"),
        ([[0, 6]], r"\[0, 6\] leaves a model of 5 layers; its widest range is \[0, 5\]"),
        ([[0, 4], [-1, 2]], r"\[-1, 2\] leaves a model of 5 layers"),
        ([[4, 2]], r"\[4, 2\] holds no layer.*did you mean \[2, 4\]"),
        ([[2, 2]], r"\[2, 2\] holds no layer.*did you mean \[2, 3\]"),
        ([[0, 1, 2]], r"two whole numbers such as \[0, 5\], not \[0, 1, 2\]"),
        ([[0, 4.0]], r"two whole numbers such as \[0, 5\], not \[0, 4.0\]"),
        ([[False, True]], r"two whole numbers"),
    ],
)
def test_bad_ranges_are_refused(ranges, says):
    with pytest.raises(ValueError, match=says):
        replication.layers(ranges, 5)


def test_peft_takes_a_negative_start_without_a_word():
    """The reason for a check of our own: [-2, 2] stacks the last two layers, then the first."""
    assert len(replication.stack(replicated([[-2, 2]]))) == 4


@pytest.mark.parametrize("arch", ["gpt2", "falcon", "t5"])
def test_a_model_that_peft_cannot_replicate_is_refused(arch):
    with pytest.raises(ValueError, match="no list of layers where peft looks"):
        replication.stack(models.tiny(arch))
    config = LoraConfig(r=4, target_modules="all-linear", layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(ValueError, match="Could not locate the layers"):
        get_peft_model(models.tiny(arch), config)


def test_bert_is_replicated_too():
    config = LoraConfig(r=4, target_modules=["query"], layer_replication=[[0, 2], [1, 2]])
    assert len(replication.stack(get_peft_model(models.tiny("bert"), config))) == 3


# ------------------------------------------------------------------------------- what is shared


def test_storages_by_hand():
    plain = replication.storages(llama())
    found = replication.storages(replicated())
    assert plain.stored == plain.held == 5 * 9  # seven matrices and two norms a layer
    assert (found.stored, found.held) == (5 * 9, 7 * 9)
    assert found.stored_bytes == plain.stored_bytes == plain.held_bytes
    assert found.held_bytes * 5 == plain.held_bytes * 7
    parameters = sum(p.numel() for p in llama().model.layers.parameters())
    assert plain.stored_bytes == 4 * parameters


@pytest.mark.parametrize("name", ["llama-2-7b", "mistral-7b"])
def test_storages_on_the_meta_device(name):
    config = LoraConfig(r=16, layer_replication=[[0, 24], [8, 32]], task_type="CAUSAL_LM")
    net = models.full_size(name)
    before = net.num_parameters()
    model = get_peft_model(net, config)
    found = replication.storages(model)
    assert 2 * found.held_bytes == 3 * found.stored_bytes
    assert (found.stored, found.held) == (32 * 9, 48 * 9)
    count = adapters.count(model)
    assert count.total - count.trainable == before  # peft counts a shared weight once


def test_every_layer_has_an_adapter_of_its_own():
    model = replicated()
    a = [layer.self_attn.q_proj.lora_A["default"].weight for layer in replication.stack(model)]
    assert len({weight.data_ptr() for weight in a}) == 7
    q = "model.layers.{}.self_attn.q_proj"
    groups = replication.shared_targets(model)
    assert [q.format(2), q.format(4)] in groups and [q.format(3), q.format(5)] in groups
    assert len(groups) == 2 * len(QV)
    assert replication.shared_targets(replicated([[0, 5]])) == []


def test_generation_with_a_cache_is_generation_without():
    model = replicated()
    arguments = {"max_new_tokens": 8, "do_sample": False}
    cached, plain = (
        model.generate(input_ids=IDS, use_cache=use, **arguments) for use in (True, False)
    )
    assert torch.equal(cached, plain)


@torch.no_grad()
def test_one_module_twice_breaks_the_cache():
    """Why peft makes new modules around the shared weights: a module has one place in the cache."""
    net = llama()
    net.model.layers = torch.nn.ModuleList(net.model.layers[i] for i in (0, 1, 2, 3, 2, 3, 4))
    net.config.num_hidden_layers = 7  # transformers runs only so many of the list
    config = LoraConfig(r=4, target_modules=QV, layer_replication=NOTE)
    right = logits(get_peft_model(llama(), config))
    cached, plain = (net(input_ids=IDS, use_cache=use).logits for use in (True, False))
    assert torch.allclose(plain, right, atol=1e-6)
    assert not torch.allclose(cached, right, atol=1e-2)


# ------------------------------------------------------------------------------------- merging


def test_peft_merges_two_adapters_into_one_weight_without_a_word():
    model = replicated()
    before = logits(model)
    model.merge_adapter()
    assert (logits(model) - before).abs().max() > 0.1
    model.unmerge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_the_shared_weight_receives_the_sum_of_both_updates():
    model = replicated()
    third, fifth = (replication.stack(model)[i].self_attn.q_proj for i in (2, 4))
    before = third.base_layer.weight.clone()
    both = third.get_delta_weight("default") + fifth.get_delta_weight("default")
    model.merge_adapter()
    assert third.base_layer.weight is fifth.base_layer.weight
    assert torch.allclose(third.base_layer.weight, before + both, atol=1e-6)


def test_separated_weights_merge_right_and_come_back_from_the_disk(tmp_path):
    model = replicated()
    before, shared = logits(model), replication.storages(model)
    added = replication.separate(model)
    assert added == shared.held_bytes - shared.stored_bytes
    assert replication.separate(model) == 0
    assert replication.shared_targets(model) == []
    assert torch.equal(logits(model), before)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), before, atol=1e-5)
    merged.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert back.config.num_hidden_layers == 7
    assert torch.equal(logits(back), logits(merged))


def test_tied_embeddings_stay_tied():
    config = models.tiny("llama").config
    config.tie_word_embeddings = True
    net = AutoModelForCausalLM.from_config(config)
    lora = LoraConfig(r=4, target_modules=QV, layer_replication=[[0, 2], [1, 2]])
    base = get_peft_model(net, lora).get_base_model()
    assert replication.separate(base) > 0
    assert base.lm_head.weight is base.model.embed_tokens.weight


# -------------------------------------------------------------------------------------- saving


def test_shared_weights_cannot_be_saved_as_a_whole_model(tmp_path):
    with pytest.raises(RuntimeError, match="shared tensors"):
        replicated().unload().save_pretrained(tmp_path)


def test_an_adapter_comes_back_on_the_plain_base(tmp_path):
    model = replicated()
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size == adapters.saved_bytes(model)
    back = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(logits(back), logits(model))


def test_a_second_adapter_replicates_the_replicated_stack(tmp_path):
    """peft stacks again, silently, and the first adapter is another model from then on."""
    model = replicated()
    model.save_pretrained(tmp_path)
    before = logits(model)
    model.load_adapter(tmp_path, "second")
    found = [layer.mlp.up_proj.weight for layer in replication.stack(model)]
    assert found[6] is found[2]  # it was layer 4: [0, 1, 2, 3, 2, 3, 2] now
    assert (logits(model) - before).abs().max() > 0.1


def test_a_second_adapter_without_ranges_keeps_the_stack():
    model = replicated()
    before = logits(model)
    config = copy.deepcopy(model.peft_config["default"])
    config.layer_replication = None
    model.add_adapter("second", config)
    assert torch.equal(logits(model), before)
    model.set_adapter("second")
    assert (logits(model) - before).abs().max() > 1e-3


# ------------------------------------------------------------------------------ other traps


def test_a_configuration_with_a_type_for_each_layer_is_not_stretched():
    """Qwen2 lists a kind of attention for each layer, and peft leaves that list as it was."""
    config = LoraConfig(r=4, target_modules=QV, layer_replication=[[0, 2], [1, 2]])
    model = get_peft_model(models.tiny("qwen"), config)
    assert (model.config.num_hidden_layers, len(model.config.layer_types)) == (3, 2)
    with pytest.raises(IndexError):
        model(input_ids=IDS)
    model.config.layer_types = model.config.layer_types[:1] * 3
    assert model(input_ids=IDS).logits.isfinite().all()


def test_unload_leaves_the_stack_as_it_is():
    base = llama()
    config = LoraConfig(r=4, target_modules=QV, layer_replication=NOTE)
    assert len(get_peft_model(base, config).unload().model.layers) == len(base.model.layers) == 7


def test_four_bit_weights_are_shared_and_separated(tmp_path):
    llama().save_pretrained(tmp_path)
    net = quantization.load_in_4bit(tmp_path, AutoModelForCausalLM)
    config = LoraConfig(r=4, target_modules=QV, layer_replication=NOTE, init_lora_weights=False)
    model = get_peft_model(net, config).eval()
    before, shared = logits(model), replication.storages(model)
    assert shared.stored * 7 == shared.held * 5
    assert replication.separate(model) == shared.held_bytes - shared.stored_bytes
    assert replication.shared_targets(model) == []
    assert torch.equal(logits(model), before)
