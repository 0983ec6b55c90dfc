"""Soft prompts by hand: the same losses, gradients and texts as peft's, and what defines each."""

import pytest
import torch
from peft import get_peft_model, initialize_kv_prefix_from_text
from torch import nn

from helpers import adapters, models
from helpers.by_hand import PrefixTuning, PromptTuning, PTuning, PTuningV2, embed, prefill

TOKENS = 5
IDS = torch.arange(3, 19).reshape(2, 8)
MASK = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
LABELS = IDS.masked_fill(MASK == 0, -100)
METHODS = ("prompt", "p-tuning", "prefix", "p-tuning-v2")
EXACT = {"rtol": 0, "atol": 1e-6}


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    return models.tiny("llama")


def by_hand(method: str, base: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    if method == "prompt":
        return PromptTuning(base, torch.randn(TOKENS, base.config.hidden_size))
    kinds = {"p-tuning": PTuning, "prefix": PrefixTuning, "p-tuning-v2": PTuningV2}
    return kinds[method](base, TOKENS)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by their names without peft's or our prefixes."""
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    plain = {n.replace("prompt_encoder.default.", ""): p for n, p in found.items()}
    renamed = {
        n.replace("mlp_head.", "mlp.").replace("transform.", "mlp."): plain[n] for n in plain
    }
    return {n.removesuffix(".weight") if "embed" in n else n: p for n, p in renamed.items()}


def twins(method: str) -> tuple[nn.Module, nn.Module]:
    """Ours and peft's on equal bases with equal trained parameters."""
    mine = by_hand(method, tiny_llama())
    config = adapters.config(method, task_type="CAUSAL_LM", virtual_tokens=TOKENS)
    theirs = get_peft_model(tiny_llama(), config)
    ours, others = trained(mine), trained(theirs)
    assert ours.keys() == others.keys()
    with torch.no_grad():
        for name, parameter in ours.items():
            others[name].copy_(parameter)
    return mine.eval(), theirs.eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole rows", "padded rows"])
def test_loss_and_logits_equal_peft(method: str, mask: torch.Tensor | None) -> None:
    mine, theirs = twins(method)
    ours = mine(IDS, attention_mask=mask, labels=LABELS)
    other = theirs(input_ids=IDS, attention_mask=mask, labels=LABELS)
    torch.testing.assert_close(ours.loss, other.loss, **EXACT)
    torch.testing.assert_close(ours.logits, other.logits, **EXACT)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_peft(method: str) -> None:
    mine, theirs = twins(method)
    mine(IDS, attention_mask=MASK, labels=LABELS).loss.backward()
    theirs(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.backward()
    others = trained(theirs)
    for name, parameter in trained(mine).items():
        assert parameter.grad.any(), name
        torch.testing.assert_close(parameter.grad, others[name].grad, **EXACT)


@pytest.mark.parametrize("method", METHODS)
def test_a_changed_parameter_is_noticed(method: str) -> None:
    mine, theirs = twins(method)
    with torch.no_grad():
        next(iter(trained(mine).values())).mul_(1.05)
    ours, other = mine(IDS, labels=LABELS), theirs(input_ids=IDS, labels=LABELS)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours.logits, other.logits, **EXACT)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("method", METHODS)
def test_generation_equals_peft(method: str) -> None:
    mine, theirs = twins(method)
    row = IDS[:1]
    ours = mine.generate(row, max_new_tokens=12)
    other = theirs.generate(input_ids=row, max_new_tokens=12, do_sample=False)
    assert ours.shape[1] > row.shape[1]
    assert ours.tolist() == other.tolist()
    plain = tiny_llama().generate(input_ids=row, max_new_tokens=12, do_sample=False)
    assert ours.tolist() != plain.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_a_step_moves_the_prompt_only(method: str) -> None:
    mine = by_hand(method, tiny_llama())
    before = {n: p.detach().clone() for n, p in mine.named_parameters()}
    optimiser = torch.optim.SGD([p for p in mine.parameters() if p.requires_grad], lr=1.0)
    mine(IDS, labels=LABELS).loss.backward()
    optimiser.step()
    moved = {n for n, p in mine.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if not n.startswith("base.")}


@pytest.mark.parametrize("method", METHODS)
def test_generation_with_the_cache_equals_a_fresh_pass(method: str) -> None:
    mine = by_hand(method, tiny_llama())
    row = mine.generate(IDS[:1], max_new_tokens=4)
    fresh = mine(row[:, :-1]).logits[:, -1].argmax(-1)
    assert fresh.item() == row[0, -1].item()


def test_generation_stops_at_the_end_token() -> None:
    mine = by_hand("prompt", tiny_llama())
    first = mine(IDS[:1]).logits[:, -1].argmax(-1).item()
    mine.base.generation_config.eos_token_id = first
    assert mine.generate(IDS[:1], max_new_tokens=9).shape[1] == IDS.shape[1] + 1


def test_where_the_virtual_tokens_are() -> None:
    prompt, deep = by_hand("prompt", tiny_llama()), by_hand("p-tuning-v2", tiny_llama())
    assert prompt(IDS).logits.shape[1] == IDS.shape[1] + TOKENS
    out = deep(IDS)
    assert out.logits.shape[1] == IDS.shape[1]
    assert out.past_key_values.get_seq_length() == IDS.shape[1] + TOKENS


def test_a_prompt_of_words_is_the_text_itself() -> None:
    base = tiny_llama()
    mine = PromptTuning(base, embed(base, [7, 8, 9], 3))
    text = torch.tensor([[7, 8, 9, *IDS[0]]])
    torch.testing.assert_close(mine(IDS[:1]).logits, base(text).logits, **EXACT)


@torch.no_grad()
def test_a_prefix_made_of_words_is_the_text_itself() -> None:
    base, words = tiny_llama(), [7, 8, 9, 10, 11]
    mine = PTuningV2(base, TOKENS)
    mine.embedding.copy_(prefill(base, words))
    whole = base(torch.tensor([[*words, *IDS[0]]])).logits[:, TOKENS:]
    torch.testing.assert_close(mine(IDS[:1]).logits, whole, **EXACT)
    mine.embedding.copy_(prefill(base, words[::-1]))
    assert not torch.allclose(mine(IDS[:1]).logits, whole, rtol=0, atol=1e-6)


def test_prefill_equals_peft() -> None:
    words = [7, 8, 9, 10, 11]
    config = adapters.config("p-tuning-v2", task_type="CAUSAL_LM", virtual_tokens=TOKENS)
    theirs = get_peft_model(tiny_llama(), config)

    def tokenizer(text: str, **settings: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}

    text = " ".join(map(str, words))
    initialize_kv_prefix_from_text(theirs, tokenizer, text=text, use_chat_template=False)
    other = theirs.prompt_encoder.default.embedding.weight
    torch.testing.assert_close(prefill(tiny_llama(), words), other.detach(), **EXACT)
    with pytest.raises(ValueError, match="has no tokens"):
        prefill(tiny_llama(), [])


def test_start_from_text_is_cut_or_repeated() -> None:
    base = tiny_llama()
    table = base.get_input_embeddings().weight
    assert torch.equal(embed(base, [4, 5], 5), table[torch.tensor([4, 5, 4, 5, 4])])
    assert torch.equal(embed(base, [4, 5, 6], 2), table[torch.tensor([4, 5])])
    with pytest.raises(ValueError, match="has no tokens"):
        embed(base, [], 3)


@pytest.mark.parametrize("tokens", [0, -1, 2.0, True])
def test_impossible_numbers_of_tokens(tokens: object) -> None:
    with pytest.raises(ValueError, match="whole number of at least 1"):
        PTuningV2(tiny_llama(), tokens)


def test_impossible_starts_and_batches() -> None:
    with pytest.raises(ValueError, match=r"shape \(tokens, 32\), but has \(4, 16\)"):
        PromptTuning(tiny_llama(), torch.randn(4, 16))
    with pytest.raises(ValueError, match="given 2"):
        by_hand("prompt", tiny_llama()).generate(IDS)
