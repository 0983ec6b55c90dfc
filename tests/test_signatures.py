"""Every keyword that the course passes exists in the oldest and the newest supported libraries."""

import json

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import course
from helpers import signatures, versions

STORED = course.CHECKOUT / "data" / "signatures"
# Nobody can compare these: a `**kwargs` takes any word, and its owner names only some. They are
# held by what the tests and lessons do with them on both edges.
ATTRIBUTES = {  # a configuration or processor keeps them, and its model or its call reads them
    "transformers.AutoImageProcessor.from_pretrained": "crop_size do_center_crop size",
    "transformers.AutoModelForSequenceClassification.from_pretrained": "num_labels",
    "transformers.AutoTokenizer.from_pretrained": "padding_side",
    "transformers.BitImageProcessorPil": "crop_size image_mean image_std resample size",
    "transformers.DebertaV2Config": "norm_rel_ebd position_buckets share_att_key",
    "transformers.GenerationConfig": "alignment_heads is_multilingual no_timestamps_token_id "
    "prev_sot_token_id return_timestamps",
    "transformers.T5Config": "decoder_start_token_id",
    "transformers.WhisperTokenizerFast": "model_max_length pad_token tokenizer_file",
}
HANDED_ON = {  # to a function that depends on the model, or on the file
    ".generate": "input_features",
    "peft.PeftModel.from_pretrained": "local_files_only",
    "transformers.AutoModelForCausalLM.from_config": "dtype",
}


def stored(edge: str) -> dict:
    return json.loads((STORED / f"{edge}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def calls() -> signatures.Calls:
    return signatures.of_course()


@pytest.mark.parametrize("edge", versions.EDGES)
def test_both_edges_take_every_keyword_of_the_course(edge: str, calls: signatures.Calls) -> None:
    assert len(calls) > 150
    assert signatures.problems(calls, stored(edge)["callables"], edge) == []


@pytest.mark.parametrize("edge", versions.EDGES)
def test_only_the_listed_keywords_escape_the_comparison(edge: str, calls: signatures.Calls) -> None:
    listed = {
        f"{n} {word}" for n, words in (ATTRIBUTES | HANDED_ON).items() for word in words.split()
    }
    found = signatures.hidden(calls, stored(edge)["callables"])
    assert found == listed


def test_both_edges_have_the_same_methods(calls: signatures.Calls) -> None:
    """A method that one edge lacks looks like a method of somebody else's."""
    absent = [{n for n in calls if stored(e)["callables"].get(n) is None} for e in versions.EDGES]
    assert absent[0] == absent[1]
    assert ".merge_and_unload" not in absent[0] and ".groupby" in absent[0]


def test_compiled_functions_and_words_read_from_kwargs_count() -> None:
    assert {"dtype", "requires_grad", "out"} <= set(signatures.takes("torch.zeros"))
    assert {"rtol", "atol"} <= set(signatures.takes("torch.allclose"))
    assert "quantization_config" in signatures.takes(
        "transformers.AutoModelForCausalLM.from_pretrained"
    )
    assert signatures.takes(".sum") is None, "pandas has it too"
    assert signatures.hidden(
        {"transformers.T5Config": {"d_model", "d_modell"}},
        {"transformers.T5Config": signatures.takes("transformers.T5Config")},
    ) == {"transformers.T5Config d_modell"}


@pytest.mark.parametrize("edge", versions.EDGES)
def test_the_stored_keywords_are_of_the_edge(edge: str) -> None:
    wanted = dict(line.split("==") for line in versions.constraints(edge).split())
    for name, version in stored(edge)["versions"].items():
        assert version.split("+")[0] == wanted[name]


def test_the_oldest_is_the_floor_of_pyproject() -> None:
    oldest = dict(line.split("==") for line in versions.constraints("oldest").split())
    required = map(Requirement, course.requirements(course.CHECKOUT))
    floors = {canonicalize_name(each.name): each for each in required}
    for name in versions.NAMED:
        (floor,) = (s.version for s in floors[name].specifier if s.operator == ">=")
        assert Version(floor) == Version(oldest[name]), name


@pytest.mark.parametrize(
    ("source", "called"),
    [
        ("from peft import LoraConfig\nLoraConfig(r=4)", {"peft.LoraConfig": {"r"}}),
        ("import torch.nn.functional as F\nF.softmax(x, dim=1)", {"torch.nn.functional.softmax"}),
        ("import torch\ntorch.optim.AdamW(p, lr=1)", {"torch.optim.AdamW": {"lr"}}),
        ("from peft import PeftModel\nPeftModel.from_pretrained(m, d, is_trainable=True)", None),
        ("model.merge_and_unload(safe_merge=True)", {".merge_and_unload": {"safe_merge"}}),
        ("print('x', end='')", {}),
    ],
)
def test_what_a_source_calls(source: str, called: dict | set | None) -> None:
    found = signatures.of_source(source)
    if called is None:
        called = {"peft.PeftModel.from_pretrained": {"is_trainable"}}
    assert found == called if isinstance(called, dict) else set(found) == called


def test_an_invented_keyword_is_found() -> None:
    calls = signatures.of_source(
        "from peft import LoraConfig\nfrom transformers import TrainingArguments\n"
        "from transformers import BitsAndBytesConfig\nimport torch\n"
        "LoraConfig(r=1, rang=2)\nTrainingArguments(evaluation_strategy='epoch')\n"
        "BitsAndBytesConfig(load_in_5bit=True)\ntorch.zeros(2, dtype=None, dtypes=None)\n"
        "model.merge_and_unload(safely=True)\nfrom peft import Lora\nLora(r=1)\n"
    )
    taken = {name: signatures.takes(name) for name in calls}
    assert signatures.problems(calls, taken, "oldest") == [
        "the oldest .merge_and_unload takes no safely=",
        "the oldest libraries have no peft.Lora",
        "the oldest peft.LoraConfig takes no rang=",
        "the oldest torch.zeros takes no dtypes=",
        "the oldest transformers.BitsAndBytesConfig takes no load_in_5bit=",
        "the oldest transformers.TrainingArguments takes no evaluation_strategy=",
    ]


def test_a_keyword_of_one_edge_only_is_found(calls: signatures.Calls) -> None:
    taken = stored("oldest")["callables"]
    taken["peft.LoraConfig"].remove("lora_alpha")
    found = signatures.problems(calls, taken, "oldest")
    assert found == ["the oldest peft.LoraConfig takes no lora_alpha="]
    del taken["peft.LoraConfig"]
    (found,) = signatures.problems(calls, taken, "oldest")
    assert "run `python -m helpers.versions oldest --signatures`" in found


def test_a_keyword_that_only_one_edge_really_has_is_found() -> None:
    calls = signatures.of_source(
        "from transformers import TrainingArguments\nfrom torch.profiler import profile\n"
        "TrainingArguments('x', activation_checkpointing=True)\nprofile(use_cuda=True)\n"
    )
    found = {e: signatures.problems(calls, stored(e)["callables"], e) for e in versions.EDGES}
    assert found == {
        "oldest": [
            "the oldest transformers.TrainingArguments takes no activation_checkpointing=",
        ],
        "newest": ["the newest torch.profiler.profile takes no use_cuda="],
    }
