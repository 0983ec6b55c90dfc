"""Measure a configuration on this machine's CUDA card, beside its prediction.

    python -m helpers.memory.on_cuda llama-3.2-3b --method qlora --rank 16 --batch 4 --seq 1024
    python -m helpers.memory.on_cuda --all

Weights are random. `--all` runs a list of configurations, those that are predicted to fit, and
appends a row for each to data/results/memory_on_cuda.csv.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
from importlib.metadata import version

import bitsandbytes
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from helpers import assets
from helpers.experiments.study import append
from helpers.memory import build
from helpers.memory.__main__ import parse, plan_of
from helpers.memory.gpus import GIB, Gpu
from helpers.memory.inputs import fake_batch
from helpers.memory.predict import predict_plan
from helpers.memory.report import settings_in_words
from helpers.memory.simulate import Plan

STORED = assets.DATA / "results" / "memory_on_cuda.csv"
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes")
CONFIGURATIONS = tuple(
    line.split()
    for line in """
    gpt2 --method full --dtype fp32 --batch 8 --seq 512
    gpt2 --method lora --dtype mixed --batch 8 --seq 512
    bert-base --method lora --dtype fp16 --batch 16 --seq 512
    t5-small --method lora --dtype fp32 --batch 8 --seq 512
    llama-3.2-3b --method lora --batch 1 --seq 512
    llama-3.2-3b --method lora --batch 1 --seq 512 --padded
    llama-3.2-3b --method lora --batch 1 --seq 512 --attention eager
    llama-3.2-3b --method lora --batch 4 --seq 1024 --checkpointing
    llama-3.2-3b --method lora --batch 4 --seq 1024 --checkpointing --attention eager
    llama-3.2-3b --method lora --rank 64 --targets all-linear --batch 1 --seq 512
    llama-3.2-3b --method dora --batch 1 --seq 512
    llama-3.2-3b --method dora --batch 4 --seq 1024 --checkpointing
    llama-3.2-3b --method ia3 --batch 1 --seq 512
    llama-3.2-3b --method prompt --batch 1 --seq 512
    llama-3.2-3b --method p-tuning-v2 --batch 1 --seq 512
    llama-3.2-3b --method qlora --batch 1 --seq 512
    llama-3.2-3b --method qlora --batch 1 --seq 512 --no-double-quant
    llama-3.2-3b --method qlora --batch 1 --seq 512 --quant-type fp4
    llama-3.2-3b --method qlora --batch 4 --seq 1024 --checkpointing
    llama-3.2-3b --method qlora --batch 4 --seq 1024 --checkpointing --attention eager
    llama-3.2-3b --method qlora --rank 64 --targets all-linear --optimizer adamw_8bit
    llama-3.2-3b --method qlora --rank 64 --targets all-linear --optimizer paged_adamw_8bit
    llama-3.2-3b --method qlora --rank 64 --targets all-linear --optimizer paged_adamw
    mistral-7b --method qlora --batch 2 --seq 1024 --checkpointing
    llama-2-7b --method lora --batch 2 --seq 1024 --checkpointing
    """.strip().splitlines()
)


def this_card() -> Gpu:
    """The first CUDA card of this machine.

    Raises:
        RuntimeError: there is none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("There is no CUDA card here, so nothing can be measured on one.")
    found = torch.cuda.get_device_properties(0)
    return Gpu(found.name, found.total_memory, (found.major, found.minor))


def measure_on_cuda(plan: Plan) -> tuple[int, int]:
    """Peak bytes allocated and reserved by PyTorch in the second step of the plan, for real.

    The base is built on the card with random weights, packed there and the cache emptied, so that
    nothing of the building is counted.
    """
    gc.collect()
    torch.cuda.empty_cache()  # or the model moves into the segments of the run before
    with torch.device("cuda"):
        model = build.base(plan.config, plan.dtype, plan.attention)
        model.config.use_cache = plan.use_cache
        batch = _batch(plan, model)
        model = _prepared(model, plan)
    torch.cuda.empty_cache()
    optimizer = _optimizer(plan.optimizer, model)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=plan.autocast, enabled=plan.autocast is not None):
            output: ModelOutput = model(**batch)
        output.loss.backward()
        optimizer.step()
        del output
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def _batch(plan: Plan, model: PreTrainedModel) -> dict[str, Tensor]:
    """A padded batch pads one token: transformers drops a mask in which nothing is masked."""
    batch = fake_batch(plan.config, model, plan.batch, plan.seq, padded=plan.padded)
    if plan.padded:
        batch["attention_mask"][0, -1] = 0
    return batch


def _prepared(model: PreTrainedModel, plan: Plan) -> nn.Module:
    if plan.quant_type is not None:
        for name in build.linear_layers(model):
            build.pack(model, name, plan.dtype, plan.quant_type, plan.double_quant)
        model.is_loaded_in_4bit = True
    return build.adapted(
        model,
        plan.adapter,
        four_bit=plan.quant_type is not None,
        checkpointing=plan.checkpointing,
    ).cuda()


def _optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    kinds = {
        "adamw": torch.optim.AdamW,
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw": bitsandbytes.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
        "sgd": torch.optim.SGD,
    }
    return kinds[name]([p for p in model.parameters() if p.requires_grad], lr=1e-6)


def compare(words: list[str], card: Gpu) -> dict[str, object] | None:
    """A row of predicted and measured bytes; None if the run is predicted not to fit."""
    plan = dataclasses.replace(plan_of(parse(words)), gpu=card, loading="plain")
    found = predict_plan(plan)
    if not found.fits():
        return None
    allocated, reserved = measure_on_cuda(plan)
    return {
        "configuration": " ".join(words),
        "settings": settings_in_words(plan),
        "predicted_allocated": found.allocated,
        "measured_allocated": allocated,
        "predicted_reserved": found.reserved,
        "measured_reserved": reserved,
        "card": card.name,
        **{package: version(package) for package in VERSIONS},
    }


def main(words: list[str] | None = None) -> int:
    """Measure one configuration, or all of `CONFIGURATIONS`."""
    words = sys.argv[1:] if words is None else words
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    try:
        card = this_card()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    every = words == ["--all"]
    for chosen in tqdm(CONFIGURATIONS if every else (words,), unit="run", disable=not every):
        try:
            row = compare(list(chosen), card)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        except torch.OutOfMemoryError:  # building, or a wrong prediction: the others still run
            print(f"{' '.join(chosen)}: out of memory on {card.name}, left out")
            continue
        if row is None:
            print(f"{' '.join(chosen)}: predicted not to fit on {card.name}, left out")
            continue
        print(_line(row))
        if every:
            append(STORED, list(row), row)
    return 0


def _line(row: dict[str, object]) -> str:
    parts = [str(row["settings"])]
    for kind in ("allocated", "reserved"):
        measured, predicted = row[f"measured_{kind}"], row[f"predicted_{kind}"]
        parts.append(
            f"  {kind}: measured {measured / GIB:.3f} GiB, predicted {predicted / GIB:.3f} GiB "
            f"({100 * (predicted / measured - 1):+.2f} %)"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
