"""Does the exported file compute what the merged model computes? MiniLM and SmolLM2 as ONNX.

A LoRA of rank 16 with random numbers is merged, exported with torch's exporter and run by
onnxruntime on rows of three shapes. A seed draws other numbers.

Source: this course's own.
Taught in: notebook 07, section 7.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from helpers import adapters, models
from helpers.experiments.study import Study
from helpers.merging import export

CLASSES = {"minilm": AutoModel, "smollm2": AutoModelForCausalLM}
TARGETS = {"minilm": ["query", "value"], "smollm2": ["q_proj", "v_proj"]}


def merged(name: str, seed: int) -> PreTrainedModel:
    """The base with an adapter of random numbers merged into it, in fp32."""
    torch.manual_seed(seed)
    base = CLASSES[name].from_pretrained(models.path(name))
    model = get_peft_model(base, adapters.config("lora", rank=16, target_modules=TARGETS[name]))
    for parameter, weight in model.named_parameters():
        if "lora_B" in parameter:
            torch.nn.init.normal_(weight, std=0.02)
    return model.merge_and_unload().eval()


def run(settings: dict, seed: int) -> dict[str, float]:
    """Export and compare.

    ``gap`` is the largest difference as a share of the largest output, ``mib`` the size of the
    files, ``weights_mib`` that of the weights in fp32.
    """
    model = merged(settings["model"], seed)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        file = export.to_onnx(model, Path(folder) / "onnx")
        seconds = time.perf_counter() - start
        size = sum(one.stat().st_size for one in file.parent.iterdir())
        gap = export.largest_gap(model, file)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "gap": float(f"{gap:.2e}"),
        "mib": round(size / 2**20, 1),
        "weights_mib": round(weights / 2**20, 1),
        "export_seconds": round(seconds, 1),
    }


STUDY = Study(
    name="onnx_export",
    settings=tuple({"model": name} for name in CLASSES),
    metrics=("gap", "mib", "weights_mib", "export_seconds"),
    run=run,
    seeds=1,
)
