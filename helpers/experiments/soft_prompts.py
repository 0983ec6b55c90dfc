"""What do soft prompts and (IA)3 learn beside LoRA? SmolLM2-135M on trivia answers.

Equal for all arms: the steps, the batches and their order, fp32; all soft prompts have 16 virtual
tokens. Each method has its own grid of learning rates and chooses on the validation rows of the
first seed. The arms "from text" start as the words of `TEXT`: as their embeddings before the input,
or as the keys and values that the model itself computes for them. Three controls train nothing: the
model as it is, a random prompt, and those words.

`ENCODER` repeats it with MiniLM on movie reviews, where the head is trained in every arm and the
control trains the head alone.

Source: this course's own study.
Taught in: notebook 05, section 3.
"""

from __future__ import annotations

from functools import cache

import torch
from datasets import Dataset
from peft import (
    PeftConfig,
    PromptTuningConfig,
    get_peft_model,
    initialize_kv_prefix_from_text,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerBase,
)

from helpers import adapters, data, models, training
from helpers.experiments import ranks, tasks
from helpers.experiments.dora import NOT_FINITE
from helpers.experiments.study import Study

STEPS, BATCH = 20, 4
TEXT = "Answer the question with a name, a number or a few words, nothing else"
CONTROLS = {"untrained": None, "random prompt": "prompt", "words alone": "prompt from text"}
GRID = {
    "prompt": (1e-2, 3e-2, 1e-1, 3e-1),
    "prompt from text": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "p-tuning": (1e-3, 3e-3, 1e-2),
    "prefix": (1e-3, 3e-3, 1e-2),
    "p-tuning-v2": (1e-2, 3e-2, 1e-1, 3e-1),
    "p-tuning-v2 from text": (3e-3, 1e-2, 3e-2, 1e-1),
    "ia3": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "lora": (1e-3, 2e-3, 4e-3),
}


def config(method: str) -> PeftConfig:
    """The peft configuration of an arm."""
    if method != "prompt from text":
        return adapters.config(method.removesuffix(" from text"), task_type="CAUSAL_LM")
    return PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=adapters.DEFAULT_VIRTUAL_TOKENS,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=TEXT,
        tokenizer_name_or_path=str(models.path("smollm2")),
    )


def adapted(method: str) -> torch.nn.Module:
    """SmolLM2 with the method of an arm, or with the untrained prompt of a control."""
    base = AutoModelForCausalLM.from_pretrained(models.path("smollm2"))
    method = CONTROLS.get(method, method)
    if method is None:
        return base
    model = get_peft_model(base, config(method))
    if method == "p-tuning-v2 from text":
        initialize_kv_prefix_from_text(model, tokenizer(), text=TEXT, use_chat_template=False)
    return model


def trained(method: str, learning_rate: float, seed: int) -> torch.nn.Module:
    """The model of an arm after its steps; a control as it is.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    torch.manual_seed(seed)
    model = adapted(method)
    if method not in CONTROLS:
        rows = training.batches(examples("train"), collator(), batch_size=BATCH, seed=seed)
        training.train(
            model,
            rows,
            steps=STEPS,
            learning_rate=learning_rate,
            warmup_steps=2,
            label=f"{method} {learning_rate:g}",
        )
    return model


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer."""
    return AutoTokenizer.from_pretrained(models.path("smollm2"))


def examples(part: str) -> Dataset:
    """The trivia questions and answers of a split as token ids and labels."""
    return data.chat_examples(data.trivia()[part], tokenizer())


def collator() -> DataCollatorForTokenClassification:
    """Pads a batch to its longest row."""
    return DataCollatorForTokenClassification(tokenizer())


def held_out(model: torch.nn.Module) -> dict[str, float]:
    """Both held-out losses, in nats per answer token."""
    losses = {}
    for part in ("validation", "test"):
        batches = training.ordered_batches(examples(part), collator(), batch_size=10)
        losses[f"{part}_loss"] = round(training.answer_loss(model, batches), 5)
    return losses


def run(settings: dict, seed: int) -> dict[str, float]:
    """Train one arm at one rate; losses in nats per answer token."""
    try:
        model = trained(settings["method"], settings["learning_rate"], seed)
    except training.TrainingError:
        return dict.fromkeys(STUDY.metrics, NOT_FINITE)
    return held_out(model)


STUDY = Study(
    name="soft_prompts",
    settings=(
        *({"method": name, "learning_rate": 0.0} for name in CONTROLS),
        *(
            {"method": name, "learning_rate": rate}
            for name, rates in GRID.items()
            for rate in rates
        ),
    ),
    metrics=("validation_loss", "test_loss"),
    run=run,
    tuned="learning_rate",
    seeds=3,
)


REVIEWS = {
    "head alone": ranks.HEAD_RATES,
    "prompt": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "p-tuning": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "prefix": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "p-tuning-v2": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "ia3": (3e-3, 1e-2, 3e-2, 1e-1),
    "lora": (1e-3, 3e-3, 1e-2),
}


def run_encoder(settings: dict, seed: int) -> dict[str, float]:
    """Train one arm at one rate on movie reviews; losses in nats per review, scores as shares."""
    method, rate = settings["method"], settings["learning_rate"]
    if method == "head alone":
        model = ranks.adapted("movies", 0, seed)
    else:
        model = get_peft_model(
            tasks.base("movies", seed), adapters.config(method, task_type="SEQ_CLS")
        )
    try:
        tasks.fine_tune(model, "movies", learning_rate=rate, seed=seed, label=f"{method} {rate:g}")
    except training.TrainingError:
        return dict.fromkeys(ENCODER.metrics, NOT_FINITE)
    return tasks.measure(model, "movies", "validation") | tasks.measure(model, "movies", "test")


ENCODER = Study(
    name="soft_prompts_encoder",
    settings=tuple(
        {"method": name, "learning_rate": rate} for name, rates in REVIEWS.items() for rate in rates
    ),
    metrics=("validation_loss", "validation_score", "test_loss", "test_score"),
    run=run_encoder,
    tuned="learning_rate",
    seeds=3,
)
