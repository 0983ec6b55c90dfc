"""Every method by name: the right peft configuration, that trains, and clear refusals."""

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)

from helpers import adapters, models

PROMPT_METHODS = ("prefix", "p-tuning-v2", "prompt", "p-tuning")
CLASSES = {
    "lora": LoraConfig,
    "qlora": LoraConfig,
    "dora": LoraConfig,
    "adalora": AdaLoraConfig,
    "ia3": IA3Config,
    "prefix": PrefixTuningConfig,
    "p-tuning-v2": PrefixTuningConfig,
    "prompt": PromptTuningConfig,
    "p-tuning": PromptEncoderConfig,
}
BASES = [("llama", "lm", "CAUSAL_LM"), ("gpt2", "lm", "CAUSAL_LM"), ("bert", "seq_cls", "SEQ_CLS")]


def settings(method: str) -> dict[str, int]:
    return {"total_steps": 20} if method == "adalora" else {}


def test_all_methods_are_there() -> None:
    assert set(adapters.METHODS) == set(CLASSES)
    for method, kind in CLASSES.items():
        made = adapters.config(method, task_type="CAUSAL_LM", **settings(method))
        assert type(made) is kind and made.task_type is TaskType.CAUSAL_LM


@pytest.mark.parametrize("arch, task, task_type", BASES)
@pytest.mark.parametrize("method", adapters.METHODS)
def test_every_method_trains(method: str, arch: str, task: str, task_type: str) -> None:
    torch.manual_seed(0)
    base = models.tiny(arch, task)
    model = get_peft_model(
        base, adapters.config(method, task_type=task_type, **settings(method))
    ).train()
    ids = torch.randint(3, 90, (2, 6))
    labels = ids if task == "lm" else torch.tensor([0, 1])
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert torch.isfinite(loss) and any(p.grad is not None and p.grad.any() for p in trained)
    assert 0 < adapters.count(model).trainable < adapters.count(model).total
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)


@pytest.mark.parametrize("rank", [1, 2, 8, 32])
@pytest.mark.parametrize("method", ["lora", "qlora", "dora"])
def test_scaling_is_two_at_every_rank(method: str, rank: int) -> None:
    made = adapters.config(method, rank=rank)
    assert made.r == rank and made.lora_alpha / made.r == 2 and made.lora_dropout == 0
    assert made.use_dora is (method == "dora")


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 1000])
@pytest.mark.parametrize("rank", [1, 2, 8])
def test_adalora_prunes_to_the_rank(rank: int, steps: int) -> None:
    made = adapters.config("adalora", rank=rank, total_steps=steps)
    assert made.target_r == rank < made.init_r
    assert made.lora_alpha / made.init_r == 2
    assert made.total_step == steps and made.tinit < steps - made.tfinal


def test_prefix_and_p_tuning_v2_differ_by_the_mlp_only() -> None:
    prefix = adapters.config("prefix", task_type="CAUSAL_LM", virtual_tokens=5)
    second = adapters.config("p-tuning-v2", task_type="CAUSAL_LM", virtual_tokens=5)
    assert prefix.prefix_projection and not second.prefix_projection
    wrapped = [get_peft_model(models.tiny("llama"), c) for c in (prefix, second)]
    assert adapters.count(wrapped[0]).trainable > adapters.count(wrapped[1]).trainable
    assert adapters.saved_bytes(wrapped[0]) == adapters.saved_bytes(wrapped[1])


def test_defaults_and_targets_arrive() -> None:
    assert adapters.config("lora").r == adapters.DEFAULT_RANK == 8
    prompt = adapters.config("prompt", task_type="CAUSAL_LM")
    assert prompt.num_virtual_tokens == adapters.DEFAULT_VIRTUAL_TOKENS == 16
    assert adapters.config("lora", target_modules=("q_proj",)).target_modules == {"q_proj"}
    assert adapters.config("lora", target_modules=".*q_proj").target_modules == ".*q_proj"


def test_ia3_with_own_targets_scales_the_input_of_feedforward_layers() -> None:
    base = models.tiny("llava")
    made = adapters.config("ia3", target_modules=["k_proj", "down_proj"])
    layers = {
        name.rsplit(".", 1)[-1]: module.is_feedforward
        for name, module in get_peft_model(base, made).named_modules()
        if hasattr(module, "is_feedforward")
    }
    assert layers == {"k_proj": False, "down_proj": True}


@pytest.mark.parametrize(
    "method, nearest",
    [("LoRA", "lora"), ("qlorra", "qlora"), ("p-tuning-v3", "p-tuning-v2"), ("IA3", "ia3")],
)
def test_unknown_method_names_the_nearest(method: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"Unknown method '{method}'; did you mean '{nearest}'"):
        adapters.config(method)


def test_unknown_method_without_a_near_one_lists_all() -> None:
    with pytest.raises(ValueError, match=r"Unknown method 'zzz'. Known: lora, qlora, .*p-tuning"):
        adapters.config("zzz")


@pytest.mark.parametrize(
    "task, nearest",
    [("CAUSALLM", "CAUSAL_LM"), ("causal_lm", "CAUSAL_LM"), ("SEQ_CLASS", "SEQ_CLS")],
)
def test_unknown_task_names_the_nearest(task: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"Unknown task_type '{task}'; did you mean '{nearest}'"):
        adapters.config("lora", task_type=task)


@pytest.mark.parametrize("method", PROMPT_METHODS)
def test_prompt_methods_need_a_task_and_take_no_rank(method: str) -> None:
    with pytest.raises(ValueError, match="needs a task_type"):
        adapters.config(method)
    with pytest.raises(ValueError, match=r"takes no rank .*no low-rank matrices; rank is for lora"):
        adapters.config(method, task_type="CAUSAL_LM", rank=8)
    with pytest.raises(ValueError, match="takes no target_modules"):
        adapters.config(method, task_type="CAUSAL_LM", target_modules=["q_proj"])


@pytest.mark.parametrize(
    "method, given, sentence",
    [
        ("lora", {"virtual_tokens": 4}, "takes no virtual_tokens"),
        ("lora", {"total_steps": 4}, r"takes no total_steps .*is for adalora"),
        ("ia3", {"rank": 4}, "takes no rank"),
        ("adalora", {}, "needs total_steps"),
        ("lora", {"rank": 0}, "rank must be a whole number of at least 1, but was 0"),
        ("lora", {"rank": -3}, "but was -3"),
        ("lora", {"rank": 1.5}, r"but was 1\.5"),
        ("adalora", {"total_steps": 0}, "total_steps must be"),
        ("prompt", {"virtual_tokens": 0}, "virtual_tokens must be"),
    ],
)
def test_meaningless_settings_are_refused(
    method: str, given: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        adapters.config(method, task_type="CAUSAL_LM", **given)
