"""AdaLoRA's schedule, its live ranks, and the callback that makes it prune in the Trainer."""

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback

from helpers import adapters, models, training

QV = ["q_proj", "v_proj"]
MODULES = 4  # two layers with two targets


def rows(count: int = 16) -> list[dict]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 90, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def stack(chosen: list[dict]) -> training.Batch:
    return {key: torch.stack([row[key] for row in chosen]) for key in chosen[0]}


def schedule(**given) -> AdaLoraConfig:
    return AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=QV, init_r=3, target_r=2, lora_alpha=6, **given
    )


def tiny(config: AdaLoraConfig) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(models.tiny("llama"), config)


def route(model: nn.Module, folder, steps: int, callbacks: list[TrainerCallback]):
    trainer = training.trainer(
        model,
        rows(),
        stack,
        steps=steps,
        learning_rate=3e-2,
        batch_size=4,
        seed=0,
        output_dir=folder,
    )
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def alive(model: nn.Module) -> torch.Tensor:
    """Which singular values are not zero, of all modules in a row."""
    values = [v.flatten() for name, v in model.named_parameters() if "lora_E" in name]
    return torch.cat(values) != 0


# --------------------------------------------------------------------------------- the schedule


def test_the_budget_by_hand():
    """12 → 8 over four steps after one: 8 + 4 (1 - k/4)^3 = 9.6, 8.5, 8.06, 8, rounded down."""
    table = adapters.rank_budget(schedule(tinit=1, tfinal=2, total_step=7), MODULES)
    assert table["rank"].tolist() == [12, 12, 9, 8, 8, 8, 8]
    assert table["masked"].tolist() == [False, False, True, True, True, True, True]
    assert table["phase"].tolist() == ["warm-up"] * 2 + ["pruning"] * 4 + ["final"]
    assert table.index.tolist() == list(range(7))


def test_masks_fall_every_delta_t_steps_and_where_the_final_phase_begins():
    table = adapters.rank_budget(schedule(deltaT=4, tfinal=3, total_step=14), MODULES)
    assert table.index[table["masked"]].tolist() == [4, 8, 11, 12, 13]


@pytest.mark.parametrize("tinit, tfinal, delta", [(0, 0, 1), (3, 6, 1), (2, 5, 4), (5, 7, 10)])
def test_the_table_is_what_a_run_does(tinit, tfinal, delta):
    config = schedule(tinit=tinit, tfinal=tfinal, deltaT=delta, total_step=20)
    table = adapters.rank_budget(config, MODULES)
    model, ranks = tiny(config), []
    batches = training.batches(rows(), stack, batch_size=4, seed=0)
    training.train(
        model,
        batches,
        steps=20,
        learning_rate=3e-2,
        watch=lambda step: ranks.append(adapters.live_ranks(model).sum()),
    )
    masked = table["masked"].to_numpy()
    assert [r for r, m in zip(ranks, masked, strict=True) if m] == table["rank"][masked].tolist()
    # between masks all singular values train on, the pruned ones too
    assert {r for r, m in zip(ranks, masked, strict=True) if not m} <= {12}


def test_the_pattern_can_change_until_the_final_phase_only():
    config = schedule(tinit=2, tfinal=20, total_step=40)
    model, seen = tiny(config), []
    batches = training.batches(rows(), stack, batch_size=4, seed=0)
    training.train(
        model, batches, steps=40, learning_rate=1e-1, watch=lambda step: seen.append(alive(model))
    )
    phase = adapters.rank_budget(config, MODULES)["phase"]
    changed = [i for i in range(1, 40) if not torch.equal(seen[i], seen[i - 1])]
    assert changed and {phase[i] for i in changed} == {"pruning"}


def test_a_budget_for_no_module_is_refused():
    with pytest.raises(ValueError, match="at least one module, not by 0"):
        adapters.rank_budget(schedule(total_step=7), 0)


# -------------------------------------------------------------------------------- the live ranks


def test_ranks_are_zero_at_the_start_and_named_as_in_the_base():
    model = tiny(schedule(total_step=7))
    found = adapters.live_ranks(model)
    assert found.to_dict() == dict.fromkeys(
        [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in QV], 0
    )
    layer = model.get_base_model().get_submodule(found.index[2])
    layer.lora_E["default"].data[:2] = 0.5
    assert adapters.live_ranks(model).tolist() == [0, 0, 2, 0]


def test_a_model_without_adalora_has_no_ranks():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no AdaLoRA module: wrap it"):
        adapters.live_ranks(models.tiny("llama"))


def test_what_is_kept_has_the_highest_scores():
    """peft's mask keeps the 8 triplets with the highest importance of all modules together."""
    model = tiny(schedule(tinit=8, tfinal=0, total_step=10))
    batches = training.batches(rows(), stack, batch_size=4, seed=0)
    training.train(model, batches, steps=9, learning_rate=3e-2)
    allocator = model.base_model.rankallocator
    scores = []
    for name, _ in model.base_model.model.named_parameters():
        if "lora_E" not in name:
            continue
        p, q = name.replace("lora_E", "lora_B"), name.replace("lora_E", "lora_A")
        s = {n: allocator.exp_avg_ipt[n] * allocator.exp_avg_unc[n] for n in (name, p, q)}
        scores.append(s[name].flatten() + s[p].mean(0) + s[q].mean(1))
    assert adapters.live_ranks(model).sum() == 12
    allocator.mask_to_budget(model.base_model.model, 8)
    best = torch.cat(scores).topk(8).indices
    assert alive(model).nonzero().flatten().tolist() == sorted(best.tolist())


# ---------------------------------------------------------------------------------- the Trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_with_the_callback_the_trainer_prunes_and_without_it_does_not(tmp_path, accumulate):
    config = schedule(tinit=1, tfinal=3, total_step=8)
    plain, called = tiny(config), tiny(schedule(tinit=1, tfinal=3, total_step=8))
    for model, callbacks in ((plain, []), (called, [adapters.AllocateRanks()])):
        trainer = route(model, tmp_path, 8, callbacks)
        trainer.args.gradient_accumulation_steps = accumulate
        trainer.train()
    assert adapters.live_ranks(plain).sum() == 12
    assert plain.active_peft_config.rank_pattern is None
    assert adapters.live_ranks(called).sum() == 8
    assert sum(map(sum, called.active_peft_config.rank_pattern.values())) == 8


def test_the_trainer_prunes_as_the_loop_does(tmp_path):
    """Whole batches, so that the order of the rows cannot matter: the same singular values."""
    by_trainer, by_loop = (tiny(schedule(tinit=1, tfinal=3, total_step=8)) for _ in range(2))
    trainer = training.trainer(
        by_trainer,
        rows(4),
        stack,
        steps=8,
        learning_rate=3e-2,
        batch_size=4,
        seed=0,
        output_dir=tmp_path,
        warmup_steps=0,
    )
    trainer.add_callback(adapters.AllocateRanks())
    trainer.train()
    training.train(by_loop, [stack(rows(4))] * 8, steps=8, learning_rate=3e-2)
    assert torch.equal(alive(by_trainer), alive(by_loop))


class At(TrainerCallback):
    """The same call at another moment of the step."""

    def __init__(self, moment: str) -> None:
        setattr(self, moment, self._call)

    def _call(self, args, state, control, model=None, **kwargs) -> None:
        model.base_model.update_and_allocate(min(state.global_step, 7))


def test_after_the_step_the_gradients_are_gone(tmp_path):
    trainer = route(tiny(schedule(tinit=1, tfinal=3, total_step=8)), tmp_path, 8, [])
    trainer.add_callback(At("on_step_end"))
    with pytest.raises(TypeError, match="NoneType"):
        trainer.train()


def test_before_the_step_the_mask_is_undone(tmp_path):
    model = tiny(schedule(tinit=1, tfinal=3, total_step=8))
    route(model, tmp_path, 8, [At("on_pre_optimizer_step")]).train()
    assert adapters.live_ranks(model).sum() == 12  # 8 were to be left


def test_a_run_of_another_length_is_refused(tmp_path):
    model = tiny(schedule(total_step=100))
    with pytest.raises(ValueError, match="total_step=100, but the Trainer takes 8 steps: build"):
        route(model, tmp_path, 8, [adapters.AllocateRanks()]).train()


def test_a_model_without_adalora_is_refused(tmp_path):
    torch.manual_seed(0)
    lora = adapters.config("lora", task_type="CAUSAL_LM", target_modules=QV)
    model = get_peft_model(models.tiny("llama"), lora)
    with pytest.raises(ValueError, match="a trainable AdaLoRA, not PeftModelForCausalLM"):
        route(model, tmp_path, 8, [adapters.AllocateRanks()]).train()


def test_going_on_from_a_checkpoint_is_refused(tmp_path):
    config = schedule(tinit=1, tfinal=3, total_step=8)
    route(tiny(config), tmp_path, 8, [adapters.AllocateRanks()]).train()
    again = route(tiny(config), tmp_path, 8, [adapters.AllocateRanks()])
    with pytest.raises(ValueError, match="at step 8, but a checkpoint holds none"):
        again.train(resume_from_checkpoint=True)


# ------------------------------------------------------------------------------ what peft does


def test_a_pruned_adapter_comes_back_as_it_was(tmp_path):
    model = tiny(schedule(tinit=1, tfinal=3, total_step=8))
    batches = training.batches(rows(), stack, batch_size=4, seed=0)
    training.train(model, batches, steps=8, learning_rate=3e-2)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    back = PeftModel.from_pretrained(models.tiny("llama"), tmp_path)
    ids = stack(rows())["input_ids"]
    with torch.no_grad():
        both = [m.eval()(input_ids=ids).logits for m in (model, back)]
    assert torch.allclose(*both, atol=1e-6)
    assert adapters.live_ranks(back).equals(adapters.live_ranks(model))


@pytest.mark.parametrize("freeze", [False, True])
def test_on_a_16_bit_base_the_divisor_trains_and_is_lost(tmp_path, freeze):
    """peft 0.21.2 lets `ranknum`, which divides alpha, train there, and does not save it."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return models.tiny("llama").to(torch.bfloat16)

    model = get_peft_model(base(), schedule(tinit=1, tfinal=3, total_step=8))
    divisors = [p for name, p in model.named_parameters() if "ranknum" in name]
    assert all(p.requires_grad for p in divisors)
    if freeze:
        for p in divisors:
            p.requires_grad_(False)
    batches = training.batches(rows(), stack, batch_size=4, seed=0)
    training.train(model, batches, steps=8, learning_rate=1e-1)
    assert all(p.item() == 3 for p in divisors) == freeze
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(base(), tmp_path)
    ids = stack(rows())["input_ids"]
    with torch.no_grad():
        both = [m.eval()(input_ids=ids).logits for m in (model, back)]
    gap = (both[0] - both[1]).abs().max().item()
    assert gap < 0.01 if freeze else gap > 0.03  # logits of about 0.5, with 8 bits each


def test_a_loaded_adapter_takes_labels_only_when_it_is_to_train(tmp_path):
    tiny(schedule(total_step=8)).save_pretrained(tmp_path)
    batch = stack(rows())
    frozen = PeftModel.from_pretrained(models.tiny("llama"), tmp_path)
    with pytest.raises(AttributeError, match="trainable_adapter_name"):
        frozen(**batch)
    assert frozen.get_base_model()(**batch).loss.isfinite()
    again = PeftModel.from_pretrained(models.tiny("llama"), tmp_path, is_trainable=True)
    assert again(**batch).loss > again.get_base_model()(**batch).loss  # with the penalty
