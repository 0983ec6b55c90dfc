"""Counts as peft prints them, and file sizes as save_pretrained writes them."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from helpers import adapters, models

CASES = [
    ("llama", "lm", "CAUSAL_LM"),
    ("gpt2", "lm", "CAUSAL_LM"),
    ("bert", "seq_cls", "SEQ_CLS"),
]


def wrapped(method: str, arch: str, task: str, task_type: str) -> PeftModel:
    torch.manual_seed(0)
    steps = {"total_steps": 20} if method == "adalora" else {}
    config = adapters.config(method, task_type=task_type, **steps)
    return get_peft_model(models.tiny(arch, task), config)


def written(model: PeftModel, folder: Path) -> int:
    model.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def test_count_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, bias=False))
    model[0].requires_grad_(False)
    assert adapters.count(model) == adapters.Count(trainable=2, total=10)
    assert adapters.count(model).percent == 20.0
    assert str(adapters.count(model)) == "2 of 10 parameters train (20.0000 %)"
    assert adapters.count(nn.Sequential()).percent == 0.0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
@pytest.mark.parametrize("method", adapters.METHODS)
def test_count_is_what_peft_prints(
    method: str, case: tuple[str, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = wrapped(method, *case)
    capsys.readouterr()
    model.print_trainable_parameters()
    n = adapters.count(model)
    expected = (
        f"trainable params: {n.trainable:,} || all params: {n.total:,} || "
        f"trainable%: {n.percent:.4f}"
    )
    assert capsys.readouterr().out.strip() == expected


def test_count_of_four_bit_weights() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = nn.Sequential(bnb.nn.Linear4bit(64, 64, bias=False))
    layer = layer.to("cpu")
    assert layer[0].weight.numel() == 64 * 64 // 2
    assert adapters.count(layer).total == 64 * 64


def test_count_on_meta_by_the_formula() -> None:
    model = models.full_size("llama-2-7b")
    assert adapters.count(model).total == 6_738_415_616
    lora = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    expected = 32 * 2 * 16 * (4096 + 4096)
    assert adapters.count(lora).trainable == expected
    # Four bytes a parameter, plus a header.
    assert 4 * expected < adapters.saved_bytes(lora) < 4 * expected + 50_000


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
@pytest.mark.parametrize("method", adapters.METHODS)
def test_saved_bytes_is_the_size_of_the_file(
    method: str, case: tuple[str, str, str], tmp_path: Path
) -> None:
    model = wrapped(method, *case)
    assert adapters.saved_bytes(model) == written(model, tmp_path)


@pytest.mark.parametrize("method", ["lora", "prefix", "p-tuning-v2", "prompt", "p-tuning", "ia3"])
def test_saved_bytes_on_meta_equals_real_weights(method: str) -> None:
    config = adapters.config(method, task_type="SEQ_CLS")
    real = get_peft_model(models.tiny("bert", "seq_cls"), config)
    meta = get_peft_model(
        models.tiny("bert", "seq_cls").to("meta"), adapters.config(method, task_type="SEQ_CLS")
    )
    assert adapters.saved_bytes(meta) == adapters.saved_bytes(real)


def test_saved_bytes_with_mixed_dtypes_and_a_saved_embedding(tmp_path: Path) -> None:
    base = models.tiny("llama").to(torch.bfloat16)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(base, config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {
        torch.float32,
        torch.bfloat16,
    }
    assert adapters.saved_bytes(model) == written(model, tmp_path)


def test_saved_bytes_sums_over_adapters(tmp_path: Path) -> None:
    model = get_peft_model(models.tiny("llama"), adapters.config("lora", rank=4))
    one = adapters.saved_bytes(model)
    model.add_adapter("second", adapters.config("lora", rank=8))
    assert adapters.saved_bytes(model) > 2 * one
    assert adapters.saved_bytes(model) == written(model, tmp_path)


def test_saved_bytes_leaves_the_model_alone() -> None:
    model = get_peft_model(models.tiny("llama"), adapters.config("lora"))
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    adapters.saved_bytes(model)
    assert before == {n: (p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()}


def test_saved_bytes_needs_an_adapter() -> None:
    with pytest.raises(TypeError, match="LlamaForCausalLM has none"):
        adapters.saved_bytes(models.tiny("llama"))
