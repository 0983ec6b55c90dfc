"""Every keyword that the course passes exists in the oldest and the newest supported libraries."""

import json

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import course
from helpers import signatures, versions

STORED = course.CHECKOUT / "data" / "signatures"


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
        "BitsAndBytesConfig(load_in_5bit=True)\ntorch.zeros(2, dtype=None)\n"
        "model.merge_and_unload(safely=True)\nfrom peft import Lora\nLora(r=1)\n"
    )
    taken = {name: signatures.takes(name) for name in calls}
    assert signatures.problems(calls, taken, "oldest") == [
        "the oldest .merge_and_unload takes no safely=",
        "the oldest libraries have no peft.Lora",
        "the oldest peft.LoraConfig takes no rang=",
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
