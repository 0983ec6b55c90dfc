"""The study of weighted merges: its arms, its choice of a weight, and the adapters it stored."""

import json

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

from helpers import models
from helpers.experiments import study, weighted_merges
from helpers.experiments.weighted_merges import FOLDER, METHODS, SETS, STUDY, TASKS
from helpers.merging.weighted import METHODS as KNOWN


def encoder():
    base = AutoModel.from_pretrained(models.path("minilm"))
    model = PeftModel.from_pretrained(base, FOLDER / TASKS[0], adapter_name=TASKS[0])
    for name in TASKS[1:]:
        model.load_adapter(FOLDER / name, adapter_name=name)
    return model.eval()


def test_the_arms():
    arms = {(s["adapters"], s["method"]) for s in STUDY.settings}
    controls = {(name, "none") for name in ("nothing", *TASKS)}
    assert arms == controls | {(chosen, method) for chosen in SETS for method in METHODS}
    assert set(METHODS) <= set(KNOWN)


def test_the_weight_is_chosen_by_validation_on_the_first_seed():
    rows = pd.DataFrame(
        [("two", "cat", w, seed, loss) for w, seed, loss in
         [(0.5, 0, 0.9), (1.0, 0, 0.5), (0.5, 1, 0.1), (1.0, 1, 0.7)]],
        columns=["adapters", "method", "weight", "seed", "validation_loss"],
    )  # fmt: skip
    best = weighted_merges.chosen(rows)
    assert best["weight"].tolist() == [1.0, 1.0]
    assert best["seed"].tolist() == [0, 1]


@pytest.mark.parametrize("name", TASKS)
def test_stored_adapters_name_no_machine(name):
    config = json.loads((FOLDER / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "all-MiniLM-L6-v2"
    assert config["r"] == weighted_merges.RANK
    files = {path.name for path in (FOLDER / name).iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "head.safetensors"}


def test_store_writes_what_with_stored_heads_reads(tmp_path):
    made, heads = weighted_merges.encoder_with_heads(3, ("addresses", "questions"))
    weighted_merges.store(made, heads, tmp_path)
    read = weighted_merges.with_stored_heads(made.get_base_model(), tuple(heads), tmp_path)
    assert torch.equal(read["addresses"].classifier.weight, heads["addresses"].classifier.weight)
    assert torch.equal(read["questions"].qa_outputs.bias, heads["questions"].qa_outputs.bias)
    stored = load_file(tmp_path / "questions" / "adapter_model.safetensors")
    assert len(stored) == 24
    assert not any("head" in key or "classifier" in key for key in stored)
    config = json.loads((tmp_path / "questions" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "all-MiniLM-L6-v2"


def test_heads_share_one_encoder_and_its_adapters():
    made, heads = weighted_merges.encoder_with_heads(0, ("addresses", "questions"))
    assert heads["addresses"].bert is heads["questions"].bert
    first, second = (
        made.get_submodule(f"base_model.model.encoder.layer.0.attention.self.query.lora_A.{name}")
        for name in heads
    )
    assert not torch.equal(first.weight, second.weight)  # each its own start
    made.set_adapter("questions")
    trains = {key for key, p in heads["questions"].named_parameters() if p.requires_grad}
    assert all(".questions." in key or key.startswith("qa_outputs") for key in trains)


def test_the_stored_adapters_give_the_stored_scores():
    rows = study.results("weighted_merges")
    row = rows[(rows["adapters"] == "addresses") & (rows["seed"] == 0)].iloc[0]
    model = encoder()
    heads = weighted_merges.with_stored_heads(model.get_base_model(), ("addresses",))
    model.set_adapter("addresses")
    assert weighted_merges.scores(heads)["addresses"] == pytest.approx(row["addresses"], abs=0.02)
    model.set_adapter("tweets")  # the check can fail: another adapter, another score
    other = rows[(rows["adapters"] == "tweets") & (rows["seed"] == 0)].iloc[0]
    assert abs(other["addresses"] - row["addresses"]) > 0.1
    assert weighted_merges.scores(heads)["addresses"] == pytest.approx(other["addresses"], abs=0.02)
