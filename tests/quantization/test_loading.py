"""4-bit loading: the weights are bitsandbytes' own, and stay in the order that a merge reads."""

from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16, quantize_4bit
from block_wide_llama import block_wide_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from helpers import models, quantization

repacks = pytest.mark.skipif(
    not has_avx512bf16(), reason="bitsandbytes repacks 4-bit weights only with AVX512-BF16"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Llama whose layers are as wide as a block of 64, as repacking demands."""
    monkeypatch.setenv("PEFT_MEASURED_DEVICE", "cpu")
    torch.manual_seed(0)
    block_wide_llama().save_pretrained(tmp_path)
    return tmp_path


def stored_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """What each 4-bit layer's bytes stand for, by layer name."""
    return {
        name: dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in model.named_modules()
        if isinstance(layer, bitsandbytes.nn.Linear4bit)
    }


def after_evaluation_and_merge(model: nn.Module) -> dict[str, torch.Tensor]:
    """The stored weights after an untrained adapter (B = 0) was evaluated and merged."""
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora).eval()
    with torch.no_grad():
        adapted(torch.arange(8)[None])
    return stored_weights(adapted.merge_and_unload())


@pytest.mark.parametrize("quant_type", quantization.QUANT_TYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_weights_are_those_of_bitsandbytes(
    folder: Path, quant_type: str, double_quant: bool
) -> None:
    model = quantization.load_in_4bit(
        folder, AutoModelForCausalLM, quant_type=quant_type, double_quant=double_quant
    )
    original = AutoModelForCausalLM.from_pretrained(folder)
    weights = stored_weights(model)
    assert len(weights) == 2 * 7 and "lm_head" not in weights
    for name, weight in weights.items():
        packed, state = quantize_4bit(
            original.get_submodule(name).weight.data,
            quant_type=quant_type,
            compress_statistics=double_quant,
        )
        assert torch.equal(weight, dequantize_4bit(packed, state)), name
        assert not torch.equal(weight, original.get_submodule(name).weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compute_dtype_reaches_the_layers(folder: Path, dtype: torch.dtype) -> None:
    model = quantization.load_in_4bit(folder, AutoModelForCausalLM, compute_dtype=dtype)
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert {layer.compute_dtype for layer in layers} == {dtype}


def repack_as_bitsandbytes_would(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = True


def relative_change(model: nn.Module) -> dict[str, float]:
    """How far an evaluation and an untrained merge move each layer, in its weights' own spread."""
    before = stored_weights(model)
    after = after_evaluation_and_merge(model)
    return {name: ((after[name] - w).std() / w.std()).item() for name, w in before.items()}


def test_evaluation_and_an_untrained_merge_change_nothing(folder: Path) -> None:
    model = quantization.load_in_4bit(folder, AutoModelForCausalLM, double_quant=False)
    assert set(relative_change(model).values()) == {0.0}


def test_double_quantised_absmaxes_are_rounded_again_by_a_merge(folder: Path) -> None:
    change = relative_change(quantization.load_in_4bit(folder, AutoModelForCausalLM))
    merged = {name for name in change if name.endswith(("q_proj", "v_proj"))}
    assert all(change[name] < 0.002 for name in merged)
    assert {change[name] for name in change.keys() - merged} == {0.0}


@repacks
@pytest.mark.parametrize("double_quant", [True, False])
def test_without_the_handling_the_merge_scrambles(folder: Path, double_quant: bool) -> None:
    """The control. Two unrelated matrices of one spread differ by sqrt(2) of it."""
    model = quantization.load_in_4bit(folder, AutoModelForCausalLM, double_quant=double_quant)
    repack_as_bitsandbytes_would(model)
    assert min(relative_change(model).values()) > 1


def gradient_after_evaluation(model: nn.Module) -> float:
    """Sum of absolute gradients of B, in a training step that follows an evaluation."""
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora).eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        adapted(tokens)
    adapted.train()(tokens, labels=tokens).loss.backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    return sum(grad.abs().sum().item() for grad in gradients if grad is not None)


def test_training_goes_on_after_an_evaluation(folder: Path) -> None:
    model = quantization.load_in_4bit(folder, AutoModelForCausalLM)
    assert gradient_after_evaluation(model) > 0


@repacks
def test_without_the_handling_training_is_lost_after_an_evaluation(folder: Path) -> None:
    model = quantization.load_in_4bit(folder, AutoModelForCausalLM)
    repack_as_bitsandbytes_would(model)
    assert gradient_after_evaluation(model) == 0


def test_a_model_without_4bit_layers_is_left_alone() -> None:
    model = models.tiny("llama")
    assert quantization.keep_weights_unpacked(model) is model


def test_unknown_quant_type_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="Unknown quant_type 'int4'"):
        quantization.load_in_4bit(folder, AutoModelForCausalLM, quant_type="int4")


def test_a_new_head_stays_out_of_the_4_bit_layers():
    """Its weights are not in the file, so that bitsandbytes would never quantise them."""
    from transformers import AutoModelForSequenceClassification

    model = quantization.load_in_4bit(models.path("minilm"), AutoModelForSequenceClassification)
    assert type(model.classifier) is torch.nn.Linear
    assert model(input_ids=torch.tensor([[101, 2023, 102]])).logits.shape == (1, 2)
