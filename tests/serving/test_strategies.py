"""The serving study: what is timed is what it says, and ratios are taken within a round."""

import pytest
import torch

from helpers import models
from helpers.experiments import serving as strategies
from helpers.experiments import study


def test_ratios_are_taken_within_a_round():
    """The machine slows down tenfold in the second round, and no ratio notices."""
    times = {"base": 1, "base again": 1, "merged": 1, "apart": 1.1, "4-bit": 0.5}
    times |= {"4-bit again": 0.5, "4-bit, apart": 0.6}
    rounds = [{arm: t * slow for arm, t in times.items()} for slow in (1, 10, 1)]
    found = strategies.summary(rounds)
    assert found["apart"] == 1.1 and found["apart_4bit"] == 1.2 and found["four_bit"] == 0.5
    assert found["control"] == found["control_4bit"] == found["merged"] == 1
    assert set(found) == set(strategies.STUDY.metrics)


def test_writing_leaves_the_cache_as_it_was():
    model = models.tiny("llama").eval()
    lengths = []
    model.register_forward_hook(
        lambda module, args, kwargs, out: lengths.append(out.past_key_values.get_seq_length()),
        with_kwargs=True,
    )
    call = strategies.writing(model, torch.arange(10, 20)[None])
    call()
    call()
    assert lengths == [10, 11, 11]


def test_the_adapter_changes_the_outputs_and_the_merged_model_keeps_the_change(monkeypatch):
    monkeypatch.setattr(strategies, "TARGETS", {"some": ["q_proj", "v_proj"]})
    torch.manual_seed(0)
    base = models.tiny("llama")
    ids = torch.arange(10, 20)[None]
    plain = base(ids).logits
    apart = strategies.with_adapter(base, "some").eval()
    changed = apart(ids).logits
    assert not torch.allclose(changed, plain, atol=1e-5)
    assert torch.allclose(apart.merge_and_unload()(ids).logits, changed, atol=1e-5)


@pytest.mark.parametrize("made", [strategies.STUDY, strategies.START])
def test_every_stored_repeat_is_there(made):
    rows = study.results(made.name)
    assert len(rows) == len(made.settings) * made.seeds
    assert list(rows.columns) == made.columns


def test_the_stored_controls_are_near_one():
    """Two runs of one model: a median that strays by a tenth would make every ratio worthless."""
    rows = study.results("serving")
    assert (rows[["control", "control_4bit"]] - 1).abs().to_numpy().max() < 0.1


def test_the_exported_files_agree():
    rows = study.results("onnx_export").set_index("model")
    assert set(rows.index) == {"minilm", "smollm2"}
    assert (rows.gap < 1e-4).all()
    assert (rows.mib / rows.weights_mib).between(1, 1.1).all()
