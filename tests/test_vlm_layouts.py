"""Layouts of published vision-language models: patterns reach their tower, counts by hand."""

import pytest
from peft import get_peft_model
from torch import nn

from helpers import adapters, models
from helpers.vlm import layouts

NAMES = tuple(layouts.LAYOUTS)


@pytest.mark.parametrize("name", NAMES)
def test_each_part_is_found_and_nothing_is_left_over(name: str) -> None:
    model, of = models.full_size(name), layouts.layout(name)
    sizes = layouts.sizes(model, of)
    assert sizes.pop("other") == 0 and all(sizes.values())
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_pattern_reaches_every_block_of_its_tower_and_no_other(name: str) -> None:
    model, of = models.full_size(name), layouts.layout(name)
    for part in ("vision", "language"):
        reached = set(adapters.match(model, getattr(of, part)).matched)
        linear = {
            n
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and layouts.part_of(of, f"{n}.weight") == part
        }
        assert reached == {n for n in linear if not n.endswith("lm_head")}


@pytest.mark.parametrize("name", NAMES)
def test_the_moderate_strategy_trains_the_connector_in_full(name: str) -> None:
    wrapped, of = layouts.wrapped(name, "moderate"), layouts.layout(name)
    trained = layouts.sizes(wrapped, of, trainable=True)
    connector = layouts.sizes(models.full_size(name), of)["connector"]
    # BLIP-2's query tokens are a bare parameter, which modules_to_save cannot name
    queries = 32 * 768 if "blip" in name else 0
    assert trained["connector"] == connector - queries
    assert trained["vision"] == 0


def test_counts_of_llava_by_hand() -> None:
    """Rank times (inputs + outputs), for every linear layer of a block, times the blocks."""
    table = layouts.trainable("llava-1.5-7b")
    decoder = 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    vision = 24 * 32 * (4 * (1024 + 1024) + 2 * (1024 + 4096))
    connector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert list(table.loc["conservative"]) == [0, 0, decoder, decoder]
    assert list(table.loc["moderate"]) == [0, connector, decoder, connector + decoder]
    assert list(table.loc["aggressive"]) == [vision, 0, decoder, vision + decoder]


def test_towers_have_their_own_rank_and_the_same_scaling() -> None:
    wrapped, of = layouts.wrapped("llava-1.5-7b", "aggressive"), layouts.layout("llava-1.5-7b")
    found = {
        (layouts.part_of(of, f"{name}.weight"), layer.r["default"], layer.scaling["default"])
        for name, layer in wrapped.base_model.model.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert found == {("vision", 32, 2.0), ("language", 16, 2.0)}


def test_widths_are_those_of_the_blocks_and_not_of_the_output() -> None:
    table = layouts.overview(["qwen2-vl-7b"])
    assert table.loc["qwen2-vl-7b", "vision width"] == 1280  # its config's hidden_size is 3584
    assert table.loc["qwen2-vl-7b", "text width"] == 3584


def test_patterns_fit_a_model_that_is_small() -> None:
    of = layouts.layout("llava-1.5-7b")
    model = get_peft_model(models.tiny("llava"), layouts.config(of, "aggressive"))
    trained = layouts.sizes(model, of, trainable=True)
    assert trained["vision"] and trained["language"] and not trained["connector"]


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="llava-1.5-7b"):
        layouts.layout("llava-1.5")
    with pytest.raises(ValueError, match="moderate"):
        layouts.config(layouts.layout("llava-1.5-7b"), "moderat")


def test_a_language_models_target_list_reaches_both_towers() -> None:
    names = adapters.match(models.full_size("llava-1.5-7b"), ["q_proj", "v_proj"]).matched
    assert {name.split(".")[1] for name in names} == {"vision_tower", "language_model"}
