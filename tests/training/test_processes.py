"""The same command in one process and in two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.assets import DATA
from helpers.training import __main__ as cli
from helpers.training.checkpoints import Checkpoints
from helpers.training.team import Team

CONFIGS = DATA / "configs" / "accelerate"
ROOT = Path(__file__).parents[2]
ARGUMENTS = ["tiny", "--steps", "6", "--warmup-steps", "1"]


def launch(out: Path, *more: str) -> subprocess.CompletedProcess:
    """The command under `accelerate launch`, with two processes on the processor."""
    config = ["--config_file", str(CONFIGS / "two_processes_cpu.yaml"), "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *config]
    command += ["-m", "helpers.training", *ARGUMENTS, "--out", str(out), *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PEFT_MEASURED_DEVICE": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def losses(out: Path) -> list[float]:
    return json.loads((out / "losses.json").read_text())["losses"]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """One process that accumulates twice as much."""
    out = tmp_path_factory.mktemp("one") / "adapter"
    assert cli.main([*ARGUMENTS, "--accumulate", "2", "--out", str(out)]) == 0
    return out


def test_two_processes_give_the_curve_of_one(one, tmp_path):
    """Tolerance: sums of the same numbers in another order, in fp32 over six steps of AdamW."""
    two = tmp_path / "adapter"
    ran = launch(two, "--checkpoints", str(tmp_path / "saved"))
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads((two / "losses.json").read_text())["processes"] == 2
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    a, b = (load_file(f / "adapter_model.safetensors") for f in (one, two))
    assert a.keys() == b.keys()
    assert max((a[k] - b[k]).abs().max() for k in a) <= 1e-5
    assert ran.stdout.count("written to") == 1  # the main process alone
    saved = tmp_path / "saved" / "step-00000006"
    assert {"random-0.json", "random-1.json"} <= {f.name for f in saved.iterdir()}


def test_the_comparison_can_fail(one, tmp_path):
    out = tmp_path / "adapter"
    assert cli.main([*ARGUMENTS, "--accumulate", "1", "--out", str(out)]) == 0
    assert losses(out) != pytest.approx(losses(one), abs=1e-3)


def test_a_second_call_replaces_the_first_whole(one, tmp_path):
    out = tmp_path / "adapter"
    for steps in ("1", "2"):
        assert cli.main(["tiny", "--steps", steps, "--out", str(out)]) == 0
    assert len(losses(out)) == 2
    assert [f.name for f in tmp_path.iterdir()] == ["adapter"]
    assert (out / "adapter_config.json").exists()


def test_a_folder_with_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit):
        cli.main(["tiny", "--steps", "1", "--out", str(tmp_path)])
    assert "holds other things than an adapter" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()


def test_the_command_line_names_what_is_possible(tmp_path, capsys):
    for words, says in (
        (["trivial"], "trivia"),
        (["tiny", "--four-bit"], "--four-bit needs the task trivia"),
        (["tiny", "--accumulate", "0"], "--accumulate must be"),
        (["tiny", "--learning-rate", "nan"], "--learning-rate must be"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*words, "--out", str(tmp_path / "x")])
        assert says in capsys.readouterr().err
        assert stopped.value.code and not list(tmp_path.iterdir())


def test_the_configurations_are_ones_that_accelerate_reads():
    from accelerate.commands.config import load_config_from_file

    files = sorted(CONFIGS.glob("*.yaml"))
    assert len(files) == 2
    for file in files:
        assert load_config_from_file(str(file)).num_processes == 2
    fsdp = yaml.safe_load((CONFIGS / "two_gpus_fsdp_qlora.yaml").read_text())
    assert fsdp["fsdp_config"]["fsdp_version"] == 2
    # the shard unit that the configuration names is the layer class of the base it is for
    from transformers.models.llama import modeling_llama

    assert hasattr(modeling_llama, fsdp["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"])
    storage = cli.four_bit_for_sharding().bnb_4bit_quant_storage
    assert storage == torch.bfloat16


def test_sharded_weights_are_not_checkpointed_here(tmp_path):
    team = Team(None)
    type(team).sharded, kept = property(lambda self: True), type(team).sharded
    try:
        with pytest.raises(cli.training.TrainingError, match="save_state"):
            Checkpoints(tmp_path, {}, team)
    finally:
        type(team).sharded = kept
