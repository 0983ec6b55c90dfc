"""What adapters cost at inference, held against the cache that a model really fills."""

import pytest
import torch
from peft import get_peft_model

from helpers import adapters, models

IDS = torch.arange(3, 19).reshape(2, 8)


def wrapped(method: str, arch: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    return get_peft_model(models.tiny(arch), adapters.config(method, task_type="CAUSAL_LM")).eval()


def filled(model: torch.nn.Module) -> tuple[int, int]:
    """Positions in the cache after one pass, and its bytes a sequence."""
    cache = model(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=True
    ).past_key_values
    bytes_ = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return cache.get_seq_length(), bytes_ // len(IDS)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["prompt", "p-tuning", "prefix", "p-tuning-v2"])
def test_virtual_tokens_take_positions_and_cache(method: str, arch: str) -> None:
    model = wrapped(method, arch)
    cost, each = adapters.at_inference(model), filled(models.tiny(arch))[1] // IDS.shape[1]
    positions, bytes_ = filled(model)
    assert cost.positions == positions - IDS.shape[1] == adapters.DEFAULT_VIRTUAL_TOKENS
    assert cost.cache_bytes == bytes_ - each * IDS.shape[1]
    assert cost.computed == (0 if "prefix" in method or "v2" in method else cost.positions)
    assert not cost.mergeable
    with pytest.raises(AttributeError, match="merge_and_unload"):
        model.merge_and_unload()


@pytest.mark.parametrize("method", ["ia3", "lora"])
def test_nothing_is_left_of_what_merges(method: str) -> None:
    model = wrapped(method)
    assert adapters.at_inference(model) == adapters.AtInference(0, 0, 0, mergeable=True)
    assert filled(model) == filled(models.tiny("llama"))


def test_full_size_shapes_without_weights() -> None:
    model = models.full_size("llama-2-7b")
    # 2 (key and value) x 32 layers x 4096 numbers of 2 bytes
    assert adapters.cache_bytes_per_token(model) == 2 * 32 * 4096 * 2


def test_a_model_without_adapter() -> None:
    with pytest.raises(TypeError, match="LlamaForCausalLM has none"):
        adapters.at_inference(models.tiny("llama"))
