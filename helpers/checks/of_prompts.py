"""Checks for the exercises on soft prompts and (IA)3: the input, the cache, the merged weight.

Source: transformers' cache: keys and values, for every layer and token.
Taught in: notebook 05, exercises 1 to 3.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers import adapters, models
from helpers.by_hand import PromptTuning, ScaledInput
from helpers.data import IGNORED

from .exercises import Broken, Passed, running

EXACT = 1e-9  # weights are checked in 64 bits
SAME_LOSS = 1e-6  # nats; transformers takes a loss in 32 bits, a learner may take it in 64
Loss = Callable[[PreTrainedModel, Tensor, dict[str, Tensor]], Tensor]


def prompt_loss(loss: Loss) -> Passed:
    """Checks prompt tuning that a learner wrote: `loss(base, prompt, batch)`.

    The prompt has the shape (tokens, width); the batch has input_ids, attention_mask and labels,
    all (B, T). The answer is the base's loss with the prompt before the words of every row.

    Raises:
        Broken: place, mask, labels or gradient; names the usual slip when it is one.

    Source: Lester et al. 2021, section 2. Taught in: notebook 05, exercise 1.
    """
    base, prompt, batch = _case()
    right = PromptTuning(base, prompt)(**batch).loss.item()
    with running("runs", "the function, called with base, prompt and batch,"):
        found = loss(base, prompt, dict(batch))
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise Broken("loss", f"it has to be a tensor with one number, not {found!r}")
    if abs(found.item() - right) > SAME_LOSS:
        raise Broken(*_slip(found.item(), base, prompt, batch, right))
    if not found.requires_grad or torch.autograd.grad(found, prompt, allow_unused=True)[0] is None:
        raise Broken("gradient", "none reaches the prompt, so it would never learn")
    return Passed("passed: the prompt stands before every row, is seen, and is not a target")


def _case() -> tuple[PreTrainedModel, Tensor, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = models.tiny("llama").double().requires_grad_(False)
        prompt = torch.randn(3, base.config.hidden_size, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(3, 17).reshape(2, 7)
    mask = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])  # padded on the left, where it matters
    labels = ids.masked_fill(mask == 0, IGNORED)
    return base, prompt, {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _slip(
    found: float, base: PreTrainedModel, prompt: Tensor, batch: dict[str, Tensor], right: float
) -> tuple[str, str]:
    """The rule that a wrong loss breaks, and why."""
    words = base.get_input_embeddings()(batch["input_ids"])
    whole = torch.cat([prompt.expand(len(words), -1, -1), words], dim=1)
    mask, masked, late, target = (
        nn.functional.pad(batch[name], sides, value=value)
        for name, sides, value in (
            ("attention_mask", (len(prompt), 0), 1),
            ("attention_mask", (len(prompt), 0), 0),
            ("labels", (0, len(prompt)), IGNORED),
            ("labels", (len(prompt), 0), 0),
        )
    )
    labels = nn.functional.pad(batch["labels"], (len(prompt), 0), value=IGNORED)
    front = {"inputs_embeds": whole, "attention_mask": mask, "labels": labels}
    slips = (
        (batch, "place", "no word sees the prompt: it is left out, or stands behind the words"),
        (
            front | {"attention_mask": None},
            "mask",
            "the padding is not masked: put ones before the attention mask",
        ),
        (front | {"attention_mask": masked}, "mask", "the prompt is masked: its part is ones"),
        (
            front | {"labels": late},
            "labels",
            "they are shifted against the words: the prompt's -100 go before them",
        ),
        (
            front | {"labels": target},
            "labels",
            "the virtual tokens are targets: give them -100, not 0",
        ),
    )
    for inputs, rule, why in slips:
        if abs(base(**inputs).loss.item() - found) < SAME_LOSS:
            return rule, why
    return "loss", f"it is {found:.6f} and should be {right:.6f}"


def cache_bytes(answer: int, model: nn.Module, virtual_tokens: int) -> Passed:
    """Checks a learner's count of the bytes that virtual tokens take in the key-value cache.

    The model may be on the meta device; its dtype and shapes count. One sequence.

    Raises:
        Broken: the answer is another number; names the usual slip when it is one.

    Source: transformers, ``DynamicCache``.
    Taught in: notebook 05, exercise 2.
    """
    config = model.config.get_text_config()
    right = virtual_tokens * adapters.cache_bytes_per_token(model)
    if answer == right:
        return Passed(f"passed: {right:,} bytes, {right / 2**20:.2f} MiB a sequence")
    shared = config.num_attention_heads // config.num_key_value_heads
    slips = {
        right // 2: "every layer keeps keys and values, two tensors",
        right // config.num_hidden_layers: "that is one layer; every layer has its own",
        right // virtual_tokens: "that is one virtual token",
        right // model.dtype.itemsize: f"a number takes {model.dtype.itemsize} bytes",
        right * shared: f"{shared} query heads share one head of keys and values here",
        virtual_tokens * config.hidden_size * model.dtype.itemsize: "that is the prompt in the "
        "file; the cache holds keys and values of every layer",
    }
    why = slips.get(answer, "tokens x 2 x layers x key-value heads x head width x bytes a number")
    raise Broken("every layer's keys and values", f"{answer!r} is not right: {why}")


def merged_input(merge: Callable[[Tensor, Tensor], Tensor]) -> Passed:
    """Checks how a learner merges the factors of a layer's input: `merge(weight, factors)`.

    The weight is (out, in), the factors are (in,). The answer is the new weight; the given one
    stays as it is.

    Raises:
        Broken: runs, shape, columns, or weight untouched.

    Source: Liu et al. 2022, section 3.3. Taught in: notebook 05, exercise 3.
    """
    for outs, ins in ((3, 5), (4, 4)):  # the square one hides no shape error, but other slips
        generator = torch.Generator().manual_seed(outs)
        layer = ScaledInput(nn.Linear(ins, outs, bias=False, dtype=torch.float64))
        layer.base.weight.data.normal_(generator=generator)
        layer.factors.data.uniform_(0.5, 2, generator=generator)
        _check_merge(merge, layer)
    return Passed("passed: each column of the weight takes the factor of its input")


def _check_merge(merge: Callable[[Tensor, Tensor], Tensor], layer: ScaledInput) -> None:
    weight, factors = layer.base.weight.detach(), layer.factors.detach()
    given = weight.clone()
    with running("runs", "the function, called with weight and factors,"):
        found = merge(given, factors)
    if not isinstance(found, Tensor) or found.shape != weight.shape:
        raise Broken("shape", f"the weight has to stay {tuple(weight.shape)}")
    if not torch.equal(given, weight):
        raise Broken("weight untouched", "the given weight was changed in place")
    if torch.allclose(found, layer.merge().weight, rtol=0, atol=EXACT):
        return
    if len(weight) == len(factors) and torch.allclose(found, weight * factors.unsqueeze(1)):
        raise Broken("columns", "that scales the outputs, which are the rows")
    raise Broken("columns", "W (l * x) has to equal the new weight times x, for every x")
