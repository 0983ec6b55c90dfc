r"""Fine-tune a base model of the course with LoRA, in one process or under `accelerate launch`.

python -m helpers.training movies --out my-adapter
accelerate launch --config_file data/configs/accelerate/two_processes_cpu.yaml \
    -m helpers.training movies --out my-adapter
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from helpers import adapters, data, models, quantization, training
from helpers.atomic import DiskFull, whole_folder
from helpers.given import LARGEST_SEED, number, whole

TASKS = ("trivia", *data.DOMAINS, "tiny")


@dataclass
class Job:
    """A base model, the rows it shall learn, and how rows become a batch."""

    base: torch.nn.Module
    rows: object
    collate: training.Collate
    task_type: str


def trivia(four_bit: bool, sharded: bool) -> Job:
    """SmolLM2-135M on short answers to trivia questions."""
    folder = models.path("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = data.chat_examples(data.trivia()["train"], tokenizer)
    collate = DataCollatorForTokenClassification(tokenizer)
    if not four_bit:
        base = AutoModelForCausalLM.from_pretrained(folder)
    elif sharded:
        base = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=four_bit_for_sharding(), dtype=torch.bfloat16
        )
    else:
        base = quantization.load_in_4bit(folder, AutoModelForCausalLM)
    return Job(base, rows, collate, "CAUSAL_LM")


def four_bit_for_sharding() -> BitsAndBytesConfig:
    """NF4 whose bytes are stored as bfloat16: FSDP shards floating-point tensors only.

    Source: bitsandbytes, "FSDP-QLoRA".
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )


def sentiment(domain: str) -> Job:
    """MiniLM on one domain of sentiment."""
    folder = models.path("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = data.classification_examples(data.sentiment(domain)["train"], tokenizer)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return Job(base, rows, DataCollatorWithPadding(tokenizer), "SEQ_CLS")


def tiny() -> Job:
    """A tiny Llama with random weights on random tokens, of unequal length: seconds, no files."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (64,), generator=generator).tolist()
    rows = [{"input_ids": torch.randint(3, 90, (n,), generator=generator)} for n in lengths]
    return Job(models.tiny("llama"), rows, pad, "CAUSAL_LM")


def pad(rows: list[dict]) -> training.Batch:
    """Rows of token ids side by side, filled with zeros, which are masked in the labels.

    Source: transformers, ``DataCollatorForTokenClassification``, which fills labels with -100 too.
    Taught in: notebook 06, sections 1 to 5.
    """
    ids = [row["input_ids"] for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    labels = padded.masked_fill(mask == 0, data.IGNORED)
    return {"input_ids": padded, "attention_mask": mask, "labels": labels}


def job(task: str, four_bit: bool, sharded: bool) -> Job:
    """The job of that name."""
    if task == "trivia":
        return trivia(four_bit, sharded)
    return tiny() if task == "tiny" else sentiment(task)


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line, or an error that names what is possible."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=TASKS, help="tiny: random weights, to try the machinery")
    parser.add_argument("--out", type=Path, required=True, help="folder for adapter and losses")
    parser.add_argument("--four-bit", action="store_true", help="QLoRA (trivia only)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0, help="of LoRA's input")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup-steps", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=4, help="rows a batch")
    parser.add_argument("--accumulate", type=int, default=1, help="batches a step, per process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=Path, help="folder to save in and to resume from")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    args = parser.parse_args(words)
    if args.four_bit and args.task != "trivia":
        parser.error(f"--four-bit needs the task trivia, not {args.task}")
    if not replaceable(args.out):
        parser.error(f"{args.out} holds other things than an adapter; give a new folder to --out")
    try:
        for name in ("rank", "batch_size", "accumulate", "save_every"):
            whole(flag(name), getattr(args, name))
        for name in ("steps", "warmup_steps"):
            whole(flag(name), getattr(args, name), least=0)
        whole("--seed", args.seed, 0, LARGEST_SEED)
        number("--learning-rate", args.learning_rate, least=0)
    except ValueError as error:
        parser.error(str(error))
    if not 0 <= args.dropout <= 1:
        parser.error(f"--dropout is a share from 0 to 1, not {args.dropout}")
    return args


def flag(name: str) -> str:
    """An argument's name as it is typed."""
    return "--" + name.replace("_", "-")


def replaceable(out: Path) -> bool:
    """Whether nothing of value is lost when the folder is replaced: an adapter, or nothing."""
    if not out.exists():
        return True
    return out.is_dir() and (not any(out.iterdir()) or (out / "adapter_config.json").exists())


def main(words: list[str] | None = None) -> int:
    """Train, then write the adapter and `losses.json`; a second call replaces both.

    Source: accelerate, ``accelerate launch``.
    Taught in: notebook 06, section 8.
    """
    args = parse(words)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    accelerator = None if alone else Accelerator(cpu=models.device().type == "cpu")
    team = training.Team(accelerator)
    torch.manual_seed(args.seed)
    task = job(args.task, args.four_bit, team.sharded)
    lora = adapters.config("lora", task_type=task.task_type, rank=args.rank)
    model = get_peft_model(task.base, replace(lora, lora_dropout=args.dropout))
    device = accelerator.device if accelerator else models.device()
    if accelerator is None:
        model.to(device)
    rows = training.batches(
        task.rows, task.collate, batch_size=args.batch_size, seed=args.seed, device=device
    )
    try:
        history = training.train(
            model,
            rows,
            steps=args.steps,
            learning_rate=args.learning_rate,
            warmup_steps=args.warmup_steps,
            accumulate=args.accumulate,
            checkpoints=args.checkpoints,
            save_every=args.save_every,
            accelerator=accelerator,
            label=args.task,
        )
    except (training.TrainingError, DiskFull) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    weights = accelerator.get_state_dict(model) if team.sharded else None
    if team.main:
        try:
            write(model, weights, history, args.out, team.count)
        except DiskFull as error:
            print(error, file=sys.stderr)
            return 1
        print(f"loss {history.losses[0]:.3f} → {history.losses[-1]:.3f} · written to {args.out}")
    if accelerator:
        accelerator.end_training()
    return 0


def write(
    model, weights: dict | None, history: training.History, out: Path, processes: int
) -> None:
    """Adapter and losses into a folder beside, then into place."""
    losses = {"losses": history.losses, "tokens": history.tokens, "processes": processes}
    with whole_folder(out) as part:
        model.save_pretrained(part, state_dict=weights)
        text = json.dumps(losses, indent=1)
        (part / "losses.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
