"""Counts, rates, seeds and folders that make no sense: refused in words, before anything is lost.

And what comes back from those that do: merged is unmerged, loaded is saved, more takes more.
"""

import copy
from functools import cache
from pathlib import Path

import pytest
import strange
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from strange import COUNTS, PATTERNS, SHARE, names, tensors
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from helpers import (
    adapters,
    by_hand,
    data,
    memory,
    merging,
    models,
    quantization,
    serving,
    speech,
    training,
    updates,
    vlm,
)
from helpers.adapters import replication
from helpers.arr_coc import ArrCoc, at_random, base, note, selectors, world
from helpers.quantization import optimal, samples

SIZES = st.integers(1, 4)
SEEDS = st.one_of(st.integers(0, 9), COUNTS, st.just(2**70))
RATES = st.one_of(SHARE, st.sampled_from(["1e-3", "", None]))
BATCH = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "labels": torch.tensor([[1, 2, 3, 4]])}


@cache
def config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
    )


@cache
def stand_in() -> ArrCoc:
    return base()


def adapted(rank: int = 2) -> PeftModel:
    model = get_peft_model(models.tiny("llama"), LoraConfig(r=rank, target_modules=["q_proj"]))
    return merging.disturbed(model, seed=0)


# --- The predictor -------------------------------------------------------------------------------


def predicted(batch: int = 1, seq: int = 8, rank: int = 2) -> int:
    found = memory.predict(config(), batch=batch, seq=seq, rank=rank, targets=["q_proj"])
    return found.allocated


@given(
    COUNTS,
    st.one_of(st.none(), COUNTS),
    st.none() | PATTERNS,
    names(*memory.METHODS),
    names("bf16", "mixed"),
    names(*memory.OPTIMIZERS),
    names("t4", "h100"),
    names("sdpa", "eager"),
)
def test_a_run_is_predicted_or_refused(
    number, rank, targets, method, dtype, optimizer, gpu, attention
) -> None:
    found = strange.tried(
        lambda: memory.predict(
            config(),
            method,
            batch=number,
            seq=8,
            rank=rank,
            targets=targets,
            dtype=dtype,
            optimizer=optimizer,
            gpu=gpu,
            attention=attention,
        )
    )
    if found is not None:  # the allocator rounds each block up
        assert 0 < sum(found.categories.values()) <= found.allocated <= found.reserved


@settings(max_examples=min(5, settings().max_examples))  # each is four predictions
@given(SIZES, SIZES, SIZES)
def test_more_rows_tokens_or_rank_never_take_less(batch, seq, rank) -> None:
    here = predicted(batch, 8 * seq, rank)
    assert predicted(batch + 1, 8 * seq, rank) >= here
    assert predicted(batch, 8 * seq + 8, rank) >= here
    assert predicted(batch, 8 * seq, rank + 1) >= here


# --- Training ------------------------------------------------------------------------------------


@given(COUNTS, COUNTS, COUNTS, RATES, RATES, RATES)
def test_a_run_trains_or_is_refused(steps, warmup, accumulate, rate, decay, clip) -> None:
    if isinstance(steps, int) and steps > 3:
        steps = 3
    found = strange.tried(
        lambda: training.train(
            adapted(),
            (BATCH for _ in range(40)),
            steps=steps,
            warmup_steps=warmup,
            accumulate=accumulate,
            learning_rate=rate,
            weight_decay=decay,
            max_grad_norm=clip,
        )
    )
    assert found is None or len(found.losses) == steps


@given(st.dictionaries(st.sampled_from(["steps", "batch_size", "seed", "accumulate"]), COUNTS))
def test_the_other_route_takes_the_same_or_refuses(tmp_path_factory, odd) -> None:
    choices = {"steps": 2, "batch_size": 1, "seed": 0, "learning_rate": 1e-3} | odd
    folder = tmp_path_factory.mktemp("trainer")
    strange.tried(
        lambda: training.trainer(
            adapted(), [{"x": 1}], lambda rows: rows, output_dir=folder, **choices
        )
    )


@given(COUNTS, SEEDS)
def test_batches_are_ordered_or_refused(size, seed) -> None:
    rows, collate = [{"x": 1}] * 3, lambda rows: {"x": torch.ones(len(rows))}
    found = strange.tried(lambda: list(training.ordered_batches(rows, collate, batch_size=size)))
    assert found is None or sum(len(batch["x"]) for batch in found) == 3
    strange.tried(lambda: next(training.batches(rows, collate, batch_size=size, seed=seed)))


@given(st.dictionaries(st.sampled_from(["x", "input_ids", "labels"]), tensors()), COUNTS)
def test_a_batch_is_counted_or_refused(batch, positions) -> None:
    limit = positions if type(positions) is int else None
    for look in (training.token_count, training.check_targets):
        strange.tried(lambda look=look: look(batch))
    strange.tried(lambda: training.check_batch(batch, limit))


@pytest.mark.parametrize("measure", [training.accuracy, training.answer_loss, training.mean_loss])
@pytest.mark.parametrize("batches", [[], [{}]])
def test_nothing_to_measure_is_said(measure, batches) -> None:
    with pytest.raises(training.TrainingError):
        measure(adapted(), batches)


# --- Layers by hand, four bits, sounds -----------------------------------------------------------


@pytest.mark.parametrize("layer", [by_hand.LoRALinear, by_hand.DoRALinear])
@given(rank=COUNTS, alpha=RATES)
def test_a_layer_by_hand_starts_as_its_base_or_is_refused(layer, rank, alpha) -> None:
    linear, x = nn.Linear(6, 4), torch.randn(2, 6)
    made = strange.tried(lambda: layer(linear, rank, alpha))
    if made is not None and abs(alpha) < 1e30:
        torch.testing.assert_close(made(x), linear(x))
        torch.testing.assert_close(made.merge()(x), made(x))


@pytest.mark.parametrize("kind", [by_hand.PTuning, by_hand.PTuningV2, by_hand.PrefixTuning])
@given(tokens=COUNTS)
def test_virtual_tokens_are_whole_or_refused(kind, tokens) -> None:
    made = strange.tried(lambda: kind(models.tiny("llama"), tokens))
    assert made is None or made.tokens == tokens


@given(st.lists(COUNTS | st.integers(50, 200), max_size=3))
def test_a_prefix_is_computed_from_words_or_refused(ids) -> None:
    found = strange.tried(lambda: by_hand.prefill(models.tiny("llama"), ids))
    assert found is None or len(found) == len(ids)


@pytest.mark.parametrize("call", [by_hand.merge_ia3, by_hand.add_ia3])
@pytest.mark.parametrize("model", [models.tiny("bert", "seq_cls"), nn.Linear(2, 2)])
def test_ia3_by_hand_is_for_llamas(call, model) -> None:
    with pytest.raises(TypeError, match="Llama"):
        call(model)


def test_ia3_is_merged_once() -> None:
    with pytest.raises(TypeError, match="add_ia3"):
        by_hand.merge_ia3(by_hand.merge_ia3(by_hand.add_ia3(models.tiny("llama"))))


@given(tensors(), names("nf4", "fp4"), COUNTS)
def test_twice_quantised_comes_back_or_is_refused(weights, kind, size) -> None:
    def there_and_back() -> torch.Tensor:
        once = quantization.quantize(weights, kind, size)
        return quantization.dequantize(quantization.double_quantize(once))

    found = strange.tried(there_and_back)
    assert found is None or (found.shape, found.dtype) == (weights.shape, weights.dtype)


@given(tensors(), tensors(), st.booleans())
def test_codes_and_books_fit_or_are_refused(values, book, meta) -> None:
    there = values.to("meta") if meta else values
    for call in (quantization.unpack, quantization.quantize_absmax, quantization.pack):
        strange.tried(lambda call=call: call(there))
    strange.tried(lambda: optimal.scaled(there, 2))
    found = strange.tried(lambda: quantization.nearest(values, book))
    assert found is None or found.shape == values.shape


@given(tensors(), names("squared", "absolute"), st.lists(SHARE, max_size=17).map(tuple))
def test_a_book_is_fitted_or_refused(book, measure, fixed) -> None:
    data = optimal.scaled(samples.draw("Gaussian", 64, 0))
    found = strange.tried(lambda: optimal.fit(data, measure, fixed))
    assert found is None or found.shape == (16,)
    error = strange.tried(lambda: optimal.error(data, book, measure))
    assert error is None or error >= 0 or book.isnan().any()
    strange.tried(lambda: optimal.code_entropy(data, book))


@given(names("Gaussian", "Laplace"), COUNTS, SEEDS)
def test_numbers_are_drawn_the_same_or_refused(distribution, count, seed) -> None:
    first = strange.tried(lambda: samples.draw(distribution, count, seed))
    if first is not None:
        assert torch.equal(first, samples.draw(distribution, count, seed))


@given(st.integers(0, 9), st.integers(-1, 9), st.integers(-1, 9))
def test_a_sound_has_its_new_length_or_is_refused(count, rate, wanted) -> None:
    found = strange.tried(lambda: speech.resampled(torch.zeros(count).numpy(), rate, wanted))
    assert found is None or len(found) == round(count * wanted / rate)


# --- Adapters ------------------------------------------------------------------------------------


@given(names(*adapters.METHODS), COUNTS, COUNTS, COUNTS, st.none() | PATTERNS)
def test_odd_sizes_of_a_method_are_refused(method, rank, tokens, steps, targets) -> None:
    given_ = {"rank": rank, "virtual_tokens": tokens, "total_steps": steps}
    for name, size in given_.items():
        rest = {"total_steps": 10} if method == "adalora" else {}
        made = strange.tried(
            lambda size=size, name=name, rest=rest: adapters.config(
                method, task_type="CAUSAL_LM", target_modules=targets, **(rest | {name: size})
            )
        )
        assert made is None or type(size) is int


NO_TARGETS = st.sampled_from([[], "", [""], [[]], [["q_proj"]], 5, {}, b"q_proj", [1]])


@given(NO_TARGETS, st.one_of(COUNTS, st.just(10_000)))
def test_targets_that_are_no_names_are_refused_everywhere(targets, budget) -> None:
    model = models.tiny("llama")
    for call in (
        lambda: adapters.config("lora", target_modules=targets),
        lambda: adapters.match(model, targets),
        lambda: adapters.config_for_budget(model, budget, targets),
    ):
        assert strange.tried(call) is None


@given(st.sampled_from([nn.Linear(2, 2), nn.Sequential(), models.tiny("bert", "seq_cls")]))
def test_a_model_without_adapters_is_told_apart(model) -> None:
    model = copy.deepcopy(model)
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    for call in (
        lambda: adapters.at_inference(model),
        lambda: adapters.live_ranks(model),
        lambda: adapters.saved_bytes(model),
        lambda: merging.memory(model),
        lambda: merging.LiveAdapter(model),
        lambda: merging.merge_error(model, batch),
        lambda: merging.round_trip(model),
        lambda: merging.weighted(model, {"a": 1.0}, "b"),
        lambda: updates.table(model),
    ):
        assert strange.tried(call) is None
    for call in (adapters.cache_bytes_per_token, replication.stack, replication.shared_targets):
        strange.tried(lambda call=call: call(model))
    assert adapters.inspect(model).count == adapters.count(model)


@given(
    st.sampled_from(
        [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64, *merging.routes.DTYPES]
    ),
    SEEDS,
)
def test_merged_is_unmerged_or_refused(dtype, seed) -> None:
    model = strange.tried(lambda: merging.disturbed(adapted(), seed=seed))
    if model is None:
        return
    batch = {"input_ids": BATCH["input_ids"]}
    found = strange.tried(lambda: merging.merge_error(model, batch, dtype))
    assert (found is None) == (dtype not in merging.routes.DTYPES)
    if found is not None and dtype.itemsize >= 4:
        assert found.relative < 1e-4
    strange.tried(lambda: merging.round_trip(model, dtype))


@given(names("default", "other"), names("default", "other"))
def test_a_known_answer_needs_both_adapters(name, merged) -> None:
    found = strange.tried(
        lambda: merging.known_answer(adapted(), name, merged, input_ids=BATCH["input_ids"])
    )
    assert (found == 0) if name == merged == "default" else found is None


@given(names("default", "other"))
def test_an_update_is_of_an_adapter_that_is_there(name) -> None:
    layer = adapted().base_model.model.model.layers[0].self_attn.q_proj
    for call in (updates.update, updates.singular_values):
        assert (strange.tried(lambda call=call: call(layer, name)) is None) == (name != "default")


# --- Folders -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A model, an adapter, and what is mistaken for them."""
    root = tmp_path_factory.mktemp("folders")
    models.tiny("llama").save_pretrained(root / "model")
    adapters.save(adapted(), root / "adapter")
    (root / "file").write_text("x")
    for name, text in (("empty", None), ("cut json", "{"), ("no kind", "{}"), ("list", "[]")):
        (root / name).mkdir()
        if text is not None:
            (root / name / "config.json").write_text(text)
            (root / name / "adapter_config.json").write_text(text)
    for name, source, file in (
        ("cut model", "model", "model.safetensors"),
        ("cut adapter", "adapter", "adapter_model.safetensors"),
    ):
        (root / name).mkdir()
        for each in (root / source).iterdir():
            content = each.read_bytes()
            (root / name / each.name).write_bytes(content[:-9] if each.name == file else content)
    return root


WRONG = ("nowhere", "file", "empty", "cut json", "no kind", "list", "cut model", "cut adapter")


@pytest.mark.parametrize("name", [*WRONG, "adapter"])
def test_a_base_that_is_none_is_refused(name, folders) -> None:
    auto, adapter = AutoModelForCausalLM, folders / "adapter"
    for call in (
        lambda: quantization.load_in_4bit(folders / name, auto),
        lambda: note.in_four_bits(folders / name),
        lambda: merging.kept_apart(folders / name, adapter, auto),
        lambda: merging.into_four_bits(folders / name, adapter, auto),
        lambda: merging.onto_full_precision(folders / name, adapter, auto),
        lambda: merging.onto_dequantised(folders / name, adapter, auto),
        lambda: merging.merge_for_deployment(adapter, folders / "out", base=folders / name),
        lambda: serving.servable(folders / name, folders / name, folders / "out"),
    ):
        assert strange.tried(call) is None and not (folders / "out").exists()


@pytest.mark.parametrize("name", [*WRONG, "model"])
def test_an_adapter_that_is_none_is_refused(name, folders) -> None:
    base_, auto = folders / "model", AutoModelForCausalLM
    for call in (
        lambda: adapters.load(models.tiny("llama"), folders / name),
        lambda: merging.onto_full_precision(base_, folders / name, auto),
        lambda: merging.merge_for_deployment(folders / name, folders / "out", base=base_),
        lambda: merging.LiveAdapter(adapted()).swap(folders / name),
        lambda: merging.run_onnx(folders / name, {}),
        lambda: vlm.about(folders / name),
        lambda: vlm.trained(folders / name),
        lambda: speech.read(folders / name),
    ):
        assert strange.tried(call) is None and not (folders / "out").exists()


@given(SIZES)
def test_loaded_is_saved(tmp_path_factory, rank) -> None:
    model = adapted(rank)
    folder = adapters.save(model, tmp_path_factory.mktemp("saved") / "a")
    again = adapters.load(models.tiny("llama"), folder)
    assert adapters.check_folder(folder).rank == rank
    kept, loaded = ({n: p for n, p in m.named_parameters() if "lora_" in n} for m in (model, again))
    assert kept.keys() == loaded.keys() and all(torch.equal(kept[n], loaded[n]) for n in kept)


@given(names("dequantised", "full precision", "kept apart"))
def test_a_route_is_known_or_refused(folders, route) -> None:
    with pytest.raises(ValueError) as refused:
        merging.merge_for_deployment(
            folders / "adapter", folders / "model", base=folders / "model", route=route
        )
    assert "function" not in str(refused.value)


# --- The hybrid and the VLM ----------------------------------------------------------------------


@given(COUNTS, SEEDS, st.sampled_from([(), ("x",), "pattern", ("pattern",)]))
def test_a_world_is_drawn_or_refused(rows, seed, kinds) -> None:
    found = strange.tried(lambda: world.scenes(rows, seed=seed, kinds=kinds))
    assert found is None or len(found) == rows
    strange.tried(lambda: world.asked_again(world.scenes(2, seed=0), seed=seed))


@given(COUNTS | st.integers(10, 20), tensors(), st.lists(st.integers(-2, 99), max_size=4))
def test_cells_and_words_are_there_or_refused(cells, where, words) -> None:
    scenes, reader = world.scenes(3, seed=0), stand_in()
    for call in (
        lambda: at_random(scenes, cells, torch.Generator()),
        lambda: selectors.without_training("oracle", scenes, cells),
        lambda: selectors.chosen(reader, scenes, cells),
    ):
        found = strange.tried(call)
        assert found is None or found.sum(1).tolist() == [cells] * 3
    strange.tried(lambda: selectors.score(reader, scenes, where))
    strange.tried(lambda: selectors.sensitivity(where, scenes.needed))
    strange.tried(lambda: world.in_words(torch.tensor(words, dtype=torch.long)))


@given(COUNTS, SHARE)
def test_odd_ranks_of_the_note_are_refused(rank, dropout) -> None:
    made = strange.tried(lambda: note.config(rank=rank, dropout=dropout))
    assert made is None or made.r == rank


def test_nothing_to_learn_is_said() -> None:
    with pytest.raises(ValueError, match="zzz"):
        selectors.learn(
            base(), world.batches(2, seed=0), selectors.proxy, steps=1, rates=[("zzz", 1e-3)]
        )


@given(st.lists(st.dictionaries(names("image", "question", "answer"), st.none()), max_size=2))
def test_pairs_of_image_and_question_or_refused(rows) -> None:
    if not all({"image", "question", "answer"} <= set(row) for row in rows) or not rows:
        assert strange.tried(lambda: vlm.collate(rows)) is None
    assert strange.tried(lambda: vlm.inputs([], ["?"])) is None
    assert strange.tried(lambda: data.speech_batch(rows)) is None
