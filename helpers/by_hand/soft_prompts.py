"""Soft prompts by hand: trained vectors before the input, or keys and values in every layer.

Each class wraps a frozen causal language model of transformers and is called like one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from helpers.data import IGNORED
from helpers.given import whole


def _whole(tokens: int) -> int:
    return whole("The number of virtual tokens", tokens)


def _own_ids(base: PreTrainedModel, ids: list[int]) -> Tensor:
    """The embedding table, for ids that are all in it."""
    if not len(ids):
        raise ValueError("The text has no tokens; give the ids of at least one, for instance [1].")
    table = base.get_input_embeddings().weight
    for token in ids:
        whole("A token id of this model", token, 0, len(table) - 1)
    return table


class _SoftPrompt(nn.Module):
    """What all four share: a frozen base, a number of virtual tokens, and writing greedily."""

    def __init__(self, base: PreTrainedModel, tokens: int) -> None:
        super().__init__()
        _whole(tokens)
        self.base, self.tokens = base.requires_grad_(False), tokens

    def mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The attention mask (B, virtual + T): virtual tokens are never masked."""
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return torch.cat([real.new_ones(len(real), self.tokens), real], dim=1)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, *, max_new_tokens: int = 20) -> Tensor:
        """Continue one row (1, T) greedily, to the end token or ``max_new_tokens`` at most.

        The virtual tokens are computed once: after the first step they sit in the cache.

        Raises: ValueError for more than one row.
        """
        if len(input_ids) != 1:
            raise ValueError(
                f"generate continues one row at a time, but was given {len(input_ids)}"
            )
        out = self(input_ids, use_cache=True)
        for _ in range(max_new_tokens):
            token = out.logits[:, -1:].argmax(-1)
            input_ids = torch.cat([input_ids, token], dim=1)
            if token.item() == self.base.generation_config.eos_token_id:
                break
            out = self.base(input_ids=token, past_key_values=out.past_key_values)
        return input_ids


class PromptTuning(_SoftPrompt):
    """Prompt tuning: ``tokens`` trained vectors stand before the embeddings of the input.

    Args:
        base: a causal language model; it is frozen in place.
        start: the vectors to start from, of shape (tokens, width): random ones, or the embeddings
            of a text (:func:`embed`).

    Raises: ValueError for a start of another shape.
    Source: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning",
    section 2.
    Taught in: notebook 05, section 2.
    """

    def __init__(self, base: PreTrainedModel, start: Tensor) -> None:
        super().__init__(base, len(start))
        width = base.config.hidden_size
        if start.shape != (len(start), width):
            raise ValueError(
                f"The start must have the shape (tokens, {width}), but has {tuple(start.shape)}."
            )
        self.embedding = nn.Parameter(start.detach().clone())

    def prompt(self) -> Tensor:
        """The vectors before the input, (tokens, width)."""
        return self.embedding

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
    ) -> CausalLMOutputWithPast:
        """The base's output for (B, T) token ids; its logits are (B, tokens + T, vocabulary)."""
        words = self.base.get_input_embeddings()(input_ids)
        prompt = self.prompt().to(words.dtype).expand(len(words), -1, -1)
        if labels is not None:  # nobody is asked to predict the virtual tokens
            labels = nn.functional.pad(labels, (self.tokens, 0), value=IGNORED)
        return self.base(
            inputs_embeds=torch.cat([prompt, words], dim=1),
            attention_mask=self.mask(input_ids, attention_mask),
            labels=labels,
            use_cache=use_cache,
        )


class PTuning(PromptTuning):
    """P-tuning (version 1): the vectors before the input are computed by a small MLP.

    The MLP is only needed to train: what it computes can be kept in its place.

    Args:
        base: a causal language model; it is frozen in place.
        tokens: the number of virtual tokens.
        hidden: the width of the MLP; the base's width when it is None, as in peft.

    Raises: ValueError for fewer than one virtual token.
    Source: Liu et al. 2021, "GPT Understands, Too", section 3.2; the MLP instead of an LSTM and an
    MLP is peft's choice.
    Taught in: notebook 05, section 2.
    """

    def __init__(self, base: PreTrainedModel, tokens: int, hidden: int | None = None) -> None:
        width = base.config.hidden_size
        hidden = hidden or width
        super().__init__(base, torch.randn(_whole(tokens), width))
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, width),
        )

    def prompt(self) -> Tensor:
        """The vectors before the input, (tokens, width)."""
        return self.mlp(self.embedding)


class PTuningV2(_SoftPrompt):
    """P-tuning v2: trained keys and values of virtual tokens in every layer.

    The input grows by nothing; every layer finds ``tokens`` more positions to attend to, put into
    its cache before the first word.

    Args:
        base: a causal language model; it is frozen in place.
        tokens: the number of virtual tokens.

    Source: Liu et al. 2022, "P-Tuning v2", section 3.2; the start, N(0, 1), is peft's.
    Taught in: notebook 05, section 2.
    """

    def __init__(self, base: PreTrainedModel, tokens: int) -> None:
        super().__init__(base, tokens)
        self.embedding = nn.Parameter(torch.randn(tokens, 2 * _layers(base) * _key_width(base)))

    def prefix(self) -> Tensor:
        """All keys and values, (tokens, layers * 2 * width of the keys)."""
        return self.embedding

    def cache(self, rows: int) -> DynamicCache:
        """A cache in which each layer holds its keys and values, (rows, heads, tokens, width)."""
        heads = _heads(self.base)
        parts = self.prefix().to(self.base.dtype)
        parts = parts.view(self.tokens, 2 * _layers(self.base), heads, -1).permute(1, 2, 0, 3)
        parts = parts.unsqueeze(1).expand(-1, rows, -1, -1, -1)
        return DynamicCache(list(zip(parts[::2], parts[1::2], strict=True)))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = True,
    ) -> CausalLMOutputWithPast:
        """The base's output for (B, T) token ids; its logits are (B, T, vocabulary)."""
        return self.base(
            input_ids=input_ids,
            attention_mask=self.mask(input_ids, attention_mask),
            labels=labels,
            past_key_values=self.cache(len(input_ids)),
            use_cache=use_cache,
        )


class PrefixTuning(PTuningV2):
    """Prefix tuning: the keys and values of :class:`PTuningV2`, computed by an MLP.

    Args:
        base: a causal language model; it is frozen in place.
        tokens: the number of virtual tokens.
        hidden: the width of the MLP; that of the keys of a layer when it is None.

    Source: Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation",
    section 4.3.
    Taught in: notebook 05, section 2.
    """

    def __init__(self, base: PreTrainedModel, tokens: int, hidden: int | None = None) -> None:
        super().__init__(base, tokens)
        width = _key_width(base)
        hidden = hidden or width
        self.embedding = nn.Parameter(torch.randn(tokens, width))
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 2 * _layers(base) * width)
        )

    def prefix(self) -> Tensor:
        """All keys and values, (tokens, layers * 2 * width of the keys)."""
        return self.mlp(self.embedding)


def embed(base: PreTrainedModel, ids: list[int], tokens: int) -> Tensor:
    """The embeddings of a text as a start of prompt tuning, (tokens, width).

    A longer text is cut, a shorter one is said again until it fills the virtual tokens.

    Raises: ValueError for a text without tokens, or for fewer than one virtual token.
    Source: Lester et al. 2021, section 2.1; cutting and repeating as in peft.
    Taught in: notebook 05, section 3.
    """
    table = _own_ids(base, ids)
    filled = torch.tensor([ids[i % len(ids)] for i in range(_whole(tokens))])
    return table[filled.to(table.device)].detach().clone()


@torch.no_grad()
def prefill(base: PreTrainedModel, ids: list[int]) -> Tensor:
    """The keys and values that the base computes for a text, as a start of :class:`PTuningV2`.

    Of shape (tokens of the text, layers * 2 * width of the keys). A prefix that starts so is the
    text itself, read before the input.

    Raises: ValueError for a text without tokens, or an id that the model does not have.
    Source: peft, ``initialize_kv_prefix_from_text``. Taught in: notebook 05, section 3.
    """
    _own_ids(base, ids)
    row = torch.tensor([ids], device=base.device)
    cache = base(input_ids=row, use_cache=True).past_key_values
    parts = [part[0] for layer in cache.layers for part in (layer.keys, layer.values)]
    return torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)


def _layers(base: PreTrainedModel) -> int:
    return base.config.num_hidden_layers


def _heads(base: PreTrainedModel) -> int:
    """Heads of keys and values, which are fewer than those of queries in grouped attention."""
    return getattr(base.config, "num_key_value_heads", base.config.num_attention_heads)


def _key_width(base: PreTrainedModel) -> int:
    """Numbers in a key of one layer, all heads together."""
    config = base.config
    each = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return _heads(base) * each
