"""Only the weights that the adapter was trained on give the trained model back."""

from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from block_wide_llama import block_wide_llama
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from helpers import merging
from helpers.merging import exact

AUTO = AutoModelForCausalLM
IDS = {"input_ids": torch.arange(3, 19).reshape(2, 8)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama with layers as wide as a block of 64, and an adapter of its 4-bit form."""
    base, adapter = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    torch.manual_seed(0)
    block_wide_llama().save_pretrained(base)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(merging.NF4.load(base, AUTO), lora)
    exact.disturbed(model, seed=1, size=0.1).save_pretrained(adapter)
    return base, adapter


def error(route: str, folders: tuple[Path, Path]) -> merging.MergeError:
    trained = merging.kept_apart(*folders, AUTO)
    return exact.compare(trained, merging.ROUTES[route](*folders, AUTO), IDS)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in model.named_modules()
        if isinstance(layer, bitsandbytes.nn.Linear4bit)
    }


def test_the_dequantised_base_gives_the_trained_model(folders):
    assert error("dequantised", folders).relative < 1e-5
    assert error("dequantised, bf16", folders).share < 0.1
    assert error("kept apart", folders).share == 0


@pytest.mark.parametrize(
    "route", ["into four bits", "full precision", "full precision, requantised"]
)
def test_every_other_route_gives_another_model(folders, route: str):
    assert error(route, folders).share > 0.02


def test_merging_into_four_bits_is_dequantise_add_and_round_again(folders):
    by_peft = weights(merging.into_four_bits(*folders, AUTO))
    by_hand = weights(merging.requantised(merging.onto_dequantised(*folders, AUTO), AUTO))
    targets = [name for name in by_peft if name.endswith(("q_proj", "down_proj"))]
    assert len(targets) == 4
    for name in targets:
        assert torch.equal(by_peft[name], by_hand[name]), name


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_other_four_bits_dequantise_as_well(folders, quant_type, double_quant):
    bits = merging.FourBits(quant_type, double_quant)
    trained = merging.kept_apart(*folders, AUTO, bits)
    merged = merging.onto_dequantised(*folders, AUTO, bits=bits)
    assert exact.compare(trained, merged, IDS).relative < 1e-5


def test_the_wrong_four_bits_are_another_base(folders):
    trained = merging.kept_apart(*folders, AUTO)
    merged = merging.onto_dequantised(*folders, AUTO, bits=merging.FourBits("fp4"))
    assert exact.compare(trained, merged, IDS).share > 0.1


def test_a_tiny_adapter_is_rounded_away_by_four_bits(folders, tmp_path: Path):
    """Where no sum crosses half a level, the rounded weights are the old ones."""
    base, _ = folders
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    bits = merging.FourBits(double_quant=False)
    model = get_peft_model(bits.load(base, AUTO), lora)
    exact.disturbed(model, seed=1, size=0.002).save_pretrained(tmp_path)
    trained = merging.kept_apart(base, tmp_path, AUTO, bits)
    lost = exact.compare(trained, merging.into_four_bits(base, tmp_path, AUTO, bits), IDS)
    assert lost.share > 0.5
    kept = exact.compare(trained, merging.onto_dequantised(base, tmp_path, AUTO, bits=bits), IDS)
    assert kept.relative < 1e-5
