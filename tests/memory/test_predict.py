"""Predictions against bytes counted by hand, and against each other."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig

from helpers import memory, models
from helpers.memory.predict import model_config

LLAMA = "llama-3.2-3b"
WEIGHTS = 3_212_749_824  # parameters, the tied head counted once


def shallow(layers: int = 3) -> transformers.PreTrainedConfig:
    config = models.published_config(LLAMA)
    config.num_hidden_layers = layers
    return config


def run(method="lora", config=None, **settings):
    return memory.predict(config or shallow(), method, **{"batch": 2, "seq": 128} | settings)


def test_weights_of_the_whole_model_are_two_bytes_each():
    found = memory.predict(
        LLAMA, "lora", batch=1, seq=64, targets=["q_proj", "v_proj"], exact=False
    )
    # and 128 rotary frequencies of 32 bits
    assert found.categories["weights"] == pytest.approx(2 * WEIGHTS, abs=1024)


def test_adapters_and_their_state_by_hand():
    found = run(rank=8, targets=["q_proj", "v_proj"])
    adapters = 4 * 3 * 8 * ((3072 + 3072) + (3072 + 1024))  # 32 bits, three layers
    assert found.categories["adapters"] == adapters
    assert found.phases["optimizer"].categories["optimizer state"] == 2 * adapters
    assert found.phases["optimizer"].categories["gradients"] == adapters
    assert found.phases["optimizer"].operator == "_foreach_sqrt"


def test_full_fine_tuning_keeps_eight_bytes_beside_each_16_bit_weight():
    peak = run("full").phases["optimizer"].categories
    weights = peak["weights"]
    assert peak["gradients"] == pytest.approx(weights, rel=1e-4)
    assert peak["optimizer state"] == pytest.approx(2 * weights, rel=1e-4)
    assert peak["temporaries"] == pytest.approx(weights, rel=1e-4)  # AdamW's square roots


def test_four_bits_by_hand():
    sizes = {
        double: run("qlora", double_quant=double, rank=8, targets=["q_proj"]).categories["weights"]
        for double in (True, False)
    }
    packed = 3 * (2 * 3072 * 3072 + 2 * 3072 * 1024 + 3 * 3072 * 8192)
    rest = 4 * (128_256 * 3072 + 7 * 3072)  # embeddings and norms in 32 bits
    assert sizes[False] == pytest.approx(packed / 2 + 4 * packed / 64 + rest, rel=1e-4)
    saved = sizes[False] - sizes[True]
    assert saved == pytest.approx(packed / 64 * (3 - 4 / 256), rel=0.01)


def test_checkpointing_keeps_one_tensor_a_layer():
    kept = [
        run(config=shallow(layers), checkpointing=True).phases["forward"].categories["activations"]
        for layers in (3, 5)
    ]
    assert kept[1] - kept[0] == 2 * (2 * 128 * 3072) * 2  # layers x numbers x bytes


def test_eager_attention_keeps_the_table_of_scores():
    eager, fused = (run(attention=a, seq=512) for a in ("eager", "sdpa"))
    table = 2 * 24 * 512 * 512  # numbers of a layer: 16 bits after and 32 bits inside softmax
    more = eager.phases["forward"].categories["activations"]
    more -= fused.phases["forward"].categories["activations"]
    assert more > 3 * table * 4


def test_paged_states_are_outside_the_allocator():
    plain, paged = (run(optimizer=o, rank=64) for o in ("adamw_8bit", "paged_adamw_8bit"))
    assert paged.paged > 0 == plain.paged
    assert paged.categories["optimizer state"] < plain.categories["optimizer state"]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_extrapolation_agrees_within_a_per_cent(method, checkpointing):
    config = shallow(10)
    exact, fast = (
        run(method, config, checkpointing=checkpointing, exact=exact) for exact in (True, False)
    )
    assert exact.exact and not fast.exact
    assert fast.allocated == pytest.approx(exact.allocated, rel=0.01)


@pytest.mark.parametrize("name", ["llava-1.5-7b", "qwen2-vl-7b"])
def test_extrapolation_agrees_whether_or_not_the_vision_tower_sees_a_picture(name):
    """Qwen-VL is fed text alone: its tower trains in full fine-tuning, and has no gradient."""
    config = models.published_config(name)
    config.text_config.num_hidden_layers = 8
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = config.text_config.layer_types[:8]
    deep = "depth" if name == "qwen2-vl-7b" else "num_hidden_layers"
    setattr(config.vision_config, deep, 3)
    exact, fast = (run("full", config, batch=1, seq=640, exact=exact) for exact in (True, False))
    assert fast.allocated == pytest.approx(exact.allocated, rel=0.003)
    assert fast.reserved == pytest.approx(exact.reserved, rel=0.1)


@pytest.mark.parametrize("method", memory.METHODS)
def test_every_method_is_simulated(method):
    assert run(method).allocated > 0


@pytest.mark.parametrize("name", ["gpt2", "bert-base", "t5-small", "mistral-7b", "qwen2.5-7b"])
def test_every_family_is_simulated(name):
    config = models.published_config(name)
    config.num_hidden_layers = 2
    found = memory.predict(config, "lora", batch=1, seq=64)
    assert found.reserved >= found.allocated > 0


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "mixed"])
def test_dtypes(dtype):
    found = run(dtype=dtype)
    size = 4 if dtype in ("fp32", "mixed") else 2
    embeddings = 128_256 * 3072
    assert found.categories["weights"] > size * embeddings


def test_a_configuration_of_peft_a_folder_and_a_file_are_understood(tmp_path):
    models.tiny("llama").config.save_pretrained(tmp_path)
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    by = [
        memory.predict(place, adapter, batch=1, seq=16).allocated
        for place in (tmp_path, tmp_path / "config.json", str(tmp_path))
    ]
    assert len(set(by)) == 1


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "mixed"])
def test_a_card_without_bf16_units_is_noted(dtype):
    old, new = (
        memory.predict(models.tiny("llama").config, batch=1, seq=8, dtype=dtype, gpu=card)
        for card in ("t4", "a100-80gb")
    )
    said = ["t4 has no bf16 units: train with --dtype fp16"]
    assert old.notes == (said if dtype in ("bf16", "mixed") else [])
    assert new.notes == []


@pytest.mark.parametrize(("method", "rows"), [("lora", 128), ("prompt", 112)])
def test_rows_beyond_the_positions_are_noted(method, rows):
    config = models.tiny("llama").config  # 128 positions; a prompt has 16 virtual tokens
    fits, longer = (memory.predict(config, method, batch=1, seq=rows + n) for n in (0, 1))
    assert fits.notes == []
    assert longer.notes == [
        "rows of 129 tokens are longer than the 128 positions that the model is made for"
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "lama-2-7b"}, "did you mean 'llama-2-7b'"),
        ({"method": "qlorra"}, "did you mean 'qlora'"),
        ({"dtype": "float8"}, "Unknown dtype 'float8'"),
        ({"optimizer": "adam8"}, "did you mean 'adamw'"),
        ({"attention": "flash"}, "Unknown attention 'flash'"),
        ({"gpu": "t44"}, "did you mean 't4'"),
        ({"gpu": "24"}, "cards of about 24 GiB: l4, a10g, rtx-3090, rtx-4090"),
        ({"gpu": "16 GB"}, "cards of about 16 GiB: t4, v100-16gb, rtx-4080"),
        ({"gpu": "4080"}, "did you mean 'rtx-4080'"),
        ({"gpu": "7"}, "Unknown GPU '7'. Known: rtx-3060"),
        ({"model": "llama-3-8b"}, "Or give the path of its config.json"),
        ({"batch": 0}, "batch must be a whole number of at least 1, but was 0"),
        ({"seq": 2.5}, "seq must be a whole number"),
        ({"rank": -1}, "rank must be a whole number"),
        ({"method": "qlora", "dtype": "mixed"}, "'qlora' has no dtype 'mixed'"),
    ],
)
def test_bad_input_is_one_sentence(change, sentence):
    settings = {"model": LLAMA, "method": "lora", "batch": 1, "seq": 16} | change
    with pytest.raises(ValueError, match=sentence) as caught:
        memory.predict(settings.pop("model"), settings.pop("method"), **settings)
    assert "\n" not in str(caught.value)


def test_paths_where_nothing_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for given in (str(tmp_path / "none"), "./none", "none/config.json"):
        with pytest.raises(ValueError, match=f"There is no file {given};"):
            memory.predict(given, batch=1, seq=16)
    for given in (tmp_path / "empty", "empty"):
        with pytest.raises(ValueError, match=f"no config.json in the folder {given}"):
            memory.predict(given, batch=1, seq=16)


def test_a_folder_does_not_hide_a_published_name(tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_config("gpt2").model_type == "gpt2"


def test_a_file_that_is_no_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(ValueError, match="needs a model_type"):
        memory.predict(tmp_path, batch=1, seq=16)


def test_real_quantisation_still_works_after_a_prediction():
    """Made on fake tensors first, bitsandbytes' table of 8-bit values would stay fake."""
    import bitsandbytes.functional

    bitsandbytes.functional.name2qmap.clear()
    run("qlora")
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(64, 64), compress_statistics=True
    )
    assert state.nested and isinstance(float(state.offset), float)
    assert type(bitsandbytes.functional.name2qmap["dynamic"]) is torch.Tensor
    assert packed.numel() == 64 * 32
