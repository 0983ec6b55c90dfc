"""Every public helper that takes values: on strange ones it returns, or says what was wrong.

`strange.tried` tells an error of the course's own from one that fell out of a dependency. Beside
it, what a helper returns keeps its promise: a budget is kept, a shape stays, a share is a share.
"""

import copy
import tempfile
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import strange
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from strange import FLOATS, PATTERNS, SHARE, TEXT, WHOLE, names, tensors
from torch import nn

from helpers import (
    adapters,
    assets,
    atomic,
    bench,
    by_hand,
    checks,
    claims,
    data,
    memory,
    merging,
    models,
    notebooks,
    quantization,
    training,
    updates,
)
from helpers.adapters import replication
from helpers.arr_coc import note, selectors, world
from helpers.experiments import duration, evidence, looks, study
from helpers.quantization import optimal, samples
from helpers.vlm import layouts


def widest(model: nn.Module, config: LoraConfig) -> int:
    """Parameters per rank of the widest target."""
    layers = [model.get_base_model().get_submodule(name) for name in config.target_modules]
    return max(layer.in_features + layer.out_features for layer in layers)


@cache
def llama() -> nn.Module:
    return models.tiny("llama")


def with_two_adapters() -> nn.Module:
    model = get_peft_model(models.tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]), "one")
    model.add_adapter("two", LoraConfig(r=4, target_modules=["q_proj"]))
    return model


# --- Adapters ------------------------------------------------------------------------------------

METHODS = names(*adapters.METHODS)
TASKS = st.one_of(st.none(), names("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"))


@given(
    METHODS, TASKS, st.none() | WHOLE, st.none() | PATTERNS, st.none() | WHOLE, st.none() | WHOLE
)
def test_a_config_is_made_or_refused(method, task, rank, targets, tokens, steps) -> None:
    made = strange.tried(
        lambda: adapters.config(
            method,
            task_type=task,
            rank=rank,
            target_modules=targets,
            virtual_tokens=tokens,
            total_steps=steps,
        )
    )
    assert made is None or made.peft_type


@given(WHOLE, PATTERNS, TASKS)
def test_a_budget_is_kept_or_refused(parameters, targets, task) -> None:
    made = strange.tried(
        lambda: adapters.config_for_budget(llama(), parameters, targets, task_type=task)
    )
    if made is not None:
        # Without data: a budget of a billion would be four gigabytes.
        model = get_peft_model(copy.deepcopy(llama()).to("meta"), made, low_cpu_mem_usage=True)
        assert abs(adapters.count(model).trainable - parameters) <= widest(model, made) / 2


@given(PATTERNS, TASKS)
def test_a_pattern_is_matched_or_refused(pattern, task) -> None:
    found = strange.tried(lambda: adapters.match(llama(), pattern, task_type=task))
    if found is not None:
        assert str(found) and set(found.per_entry) >= set(found.unmatched)
        assert found.matched or found.parameters or found.raises


@given(WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE)
def test_a_schedule_falls_or_is_refused(init, target, tinit, tfinal, total, modules) -> None:
    def budget() -> pd.DataFrame:
        try:
            config = AdaLoraConfig(
                init_r=init, target_r=target, tinit=tinit, tfinal=tfinal, total_step=total
            )
        except ValueError:  # peft's own border
            return pd.DataFrame({"budget": [1]})
        return adapters.rank_budget(config, modules)

    if max(init, total, modules) < 1000:
        found = strange.tried(budget)
        assert found is None or len(found)


@pytest.mark.parametrize("content", [None, "file", "{", "{}", '{"peft_type": "NEW"}', "[]", "null"])
def test_a_folder_that_is_none_is_refused(content, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    if content == "file":
        folder.write_text("x")
    elif content is not None:
        folder.mkdir()
        (folder / "adapter_config.json").write_text(content)
        (folder / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}broken")
    assert strange.tried(lambda: adapters.check_folder(folder)) is None
    assert strange.tried(lambda: adapters.load(models.tiny("llama"), folder)) is None


@given(st.binary(max_size=64))
def test_weights_that_are_none_are_refused(content) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        adapters.save(get_peft_model(models.tiny("llama"), LoraConfig()), Path(scratch, "a"))
        (Path(scratch, "a") / "adapter_model.safetensors").write_bytes(content)
        assert strange.tried(lambda: adapters.check_folder(Path(scratch, "a"))) is None


@given(names("one", "default"), st.booleans())
def test_an_adapter_is_saved_or_refused(name, replace) -> None:
    model = with_two_adapters()
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, "a")
        saved = strange.tried(lambda: adapters.save(model, target, adapter=name, replace=replace))
        assert (saved is None) == (not target.exists())


@given(st.lists(st.lists(WHOLE, max_size=3), max_size=3), WHOLE)
def test_a_replication_is_read_or_refused(pairs, count) -> None:
    if all(abs(n) < 1000 for pair in pairs for n in pair):
        found = strange.tried(lambda: replication.layers(pairs, count))
        assert found is None or all(0 <= layer < count for layer in found)


# --- By hand -------------------------------------------------------------------------------------


@given(st.sampled_from([by_hand.LoRALinear, by_hand.DoRALinear]), WHOLE, SHARE)
def test_a_layer_is_wrapped_or_refused(layer, rank, alpha) -> None:
    base = nn.Linear(6, 4)
    made = strange.tried(lambda: layer(base, rank, alpha))
    if made is not None and -1e30 < alpha < 1e30:
        x = torch.randn(2, 6)
        torch.testing.assert_close(made(x), base(x))


@given(st.sampled_from([by_hand.PromptTuning, by_hand.PrefixTuning, by_hand.PTuning]), WHOLE)
def test_a_prompt_is_made_or_refused(kind, tokens) -> None:
    if kind is by_hand.PromptTuning:
        start = torch.zeros(max(0, min(tokens, 70)), llama().config.hidden_size)
        strange.tried(lambda: kind(llama(), start))
    elif tokens < 1000:
        strange.tried(lambda: kind(llama(), tokens))


@given(st.lists(WHOLE, max_size=4), WHOLE)
def test_a_prompt_of_words_is_embedded_or_refused(ids, tokens) -> None:
    if tokens < 1000:
        found = strange.tried(lambda: by_hand.embed(llama(), ids, tokens))
        assert found is None or len(found) == tokens


# --- Four bits -----------------------------------------------------------------------------------


@given(tensors(), names("nf4", "fp4"), WHOLE)
def test_four_bits_keep_shape_dtype_and_bound(weights, kind, size) -> None:
    made = strange.tried(lambda: quantization.quantize(weights, kind, size))
    if made is None:
        return
    again = quantization.dequantize(made)
    assert again.shape == weights.shape and again.dtype == weights.dtype
    if weights.dtype == torch.float32 and weights.isfinite().all():
        assert (again - weights).abs().max() <= weights.abs().max() * 0.34  # FP4's widest step


@given(tensors())
def test_codes_are_packed_or_refused(codes) -> None:
    packed = strange.tried(lambda: quantization.pack(codes))
    if packed is not None:
        assert quantization.unpack(packed).tolist() == codes.flatten().long().tolist()


@given(FLOATS, st.integers(-1, 9))
def test_blocks_are_scaled_or_refused(weights, size) -> None:
    found = strange.tried(lambda: optimal.scaled(weights, size))
    if found is not None and len(found.values):
        assert found.values.abs().max() <= 1


@given(names(*samples.DISTRIBUTIONS), WHOLE, st.integers(0, 9))
def test_numbers_are_drawn_or_refused(distribution, count, seed) -> None:
    if count < 1000:
        found = strange.tried(lambda: samples.draw(distribution, count, seed))
        assert found is None or found.shape == (count,)


@given(names("nf4", "fp4"))
def test_levels_are_sixteen_or_refused(kind) -> None:
    found = strange.tried(lambda: quantization.levels(kind))
    assert found is None or (found.shape == (16,) and found.max() == 1)


# --- Names ---------------------------------------------------------------------------------------

BY_NAME = {
    "asset": (assets.asset, ("smollm2", "minilm")),
    "fetch": (assets.fetch, ("smolm2",)),
    "claim": (claims.find, ("C017", "c1", "C999")),
    "card": (memory.gpu, ("t4", "a100-80gb", "rtx 4090")),
    "config": (models.published_config, ("llama-2-7b", "t5-small")),
    "folder": (models.path, ("smolm2", "bert")),
    "layout": (layouts.layout, ("llava-1.5-7b", "qwen")),
    "results": (study.results, ("rank_by_task", "ranks")),
    "rank": (evidence.recommend_rank, ("movies", "topics")),
    "domain": (data.sentiment, ("movies", "music")),
    "weights": (samples.linear_weights, ("smollm2", "minilmm")),
    "notebooks": (lambda name: notebooks.find([name]), ("00", "01_peft_basics", "99")),
}


@pytest.mark.parametrize("which", BY_NAME)
@given(data_=st.data())
def test_a_name_is_known_or_refused(which, data_) -> None:
    call, known = BY_NAME[which]
    name = data_.draw(names(*known))
    strange.tried(lambda: call(name))


@given(names("llama", "gpt2", "bert", "vit", "t5", "whisper"), names("lm", "cls"))
def test_a_tiny_model_is_made_or_refused(arch, task) -> None:
    strange.tried(lambda: models.tiny(arch, task))


@given(names("llama-2-7b", "gpt2"))
def test_a_full_size_model_is_on_the_meta_device_or_refused(name) -> None:
    made = strange.tried(lambda: models.full_size(name))
    assert made is None or made.device.type == "meta"


@given(names("llava-1.5-7b"), names("conservative", "aggressive"))
def test_a_strategy_is_known_or_refused(name, strategy) -> None:
    if (name, strategy) != ("llava-1.5-7b", "aggressive"):
        strange.tried(lambda: layouts.wrapped(name, strategy))


# --- Claims --------------------------------------------------------------------------------------

MEASURED = st.one_of(
    WHOLE,
    SHARE,
    TEXT,
    st.booleans(),
    st.none(),
    st.lists(SHARE, max_size=3),
    st.dictionaries(TEXT, st.booleans(), max_size=3),
)


@given(st.integers(1, 209), MEASURED)
def test_a_measurement_is_judged_or_refused(number, measured) -> None:
    claim = claims.find(f"C{number:03}")
    found = strange.tried(lambda: claims.weigh(claim, measured))
    assert found is None or found.verdict in (
        "confirmed",
        "wrong",
        "outdated",
        "partly",
        "undecided",
        "out of reach",
    )


@given(st.lists(SHARE, max_size=4), st.lists(SHARE, max_size=4))
def test_seeds_are_compared_or_refused(one, other) -> None:
    strange.tried(
        lambda: claims.weigh(claims.find("C116"), claims.Seeds(one, other, larger_is_better=True))
    )


@given(WHOLE, WHOLE, WHOLE, WHOLE)
def test_an_exercise_passes_or_names_the_rule(answer, inside, outside, rank) -> None:
    strange.tried(
        lambda: checks.trainable_parameters(
            answer, in_features=inside, out_features=outside, rank=rank
        )
    )


# --- Training and merging ------------------------------------------------------------------------


@given(st.lists(st.just({"x": 1}), max_size=5), WHOLE, st.integers(0, 3))
def test_batches_have_their_size_or_are_refused(rows, size, seed) -> None:
    made = strange.tried(
        lambda: training.batches(
            rows, lambda rows: {"x": torch.ones(len(rows))}, batch_size=size, seed=seed
        )
    )
    if made is not None:
        assert 1 <= len(next(made)["x"]) <= size


@given(st.lists(TEXT, max_size=3), st.lists(TEXT, max_size=3))
def test_word_errors_are_counted_or_refused(heard, said) -> None:
    found = strange.tried(lambda: training.word_error_rate(heard, said))
    assert found is None or found >= 0


@given(FLOATS, SHARE)
def test_a_used_rank_is_a_rank_or_refused(matrix, energy) -> None:
    found = strange.tried(lambda: updates.used_rank(matrix, energy))
    assert found is None or 0 <= found <= min(matrix.shape)


@given(FLOATS, FLOATS)
def test_a_change_is_measured_or_refused(before, after) -> None:
    strange.tried(lambda: updates.magnitude_and_direction(before, after))


@given(
    st.dictionaries(names("one", "two"), SHARE, max_size=2),
    names("new", "one"),
    names("cat", "linear", "svd", "ties", "dare_linear"),
    st.none() | st.integers(-1, 9),
    st.none() | SHARE,
)
def test_adapters_are_weighted_or_refused(weights, name, method, rank, density) -> None:
    model = with_two_adapters()
    found = strange.tried(
        lambda: merging.weighted(model, weights, name, method=method, rank=rank, density=density)
    )
    assert (found is None) == (set(model.peft_config) == {"one", "two"})


@given(st.lists(SHARE, max_size=6), WHOLE)
def test_an_early_stop_is_an_epoch_or_refused(losses, patience) -> None:
    found = strange.tried(lambda: duration.early_stop(losses, patience))
    assert found is None or 0 <= found <= len(losses)


@given(SHARE, SHARE, SHARE)
def test_a_gap_is_closed_or_refused(accuracy, random, oracle) -> None:
    strange.tried(lambda: looks.gap_closed(accuracy, random, oracle))


@given(st.dictionaries(TEXT, st.just(lambda: None), max_size=3), st.integers(-1, 3))
def test_timings_take_turns_or_are_refused(calls, rounds) -> None:
    found = strange.tried(lambda: list(bench.interleaved(calls, rounds)))
    assert found is None or len(found) == max(rounds, 0)


# --- The hybrid ----------------------------------------------------------------------------------


@given(WHOLE, st.integers(0, 9), st.lists(names(*world.KINDS), max_size=3).map(tuple))
def test_scenes_are_drawn_or_refused(rows, seed, kinds) -> None:
    if rows < 100:
        found = strange.tried(lambda: world.scenes(rows, seed=seed, kinds=kinds))
        assert found is None or len(found) == rows


@given(names("random", "oracle", "salience", "information", "fixed"), st.integers(-2, 20))
def test_cells_are_chosen_or_refused(name, cells) -> None:
    given_ = world.scenes(3, seed=0)
    found = strange.tried(lambda: selectors.without_training(name, given_, cells))
    assert found is None or found.sum(1).tolist() == [cells] * 3


@given(WHOLE, SHARE, TASKS)
def test_the_notes_config_is_made_or_refused(rank, dropout, task) -> None:
    strange.tried(lambda: note.config(rank=rank, dropout=dropout, task_type=task))


# --- Files ---------------------------------------------------------------------------------------


@given(TEXT)
def test_a_text_comes_back_as_it_was_put(text) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        atomic.put_text(Path(scratch, "a.txt"), text)
        assert Path(scratch, "a.txt").read_bytes() == text.encode()
        assert [file.name for file in Path(scratch).iterdir()] == ["a.txt"]


# --- The rule itself can fail --------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: {}["absent"],
        lambda: torch.zeros(2) @ torch.zeros(3),
        lambda: claims.Seeds(1, 2),  # wrong types, and no sentence about them
        lambda: (_ for _ in ()).throw(ValueError("from the test, not from helpers/")),
    ],
)
def test_an_error_of_anybody_elses_is_found(call) -> None:
    with pytest.raises(strange.NotOurs):
        strange.tried(call)
