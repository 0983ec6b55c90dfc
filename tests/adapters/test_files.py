"""Adapter folders: what is refused and in which words, what is accepted, and saves that break."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers import adapters, atomic, models, quantization
from helpers.adapters import __main__ as cli
from helpers.adapters.files import CONFIG, PICKLE, SUMS, WEIGHTS, AdapterFileError, check_folder
from helpers.atomic import beside

IDS = torch.tensor([[5, 9, 33, 70, 12, 8]])

MOMENTS = ("half of the weights", "before the name", "half of the weights, peft alone")
# A process that imports once. For each moment, a child of it saves an adapter over another one and
# is killed then; the child's end is printed.
KILLED = """
import os, signal, sys
from pathlib import Path
import peft.peft_model
sys.path.insert(0, sys.argv[1])
from test_files import MOMENTS, trained
from helpers import atomic
from helpers.adapters import files

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half(tensors, path, **_):
    Path(path).write_bytes(b"half")
    die()

def save(folder, moment):
    if moment == "before the name":
        atomic.put_folder = die
    else:
        peft.peft_model.safe_save_file = half
    if moment.endswith("peft alone"):
        trained(seed=1).save_pretrained(folder)
    else:
        files.save(trained(seed=1), folder, replace=True)

for moment in MOMENTS:
    child = os.fork()
    if not child:
        save(Path(sys.argv[2]) / moment, moment)
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


def tiny(arch="llama", layers=None, task="lm"):
    torch.manual_seed(0)
    model = models.tiny(arch, task).eval()
    if layers:
        model.config.num_hidden_layers = layers
        model = type(model)._from_config(model.config).eval()
    return model


def trained(method="lora", seed=0, base=None, task="CAUSAL_LM"):
    """A tiny model with an adapter that does something."""
    steps = {"total_steps": 50} if method == "adalora" else {}
    model = get_peft_model(base or tiny(), adapters.config(method, task_type=task, **steps))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture
def folder(tmp_path):
    return adapters.save(trained(), tmp_path / "adapter")


def rewrite(file, change):
    """Change the tensors of a file and leave no sums behind, as another program would."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    (file.parent / SUMS).unlink(missing_ok=True)


def edit(folder, **entries):
    (folder / SUMS).unlink(missing_ok=True)
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def refusal(folder, base=None):
    """The one sentence; it names the folder."""
    with pytest.raises(AdapterFileError) as caught:
        check_folder(folder, base)
    text = str(caught.value)
    assert str(folder) in text and text.endswith(".") and "\n" not in text
    return text


# ------------------------------------------------------------------------------ what is accepted


@pytest.mark.parametrize("method", adapters.METHODS)
def test_every_method_comes_back_with_the_same_logits(method, tmp_path):
    model = trained(method)
    folder = adapters.save(model, tmp_path / "adapter")
    found = check_folder(folder, tiny())
    assert found.notes == ("checksums agree",)
    assert set(found.shapes) == set(load_file(folder / WEIGHTS))
    loaded = adapters.load(tiny(), folder)
    torch.testing.assert_close(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded)[:, -6:], logits(tiny()))  # it does something


def test_what_it_says_of_a_folder(folder):
    size = (folder / WEIGHTS).stat().st_size
    assert str(check_folder(folder)) == f"LORA, rank 8, 8 tensors, {size:,} bytes; checksums agree"


def test_the_base_is_left_as_it_is(folder):
    base = tiny()
    before = {name: (id(p), p.clone()) for name, p in base.named_parameters()}
    check_folder(folder, base)
    assert not isinstance(base, PeftModel) and not hasattr(base, "peft_config")
    for name, parameter in base.named_parameters():
        assert id(parameter) == before[name][0] and torch.equal(parameter, before[name][1])


def test_a_base_without_weights_will_do(folder):
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(tiny().config)
    assert check_folder(folder, base).kind == "LORA"


def test_a_base_in_four_bits(tmp_path, folder):
    tiny().save_pretrained(tmp_path / "base")
    base = quantization.load_in_4bit(tmp_path / "base", AutoModelForCausalLM)
    assert check_folder(folder, base).rank == 8
    assert "has to be" in refusal(wider(tmp_path), base)


def test_an_adapter_beside_another(tmp_path, folder):
    second = adapters.save(trained("dora", seed=2), tmp_path / "second")
    model = adapters.load(tiny(), folder, name="one")
    adapters.load(model, second, name="two")
    assert list(model.peft_config) == ["one", "two"]
    with pytest.raises(AdapterFileError, match="has an adapter 'two' already"):
        adapters.load(model, second, name="two")


def test_a_head_that_trains_is_in_the_file(tmp_path):
    model = trained(base=tiny("bert", task="seq_cls"), task="SEQ_CLS")
    folder = adapters.save(model, tmp_path / "adapter")
    assert check_folder(folder, tiny("bert", task="seq_cls"))
    rewrite(folder / WEIGHTS, lambda t: [t.pop(n) for n in list(t) if "classifier" in n])
    assert "lacks the trained copy of classifier" in refusal(folder, tiny("bert", task="seq_cls"))


def test_more_words_than_the_base_has(tmp_path):
    base = tiny()
    base.resize_token_embeddings(130)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    folder = adapters.save(get_peft_model(base, config), tmp_path / "adapter")
    assert "call base.resize_token_embeddings(130) before" in refusal(folder, tiny())
    fitting = tiny()
    fitting.resize_token_embeddings(130)
    assert check_folder(folder, fitting)


# ------------------------------------------------------------------------------- what is refused


def test_cut_at_any_byte(folder):
    """At every length of the header, and at a sample of those of the numbers."""
    data = (folder / WEIGHTS).read_bytes()
    (folder / SUMS).unlink()
    for length in (*range(0, 200, 7), *range(200, len(data), 997), len(data) - 1):
        (folder / WEIGHTS).write_bytes(data[:length])
        assert "is cut short, damaged, or no safetensors file" in refusal(folder)
    (folder / WEIGHTS).write_bytes(data)
    assert check_folder(folder)


def test_one_bit_is_found_by_the_sums_and_by_nothing_else(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-2] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    assert f"{WEIGHTS} differs from its sum" in refusal(folder)
    (folder / SUMS).unlink()
    assert check_folder(folder, tiny()).notes == (
        f"no {SUMS}, so an altered number would go unnoticed",
    )


def test_an_altered_configuration(folder):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"lora_alpha": 16', '"lora_alpha": 99'))
    assert f"{CONFIG} differs from its sum" in refusal(folder)


def test_sums_that_were_cut(folder):
    (folder / SUMS).write_text((folder / SUMS).read_text()[:40])
    assert "differs from its sum" in refusal(folder)


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="there is no sha256sum")
def test_the_sums_are_those_of_sha256sum(folder):
    command = ["sha256sum", "--check", SUMS]
    assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none(folder, number):
    name = min(load_file(folder / WEIGHTS))
    rewrite(folder / WEIGHTS, lambda tensors: tensors[name].view(-1)[3:4].fill_(number))
    assert f"NaN or infinity in {name}, in 1 of 8 tensors" in refusal(folder)


class Trap:
    """Unpickled, it makes a file; a test can see that it was not."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", [WEIGHTS, PICKLE])
@pytest.mark.parametrize("kind", ["torch.save", *range(2, pickle.HIGHEST_PROTOCOL + 1)])
def test_a_pickle_is_not_opened(folder, tmp_path, name, kind):
    trap = Trap(str(tmp_path / "ran"))
    (folder / WEIGHTS).unlink()
    (folder / SUMS).unlink()
    if kind == "torch.save":
        torch.save(trap, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(trap, protocol=kind))
    assert "a format that can carry code" in refusal(folder)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(trap))
    assert (tmp_path / "ran").exists()  # the trap works


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_that_begins_like_a_pickle_is_none(folder, length):
    """The length of a header is the first byte of the file: 0x80 now and then."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    data = length.to_bytes(8, "little") + header.ljust(length) + bytes(4)
    (folder / WEIGHTS).write_bytes(data)
    (folder / SUMS).unlink()
    assert dict(check_folder(folder).shapes) == {"a": (1,)}


def test_other_things_under_the_name(folder):
    (folder / SUMS).unlink()
    for text in ("<!DOCTYPE html><html>404</html>", "version https://git-lfs.github.com/spec/v1"):
        (folder / WEIGHTS).write_text(text)
        assert "no safetensors file" in refusal(folder)


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    assert f"has {CONFIG} but no {WEIGHTS}; copy that file too" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"peft_type": "LORA", "r": ', "is not valid JSON"),
        ("[1, 2]", "peft_type None, unknown to this peft; it names one, such as LORA"),
        ('{"peft_type": "lora"}', "peft_type 'lora', unknown to this peft; did you mean LORA"),
        ('{"peft_type": ["LORA"]}', "peft_type ['LORA'], unknown"),
        ('{"peft_type": "LORA", "layers_pattern": "h"}', "is no LORA configuration"),
    ],
)
def test_configurations_that_are_none(folder, text, says):
    (folder / CONFIG).write_text(text)
    assert says in refusal(folder)


def test_no_configuration(folder, tmp_path, monkeypatch):
    assert f"There is no folder {tmp_path / 'adaptr'}; did you mean {folder}" in refusal(
        tmp_path / "adaptr"
    )
    assert f"name an adapter inside it, such as the newest, {folder}" in refusal(tmp_path)
    assert "that is a file: name the folder" in refusal(folder / WEIGHTS)
    tiny().save_pretrained(tmp_path / "full")
    assert "a full model: load it with from_pretrained" in refusal(tmp_path / "full")
    (folder / CONFIG).unlink()
    assert f"has no {CONFIG}; name the folder that holds one" in refusal(folder)
    monkeypatch.chdir(folder)
    assert f"has no {CONFIG}" in refusal(Path())


def test_a_save_that_was_killed_between_two_renames_is_named(folder):
    old = folder.rename(beside(folder, "old"))
    assert f"rename {old} to it" in refusal(folder)


# ----------------------------------------------------------------------------- another base model


def wider(tmp_path):
    """An adapter for a Llama that is twice as wide."""
    config = tiny().config
    config.hidden_size *= 2
    config._name_or_path = "wide-llama"
    base = AutoModelForCausalLM.from_config(config)
    return adapters.save(trained(base=base), tmp_path / "wider")


def test_a_base_of_another_width(tmp_path):
    text = refusal(wider(tmp_path), tiny())
    assert "lora_A.weight (and 3 more) is 8×64 and has to be 8×32" in text
    assert "load the base that it was made for, wide-llama" in text


@pytest.mark.parametrize(("layers", "says"), [(1, "has no place"), (3, "is not in the file")])
def test_a_base_with_more_or_fewer_layers(folder, layers, says):
    """peft alone does no more than warn of layers that the file lacks."""
    assert says in refusal(folder, tiny(layers=layers))


def test_a_base_of_another_kind(folder):
    assert "does not fit this BertForSequenceClassification" in refusal(
        folder, tiny("bert", task="seq_cls")
    )


def test_a_base_without_its_head(tmp_path, folder):
    assert "made for the model with its head" in refusal(
        folder, AutoModel.from_config(tiny().config)
    )
    below = AutoModel.from_config(tiny().config)
    config = LoraConfig(target_modules=["q_proj"])
    other = adapters.save(get_peft_model(below, config), tmp_path / "below")
    assert "put it on base.model" in refusal(other, tiny())


def test_bases_of_the_same_shapes_are_told_apart_by_name_alone(folder):
    edit(folder, base_model_name_or_path="one")
    base = tiny()
    base.config._name_or_path = "other"
    assert "made for one, checked on other" in check_folder(folder, base).notes


def test_a_rank_that_the_configuration_does_not_have(folder):
    edit(folder, r=4)
    assert "is 8×32 and has to be 4×32" in refusal(folder, tiny())


def test_a_refused_folder_leaves_the_base_alone_and_peft_does_not(tmp_path):
    folder, base = wider(tmp_path), tiny()
    with pytest.raises(AdapterFileError):
        adapters.load(base, folder)
    assert not any("lora" in name for name, _ in base.named_modules())
    with pytest.raises(RuntimeError):
        PeftModel.from_pretrained(base, folder)
    assert any("lora" in name for name, _ in base.named_modules())


def test_what_this_peft_does_not_know_is_a_note(folder):
    edit(folder, of_the_future=1)
    assert any("has of_the_future, which this peft" in one for one in check_folder(folder).notes)


@pytest.mark.parametrize("name", ["smollm2", "minilm", "dinov2"])
def test_the_real_models(name, tmp_path):
    """An adapter of each fits its own base and none of the two others."""
    autos = {"smollm2": AutoModelForCausalLM, "minilm": AutoModelForSequenceClassification}
    base = autos.get(name, AutoModel).from_pretrained(models.path(name))
    config = LoraConfig(
        target_modules="all-linear",
        task_type={"smollm2": "CAUSAL_LM", "minilm": "SEQ_CLS"}.get(name),
    )
    folder = adapters.save(get_peft_model(base, config), tmp_path / "adapter")
    for other in ("smollm2", "minilm", "dinov2"):
        found = cli.main([str(folder), "--base", other])
        assert found == (0 if other == name else cli.REFUSED)


# ---------------------------------------------------------------------------------------- saving


def test_what_may_be_replaced(folder, tmp_path):
    with pytest.raises(AdapterFileError, match="pass replace=True"):
        adapters.save(trained(), folder)
    other = trained(seed=3)
    adapters.save(other, folder, replace=True)
    torch.testing.assert_close(logits(adapters.load(tiny(), folder)), logits(other))
    assert [one.name for one in tmp_path.iterdir()] == ["adapter"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "years of work").touch()
    with pytest.raises(AdapterFileError, match="is no adapter folder, so it is not replaced"):
        adapters.save(trained(), tmp_path / "thesis", replace=True)


def test_one_of_several_adapters(tmp_path):
    model = trained()
    model.add_adapter("second", adapters.config("lora", task_type="CAUSAL_LM"))
    with pytest.raises(AdapterFileError, match="several adapters"):
        adapters.save(model, tmp_path / "x")
    with pytest.raises(AdapterFileError, match="did you mean 'second'"):
        adapters.save(model, tmp_path / "x", adapter="secnd")
    folder = adapters.save(model, tmp_path / "x", adapter="second")
    assert check_folder(folder, tiny()) and not (folder / "second").exists()


def test_a_model_without_an_adapter(tmp_path):
    with pytest.raises(AdapterFileError, match="LlamaForCausalLM has no adapter to save"):
        adapters.save(tiny(), tmp_path / "x")


def test_weights_that_diverged_do_not_replace_good_ones(folder, tmp_path):
    model = trained()
    next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = float("nan")
    with pytest.raises(AdapterFileError, match="NaN or infinity"):
        adapters.save(model, folder, replace=True)
    assert check_folder(folder, tiny()) and [one.name for one in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_more(folder, tmp_path, monkeypatch, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic, "put_folder", full)
    before = (folder / WEIGHTS).read_bytes()
    with pytest.raises(AdapterFileError, match="could not be written .*still in memory"):
        adapters.save(trained(seed=4), folder, replace=True)
    assert (folder / WEIGHTS).read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["adapter"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder for each moment, in which a save over an adapter was killed then."""
    if not hasattr(os, "fork"):
        pytest.skip("the system has no fork")
    folder = tmp_path_factory.mktemp("killed")
    for moment in MOMENTS:
        adapters.save(trained(), folder / moment)
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(folder)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    assert ran.stdout.split() == [str(int(signal.SIGKILL))] * len(MOMENTS)
    return folder


@pytest.mark.parametrize("moment", MOMENTS[:2])
def test_killed_while_saving_the_old_one_is_there(killed, moment):
    folder = killed / moment
    torch.testing.assert_close(logits(adapters.load(tiny(), folder)), logits(trained()))
    assert beside(folder, "part").exists()
    adapters.save(trained(seed=1), folder, replace=True)  # and the next save clears up
    torch.testing.assert_close(logits(adapters.load(tiny(), folder)), logits(trained(seed=1)))
    assert not beside(folder, "part").exists()


def test_killed_while_peft_saves_neither_is_there(killed):
    """The danger is real: the same kill, without the folder beside."""
    assert "differs from its sum" in refusal(killed / MOMENTS[2])


# ---------------------------------------------------------------------------------- command line


def test_the_command(folder, tmp_path, capsys):
    assert cli.main([str(folder)]) == 0
    assert capsys.readouterr().out.startswith("LORA, rank 8, 8 tensors")
    tiny().config.save_pretrained(tmp_path / "base")
    assert cli.main([str(folder), "--base", str(tmp_path / "base")]) == 0
    assert capsys.readouterr().out.strip().endswith(f"fits {tmp_path / 'base'}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{}/nothing"], "There is no folder"),
        (["{}", "--base", "lama-2-7b"], "did you mean 'llama-2-7b'"),
        (["{}", "--base", "llama-2-7b"], "does not fit this LlamaForCausalLM"),
        (["{}", "--base", "t5-small"], "t5-small has no model for the task CAUSAL_LM"),
        (["{}", "--base", "{}"], "Unrecognized model"),
    ],
)
def test_the_command_refuses_in_one_sentence(folder, capsys, words, says):
    assert cli.main([word.format(folder) for word in words]) == cli.REFUSED == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_the_command_line_names_what_is_possible(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse([])
    assert caught.value.code == 2 and "FOLDER" in capsys.readouterr().err


def test_labels_are_counted_in_the_file(tmp_path, capsys):
    base = AutoModelForSequenceClassification.from_pretrained(models.path("minilm"), num_labels=7)
    folder = adapters.save(trained(base=base, task="SEQ_CLS"), tmp_path / "adapter")
    assert cli.main([str(folder), "--base", "minilm"]) == 0
