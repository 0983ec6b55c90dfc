"""A killed run goes on to the same weights, to the bit; a checkpoint is whole or not there."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny_rows import lm_rows, stack, tiny_lora

from helpers import adapters, models, training
from helpers.training import checkpoints

STEPS = 9
HERE = Path(__file__).parent

# A run that ends itself as the system would, with SIGKILL, at a moment that an argument names.
KILLED = """
import os, signal, sys
from pathlib import Path
from helpers import atomic, training
from helpers.training import checkpoints
from test_checkpoints import run

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

folder, moment = Path(sys.argv[1]), sys.argv[2]
if moment == "between two saves":
    training.loop.gradients = (lambda real, seen=[]: lambda *a: (
        seen.append(1), die() if len(seen) == 6 else real(*a))[1])(training.loop.gradients)
if moment == "while the weights are written":
    real_save, count = checkpoints.save_file, []
    def save_file(tensors, path):
        count.append(path)
        if len(count) == 4:
            path.write_bytes(b"half")
            die()
        real_save(tensors, path)
    checkpoints.save_file = save_file
if moment == "before the folder is renamed":
    real_replace, names = os.replace, []
    def replace(*names_of):
        names.append(names_of)
        if len(names) == 2:
            die()
        real_replace(*names_of)
    atomic.os.replace = replace
run(folder)
"""


def run(
    folder: Path | None,
    *,
    steps: int = STEPS,
    learning_rate: float = 1e-2,
    seed: int = 1,
    watch=None,
):
    """A run with dropout, accumulation and warm-up; returns model and history."""
    model = tiny_lora(dropout=0.3)
    rows = training.batches(lm_rows(), stack, batch_size=5, seed=seed)
    torch.manual_seed(5)
    history = training.train(
        model,
        rows,
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=5,
        accumulate=2,
        checkpoints=folder,
        save_every=2,
        watch=watch,
    )
    return model, history


def trained(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(map(torch.equal, trained(a), trained(b)))


def names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


def run_in_a_process(folder: Path, moment: str) -> int:
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, str(folder), moment]
    return subprocess.run(command, env=env, capture_output=True).returncode


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("between two saves", ["step-00000002", "step-00000004"]),
        ("while the weights are written", [".step-00000004.part", "step-00000002"]),
        ("before the folder is renamed", [".step-00000004.part", "step-00000002"]),
    ],
)
def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path, moment, left):
    whole, history = run(None)
    assert run_in_a_process(tmp_path, moment) == -signal.SIGKILL
    assert names(tmp_path) == left
    again, resumed = run(tmp_path)
    assert same(whole, again)
    assert resumed.losses == history.losses and resumed.tokens == history.tokens
    assert not any(name.endswith(".part") for name in names(tmp_path))


def test_the_comparison_sees_a_lost_dropout_state(tmp_path, monkeypatch):
    """The test above can fail: without the random state the weights differ."""
    whole, _ = run(None)
    run(tmp_path, steps=4)
    monkeypatch.setattr(checkpoints, "_set_random", lambda state: None)
    assert not same(whole, run(tmp_path)[0])


def test_a_finished_run_is_loaded_and_can_go_on_longer(tmp_path):
    whole, _ = run(None)
    short, _ = run(tmp_path, steps=6)
    loaded, history = run(tmp_path, steps=6)
    assert same(short, loaded) and len(history.losses) == 6
    assert same(whole, run(tmp_path)[0])


def test_an_evaluation_that_draws_random_numbers_does_not_part_the_runs(tmp_path):
    def draw(_: int) -> None:
        torch.rand(1)

    whole, _ = run(None, watch=draw)
    run(tmp_path, steps=4, watch=draw)
    assert same(whole, run(tmp_path, watch=draw)[0])
    assert not same(whole, run(None)[0])


def test_what_a_checkpoint_holds(tmp_path):
    run(tmp_path, steps=6)
    assert names(tmp_path) == ["step-00000004", "step-00000006"]  # the newest two
    assert names(tmp_path / "step-00000006") == [
        "optimizer.safetensors",
        "random-0.json",
        "state.json",
        "weights.safetensors",
    ]
    stored = checkpoints.load_file(tmp_path / "step-00000006" / "weights.safetensors")
    assert stored and all("lora_" in name for name in stored)


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    whole, _ = run(None)
    run(tmp_path, steps=6)
    (tmp_path / "step-00000006" / "weights.safetensors").write_bytes(b"cut")
    assert same(whole, run(tmp_path)[0])


def test_ctrl_c_while_saving_leaves_no_broken_file(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    run(tmp_path, steps=2)
    monkeypatch.setattr(checkpoints, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert names(tmp_path) == ["step-00000002"]
    monkeypatch.undo()
    assert same(run(None)[0], run(tmp_path)[0])


def test_other_settings_are_refused(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(training.TrainingError, match="another learning_rate .0.01, now 0.02"):
        run(tmp_path, learning_rate=2e-2)
    with pytest.raises(training.TrainingError, match="another seed of the data"):
        run(tmp_path, seed=2)


def resume(model: torch.nn.Module, folder: Path):
    rows = training.batches(lm_rows(), stack, batch_size=5, seed=1)
    training.train(
        model,
        rows,
        steps=4,
        learning_rate=1e-2,
        warmup_steps=5,
        accumulate=2,
        checkpoints=folder,
    )


def test_another_model_is_refused(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(training.TrainingError, match="another adapter configuration"):
        resume(tiny_lora(dropout=0.1), tmp_path)
    other = tiny_lora(dropout=0.3)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(training.TrainingError, match="another base model"):
        resume(other, tmp_path)
    with pytest.raises(training.TrainingError, match="another model"):
        resume(models.tiny("gpt2"), tmp_path)


def test_adalora_is_refused_in_one_sentence(tmp_path):
    config = adapters.config("adalora", task_type="CAUSAL_LM", total_steps=10)
    with pytest.raises(training.TrainingError, match="importance scores"):
        resume(get_peft_model(models.tiny("llama"), config), tmp_path)


def test_full_fine_tuning_with_buffers_and_tied_weights(tmp_path):
    def go(folder, steps):
        torch.manual_seed(0)
        model = models.tiny("gpt2")
        model.extra = torch.nn.BatchNorm1d(3)  # its buffers are part of the state
        rows = training.batches(lm_rows(), stack, batch_size=5, seed=1)
        training.train(
            model, rows, steps=steps, learning_rate=1e-3, checkpoints=folder, save_every=2
        )
        return model

    whole = go(None, 4)
    go(tmp_path, 2)
    assert same(whole, go(tmp_path, 4))
    state = json.loads((tmp_path / "step-00000004" / "state.json").read_text())
    assert len(state["history"]["losses"]) == 4
