"""match() must say exactly what get_peft_model does."""

import re
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from helpers import adapters, models

ARCHS = [
    ("llama", "lm"),
    ("gpt2", "lm"),
    ("bert", "seq_cls"),
    ("t5", "lm"),
    ("falcon", "lm"),
    ("roberta", "token_cls"),
    ("bert", "qa"),
    ("llava", "lm"),
    ("blip2", "lm"),
]
PATTERNS = [
    ["q_proj", "v_proj"],
    ["q_proj", "v_porj"],
    ["q"],
    ["query", "value"],
    ["c_attn", "mlp.c_proj"],
    ["dense"],
    ["self_attn.q_proj"],
    ["model.layers.0.self_attn.q_proj", "k_proj"],
    [r".*q_proj"],
    ["layers.*.q_proj"],
    ["*"],
    ["all-linear"],
    ["all-linear", "q_proj"],
    ["embed_tokens"],
    ["lm_head", "score", "classifier"],
    ["self_attn"],
    ["norm"],
    ["qa_outputs", "query"],
    "q_proj",
    "all-linear",
    "All-Linear",
    "layers.*.q_proj",
    r".*q_proj",
    r".*\.(q|v|query|value|c_attn)",
    r".*language_model\..*\.(q_proj|v_proj)",
    r".*vision.*(q_proj|qkv)",
    r".*attn.*",
    r".*",
    r".*layers\.[01]\..*_proj",
    "(",
    "*.q_proj",
]
TASK_TYPES = {"lm": None, "seq_cls": "SEQ_CLS", "token_cls": "TOKEN_CLS", "qa": "QUESTION_ANS"}


def really_wrapped(model: nn.Module, pattern: str | list[str], task_type: str | None) -> list[str]:
    """The modules that get_peft_model wraps; what it raises, it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = pattern if isinstance(pattern, str) else list(pattern)
        wrapped = get_peft_model(model, LoraConfig(target_modules=given, task_type=task_type))
    layers = wrapped.get_base_model().named_modules()
    return [name for name, module in layers if isinstance(module, BaseTunerLayer)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("arch, task", ARCHS, ids=lambda value: value)
def test_match_is_what_peft_does(arch: str, task: str, pattern: str | list[str]) -> None:
    task_type = TASK_TYPES[task]
    model = models.tiny(arch, task)
    before = [name for name, _ in model.named_modules()]
    said = adapters.match(model, pattern, task_type=task_type)
    assert [name for name, _ in model.named_modules()] == before
    try:
        done = really_wrapped(model, pattern, task_type)
    except (ValueError, TypeError, re.error):
        assert said.raises
    else:
        assert said.raises is None
        assert said.matched == done


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_task_type_decides_about_the_head(task_type: str | None) -> None:
    said = adapters.match(models.tiny("bert", "seq_cls"), "all-linear", task_type=task_type)
    done = really_wrapped(models.tiny("bert", "seq_cls"), "all-linear", task_type)
    assert said.matched == done
    assert ("classifier" in said.matched) is (task_type is None)


def test_head_in_the_list_is_left_out_by_its_task() -> None:
    model = models.tiny("bert", "seq_cls")
    said = adapters.match(model, ["query", "classifier"], task_type="SEQ_CLS")
    assert said.per_entry == {"query": 2, "classifier": 0}
    assert "trains in full" in said.advice["classifier"]


@pytest.mark.parametrize("task, head", [("token_cls", "classifier"), ("qa", "qa_outputs")])
def test_all_linear_reaches_the_heads_of_other_tasks(task: str, head: str) -> None:
    task_type = {"token_cls": "TOKEN_CLS", "qa": "QUESTION_ANS"}[task]
    said = adapters.match(models.tiny("bert", task), "all-linear", task_type=task_type)
    assert head in said.raises
    with pytest.raises(TypeError):
        really_wrapped(models.tiny("bert", task), "all-linear", task_type)
    config = adapters.config("lora", task_type=task_type, target_modules="all-linear")
    assert adapters.inspect(get_peft_model(models.tiny("bert", task), config)).healthy


def test_one_typo_among_right_names_is_reported() -> None:
    said = adapters.match(models.tiny("llama"), ["q_proj", "v_porj"])
    assert said.per_entry == {"q_proj": 2, "v_porj": 0}
    assert said.unmatched["v_porj"][0] == "v_proj"
    assert said.kinds == {"Linear": 2} and said.raises is None
    assert "says nothing" in said.note and "v_proj" in said.note


def test_right_names_leave_nothing_to_say() -> None:
    said = adapters.match(models.tiny("llama"), ["q_proj", "v_proj"])
    assert said.note == "" and not said.unmatched and not said.advice and not said.unsupported


@pytest.mark.parametrize(
    "entry",
    [r".*q_proj", "layers.*.q_proj", "*.q_proj", r"layers\.\d+\.self_attn\.(q|v)_proj", "q_proj$"],
)
def test_pattern_in_a_list_comes_back_as_a_working_string(entry: str) -> None:
    model = models.tiny("llama")
    said = adapters.match(model, [entry, "k_proj"])
    assert said.per_entry[entry] == 0
    corrected = re.search(r'string r"(.+)"', said.advice[entry]).group(1)
    reached = adapters.match(model, corrected)
    assert reached.matched and reached.raises is None
    assert all(name.endswith(("q_proj", "v_proj")) for name in reached.matched)


@pytest.mark.parametrize("pattern", ["layers.*.q_proj", "*.q_proj", "self_attn.q_proj"])
def test_incomplete_string_comes_back_corrected(pattern: str) -> None:
    model = models.tiny("llama")
    said = adapters.match(model, pattern)
    assert said.raises and not said.matched
    corrected = re.search(r'string r"(.+)"', said.advice[pattern]).group(1)
    assert len(adapters.match(model, corrected).matched) == 2


def test_a_name_as_a_string_should_be_a_list() -> None:
    said = adapters.match(models.tiny("llama"), "q_proj")
    assert said.raises and '["q_proj"]' in said.note


def test_all_linear_inside_a_list_matches_nothing() -> None:
    said = adapters.match(models.tiny("llama"), ["all-linear", "q_proj"])
    assert said.per_entry == {"all-linear": 0, "q_proj": 2}
    assert 'target_modules="all-linear"' in said.note


def test_a_parameter_is_not_a_module() -> None:
    said = adapters.match(models.tiny("llama"), ["q_proj.weight"])
    assert "write 'q_proj'" in said.advice["q_proj.weight"]


def test_names_of_another_architecture() -> None:
    said = adapters.match(models.tiny("gpt2"), ["q_proj", "v_proj"])
    assert said.raises
    assert "for gpt2 peft itself takes c_attn" in said.note


def test_unsupported_module_is_announced() -> None:
    said = adapters.match(models.tiny("llama"), r".*self_attn.*")
    assert said.unsupported[0] == "model.layers.0.self_attn"
    assert "LlamaAttention" in said.raises and "cannot wrap" in said.raises


def test_conv1d_and_embedding_are_named_as_kinds() -> None:
    said = adapters.match(models.tiny("gpt2"), ["c_attn", "wte"])
    assert said.kinds == {"Embedding": 1, "Conv1D": 2}


def test_meta_models_and_their_numbers() -> None:
    said = adapters.match(models.full_size("llama-2-7b"), "all-linear")
    assert len(said.matched) == 32 * 7 and "lm_head" not in said.matched


def mixtral() -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )


def test_stacked_experts_are_announced() -> None:
    said = adapters.match(mixtral(), ["q_proj", "w2"])
    config = LoraConfig(target_modules=["q_proj", "w2"])
    get_peft_model(mixtral(), config)
    assert said.parameters == sorted(config.target_parameters) == ["down_proj"]
    assert said.raises is None and "down_proj" in said.note and not said.unmatched
    half = adapters.match(mixtral(), ["w1"])
    assert "without also targeting w3" in half.raises
    with pytest.raises(ValueError, match="without also targeting w3"):
        get_peft_model(mixtral(), LoraConfig(target_modules=["w1"]))


def test_model_that_has_an_adapter_already() -> None:
    model = get_peft_model(models.tiny("llama"), adapters.config("lora"))
    said = adapters.match(model, ["q_proj", "k_proj"])
    with torch.no_grad():
        model.add_adapter("more", LoraConfig(target_modules=["q_proj", "k_proj"]))
    done = [
        name
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, BaseTunerLayer) and "more" in module.lora_A
    ]
    assert said.matched == done and said.kinds == {"Linear": 4}


def test_table_and_text() -> None:
    said = adapters.match(models.tiny("llava"), ["q_proj", "v_porj"])
    table = said.table()
    assert list(table.columns) == ["entry", "modules", "where", "kind", "advice"]
    assert table.loc[table.entry == "q_proj", "modules"].sum() == said.per_entry["q_proj"]
    assert len(table[table.entry == "q_proj"]) == 2  # the vision tower has a q_proj as well
    assert not table["where"].str.contains(r"\d").any()
    assert "v_proj" in str(said) and "<table" in said._repr_html_()


@pytest.mark.parametrize("pattern", [None, 3, [1], [["q_proj"]], {"q_proj": 1}])
def test_not_a_pattern(pattern: object) -> None:
    with pytest.raises(TypeError, match="a string or a list of strings"):
        adapters.match(models.tiny("llama"), pattern)


@pytest.mark.parametrize("pattern", ["", [], ["q_proj", ""]])
def test_empty_pattern(pattern: object) -> None:
    with pytest.raises(ValueError, match="nothing to match"):
        adapters.match(models.tiny("llama"), pattern)
