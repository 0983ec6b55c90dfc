"""What an adapter costs each time the model answers.

Source: this course's own count; Hu et al. 2021, section 4.1, on merged weights.
Taught in: notebook 05, section 6.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .patient import PREFIX_TYPES


@dataclass(frozen=True)
class AtInference:
    """What an adapter adds to every sequence.

    Attributes:
        positions: virtual tokens that every word attends to.
        computed: those among them that run through all layers, like words of the input; the keys
            and values of the others are there already.
        cache_bytes: keys and values of the virtual tokens, in bytes a sequence.
        mergeable: whether peft can put the adapter into the base's weights, after which nothing of
            it is left to pay for.
    """

    positions: int
    computed: int
    cache_bytes: int
    mergeable: bool


def at_inference(model: nn.Module) -> AtInference:
    """The cost of a causal model's active adapter at inference, from its configuration alone.

    The meta device will do. Keys and values are counted in the dtype of the base.

    Raises: TypeError for a model without an adapter.
    Source: peft's page "Prompt-based methods". Taught in: notebook 05, section 6.
    """
    if not getattr(model, "peft_config", None):
        raise TypeError(
            f"at_inference needs a model with an adapter, but {type(model).__name__} has none; "
            "wrap it with peft.get_peft_model first."
        )
    config = model.active_peft_config
    tokens = config.num_virtual_tokens if config.is_prompt_learning else 0
    return AtInference(
        positions=tokens,
        computed=0 if config.peft_type in PREFIX_TYPES else tokens,
        cache_bytes=tokens * cache_bytes_per_token(model.get_base_model()),
        mergeable=hasattr(model.base_model, "merge_and_unload"),
    )


def cache_bytes_per_token(base: nn.Module) -> int:
    """Bytes that one position of one sequence takes in the key-value cache of a causal model.

    Raises: TypeError for a module without a configuration.
    Taught in: notebook 05, section 6.
    """
    if not hasattr(base, "config"):
        raise TypeError(f"{type(base).__name__} has no config, so it is no causal model.")
    config = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * base.dtype.itemsize
