"""An exported file computes what the merged model does; anything else is refused."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from peft import get_peft_model

from helpers import adapters, merging, models, quantization
from helpers.merging import export


def merged_tiny():
    torch.manual_seed(0)
    config = adapters.config("lora", target_modules="all-linear")
    model = get_peft_model(models.tiny("llama"), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.merge_and_unload().eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = merged_tiny()
    return model, merging.to_onnx(model, tmp_path_factory.mktemp("onnx") / "file")


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (4, 30)])
def test_logits_are_the_models_on_other_shapes(exported, shape):
    model, file = exported
    ids = torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        wanted = model(**batch).logits
    assert torch.allclose(merging.run_onnx(file, batch), wanted, atol=1e-6)
    with torch.no_grad():  # the control: the base without the adapter is another model
        torch.manual_seed(0)
        assert not torch.allclose(models.tiny("llama")(**batch).logits, wanted, atol=1e-3)


def test_padding_on_the_left_changes_nothing(exported):
    _, file = exported
    ids = torch.arange(10, 18)[None]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    alone = merging.run_onnx(file, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    mask = (padded != 0).long()
    beside = merging.run_onnx(file, {"input_ids": padded, "attention_mask": mask})
    assert torch.allclose(beside[:, -1], alone[:, -1], atol=1e-4)


def test_the_model_is_left_as_it_was(exported):
    model, _ = exported
    assert model.config.use_cache and not model.training
    assert "past_key_values" in model(torch.arange(5)[None])


def test_an_altered_weight_is_noticed(exported, tmp_path):
    model, file = exported
    graph = onnx.load(file)
    weight = max(graph.graph.initializer, key=lambda t: np.prod(t.dims))
    values = numpy_helper.to_array(weight) * 1.01
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(graph, tmp_path / "altered.onnx")
    assert export.largest_gap(model, file) < 1e-5
    assert export.largest_gap(model, tmp_path / "altered.onnx") > 1e-4


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_export", lambda model, file: file.write_bytes(b"x"))
    monkeypatch.setattr(export, "largest_gap", lambda model, file: 0.5)
    with pytest.raises(merging.ExportError, match="differ by 5.0e-01"):
        merging.to_onnx(merged_tiny(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused(tmp_path):
    lora = adapters.config("lora", target_modules=["q_proj"])
    apart = get_peft_model(models.tiny("llama"), lora)
    with pytest.raises(merging.ExportError, match="merge them first"):
        merging.to_onnx(apart, tmp_path / "a")
    with pytest.raises(merging.ExportError, match="exists; give a folder"):
        merging.to_onnx(models.tiny("llama"), tmp_path)
    with pytest.raises(merging.ExportError, match="no transformers model"):
        merging.to_onnx(torch.nn.Linear(2, 2), tmp_path / "b")
    models.tiny("llama").save_pretrained(tmp_path / "plain")
    from transformers import AutoModelForCausalLM

    four = quantization.load_in_4bit(tmp_path / "plain", AutoModelForCausalLM)
    with pytest.raises(merging.ExportError, match="quantised"):
        merging.to_onnx(four, tmp_path / "c")
