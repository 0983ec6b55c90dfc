"""What can be tried of the measurement without a card."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest
import torch
from torch import nn

from helpers.memory import GPUS, on_cuda, predict
from helpers.memory.__main__ import parse, plan_of
from helpers.memory.predict import predict_plan

no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


def test_at_least_twenty_configurations_of_all_kinds():
    words = {word for line in on_cuda.CONFIGURATIONS for word in line}
    assert len(on_cuda.CONFIGURATIONS) >= 20
    assert {"eager", "dora", "qlora", "fp4", "--checkpointing", "adamw_8bit"} <= words
    assert {"paged_adamw_8bit", "--no-double-quant", "--padded", "full"} <= words


@pytest.mark.parametrize("words", on_cuda.CONFIGURATIONS, ids=" ".join)
def test_each_can_be_predicted(words):
    plan = dataclasses.replace(plan_of(parse(list(words))), gpu=GPUS["t4"], loading="plain")
    assert predict_plan(plan, exact=False).allocated > 0


@no_card
def test_without_a_card_one_sentence_and_status_2(capsys):
    assert on_cuda.main(["--all"]) == 2
    assert capsys.readouterr().err == (
        "There is no CUDA card here, so nothing can be measured on one.\n"
    )


def test_help_needs_no_card(capsys):
    assert on_cuda.main(["--help"]) == 0
    assert "--all" in capsys.readouterr().out


def test_rows_are_appended_whole(tmp_path):
    path = tmp_path / "rows.csv"
    for number in (1, 2):
        row = {"configuration": f"run, {number}", "measured_allocated": number}
        on_cuda.append(path, list(row), row)
    assert pd.read_csv(path).measured_allocated.tolist() == [1, 2]


@card
def test_a_small_configuration_on_the_card():
    words = "gpt2 --method lora --dtype fp16 --batch 4 --seq 256".split()  # noqa: SIM905
    row = on_cuda.compare(words, on_cuda.this_card())
    assert row["predicted_allocated"] == pytest.approx(row["measured_allocated"], rel=0.02)


def test_a_prediction_names_its_card():
    assert predict("gpt2", batch=1, seq=16, gpu="t4", exact=False).plan.gpu is GPUS["t4"]


def test_a_padded_batch_keeps_its_mask():
    plan = plan_of(parse(["gpt2", "--method", "lora", "--batch", "2", "--seq", "8", "--padded"]))
    mask = on_cuda._batch(plan, nn.Linear(1, 1))["attention_mask"]
    assert mask.sum() == 15


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), None])
def test_a_run_that_fails_does_not_end_the_others(monkeypatch, capsys, error):
    def measured(plan):
        if error is not None:
            raise error
        return 1, 1

    monkeypatch.setattr(on_cuda, "this_card", lambda: GPUS["t4"])
    monkeypatch.setattr(on_cuda, "measure_on_cuda", measured)
    assert on_cuda.main(["gpt2", "--method", "lora", "--batch", "1", "--seq", "16"]) == 0
    assert ("out of memory on t4, left out" in capsys.readouterr().out) == (error is not None)


def test_an_unknown_method_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(on_cuda, "this_card", lambda: GPUS["t4"])
    assert on_cuda.main(["gpt2", "--method", "lorra"]) == 2
    assert "did you mean 'lora'" in capsys.readouterr().err
