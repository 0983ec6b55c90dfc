"""The Trainer's arguments, by watching what the model and the optimiser see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from own_rules import agrees
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import Trainer, TrainingArguments

from helpers import models

IDS = torch.arange(3, 11)


def llama() -> nn.Module:
    torch.manual_seed(0)
    return models.tiny("llama")


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> tuple[list[int], type, Path, dict[str, bool]]:
    """Two epochs of 32 rows with the note's batch of 4 and accumulation of 4.

    Returns rows seen before each step of the optimiser, the optimiser's class, the folder, and
    which parameters moved.
    """
    folder = tmp_path_factory.mktemp("run")
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        save_strategy="epoch",
        optim="adamw_torch",
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    rows, seen = [{"input_ids": IDS, "labels": IDS}] * 32, [0]
    trainer = Trainer(model, arguments, train_dataset=rows)
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda m, a, out: seen.append(seen.pop() + len(out)))
    optimiser = trainer.create_optimizer()
    optimiser.register_step_post_hook(lambda *_: seen.append(0))
    trainer.train()
    hook.remove()
    moved = {n: not torch.equal(before[n], p.detach()) for n, p in model.named_parameters()}
    return [n for n in seen if n], type(optimiser), folder, moved


def test_c002_the_trainer_takes_a_wrapped_model(watched):
    """Two epochs of transformers' own Trainer and a look at the folder's files."""
    steps, _, folder, moved = watched
    checkpoints = [path for path in folder.iterdir() if path.name.startswith("checkpoint-")]
    files = {path.name for checkpoint in checkpoints for path in checkpoint.iterdir()}
    weights = {name for name in files if name.endswith((".safetensors", ".bin"))}
    agrees(
        "C002",
        {
            "four steps run": len(steps) == 4,
            "only adapter weights move": any(moved.values())
            and all("lora_" in name for name, changed in moved.items() if changed),
            "a checkpoint holds the adapter and not the base": weights - {"training_args.bin"}
            == {"adapter_model.safetensors"},
        },
    )


def test_c123_rows_of_one_step(watched):
    """Rows that pass the embedding between two steps, where the lesson divides totals."""
    agrees("C123", set(watched[0]) == {16})


def test_c127_a_checkpoint_of_adapters_each_epoch(watched):
    """File sizes: an adapter's bytes are there, the base's are not."""
    checkpoints = sorted(watched[2].glob("checkpoint-*"))
    base = sum(p.nbytes for p in llama().parameters())
    sizes = [
        sum(f.stat().st_size for f in c.iterdir() if f.suffix == ".safetensors")
        for c in checkpoints
    ]
    adapter = 2 * 4 * 8 * (32 + 32)  # two layers, fp32, rank 8 on 32 x 32
    agrees(
        "C127",
        {
            "one checkpoint an epoch": len(checkpoints) == 2,
            "it holds the adapter": all(size > adapter for size in sizes),
            "it does not hold the base": all(size < base for size in sizes),
        },
    )


def test_c129_the_name_of_the_optimiser(watched):
    """The class that took the steps."""
    agrees("C129", issubclass(watched[1], torch.optim.AdamW))


def test_c131_preparing_freezes_and_checkpoints():
    """A plain model that only says it is quantised: how often a layer runs in one step."""

    def runs(model: nn.Module) -> int:
        count = [0]
        layer = model.model.layers[0]
        hook = layer.self_attn.register_forward_pre_hook(lambda *_: count.append(1))
        model.train()(input_ids=IDS[None], labels=IDS[None]).loss.backward()
        hook.remove()
        return len(count) - 1

    assert runs(llama()) == 1
    model = llama()
    model.is_loaded_in_4bit = True
    prepared = prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    agrees(
        "C131",
        {
            "every weight of the base is frozen": not any(
                p.requires_grad for p in prepared.parameters()
            ),
            "gradient checkpointing is on": runs(prepared) == 2,
        },
    )
