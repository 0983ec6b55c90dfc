"""The server answers over loopback with what the model itself writes, adapters included."""

import shutil
import urllib.error
import urllib.request

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from helpers import adapters, data, models, serving

QUESTION = "What is the capital of France?"
TOKENS = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small base with SmolLM2's tokenizer, two adapters, and the first of them merged."""
    root = tmp_path_factory.mktemp("served")
    tokenizer = AutoTokenizer.from_pretrained(models.path("smollm2"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for name in ("one", "two"):
        base = AutoModelForCausalLM.from_pretrained(root / "base")
        lora = adapters.config("lora", task_type="CAUSAL_LM", target_modules="all-linear")
        model = get_peft_model(base, lora)
        for parameter, weight in model.named_parameters():
            if "lora_" in parameter:
                torch.nn.init.normal_(weight, std=0.5)
        model.save_pretrained(root / name)
        serving.servable(root / "base", root / name, root / f"{name} served")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(root / "base"), str(root / "one")
    )
    model.merge_and_unload().save_pretrained(root / "merged")
    tokenizer.save_pretrained(root / "merged")
    return root


@pytest.fixture(scope="module")
def address(folders):
    with serving.server() as found:
        yield found


def written(folders, adapter=None):
    """What the model writes without a server."""
    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    model = AutoModelForCausalLM.from_pretrained(folders / "base")
    if adapter:
        model = PeftModel.from_pretrained(model, str(folders / adapter))
    ids = tokenizer(data.chat_prompt(QUESTION, tokenizer), return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_each_name_gets_its_own_model(folders, address):
    """Switched back and forth by the name in the request alone."""
    wanted = {"base": None, "one served": "one", "two served": "two"}
    texts = {name: written(folders, adapter) for name, adapter in wanted.items()}
    assert len(set(texts.values())) == 3  # or the comparison could not fail
    for name in [*texts, *reversed(texts)]:
        assert serving.ask(address, folders / name, QUESTION, tokens=TOKENS) == texts[name]


def test_the_merged_model_answers_as_its_adapter(folders, address):
    merged = serving.ask(address, folders / "merged", QUESTION, tokens=TOKENS)
    assert merged == written(folders, "one")


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_alone_is_refused_with_a_way_out(folders, address):
    with pytest.raises(serving.ServingError, match="answered 500 for one.*servable makes one"):
        serving.ask(address, folders / "one", QUESTION)


def test_a_configuration_without_weights_does_not_help(folders, address):
    """Beside a config.json the server looks for the base's weights in the same folder."""
    half = folders / "half"
    shutil.copytree(folders / "one", half)
    shutil.copy(folders / "base" / "config.json", half)
    with pytest.raises(serving.ServingError, match="500"):
        serving.ask(address, half, QUESTION)


def test_the_server_is_gone_after_the_block():
    with serving.server() as address:
        assert urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
        assert address.startswith("http://127.0.0.1:")
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{address}/health", timeout=5)


def test_servable_links_the_weights(folders):
    linked = folders / "one served" / "model.safetensors"
    assert linked.samefile(folders / "base" / "model.safetensors")
    assert (folders / "one served" / "tokenizer_config.json").is_file()


@pytest.mark.parametrize(
    ("base", "adapter", "out", "says"),
    [
        ("nothing", "one", "new", "has no config.json"),
        ("base", "base", "new", "has no adapter_config.json"),
        ("one", "one", "new", "has no config.json"),
        ("base", "one", "one served", "exists; give a folder that does not"),
    ],
)
def test_servable_refuses_in_one_sentence(folders, base, adapter, out, says):
    with pytest.raises(serving.ServingError, match=says):
        serving.servable(folders / base, folders / adapter, folders / out)


def test_a_base_without_safetensors_is_refused(folders, tmp_path):
    shutil.copy(folders / "base" / "config.json", tmp_path)
    with pytest.raises(serving.ServingError, match="no weights as safetensors"):
        serving.servable(tmp_path, folders / "one", tmp_path / "out")
