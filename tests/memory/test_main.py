"""`python -m helpers.memory`: answers, and one sentence for each thing that cannot be answered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import memory
from helpers.memory import __main__ as command

GPT2 = ("gpt2", "--seq", "32")


def run(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str, str]:
    try:
        status = command.main(list(words))
    except SystemExit as left:  # argparse
        status = left.code
    return status, *capsys.readouterr()


def test_text_has_the_summary_and_the_table(capsys):
    status, out, err = run(capsys, *GPT2, "--gpu", "t4", "--batch", "2")
    found = memory.predict("gpt2", "lora", batch=2, seq=32, gpu="t4")
    assert (status, err) == (0, "")
    assert memory.summary(found) in out
    assert "rounding to blocks" in out
    assert out.startswith("run        gpt2, lora, rank 8, targets c_attn (peft's choice), batch 2,")
    assert "\nnote       t4 has no bf16 units: train with --dtype fp16\n" in out


def test_the_first_example_fits_as_it_says(capsys):
    assert "first of these runs fits" in command.__doc__
    example = command.__doc__.split("python -m helpers.memory ")[1].replace("\\", "")
    status, out, _ = run(capsys, *example.split(), "--fast", "--json")
    found = json.loads(out)
    assert (status, found["fits"], found["notes"]) == (0, True, [])


def test_help_explains_what_is_not_plain(capsys):
    status, out, _ = run(capsys, "--help")
    words = " ".join(out.split())
    assert status == 0
    assert "mixed (weights in 32 bits, products in bf16)" in words
    assert "rows of several lengths, filled up to --seq" in words
    assert "what is allocated within about 1 %, what is reserved is rough" in words


@pytest.mark.parametrize("words", [["--list"], [*GPT2, "--fast"]])
def test_a_reader_who_has_gone_is_no_error(words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "helpers.memory", *words], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_json_alone_is_on_stdout_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "helpers.memory", *GPT2, "--json", "--method", "qlora"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["model"] == "gpt2"
    assert found["settings"]["method"] == "qlora"
    assert 0 < found["allocated"] <= found["reserved"]
    assert done.stderr == ""


def test_every_option_reaches_the_prediction(capsys):
    words = (
        "--method qlora --rank 3 --targets c_attn c_fc --batch 3 --dtype fp16 --quant-type fp4 "
        "--no-double-quant --optimizer paged_adamw_8bit --attention eager --checkpointing --padded "
        "--gpu l4"
    )
    status, out, _ = run(capsys, *GPT2, *words.split(), "--json")
    found = json.loads(out)
    assert status == 0
    assert found["card"]["name"] == "l4"
    assert found["settings"] == {
        "architecture": "gpt2",
        "method": "qlora",
        "rank": 3,
        "targets": ["c_attn", "c_fc"],
        "virtual_tokens": None,
        "batch": 3,
        "seq": 32,
        "dtype": "fp16",
        "quant_type": "fp4",
        "double_quant": False,
        "optimizer": "paged_adamw_8bit",
        "attention": "eager",
        "checkpointing": True,
        "padded": True,
    }


def test_virtual_tokens_and_extrapolation(capsys):
    _, out, _ = run(
        capsys, *GPT2, "--method", "prompt", "--virtual-tokens", "5", "--fast", "--json"
    )
    found = json.loads(out)
    assert found["settings"]["virtual_tokens"] == 5
    assert not found["exact"]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (None, None),
        (["all-linear"], "all-linear"),
        (["q_proj"], ["q_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["q_proj,v_proj"], ["q_proj", "v_proj"]),
        (["self_attn.q_proj"], ["self_attn.q_proj"]),
        ([r".*\.[qv]_proj"], r".*\.[qv]_proj"),
    ],
)
def test_targets_are_names_or_a_pattern(words, meant):
    assert command.targets(words) == meant


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    shape = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(shape | heads))
    return file


def test_a_configuration_file_and_its_folder(capsys, tiny_file):
    places = (tiny_file, tiny_file.parent)
    answers = [run(capsys, str(place), "--json")[1] for place in places]
    sizes = {json.loads(answer)["allocated"] for answer in answers}
    assert len(sizes) == 1
    assert run(capsys, str(tiny_file))[1].startswith(f"run        {tiny_file}, lora, ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("gptt2", "did you mean 'gpt2'"),
        ("gpt2 --method lroa", "did you mean 'lora'"),
        ("gpt2 --gpu t44", "did you mean 't4'"),
        ("gpt2 --gpu 24", "cards of about 24 GiB: l4, a10g, rtx-3090, rtx-4090"),
        ("no-such/config.json", "There is no file no-such/config.json"),
        ("llama-3-8b", "did you mean 'llama-3.2-3b'"),
        ("llama-3-8b", "Or give the path of its config.json"),
        ("gpt2 --optimizer adam", "did you mean 'adamw'"),
        ("gpt2 --dtype int8", "Known: fp32, fp16, bf16, mixed"),
        ("gpt2 --attention flash", "Known: sdpa, eager"),
        ("gpt2 --method qlora --quant-type int4", "did you mean 'nf4'"),
        ("gpt2 --quant-type fp4", "for --method qlora, not lora"),
        ("gpt2 --method qlora --dtype mixed", "no dtype 'mixed'"),
        ("gpt2 --batch 0", "batch must be a whole number of at least 1"),
        ("gpt2 --seq -4", "seq must be a whole number of at least 1"),
        ("gpt2 --seq 1.5", "invalid int value: '1.5' (--help lists the options)"),
        ("gpt2 --rank 0", "rank must be a whole number of at least 1"),
        ("gpt2 --batch 100000000000", "cannot be simulated"),
        ("gpt2 --seq 1025", "1024 learned positions"),
        ("gpt2 --seq 1010 --method prompt", "a seq of at most 1008"),
        ("gpt2 --targets nothing", "'nothing' matches no module of 'gpt2'"),
        ("gpt2 --targets c_attn c_fcc", "'c_fcc' matches no module of 'gpt2'"),
        ("gpt2 --targets .*zzz", "'.*zzz' matches no module of 'gpt2'"),
        ("gpt2 --targets (", "(' matches no module"),
        ("gpt2 --method prompt --rank 3", "'prompt' takes no rank"),
        ("gpt2 --method prompt --targets c_attn", "'prompt' takes no target_modules"),
        ("gpt2 --method prefix --checkpointing", "leave checkpointing out"),
        ("gpt2 --method full --rank 3", "--method full has no adapter"),
        ("gpt2 --picture step.jpg", "does not end in .png"),
        ("gpt2 --picture no-such-folder/step.png", "does not exist"),
        ("gpt2 --picture step.png --fast", "give one of them"),
        ("", "the following arguments are required: MODEL"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(capsys, words, says):
    status, out, err = run(capsys, *words.split())
    assert (status, out) == (2, "")
    assert says in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{broken", "is no configuration"),
        ("[1, 2]", "is no configuration"),
        ("{}", "is no configuration"),
        ('{"model_type": "nothing"}', "is no configuration"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "expected int, got str"),
        ('{"model_type": "llama", "num_attention_heads": 7}', "not a multiple"),
        ('{"model_type": "gptj"}', "give the attention 'eager'"),
        ('{"model_type": "vit"}', "vit"),
    ],
)
def test_files_that_are_no_configuration(capsys, tmp_path, text, says):
    file = tmp_path / "vit.json"
    file.write_text(text)
    status, out, err = run(capsys, str(file), "--targets", "all-linear")
    assert (status, out) == (2, "")
    assert says in err and len(err.splitlines()) == 1


def test_peft_without_default_targets_asks_for_some(capsys, tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "smollm3", "num_hidden_layers": 1}')
    status, _, err = run(capsys, str(file), "--method", "adalora")
    assert status == 2
    assert "give --targets" in err


def test_the_picture_is_a_png_in_the_right_place(capsys, tmp_path):
    file = tmp_path / "step.png"
    status, out, _ = run(capsys, *GPT2, "--picture", str(file))
    assert status == 0
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert list(tmp_path.iterdir()) == [file]
    assert f"picture: {file}\nStacked areas" in out


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (OSError("full"), 2)])
def test_a_stop_leaves_the_old_picture_and_nothing_beside_it(
    capsys, tmp_path, monkeypatch, error, status
):
    file = tmp_path / "step.png"
    file.write_bytes(b"old")

    def half(self, part, **_):
        part.write_bytes(b"half")
        raise error

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    assert run(capsys, *GPT2, "--picture", str(file))[:2] == (status, "")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_largest_batch_is_in_both_answers(capsys, tiny_file):
    words = (str(tiny_file), "--largest-batch", "--gpu", "t4")
    found = json.loads(run(capsys, *words, "--json")[1])["largest_batch"]
    assert found > 1
    assert f"largest batch that fits t4: {found}" in run(capsys, *words)[1]


def test_no_row_that_fits_is_said_in_words(capsys):
    words = ("llama-65b", "--fast", "--gpu", "t4", "--largest-batch")
    assert run(capsys, *words)[1].endswith("\n\nnot even one row fits t4\n")
    assert json.loads(run(capsys, *words, "--json")[1])["largest_batch"] == 0


def test_the_list_names_everything(capsys):
    status, out, err = run(capsys, "--list")
    assert (status, err) == (0, "")
    for name in ("llama-65b", "p-tuning-v2", "t4 (15 GiB)", "paged_adamw_8bit", "mixed"):
        assert name in out
