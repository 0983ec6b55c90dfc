"""Memory figures by arithmetic on shapes, where the lessons ask torch, peft or memory.predict."""

from __future__ import annotations

import json
import re
import struct
from math import ceil
from pathlib import Path

import torch
from own_rules import agrees
from peft import LoraConfig, get_peft_model
from test_counts_from_shapes import ATTENTION, MLP, QUERY_VALUE, base, lora, shape, weights

from helpers import claims, models
from helpers.assets import DATA

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
}
PLACES = {"r = 16 on q and v": QUERY_VALUE, "r = 16 on all linear layers": ATTENTION + MLP}
# QLoRA, section 3: 8 bits for each block of 64 weights, 32 bits for each 256 blocks
PLAIN_SCALE, DOUBLE_SCALE = 32 / 64, 8 / 64 + 32 / (64 * 256)


def adapters() -> dict[str, int]:
    return {name: lora(shape("llama-2-7b"), 16, names) for name, names in PLACES.items()}


def quantised() -> int:
    config = shape("llama-2-7b")
    return config["num_hidden_layers"] * weights(config, ATTENTION + MLP)


def tensors_in(file: Path) -> dict[str, dict]:
    """The header of a safetensors file: eight bytes say how long it is, then comes JSON."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header


def test_c007_an_adapter_s_file_in_per_cent_of_the_base():
    small = 100 * 4 * lora(SMOLLM2, 16, QUERY_VALUE) / (4 * base(SMOLLM2, tied=True))
    config = shape("llama-2-7b")
    large = 100 * 4 * lora(config, 16, QUERY_VALUE) / (2 * base(config))
    assert f"{small:.2f} %" in claims.find("C007").measured
    agrees("C007", {"SmolLM2-135M": small <= 1, "Llama-2-7B": large <= 1})


def test_c058_780_gb_to_train_65b_in_16_bits():
    recipes = {
        "all in 16 bits": 2 + 2 + 2 + 2,
        "weights and gradients in 16 bits, moments in 32": 2 + 2 + 4 + 4,
        "all in 32 bits": 4 * 4,
    }
    count = base(shape("llama-65b"))
    agrees("C058", {name: 772 <= n * count / 1e9 <= 788 for name, n in recipes.items()})


def test_c059_120_gb_for_lora_on_65b():
    """A bound: no step takes less than the weights that it reads; the lesson predicts the step."""
    weights_alone = 2 * base(shape("llama-65b")) / 1e9
    adapter = 2 * 4 * lora(shape("llama-65b"), 16, QUERY_VALUE) / 1e9
    assert weights_alone > 126  # already above what five per cent allow
    agrees(
        "C059", {"weights alone": weights_alone <= 126, "a step": weights_alone + adapter <= 126}
    )


def test_c081_what_double_quantisation_saves():
    saved = PLAIN_SCALE - DOUBLE_SCALE
    assert round(saved, 3) == 0.373  # the paper's own figure, bits a weight
    counts = {
        "the linear layers of Llama-2-7B": quantised(),
        "were every parameter quantised": base(shape("llama-2-7b")),
    }
    gigabytes = {name: saved * count / 8e9 for name, count in counts.items()}
    agrees("C081", {name: 0.4 <= size <= 0.8 for name, size in gigabytes.items()})


def test_c092_a_7b_base_in_four_bits():
    packed = quantised() * (4 + DOUBLE_SCALE) / 8e9
    rest = (base(shape("llama-2-7b")) - quantised()) / 1e9
    gigabytes = {
        "its 4-bit layers": packed,
        "as the note loads it": packed + 2 * rest,
        "after prepare_model_for_kbit_training": packed + 4 * rest,
    }
    agrees("C092", {name: abs(size - 3.5) <= 0.25 for name, size in gigabytes.items()})


def test_c093_adapters_in_16_bits():
    agrees("C093", {name: 50 <= 2 * n / 1e6 <= 150 for name, n in adapters().items()})


def one_step() -> tuple[list[torch.nn.Parameter], torch.optim.AdamW]:
    """A tiny model in bf16 with an adapter as peft makes it, after one step of AdamW."""
    torch.manual_seed(0)
    model = get_peft_model(models.tiny("llama").bfloat16(), LoraConfig(target_modules=["q_proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    ids = torch.arange(3, 11)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    return trained, optimiser


def test_c094_the_optimiser_s_state():
    """Bytes a parameter on a tiny model times the counts; the lesson's run has four bits."""
    trained, optimiser = one_step()
    moments = [s[key] for s in optimiser.state.values() for key in ("exp_avg", "exp_avg_sq")]
    each = sum(t.nbytes for t in moments) / sum(p.numel() for p in trained)
    agrees("C094", {name: 100 <= each * n / 1e6 <= 300 for name, n in adapters().items()})


def test_c095_the_gradients():
    """As C094."""
    trained, _ = one_step()
    each = sum(p.grad.nbytes for p in trained) / sum(p.numel() for p in trained)
    agrees("C095", {name: 50 <= each * n / 1e6 <= 150 for name, n in adapters().items()})


def test_c126_warm_up_as_a_share_of_three_epochs():
    """Steps by division, where the lesson runs a schedule."""
    sizes = {"trivia": 200, "addresses": 1112, "movie reviews": 8056}
    percent = {f"{name}, {n:,} rows": 100 * 100 / (3 * ceil(n / 16)) for name, n in sizes.items()}
    agrees("C126", {name: part <= 10 for name, part in percent.items()})


def test_c128_what_the_stored_adapters_hold():
    """The headers of the course's own adapter files, byte by byte."""
    files = sorted((DATA / "adapters").glob("*/adapter_model.safetensors"))
    names = [name for file in files for name in tensors_in(file)]
    pieces = re.compile(r".+\.lora_[AB]\.weight")
    config = shape("llama-2-7b")
    part = 4 * lora(config, 16, QUERY_VALUE) / (2 * base(config))
    assert len(files) == 3
    agrees(
        "C128",
        {
            "only LoRA's tensors are stored": all(pieces.fullmatch(name) for name in names),
            "at most 1 % of Llama-2-7B": part <= 0.01,
        },
    )


def test_c154_the_base_once_and_adapters_in_megabytes():
    """Bytes by arithmetic and one storage seen twice, where the lesson loads ten adapters."""
    torch.manual_seed(0)
    model = get_peft_model(models.tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    before = {p.data_ptr() for n, p in model.named_parameters() if "lora_" not in n}
    for number in range(9):
        model.add_adapter(f"more {number}".replace(" ", "_"), LoraConfig(target_modules=["q_proj"]))
    after = {p.data_ptr() for n, p in model.named_parameters() if "lora_" not in n}
    assert len(model.peft_config) == 10
    minilm = 6 * 8 * 2 * (384 + 384)  # six layers of width 384; the base has 22,713,216 parameters
    llama = shape("llama-2-7b")
    pairs = {
        "MiniLM, rank 8 on query and value": (4 * minilm, 4 * 22_713_216),
        "SmolLM2, rank 8 on query and value": (
            4 * lora(SMOLLM2, 8, QUERY_VALUE),
            4 * base(SMOLLM2, tied=True),
        ),
        "Llama-2-7B, rank 8 on query and value": (4 * lora(llama, 8, QUERY_VALUE), 2 * base(llama)),
        "Llama-2-7B, rank 64 on all linear layers": (
            4 * lora(llama, 64, ATTENTION + MLP),
            2 * base(llama),
        ),
    }
    small = {name: own < 1e9 and own < whole / 10 for name, (own, whole) in pairs.items()}
    agrees("C154", {"ten adapters leave the base's bytes as they were": before == after} | small)
