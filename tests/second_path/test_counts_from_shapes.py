"""Parameter counts by arithmetic on the published configurations: no model, no peft.

The lessons build the models on the meta device, wrap them with peft and count tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import pairwise

from own_rules import agrees

from helpers import claims
from helpers.assets import DATA

QUERY_VALUE = ("q_proj", "v_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LISTS = {
    "query and value": QUERY_VALUE,
    "attention": ATTENTION,
    "attention and MLP": ATTENTION + MLP,
}


def shape(name: str) -> dict[str, int]:
    config = json.loads((DATA / "configs" / f"{name}.json").read_text(encoding="utf-8"))
    return config.get("text_config", config)


def linears(config: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the seven linear layers of a Llama-like block."""
    wide, inner = config["hidden_size"], config["intermediate_size"]
    narrow = wide // config["num_attention_heads"] * config["num_key_value_heads"]
    return {
        "q_proj": (wide, wide),
        "k_proj": (wide, narrow),
        "v_proj": (wide, narrow),
        "o_proj": (wide, wide),
        "gate_proj": (wide, inner),
        "up_proj": (wide, inner),
        "down_proj": (inner, wide),
    }


def weights(config: dict[str, int], names: Iterable[str]) -> int:
    """Of these layers of one block."""
    sides = linears(config)
    return sum(math.prod(sides[name]) for name in names)


def lora(config: dict[str, int], rank: int, names: Iterable[str]) -> int:
    """A is rank x inputs and B is outputs x rank, in every block."""
    sides = linears(config)
    return config["num_hidden_layers"] * rank * sum(sum(sides[name]) for name in names)


def base(config: dict[str, int], layers: int | None = None, tied: bool = False) -> int:
    """Embedding, head, the blocks with two norms each, and the last norm."""
    wide = config["hidden_size"]
    block = weights(config, ATTENTION + MLP) + 2 * wide
    tables = (1 if tied else 2) * config["vocab_size"] * wide
    return tables + (layers or config["num_hidden_layers"]) * block + wide


def share(rank: int, names: Iterable[str]) -> float:
    """Per cent of Llama-2-7B with the adapter, rounded to one digit."""
    config = shape("llama-2-7b")
    own = lora(config, rank, names)
    percent = 100 * own / (base(config) + own)
    return round(percent, -math.floor(math.log10(percent)))


def test_c017_trainable_parameters_of_the_first_example():
    found = lora(shape("llama-2-7b"), 16, QUERY_VALUE)
    assert f"{found:,}" == claims.find("C017").measured
    agrees("C017", found == 4_194_304)
    assert lora(shape("llama-2-7b"), 8, QUERY_VALUE) == 4_194_304  # where the note's figure is from


def test_c018_all_parameters_of_the_first_example():
    found = base(shape("llama-2-7b")) + lora(shape("llama-2-7b"), 16, QUERY_VALUE)
    assert f"{found:,}" == claims.find("C018").measured
    agrees("C018", found == 6_742_609_920)


def test_c019_share_of_the_first_example():
    own = lora(shape("llama-2-7b"), 16, QUERY_VALUE)
    percent = 100 * own / (base(shape("llama-2-7b")) + own)
    agrees("C019", 0.0615 <= percent <= 0.0625)


def test_c066_four_bits_do_not_change_the_sides_of_a_layer():
    agrees("C066", lora(shape("llama-2-7b"), 16, QUERY_VALUE) == 4_194_304)


def test_c067_all_parameters_in_four_bits():
    config = shape("llama-2-7b")
    packed = config["num_hidden_layers"] * weights(config, ATTENTION + MLP) // 2
    whole = base(config) + lora(config, 16, QUERY_VALUE)
    printed = {"by peft's print": whole, "by numel() of the stored tensors": whole - packed}
    for count in printed.values():
        assert f"{count:,}" in claims.find("C067").measured
    agrees("C067", {name: count == 3_504_607_232 for name, count in printed.items()})


def between(says: float, low: int, high: int) -> dict[str, bool]:
    """For each list of targets: the stated share lies between its shares at the two ranks."""
    return {name: share(low, t) <= says <= share(high, t) for name, t in LISTS.items()}


def inside(low: float, high: float, *ranks: int) -> dict[str, bool]:
    """For each list of targets: its shares at all these ranks lie in the stated range."""
    return {name: all(low <= share(r, t) <= high for r in ranks) for name, t in LISTS.items()}


def test_c034_ranks_4_to_8():
    agrees("C034", between(0.05, 4, 8))


def test_c035_ranks_8_to_16():
    agrees("C035", between(0.1, 8, 16))


def test_c036_ranks_16_to_32():
    agrees("C036", inside(0.2, 0.5, 16, 32))


def test_c037_ranks_32_to_64():
    agrees("C037", inside(0.5, 1.0, 32, 64))


def test_c038_rank_64():
    agrees("C038", inside(1.0, 2.0, 64))


def test_c048_fewest_parameters_and_the_library_s_own_table():
    """peft's table of defaults is read, where the lesson wraps a model and looks."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    counts = [lora(shape("llama-2-7b"), 8, names) for names in LISTS.values()]
    agrees(
        "C048",
        {
            "peft's default for Llama": tuple(DEFAULTS["llama"]) == QUERY_VALUE,
            "fewest parameters of the note's three lists": all(a < b for a, b in pairwise(counts)),
            # Dettmers et al. 2023, section 4: adapters on all linear layers
            "cited: the QLoRA paper adapts query and value only": False,
        },
    )


def test_c120_a_taller_model_in_billions():
    ends = {"Llama-2-7B": "llama-2-7b", "Mistral-7B": "mistral-7b"}
    billions = {}
    for label, name in ends.items():
        tall = len([*range(0, 24), *range(8, 32)])
        billions[f"{label}, every layer of a pass"] = base(shape(name), tall) / 1e9
        billions[f"{label}, stored"] = base(shape(name)) / 1e9
    agrees("C120", {name: 9 <= count <= 11 for name, count in billions.items()})


def test_c184_the_mlp_has_more_parameters_than_attention():
    ratios = {}
    for label, name in {"LLaVA-1.5-7B": "llava-1.5-7b", "Qwen2-VL-7B": "qwen2-vl-7b"}.items():
        config = shape(name)
        adapted = ("q_proj", "v_proj", "o_proj")
        ratios[f"{label}, weights"] = weights(config, MLP) / weights(config, ATTENTION)
        ratios[f"{label}, LoRA"] = lora(config, 32, MLP) / lora(config, 32, adapted)
    agrees("C184", {name: ratio >= 1 for name, ratio in ratios.items()})


def test_c195_bytes_of_the_hybrid_s_adapters():
    names = ("q_proj", "v_proj", "o_proj", *MLP)
    megabytes = {}
    for label, name in {"LLaVA-1.5-7B": "llava-1.5-7b", "Qwen2-VL-7B": "qwen2-vl-7b"}.items():
        count = lora(shape(name), 32, names) / 1e6
        megabytes |= {f"{label}, 16 bits": 2 * count, f"{label}, as peft keeps it": 4 * count}
    agrees("C195", {name: 150 <= size <= 250 for name, size in megabytes.items()})
