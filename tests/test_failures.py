"""Every failure of lesson 10: it happens with the installed versions, is found, and is mended."""

import copy
import math
import re
import warnings
from pathlib import Path

import bitsandbytes as bnb
import nbformat
import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from helpers import adapters, models, quantization, training
from helpers.adapters import replication
from helpers.merging import exact

LESSON = Path(__file__).parent.parent / "notebooks" / "10_when_it_goes_wrong.ipynb"
QV = ["q_proj", "v_proj"]
IDS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}
LABELLED = {"input_ids": IDS, "labels": torch.tensor([0, 1])}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fresh(arch: str = "llama", task: str = "lm", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return models.tiny(arch, task)


def lora(base: nn.Module | None = None, **settings: object) -> PeftModel:
    config = LoraConfig(**({"target_modules": QV} | settings))
    return get_peft_model(base or fresh(), config)


def found(model: nn.Module) -> set[str]:
    return {finding.code for finding in adapters.inspect(model).findings}


def without_gradient(model: nn.Module, batch: dict = BATCH) -> list[str]:
    model.train().zero_grad()
    model(**batch).loss.backward()
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_typo() -> None:
    model = lora(target_modules=["q_proj", "v_prj"])
    assert adapters.count(model).trainable < adapters.count(lora()).trainable
    assert "target-not-found" in found(model) and "target-not-found" not in found(lora())


def test_second_config() -> None:
    base = fresh()
    first = lora(base)
    second = lora(base, target_modules=["q_proj"])
    trains = {n.split(".")[-4] for n, p in second.named_parameters() if p.requires_grad}
    assert trains == set(QV) and "left-over" in found(second)
    third = lora(first.unload(), target_modules=["q_proj"])
    assert "left-over" not in found(third)


def test_checkpointing() -> None:
    model = lora()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.disable_input_require_grads()
    assert "checkpointing-without-input-grad" in found(model)
    with pytest.raises(RuntimeError, match="does not require grad"):
        without_gradient(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert not without_gradient(model)


def test_copies() -> None:
    base = fresh("llama", "seq_cls")
    model = lora(base, target_modules=["q_proj"], task_type="SEQ_CLS")
    for name, parameter in model.named_parameters():
        if "score" in name:
            parameter.requires_grad = True
    assert [n.split(".")[-2] for n in without_gradient(model, LABELLED)] == ["original_module"]
    assert "lost-on-save" in found(model)


def test_adalora(tmp_path: Path) -> None:
    schedule = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 1, "total_step": 12}

    def left(*callbacks: object) -> int:
        model = get_peft_model(fresh(), AdaLoraConfig(**schedule, target_modules=QV))
        quiet = {"use_cpu": True, "report_to": "none", "save_strategy": "no"}
        args = TrainingArguments(tmp_path, max_steps=12, learning_rate=1e-2, **quiet)
        rows = [{"input_ids": row, "labels": row} for row in IDS] * 8
        Trainer(model, args, train_dataset=rows, callbacks=list(callbacks)).train()
        return int(adapters.live_ranks(model).sum())

    assert left() == 16 and left(adapters.AllocateRanks()) <= 8


def test_learning_rate() -> None:
    def last(rate: float) -> float:
        model = lora(target_modules="all-linear", lora_alpha=16)
        history = training.train(model, [BATCH] * 100, steps=100, learning_rate=rate)
        return sum(history.losses[-5:]) / 5

    start = math.log(100)  # nats of a guess among the tiny model's words
    assert last(5e-5) > start - 0.3 and last(5e-3) < start - 0.6


def test_merged() -> None:
    model = lora(init_lora_weights=False)
    model.merge_adapter()
    assert "adapter-merged" in found(model)
    with pytest.raises(RuntimeError, match="does not require grad"):
        without_gradient(model)
    model.unmerge_adapter()
    assert not without_gradient(model)


def test_masked_labels() -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.path("smollm2"))
    end = tokenizer.eos_token_id
    for pad, kept in ((tokenizer.eos_token, 0), ("<|endoftext|>", 2)):
        tokenizer.pad_token = pad
        rows = [{"input_ids": [*tokenizer(text).input_ids, end]} for text in ("Yes.", "No, no.")]
        labels = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)["labels"]
        assert int((labels == end).sum()) == kept
    masked = {"input_ids": IDS, "labels": torch.full_like(IDS, -100)}
    assert fresh()(**masked).loss.isnan()
    with pytest.raises(training.TrainingError, match="masked"):
        training.check_batch(masked)


@pytest.mark.parametrize("low", [True, False])
def test_half_precision(low: bool) -> None:
    config = LoraConfig(target_modules=QV)
    model = get_peft_model(fresh().half(), config, autocast_adapter_dtype=not low).train()
    assert ("low-precision-training" in found(model)) is low
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**BATCH).loss.backward()
    optimizer.step()
    assert bool(model(**BATCH).loss.isnan()) is low


def test_padding_side() -> None:
    torch.manual_seed(0)
    model = fresh()
    short, pad = IDS[:1, :4], torch.zeros(1, 4, dtype=torch.long)
    alone = model.generate(short, max_new_tokens=3, do_sample=False)[0, 4:]
    for row, same in (([pad, short], True), ([short, pad], False)):
        rows = torch.cat(row, 1)
        mask = (rows > 0).long()
        out = model.generate(rows, attention_mask=mask, max_new_tokens=3, do_sample=False)
        assert torch.equal(out[0, 8:], alone) is same


def test_soft_prompt_padding() -> None:
    torch.manual_seed(0)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(fresh(), config).eval()
    short, pad = IDS[:1, :4], torch.zeros(1, 4, dtype=torch.long)
    alone = exact.output(model, {"input_ids": short})[:, -1]
    for parts, at, same in (([pad, short], -1, False), ([short, pad], -5, True)):
        row = torch.cat(parts, 1)
        there = exact.output(model, {"input_ids": row, "attention_mask": (row > 0).long()})
        assert torch.allclose(there[:, at], alone, atol=1e-6) is same


def test_prefix_checkpointing() -> None:
    config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    model = get_peft_model(fresh("bert", "seq_cls"), config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert "prefix-with-checkpointing" in found(model)
    assert any("prompt" in name for name in without_gradient(model, LABELLED))
    model.gradient_checkpointing_disable()
    assert not without_gradient(model, LABELLED)


def test_default_name(tmp_path: Path) -> None:
    lora().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(fresh(), tmp_path)
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("one")
    model.load_adapter(tmp_path, "two")
    assert list(model.peft_config) == ["default", "two"] and model.active_adapter == "default"
    assert "adapter-inactive" in found(model)
    named = PeftModel.from_pretrained(fresh(), tmp_path, adapter_name="one")
    named.set_adapter("one")


@pytest.mark.parametrize("settings", [{}, {"task_type": "SEQ_CLS"}])
def test_lost_head(tmp_path: Path, settings: dict) -> None:
    base = fresh("bert", "seq_cls")
    model = lora(base, target_modules=["query"], init_lora_weights=False, **settings).eval()
    assert ("random-head" in found(model)) is not bool(settings)
    model.save_pretrained(tmp_path)
    other = fresh("bert", "seq_cls")
    nn.init.normal_(other.classifier.weight)
    again = PeftModel.from_pretrained(other, tmp_path).eval()
    one, two = (exact.output(net, {"input_ids": IDS}) for net in (model, again))
    assert torch.allclose(one, two, atol=1e-6) is bool(settings)


def test_name_of_a_layer(tmp_path: Path) -> None:
    model = get_peft_model(fresh(), LoraConfig(target_modules=QV), adapter_name="task")
    model.add_adapter("1", LoraConfig(target_modules=QV))
    assert "adapter-lost-on-save" in found(model)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "task" / "adapter_model.safetensors")
    assert names and not any("layers.1." in name for name in names)


def test_wrong_base(tmp_path: Path) -> None:
    model = lora(init_lora_weights=False).eval()
    known = exact.output(model, {"input_ids": IDS})
    adapters.save(model, tmp_path / "adapter")
    for seed, same in ((0, True), (1, False)):
        adapters.check_folder(tmp_path / "adapter", fresh(seed=seed))
        merged = PeftModel.from_pretrained(fresh(seed=seed), tmp_path / "adapter")
        logits = exact.output(merged.merge_and_unload().eval(), {"input_ids": IDS})
        assert torch.allclose(logits, known, atol=1e-5) is same


@pytest.mark.parametrize("separate", [True, False])
def test_replication(separate: bool) -> None:
    model = lora(layer_replication=[[0, 2], [1, 2]], init_lora_weights=False).eval()
    before, again = exact.output(model, {"input_ids": IDS}), copy.deepcopy(model)
    if separate:
        replication.separate(again.get_base_model())
    after = exact.output(again.merge_and_unload(), {"input_ids": IDS})
    assert torch.allclose(after, before, atol=1e-5) is separate


def test_repacking() -> None:
    def readable(model: nn.Module) -> bool:
        layer = next(m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
        read = []
        for _ in range(2):
            weight = layer.weight
            read.append(bnb.functional.dequantize_4bit(weight.data, weight.quant_state).flatten())
            read[-1] = read[-1].clone()
            exact.output(model.eval(), {"input_ids": IDS + 2000})
        return torch.equal(*read)

    minilm = models.path("minilm")
    assert readable(quantization.load_in_4bit(minilm, AutoModel))
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    plain = AutoModel.from_pretrained(minilm, quantization_config=bits, device_map="cpu")
    rearranges = any(getattr(m, "support_avx512bf16_for_cpu", False) for m in plain.modules())
    assert readable(plain) is not rearranges


# --- the lesson ----------------------------------------------------------------------------


def cases() -> list[str]:
    lesson = nbformat.read(LESSON, as_version=4)
    texts = [cell.source for cell in lesson.cells if cell.cell_type == "markdown"]
    return [text for text in texts if re.match(r"### \d+\. ", text)]


def test_each_failure_of_the_lesson_names_its_test() -> None:
    numbers = [int(text.split()[1].rstrip(".")) for text in cases()]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 15
    named = [re.search(r"`tests/test_failures\.py::(\w+)`", text).group(1) for text in cases()]
    tests = [n for n in globals() if n.startswith("test_") and "_each_" not in n]
    assert named == tests


def test_each_report_is_named_by_project_and_number() -> None:
    for text in cases():
        for name, link in re.findall(r"\[([^\]]+)\]\((https://[^)]+)\)", text):
            assert re.fullmatch(r"https://github\.com/[\w-]+/[\w-]+/(issues|pull)/\d+", link)
            assert name.split()[-1] == link.rsplit("/", 1)[-1] and f"/{name.split()[0]}/" in link
        assert "**Symptom:**" in text and ("Reports of this" in text or "no public report" in text)
