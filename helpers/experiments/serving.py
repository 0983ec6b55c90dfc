"""What does each way of serving an adapter cost? SmolLM2-135M on a processor.

`STUDY` times one forward pass of every strategy in every round, in an order that rotates: whatever
slows the machine down meets all of them, and ratios are taken within a round. The plain base and
the 4-bit base run twice; what the second run differs from the first by is noise. One token is the
step that writes a word, with a cache of the words before it; 64 tokens is the reading of a prompt.

`START` starts each strategy in a process of its own, and asks it for one word.

A seed is a repeat. Adapters have rank 16 as in the note; what they learned changes no time, so
their numbers are random. The 4-bit base is loaded as the note loads it (NF4, double quantisation,
bf16 compute); where the processor has AVX512-BF16, bitsandbytes repacks it for its faster kernel.

Source: this course's own study.
Taught in: notebook 07, section 6.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from helpers import adapters, bench, models
from helpers.experiments.study import Study

TARGETS = {"query and value": ["q_proj", "v_proj"], "all linear": "all-linear"}
RANK, CACHED = 16, 64
ROUNDS = {1: 24, 64: 12}  # by the tokens of a pass; the first round warms up
TWINS = {"base again": "base", "4-bit again": "4-bit"}
ARMS = ("base", "base again", "merged", "apart", "4-bit", "4-bit again", "4-bit, apart")


def four_bit() -> PreTrainedModel:
    """SmolLM2 in 4 bits as a server loads it: bf16 compute, repacked where bitsandbytes does."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        models.path("smollm2"), quantization_config=config, dtype=torch.bfloat16
    )


def plain() -> PreTrainedModel:
    """SmolLM2 in fp32."""
    return AutoModelForCausalLM.from_pretrained(models.path("smollm2"))


def with_adapter(base: PreTrainedModel, targets: str) -> PeftModel:
    """A LoRA of rank 16 whose B is random, so that it changes the outputs."""
    config = adapters.config(
        "lora", task_type="CAUSAL_LM", rank=RANK, target_modules=TARGETS[targets]
    )
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model


@lru_cache(maxsize=1)
def strategies(targets: str) -> dict[str, torch.nn.Module]:
    """A model in eval mode for each of the `ARMS`; those that run twice are one object."""
    made = {
        "base": plain(),
        "merged": with_adapter(plain(), targets).merge_and_unload(),
        "apart": with_adapter(plain(), targets),
        "4-bit": four_bit(),
        "4-bit, apart": with_adapter(four_bit(), targets),
    }
    return {arm: made[TWINS.get(arm, arm)].eval() for arm in ARMS}


def reading(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """A call that reads a prompt of token ids (1, tokens), at once."""

    @torch.no_grad()
    def call() -> None:
        model(input_ids=ids, use_cache=True)

    return call


def writing(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """A call that reads one token after a prompt that is in the cache, as each new word does."""
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values

    @torch.no_grad()
    def call() -> None:
        model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)  # the cache is as it was, so every call does the same

    return call


def calls(targets: str, tokens: int) -> dict[str, Callable[[], None]]:
    """For each strategy a call that passes so many tokens: 1 after a cache of 64, or a prompt.

    Taught in: notebook 07, section 6.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 4000, (1, CACHED if tokens == 1 else tokens), generator=generator)
    make = writing if tokens == 1 else reading
    return {arm: make(model, ids) for arm, model in strategies(targets).items()}


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    """From the seconds of each arm in each round to medians; ratios are taken within a round.

    ``control`` and ``control_4bit``: the same model over itself. ``merged`` and ``apart``: over
    the plain base. ``apart_4bit``: adapter on the 4-bit base, over the 4-bit base. ``four_bit``:
    over the plain base in fp32.

    Taught in: notebook 07, section 6.
    """
    ratios = {
        "control": ("base again", "base"),
        "merged": ("merged", "base"),
        "apart": ("apart", "base"),
        "control_4bit": ("4-bit again", "4-bit"),
        "apart_4bit": ("4-bit, apart", "4-bit"),
        "four_bit": ("4-bit", "base"),
    }
    found = {
        name: round(statistics.median(r[a] / r[b] for r in rounds), 4)
        for name, (a, b) in ratios.items()
    }
    for name, arm in {"base": "base", "four_bit": "4-bit"}.items():
        found[f"{name}_seconds"] = round(statistics.median(r[arm] for r in rounds), 5)
    return found


def run(settings: dict, seed: int) -> dict[str, float]:
    """Time every strategy in turns; ratios and seconds a pass as in `summary`."""
    tokens = settings["tokens"]
    rounds = list(bench.interleaved(calls(settings["targets"], tokens), ROUNDS[tokens]))
    return summary(rounds[1:])


STUDY = Study(
    name="serving",
    settings=tuple(
        {"targets": targets, "tokens": tokens} for targets in TARGETS for tokens in ROUNDS
    ),
    metrics=(
        *("control", "merged", "apart", "control_4bit", "apart_4bit", "four_bit"),
        *("base_seconds", "four_bit_seconds"),
    ),
    run=run,
    seeds=4,
)

STARTS = ("base", "merged", "base + adapter", "4-bit base", "4-bit base + adapter")
_PROBE = """
import json, sys, time
from pathlib import Path
import psutil, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from helpers.experiments import serving
strategy, adapter, merged = sys.argv[1], sys.argv[2], sys.argv[3]
process = psutil.Process()
before, start = process.memory_info().rss, time.process_time()
if strategy == "merged":
    model = AutoModelForCausalLM.from_pretrained(merged)
else:
    model = serving.four_bit() if strategy.startswith("4-bit") else serving.plain()
if strategy.endswith("adapter"):
    model = PeftModel.from_pretrained(model, adapter)
model.eval()
loaded = time.process_time()
with torch.no_grad():
    model(input_ids=torch.arange(100, 132)[None])
done = time.process_time()
print(json.dumps({
    "load_cpu_seconds": round(loaded - start, 2),
    "first_word_cpu_seconds": round(done - loaded, 2),
    "resident_mib": round((process.memory_info().rss - before) / 2**20, 1),
}))
"""


@lru_cache(maxsize=1)
def folders() -> tuple[Path, Path]:
    """An adapter (rank 16, query and value) and the merged model, each saved to a folder."""
    folder = Path(tempfile.mkdtemp())
    model = with_adapter(plain(), "query and value")
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "adapter", folder / "merged"


def run_start(settings: dict, seed: int) -> dict[str, float]:
    """Load one strategy in a new process and read 32 tokens with it.

    The seconds are the processor's, so that other programs do not count, and do not hold the
    imports, which are the same for all. The memory is what the process holds more than before it
    loaded (MiB).
    """
    places = [str(folder) for folder in folders()]
    command = [sys.executable, "-W", "ignore", "-c", _PROBE, settings["strategy"], *places]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


START = Study(
    name="serving_start",
    settings=tuple({"strategy": name} for name in STARTS),
    metrics=("load_cpu_seconds", "first_word_cpu_seconds", "resident_mib"),
    run=run_start,
    seeds=3,
)
