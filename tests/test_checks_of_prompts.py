"""The exercise checks of lesson 05 pass right answers and name what is wrong with others."""

import pytest
import torch
from torch.nn.functional import cross_entropy, pad

from helpers import checks, models


def with_prompt(base, prompt, batch, *, mask=1, label=-100, front=True):
    """Prompt tuning in a few lines, with the slips that one can make."""
    words = base.get_input_embeddings()(batch["input_ids"])
    rows, n = prompt.expand(len(words), -1, -1), len(prompt)
    sides = (n, 0) if front else (0, n)
    return base(
        inputs_embeds=torch.cat([rows, words] if front else [words, rows], dim=1),
        attention_mask=None if mask is None else pad(batch["attention_mask"], sides, value=mask),
        labels=pad(batch["labels"], sides, value=label),
    ).loss


def shifted(base, prompt, batch):
    rows, n = prompt.expand(len(batch["input_ids"]), -1, -1), len(prompt)
    return base(
        inputs_embeds=torch.cat([rows, base.get_input_embeddings()(batch["input_ids"])], dim=1),
        attention_mask=pad(batch["attention_mask"], (n, 0), value=1),
        labels=pad(batch["labels"], (0, n), value=-100),
    ).loss


def from_logits(base, prompt, batch):
    """The loss taken from the logits, in their own 64 bits; transformers takes it in 32."""
    words, n = base.get_input_embeddings()(batch["input_ids"]), len(prompt)
    logits = base(
        inputs_embeds=torch.cat([prompt.expand(len(words), -1, -1), words], dim=1),
        attention_mask=pad(batch["attention_mask"], (n, 0), value=1),
    ).logits
    return cross_entropy(logits[:, n - 1 : -1].mT, batch["labels"])


@pytest.mark.parametrize("answer", [with_prompt, from_logits])
def test_prompt_tuning_passes(answer):
    assert "passed" in checks.prompt_loss(answer)


@pytest.mark.parametrize(
    ("answer", "rule", "says"),
    [
        (lambda base, prompt, batch: base(**batch).loss, "place", "left out"),
        (lambda *a: with_prompt(*a, front=False), "place", "behind the words"),
        (lambda *a: with_prompt(*a, mask=None), "mask", "padding is not masked"),
        (lambda *a: with_prompt(*a, mask=0), "mask", "the prompt is masked"),
        (lambda *a: with_prompt(*a, label=0), "labels", "-100, not 0"),
        (shifted, "labels", "shifted"),
        (lambda *a: with_prompt(*a).detach(), "gradient", "never learn"),
        (lambda *a: 2 * with_prompt(*a), "loss", "should be"),
        (lambda *a: with_prompt(*a).item(), "loss", "tensor with one number"),
        (lambda base, prompt, batch: base(prompt), "runs", "raises"),
    ],
)
def test_other_prompts_are_named(answer, rule, says):
    with pytest.raises(checks.Broken, match=says) as caught:
        checks.prompt_loss(answer)
    assert caught.value.rule == rule


def test_the_cache_of_a_model_with_grouped_attention():
    model = models.full_size("mistral-7b")  # 32 layers, 8 key-value heads of 128, two bytes
    right = 20 * 2 * 32 * 8 * 128 * 2
    assert "passed" in checks.cache_bytes(right, model, 20)
    slips = {
        right // 2: "keys and values",
        right // 32: "one layer",
        right // 20: "one virtual token",
        right * 4: "query heads share",
        20 * 4096 * 2: "prompt in the file",
        7: "tokens x 2 x layers",
    }
    for answer, says in slips.items():
        with pytest.raises(checks.Broken, match=says):
            checks.cache_bytes(answer, model, 20)


def test_merging_the_input():
    assert "passed" in checks.merged_input(lambda weight, factors: weight * factors)


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        (lambda weight, factors: weight * factors.unsqueeze(1), "runs"),
        (lambda weight, factors: weight @ factors, "shape"),
        (lambda weight, factors: weight.mul_(factors), "weight untouched"),
        (lambda weight, factors: weight / factors, "columns"),
        (
            lambda weight, factors: (
                weight * factors if len(weight) != len(factors) else (weight.T * factors).T
            ),
            "columns",
        ),
    ],
)
def test_other_merges_are_named(answer, rule):
    with pytest.raises(checks.Broken) as caught:
        checks.merged_input(answer)
    assert caught.value.rule == rule
