"""A tiny Llama for tests of four bits: its layers are as wide as a block of 64 weights."""

from transformers import LlamaConfig, LlamaForCausalLM


def block_wide_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config)
