"""Bytes from shapes, against counts by hand and against tensors that really exist."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers import memory, models


@pytest.fixture(scope="module")
def llama():
    return models.full_size("llama-2-7b").to(torch.bfloat16)


def test_a_4_bit_llama_by_hand(llama):
    # 32 layers of 4 * 4096 * 4096 + 3 * 4096 * 11008 in 4.127 bits; the rest in 32 bits
    packed = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    rest = llama.num_parameters() - packed
    assert memory.four_bit_bytes(llama) == pytest.approx(packed * 4.127 / 8 + 4 * rest)


def test_kept_bytes_do_not_depend_on_the_length_tried(llama):
    short, long = (memory.kept_per_token(llama, tokens=n) for n in (256, 512))
    assert short == pytest.approx(long, rel=0.01)


def test_kept_bytes_are_at_most_a_third_above_a_real_layer():
    """On the processor attention is fused and keeps 16-bit queries, keys and values."""
    torch.manual_seed(0)
    tiny = models.tiny("llama").to(torch.bfloat16)
    counted = sum(memory.saved_storages(tiny.to("meta"), 48).values())
    real = models.tiny("llama").to(torch.bfloat16)
    weights = {p.untyped_storage().data_ptr() for p in real.parameters()}
    kept = {}

    def pack(tensor):
        place = tensor.untyped_storage()
        if place.data_ptr() not in weights and tensor.shape[-2:] != (48, 48):
            kept[place.data_ptr()] = (place.nbytes(), tensor)
        return tensor

    hidden = torch.zeros(1, 48, real.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    angles = real.model.rotary_emb(hidden, torch.arange(48)[None])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        real.model.layers[1].train()(hidden, attention_mask=None, position_embeddings=angles)
    measured = sum(size for size, _ in kept.values())
    assert measured <= counted <= 1.34 * measured


def test_frozen_weights_keep_less_for_backward(llama):
    full = memory.kept_per_token(llama)
    wrapped = get_peft_model(llama, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    assert memory.kept_per_token(wrapped) < full
