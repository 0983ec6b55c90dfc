"""Tables without the columns that are asked for, and answers of all kinds to every exercise."""

import inspect
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import strange
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from strange import COUNTS, SHARE, TEXT, names

from helpers import checks, claims, data, models, outcomes, serving
from helpers.claims.rules import ClaimError
from helpers.experiments import duration, evidence, looks, replication, study, tasks, texts

COLUMNS = ("task", "rank", "learning_rate", "seed", "validation_loss")
TABLES = st.dictionaries(names(*COLUMNS), st.lists(SHARE, min_size=2, max_size=2), max_size=5).map(
    pd.DataFrame
)
BY = st.lists(names("task", "rank"), max_size=2, unique=True)


@given(TABLES, BY, names(*COLUMNS))
def test_a_table_is_read_or_refused(rows, by, metric) -> None:
    for call in (
        lambda: evidence.at_best_rate(rows, by),
        lambda: evidence.whole_grid(rows, by),
        lambda: study.lowest(rows, by=by, metric=metric),
        lambda: duration.curves(rows, "test"),
    ):
        found = strange.tried(call)
        assert found is None or set(found) <= set(rows)


@given(names("rank_by_task", "dora"), BY)
def test_a_stored_study_is_read_or_refused(name, by) -> None:
    found = strange.tried(lambda: evidence.tuned(name, by))
    assert found is None or len(found)


@given(st.binary(max_size=20) | st.sampled_from([b"", b"a,b\n1", b'a\n"1', b"\xff\xfe\x00"]))
def test_a_stored_table_is_whole_or_refused(tmp_path_factory, content) -> None:
    folder = tmp_path_factory.mktemp("results")
    (folder / "x.csv").write_bytes(content)
    (folder / "x.xml").write_bytes(content)
    strange.tried(lambda: study.results("x", folder))
    assert strange.tried(lambda: outcomes.cases(folder / "x.xml")) is None


@given(st.dictionaries(names("a", "b"), COUNTS))
def test_a_row_fits_its_table_or_is_refused(tmp_path_factory, row) -> None:
    file = tmp_path_factory.mktemp("rows") / "x.csv"
    strange.tried(lambda: study.append(file, ["a", "b"], row))
    assert not file.exists() or len(file.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda name: tasks.task(name),
        lambda name: tasks.collator(name),
        lambda name: texts.lines(name, "train"),
        lambda name: texts.lines("plain text", name),
        lambda name: looks.trained(name, 0),
        lambda name: replication.adapted(name),
    ],
)
@given(name=names("moviez", "cypher"))
def test_a_name_of_a_study_is_refused(call, name) -> None:
    assert strange.tried(lambda: call(name)) is None


@pytest.mark.parametrize(
    "examples",
    [
        data.chat_examples,
        data.classification_examples,
        data.tagging_examples,
        data.qa_examples,
    ],
)
@given(columns=st.lists(names("question", "text", "tokens"), max_size=2, unique=True))
def test_a_data_set_has_its_columns_or_is_refused(examples, columns) -> None:
    rows = Dataset.from_dict({name: ["a"] for name in columns})
    assert strange.tried(lambda: examples(rows, SimpleNamespace())) is None


@given(names("http://127.0.0.1:9", "127.0.0.1"))
def test_an_address_without_a_server_is_refused(address) -> None:
    with pytest.raises(serving.ServingError):
        serving.ask(address, "model", "?")


# --- Claims --------------------------------------------------------------------------------------

RULES = ("= 3 x", "~ 1 ± 0.1", "in 0.2 .. 0.5", "<= 48", "set A, B", "better", "true", "all a; b")


@given(names(*RULES), SHARE | st.booleans() | st.dictionaries(names("a", "b"), st.booleans()))
def test_a_rule_is_read_or_refused(expects, measured) -> None:
    claim = claims.Claim("X", "1", "claim", "number", "how", expects=expects)
    found = strange.tried(lambda: claims.weigh(claim, measured))
    assert found is None or found.verdict in claims.VERDICTS


@given(st.lists(st.floats(-9, 9), min_size=3, max_size=9), st.floats(-9, 9))
def test_the_interval_of_a_lead_holds_its_mean(ours, shift) -> None:
    other = [value + shift for value in ours]
    try:
        lead = claims.Seeds(ours, other, larger_is_better=True).lead()
    except ClaimError:
        return
    mean = math.fsum(a - b for a, b in zip(ours, other, strict=True)) / len(ours)
    assert lead.low - 1e-9 <= mean <= lead.high + 1e-9


# --- Exercises -----------------------------------------------------------------------------------

# Checks of one answer, which is a function; the others take a count or a pattern besides.
FUNCTIONS = [
    name
    for name, check in inspect.getmembers(checks, inspect.isfunction)
    if (asks := inspect.signature(check)).return_annotation in (checks.Passed, "Passed")
    and len(asks.parameters) == 1
]
ANSWERS = st.sampled_from(
    [
        None,
        math.nan,
        -1,
        2.5,
        "x",
        (1, 2),
        [],
        {},
        torch.zeros(2),
        torch.tensor(3.0),
        torch.zeros(0),
        np.int64(7),
        np.zeros(3),
        object(),
    ]
)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(answer=ANSWERS)
def test_a_wrong_answer_breaks_a_rule_in_words(name, answer) -> None:
    with pytest.raises(checks.Broken, match=r"\w: .*\w"):
        getattr(checks, name)(lambda *_, **__: answer)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_answer_that_fails_or_is_no_function_breaks_a_rule(name) -> None:
    for answer in (lambda *_, **__: 1 / 0, lambda: 3, None, 5):
        with pytest.raises(checks.Broken):
            getattr(checks, name)(answer)


@given(ANSWERS | TEXT, st.sampled_from(["q_proj", "nope", "("]), COUNTS)
def test_a_wrong_count_or_pattern_breaks_a_rule(answer, target, rank) -> None:
    model = models.tiny("llama")
    for call in (
        lambda: checks.adapter_size(answer, model, rank, [target]),
        lambda: checks.targets(answer, model, ["q_proj"]),
        lambda: checks.tower_pattern(target, model),
    ):
        assert strange.tried(call) is None
