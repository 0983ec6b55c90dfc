"""What is written is the trained model, loads without peft, and is there whole or not at all."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from block_wide_llama import block_wide_llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import adapters, atomic, merging, models, quantization
from helpers.adapters import replication
from helpers.merging import deploy, exact
from helpers.merging.__main__ import main

AUTO = AutoModelForCausalLM
IDS = {"input_ids": torch.arange(3, 19).reshape(2, 8)}
LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")

WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None  # import peft raises from now on
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
with torch.no_grad():
    logits = model(input_ids=load_file(ids)["input_ids"]).logits
save_file({"logits": logits}, out)
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer's file and a setting for generation."""
    torch.manual_seed(0)
    net = block_wide_llama()
    net.generation_config.repetition_penalty = 1.25
    net.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    return tmp_path / "base"


def adapted(base: Path, *, size: float = 0.1, bits: merging.FourBits | None = None) -> PeftModel:
    net = bits.load(base, AUTO) if bits else AUTO.from_pretrained(base)
    return exact.disturbed(get_peft_model(net, copy.deepcopy(LORA)), seed=1, size=size).eval()


def stored(base: Path, **settings) -> Path:
    folder = base.with_name("adapter")
    adapted(base, **settings).save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**IDS).logits


def test_a_model_is_merged_written_and_left_alone(base: Path, tmp_path: Path):
    model = adapted(base)
    before = logits(model)
    done = merging.merge_for_deployment(model, tmp_path / "out")
    back = AUTO.from_pretrained(done.folder).eval()
    assert torch.allclose(logits(back), before, atol=1e-5)
    assert torch.equal(logits(model), before)
    assert isinstance(model, PeftModel) and "q_proj.lora_A" in str(list(model.state_dict()))
    assert done.route == "full precision" and done.error.relative < 1e-5
    assert done.companions == ("tokenizer.json",)
    assert back.generation_config.repetition_penalty == 1.25
    assert not list(tmp_path.glob(".*"))


def test_the_folder_loads_where_peft_cannot_be_imported(base: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    model = adapted(base)
    merging.merge_for_deployment(model, tmp_path / "out")
    save_file(IDS, tmp_path / "ids")
    script = [sys.executable, "-W", "ignore", "-c", WITHOUT_PEFT]
    files = [str(tmp_path / name) for name in ("out", "ids", "logits")]
    subprocess.run([*script, *files], check=True, capture_output=True)
    assert torch.allclose(load_file(tmp_path / "logits")["logits"], logits(model), atol=1e-5)


def test_a_base_in_four_bits_is_dequantised_first(base: Path, tmp_path: Path):
    folder = stored(base, bits=merging.NF4)
    done = merging.merge_for_deployment(folder, tmp_path / "out", base=base, bits=merging.NF4)
    trained = merging.kept_apart(base, folder, AUTO)
    assert done.route == "dequantised"
    assert exact.compare(trained, AUTO.from_pretrained(done.folder).eval(), IDS).relative < 1e-5
    live = merging.merge_for_deployment(trained, tmp_path / "live")
    assert live.route == "dequantised"
    pair = [AUTO.from_pretrained(one.folder).state_dict() for one in (done, live)]
    assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])


@pytest.mark.parametrize("route", ["into four bits", "full precision"])
def test_the_wrong_routes_are_refused_with_their_distance(base: Path, tmp_path: Path, route: str):
    folder = stored(base, bits=merging.NF4)
    with pytest.raises(deploy.MergeRefused, match=r"away\s+from the trained one|effect away"):
        merging.merge_for_deployment(
            folder, tmp_path / "out", base=base, bits=merging.NF4, route=route
        )
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_sixteen_bits_are_refused_for_a_small_adapter(base: Path, tmp_path: Path):
    small, large = adapted(base, size=0.005), adapted(base, size=0.3)
    with pytest.raises(deploy.MergeRefused, match="too few digits"):
        merging.merge_for_deployment(small, tmp_path / "out", dtype=torch.bfloat16)
    done = merging.merge_for_deployment(large, tmp_path / "out", dtype=torch.bfloat16)
    assert done.error.share < deploy.LIMIT
    assert AUTO.from_pretrained(done.folder).dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["prompt", "prefix", "p-tuning", "p-tuning-v2"])
def test_prompts_have_no_place_in_a_weight(base: Path, tmp_path: Path, method: str):
    model = get_peft_model(
        AUTO.from_pretrained(base), adapters.config(method, task_type="CAUSAL_LM")
    )
    with pytest.raises(deploy.MergeRefused, match="virtual tokens"):
        merging.merge_for_deployment(model, tmp_path / "out")


def test_replicated_layers_are_refused_until_they_are_separate(base: Path, tmp_path: Path):
    config = copy.deepcopy(LORA)
    config.layer_replication = [[0, 2], [0, 2]]
    model = exact.disturbed(get_peft_model(AUTO.from_pretrained(base), config), seed=0, size=0.1)
    with pytest.raises(deploy.MergeRefused, match="separate"):
        merging.merge_for_deployment(model, tmp_path / "out")
    replication.separate(model)
    assert merging.merge_for_deployment(model, tmp_path / "out").error.relative < 1e-5


def test_tied_embeddings_are_refused(tmp_path: Path):
    config = models.tiny("llama").config
    config.tie_word_embeddings = True
    net = AUTO.from_config(config)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(deploy.MergeRefused, match="tied embeddings"):
        merging.merge_for_deployment(model, tmp_path / "out")


def test_weights_that_are_not_finite_are_refused(base: Path, tmp_path: Path):
    model = adapted(base)
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    model.get_submodule(name).lora_B.default.weight.data[0, 0] = torch.nan
    with pytest.raises(deploy.MergeRefused, match=r"layers\.1\.self_attn\.q_proj.*NaN"):
        merging.merge_for_deployment(model, tmp_path / "out")


def test_a_merge_that_overflows_fp16_is_refused(base: Path, tmp_path: Path):
    model = adapted(base)
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    model.get_submodule(name).base_layer.weight.data[0, 0] = 1e6
    with pytest.raises(deploy.MergeRefused, match="fp16 overflowed"):
        merging.merge_for_deployment(model, tmp_path / "out", dtype=torch.float16)


def test_an_existing_folder_is_not_touched(base: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(deploy.MergeRefused, match="exists"):
        merging.merge_for_deployment(adapted(base), tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_one_adapter_at_a_time(base: Path, tmp_path: Path):
    model = adapted(base)
    model.add_adapter("second", copy.deepcopy(LORA))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(deploy.MergeRefused, match="Several adapters"):
        merging.merge_for_deployment(model, tmp_path / "out")


def test_an_adapter_of_another_name_is_found(base: Path, tmp_path: Path):
    net = merging.NF4.load(base, AUTO)
    model = get_peft_model(net, copy.deepcopy(LORA), adapter_name="style")
    done = merging.merge_for_deployment(exact.disturbed(model, seed=0, size=0.1), tmp_path / "out")
    assert done.error.relative < 1e-5


def test_an_adapter_that_is_merged_already_is_refused(base: Path, tmp_path: Path):
    model = adapted(base)
    model.merge_adapter()
    with pytest.raises(deploy.MergeRefused, match="merged into .* already"):
        merging.merge_for_deployment(model, tmp_path / "out")


def test_rearranged_weights_are_refused(base: Path, tmp_path: Path):
    model = adapted(base, bits=merging.NF4)
    name = "base_model.model.model.layers.0.mlp.up_proj"
    model.get_submodule(name).weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(deploy.MergeRefused, match=r"rearranged.*load_in_4bit"):
        merging.merge_for_deployment(model, tmp_path / "out")


def test_a_base_that_is_not_here_has_to_be_named(base: Path, tmp_path: Path):
    folder = stored(base)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "somebody/llama"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(deploy.MergeRefused, match="somebody/llama.*base="):
        merging.merge_for_deployment(folder, tmp_path / "out")


def test_a_write_that_fails_leaves_nothing(base: Path, tmp_path: Path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(atomic, "put_folder", full)
    with pytest.raises(OSError, match="No space"):
        merging.merge_for_deployment(adapted(base), tmp_path / "out")
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*out*"))


@pytest.mark.parametrize(
    ("name", "method", "targets"),
    [("minilm", "DoRA", ["query", "value"]), ("dinov2", "(IA)³", ["q_proj", "v_proj"])],
)
def test_real_encoders_are_deployed(tmp_path: Path, name: str, method: str, targets: list[str]):
    from transformers import AutoModel

    net = AutoModel.from_pretrained(models.path(name))
    model = exact.disturbed(get_peft_model(net, exact.config(method, targets)), seed=0)
    done = merging.merge_for_deployment(model, tmp_path / "out")
    assert done.error.relative < 1e-5
    wanted = "tokenizer.json" if name == "minilm" else "preprocessor_config.json"
    assert wanted in done.companions


@pytest.mark.slow
def test_smollm2_trained_on_four_bits_is_deployed_with_its_tokenizer(tmp_path: Path):
    net = quantization.load_in_4bit(models.path("smollm2"), AUTO)
    config = adapters.config("qlora", task_type="CAUSAL_LM")
    model = exact.disturbed(get_peft_model(net, config), seed=0)
    done = merging.merge_for_deployment(model, tmp_path / "out")
    assert done.route == "dequantised"
    assert done.error.share < deploy.LIMIT
    both = [AutoTokenizer.from_pretrained(f) for f in (done.folder, models.path("smollm2"))]
    chat = [{"role": "user", "content": "Hello"}]
    one, other = (t.apply_chat_template(chat, tokenize=False) for t in both)
    assert one == other


def test_command_line(base: Path, tmp_path: Path, capsys):
    folder = stored(base, bits=merging.NF4)
    words = [str(folder), "--base", str(base), "--out", str(tmp_path / "out"), "--four-bit", "nf4"]
    assert main(words) == 0
    assert "dequantised, float32" in capsys.readouterr().out
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert main(words) == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert "exists" in sentence


@pytest.mark.parametrize(
    "words",
    [
        ["--out", "x"],
        ["a", "--out", "x", "--dtype", "int8"],
        ["a"],
        ["a", "--out", "x", "--single-quant"],
    ],
)
def test_command_line_refuses_bad_words(words: list[str]):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2


def test_command_line_names_what_is_wrong_with_a_folder(tmp_path: Path, capsys):
    assert main([str(tmp_path / "nowhere"), "--base", "minilm", "--out", str(tmp_path / "o")]) == 2
    assert "nowhere" in capsys.readouterr().err
