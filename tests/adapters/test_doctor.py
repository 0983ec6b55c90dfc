"""Each finding of the doctor provoked on a small model, and absent on a healthy one."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from helpers import adapters, models

LORA = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def codes(model: nn.Module) -> set[str]:
    return {finding.code for finding in adapters.inspect(model).findings}


def llama(**changes: object) -> PeftModel:
    return get_peft_model(models.tiny("llama"), LoraConfig(**(LORA | changes)))


def classifier(**changes: object) -> PeftModel:
    config = {"target_modules": ["query"], "task_type": "SEQ_CLS"} | changes
    return get_peft_model(models.tiny("bert", "seq_cls"), LoraConfig(**config))


def find(model: nn.Module, code: str) -> adapters.Finding:
    return next(f for f in adapters.inspect(model).findings if f.code == code)


# --- healthy models ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch, task, task_type",
    [("llama", "lm", "CAUSAL_LM"), ("gpt2", "lm", "CAUSAL_LM"), ("bert", "seq_cls", "SEQ_CLS")],
)
@pytest.mark.parametrize("method", adapters.METHODS)
def test_every_method_is_healthy(method: str, arch: str, task: str, task_type: str) -> None:
    steps = {"total_steps": 20} if method == "adalora" else {}
    config = adapters.config(method, task_type=task_type, **steps)
    model = get_peft_model(models.tiny(arch, task), config)
    report = adapters.inspect(model)
    assert report.healthy, str(report)
    assert report.parts[report.parts.trains].parameters.sum() == adapters.count(model).trainable
    assert report.parts.parameters.sum() == adapters.count(model).total
    assert report.active == ["default"]
    expected = {"prompt-mlp-not-saved"} if method in ("prefix", "p-tuning") else set()
    assert codes(model) == expected


@pytest.mark.parametrize(
    "method, part",
    [
        ("lora", "lora_A"),
        ("dora", "lora_magnitude_vector"),
        ("adalora", "lora_E"),
        ("ia3", "ia3_l"),
        ("prompt", "prompt embeddings"),
        ("p-tuning-v2", "prompt embeddings"),
        ("prefix", "prompt MLP (not saved)"),
    ],
)
def test_parts_are_named(method: str, part: str) -> None:
    steps = {"total_steps": 20} if method == "adalora" else {}
    config = adapters.config(method, task_type="CAUSAL_LM", **steps)
    parts = adapters.inspect(get_peft_model(models.tiny("llama"), config)).parts
    assert parts[parts.part == part].trains.all() and (parts.part == part).any()


def test_copy_of_the_head_and_its_original() -> None:
    parts = adapters.inspect(classifier()).parts.set_index("part")
    copy = parts.loc["copy in modules_to_save"]
    assert copy.trains and copy.parameters == 2 * 32 + 2
    assert not parts.loc["base weights"].trains


def test_meta_model_is_healthy() -> None:
    model = get_peft_model(models.full_size("llama-2-7b"), LoraConfig(**LORA))
    report = adapters.inspect(model)
    assert report.healthy and "lost-on-save" not in codes(model)


def test_inspect_changes_nothing() -> None:
    model = llama()
    before = {n: (p.data_ptr(), p.requires_grad, p.sum()) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    adapters.inspect(model)
    assert before == {
        n: (p.data_ptr(), p.requires_grad, p.sum()) for n, p in model.named_parameters()
    }
    assert torch.equal(state, torch.get_rng_state())


# --- what is wrong -------------------------------------------------------------------------


def test_plain_model_trains_in_full() -> None:
    report = adapters.inspect(models.tiny("llama"))
    assert [f.code for f in report.findings] == ["no-adapter"] and report.healthy
    assert report.adapters == {} and report.active == []


def test_plain_frozen_model() -> None:
    assert codes(models.tiny("llama").requires_grad_(False)) == {"nothing-trains"}


def test_adapter_loaded_for_inference(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(models.tiny("llama"), tmp_path)
    assert "is_trainable=True" in find(frozen, "nothing-trains").fix
    loaded = PeftModel.from_pretrained(models.tiny("llama"), tmp_path, is_trainable=True)
    assert codes(loaded) == set()


def test_target_with_a_typo() -> None:
    model = llama(target_modules=["q_proj", "v_porj"])
    found = find(model, "target-not-found")
    assert "'v_porj'" in found.what and "v_proj" in found.fix
    assert len(adapters.inspect(model).findings) == 1


def test_modules_to_save_with_a_typo() -> None:
    assert "lm_head" in find(llama(modules_to_save=["lmhead"]), "modules-to-save-not-found").fix
    assert codes(llama(modules_to_save=["lm_head"])) == set()


def test_head_unfrozen_by_hand_is_lost() -> None:
    model = llama()
    model.base_model.model.lm_head.weight.requires_grad_(True)
    found = find(model, "lost-on-save")
    assert "lm_head.weight" in found.what and f"{100 * 32:,} parameters" in found.what
    assert found.severity == "error" and not adapters.inspect(model).healthy


def test_what_is_called_lost_is_really_lost(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = models.tiny("llama")
    start = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(**LORA))
    head = model.base_model.model.lm_head.weight.requires_grad_(True)
    with torch.no_grad():
        head.add_(1.0)
    model.save_pretrained(tmp_path)
    fresh = models.tiny("llama")
    fresh.load_state_dict(start)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(loaded.base_model.model.lm_head.weight, start["lm_head.weight"])


def test_trained_biases_are_saved() -> None:
    model = get_peft_model(
        models.tiny("gpt2"),
        LoraConfig(target_modules=["c_attn"], bias="all", task_type="CAUSAL_LM"),
    )
    parts = adapters.inspect(model).parts
    assert parts[(parts.part == "base weights") & parts.trains].tensors.sum() > 0
    assert codes(model) == set()


@pytest.mark.parametrize("arch", ["llama", "llava"])
def test_resized_embedding(arch: str, tmp_path: Path) -> None:
    models.tiny(arch).save_pretrained(tmp_path)
    base = type(models.tiny(arch)).from_pretrained(tmp_path)
    base.resize_token_embeddings(104)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "adapter")
        size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    # peft looks for the vocabulary size at the top of the configuration, where LLaVA has none.
    saved = size > 104 * 32 * 4
    assert codes(model) == ({"embedding-saved-whole"} if saved else {"embedding-lost"})
    assert saved is (arch == "llama")


def test_embedding_that_was_not_resized(tmp_path: Path) -> None:
    models.tiny("llama").save_pretrained(tmp_path)
    base = type(models.tiny("llama")).from_pretrained(tmp_path)
    assert codes(get_peft_model(base, LoraConfig(**LORA))) == set()


def test_trainable_quantised_weights() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_storage=torch.float32)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(64, 64), requires_grad=True, quant_storage=torch.float32
    )
    model = nn.Sequential(layer).to("cpu")
    assert find(model, "trainable-quantised").severity == "error"
    assert "trainable-quantised" not in codes(model.requires_grad_(False))


def test_adapter_in_fp32_over_bf16_is_only_remarked() -> None:
    model = get_peft_model(models.tiny("llama").to(torch.bfloat16), LoraConfig(**LORA))
    found = find(model, "mixed-dtypes")
    assert "float32 over a base in bfloat16" in found.what and adapters.inspect(model).healthy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_low_precision(dtype: torch.dtype) -> None:
    base = models.tiny("llama").to(dtype)
    model = get_peft_model(base, LoraConfig(**LORA), autocast_adapter_dtype=False)
    assert codes(model) == {"low-precision-training"}
    head = get_peft_model(
        models.tiny("llama").to(dtype), LoraConfig(**LORA, modules_to_save=["lm_head"])
    )
    assert "lm_head" in find(head, "low-precision-training").what


def test_base_with_two_dtypes() -> None:
    base = models.tiny("llama").to(torch.bfloat16)
    base.model.norm.float()
    found = codes(get_peft_model(base, LoraConfig(**LORA)))
    assert found == {"mixed-base-dtypes", "mixed-dtypes"}


def test_disabled_merged_and_inactive_adapters() -> None:
    model = llama()
    with model.disable_adapter():
        assert "adapters-disabled" in codes(model)
    model.merge_adapter()
    assert codes(model) == {"adapter-merged"}
    model.unmerge_adapter()
    model.add_adapter("second", LoraConfig(**LORA))
    assert codes(model) == {"adapter-inactive"}
    report = adapters.inspect(model)
    assert report.active == ["default"] and set(report.adapters) == {"default", "second"}
    model.set_adapter("second")
    assert "default" in find(model, "adapter-inactive").what


def test_head_left_at_random() -> None:
    assert "random-head" in codes(classifier(task_type=None))
    assert "random-head" not in codes(classifier())
    assert "random-head" not in codes(classifier(task_type=None, modules_to_save=["classifier"]))


def test_head_left_at_random_under_a_prompt() -> None:
    config = adapters.config("prompt", task_type="FEATURE_EXTRACTION")
    model = get_peft_model(models.tiny("bert", "seq_cls"), config)
    assert "random-head" in codes(model)


def gradient_arrives(model: PeftModel) -> bool:
    ids = torch.randint(3, 90, (2, 6))
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model(input_ids=ids, labels=ids).loss.backward()
        except RuntimeError:
            return False
    return all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("input_grads", [True, False])
def test_checkpointing_that_cuts_off_the_gradient(reentrant: bool, input_grads: bool) -> None:
    model = llama()
    # transformers asks for input gradients here by itself; older versions and own loops do not.
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if not input_grads:
        model.disable_input_require_grads()
    cut_off = reentrant and not input_grads
    assert ("checkpointing-without-input-grad" in codes(model)) is cut_off
    assert gradient_arrives(model) is not cut_off


@pytest.mark.parametrize("method", ["prefix", "p-tuning-v2", "prompt", "p-tuning"])
def test_checkpointing_that_drops_a_prefix(method: str) -> None:
    config = adapters.config(method, task_type="SEQ_CLS")
    model = get_peft_model(models.tiny("bert", "seq_cls"), config).train()
    drops = "prefix-with-checkpointing"
    assert drops not in codes(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    lost = method in ("prefix", "p-tuning-v2")
    assert (drops in codes(model)) is lost
    ids = torch.randint(3, 90, (2, 6))
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    assert all((p.grad is None) is lost for p in model.prompt_encoder.parameters())
    model.gradient_checkpointing_disable()
    assert drops not in codes(model)


# --- several adapters ----------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj"], r".*q_proj"])
def test_a_second_config_keeps_layers_of_the_first(targets: list[str] | str) -> None:
    base = models.tiny("llama")
    first = get_peft_model(base, LoraConfig(r=8, **LORA))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = get_peft_model(base, LoraConfig(r=2, target_modules=targets))
    finding = find(again, "left-over")
    assert finding.what.startswith("2 layers") and "v_proj" in finding.what
    assert "wrapped-twice" not in codes(again)
    clean = get_peft_model(first.unload(), LoraConfig(r=2, target_modules=targets))
    assert "left-over" not in codes(clean)


def test_a_model_wrapped_twice() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twice = get_peft_model(llama(), LoraConfig(**LORA))
    assert find(twice, "wrapped-twice").severity == "error"


def test_an_adapter_named_as_a_layer(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter("second", LoraConfig(**LORA))
    assert "adapter-lost-on-save" not in codes(model)
    model.add_adapter("1", LoraConfig(**LORA))
    assert "4 of 8 tensors of adapter 'default'" in find(model, "adapter-lost-on-save").what
    model.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "adapter_model.safetensors")
    assert len(kept) == 4 and not any("layers.1." in name for name in kept)


# --- the report ----------------------------------------------------------------------------


def test_gravest_first_and_readable() -> None:
    model = llama(target_modules=["q_proj", "v_porj"])
    model.base_model.model.lm_head.weight.requires_grad_(True)
    report = adapters.inspect(model)
    assert [f.severity for f in report.findings] == ["error", "warning"]
    assert list(report.table().columns) == ["severity", "what", "fix"]
    text, html = str(report), report._repr_html_()
    for finding in report.findings:
        assert finding.what in text and finding.fix in text
    assert "default (LORA, active)" in text and html.count("<table") == 2
    assert "Nothing to report." in str(adapters.inspect(llama()))


def test_adapter_added_by_transformers() -> None:
    model = models.tiny("llama")
    model.add_adapter(LoraConfig(**LORA))
    report = adapters.inspect(model)
    assert report.healthy and report.adapters == {"default": "LORA"}
