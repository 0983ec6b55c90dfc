"""Tiny models of many architectures, built from a configuration with random weights.

Source: transformers' configurations of the named architectures.
Taught in: notebook 01, section 6.
"""

from collections.abc import Callable

import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from helpers.given import letters, one_of, unknown

VOCABULARY = 100  # of every tiny model; ids 0, 1, 2 are padding, start and end
IMAGE_TOKEN = 99  # stands for a piece of the image in the tiny vision-language models
TASKS = ("lm", "seq_cls", "token_cls", "qa", "features")


def tiny(arch: str, task: str = "lm") -> PreTrainedModel:
    """A model of two layers and width 32 with random weights, in milliseconds, on the CPU.

    The vocabulary has 100 ids: 0 is padding, 1 start, 2 end, 99 an image token where the model
    sees images (of 28 x 28 pixels, four patches). Seed it yourself with `torch.manual_seed`.

    Args:
        arch: one of `TINY`; "GPT-2" or "deberta_v2" are understood too.
        task: "lm" (causal, masked, sequence to sequence or image to text: what suits the
            architecture), "seq_cls" (two labels), "token_cls", "qa" or "features".

    Raises:
        ValueError: unknown architecture or task, or transformers has no such head for it.

    Taught in: notebook 01, section 6.
    """
    name = _tiny_name(arch)
    one_of("task", task, TASKS)
    config = _TINY_CONFIGS[name]()
    config.num_labels = 2  # BART's own default is three
    auto = _head(config, task)
    if auto is None:
        able = [other for other in TASKS if _head(config, other) is not None]
        raise ValueError(
            f"transformers has no {task!r} head for {name!r}; it has {', '.join(able)}."
        )
    return auto.from_config(config).eval()


def _tiny_name(arch: str) -> str:
    plain = letters(arch)
    if plain == "flamingo":
        raise ValueError(
            "transformers has no class for Flamingo (its AudioFlamingo3 and MusicFlamingo are "
            "audio models, and IDEFICS is the open reproduction of Flamingo); the nearest here "
            "are 'llava', 'blip-2' and 'instructblip'."
        )
    known = {letters(name): name for name in TINY}
    known |= {"qwen2": "qwen", "debertav2": "deberta", "debertav3": "deberta"}
    if plain not in known:
        raise ValueError(unknown("architecture", arch, TINY))
    return known[plain]


def _head(config: PreTrainedConfig, task: str) -> type | None:
    """The Auto class that builds this task's head, None if there is none."""
    candidates = {
        "lm": (
            AutoModelForImageTextToText,
            AutoModelForSeq2SeqLM,
            # BERT has a causal head too, but masked prediction is what it was made for.
            AutoModelForMaskedLM,
            AutoModelForCausalLM,
        ),
        "seq_cls": (AutoModelForSequenceClassification,),
        "token_cls": (AutoModelForTokenClassification,),
        "qa": (AutoModelForQuestionAnswering,),
        "features": (AutoModel,),
    }[task]
    return next((auto for auto in candidates if type(config) in auto._model_mapping), None)


_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def _llama() -> PreTrainedConfig:
    return transformers.LlamaConfig(
        **_IDS, **_WIDTH, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=128
    )


def _vision() -> dict[str, int]:
    return {**_WIDTH, "intermediate_size": 64, "image_size": 28, "patch_size": 14}


def _gpt2() -> PreTrainedConfig:
    return transformers.GPT2Config(**_IDS, n_embd=32, n_layer=2, n_head=4, n_positions=128)


def _gptj() -> PreTrainedConfig:
    return transformers.GPTJConfig(
        **_IDS, n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4
    )


def _mistral() -> PreTrainedConfig:
    return transformers.MistralConfig(
        **_IDS, **_WIDTH, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=128
    )


def _qwen() -> PreTrainedConfig:
    return transformers.Qwen2Config(
        **_IDS, **_WIDTH, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=128
    )


def _falcon() -> PreTrainedConfig:
    return transformers.FalconConfig(**_IDS, **_WIDTH, max_position_embeddings=128)


def _bert() -> PreTrainedConfig:
    return transformers.BertConfig(
        **_IDS, **_WIDTH, intermediate_size=64, max_position_embeddings=128
    )


def _roberta() -> PreTrainedConfig:
    return transformers.RobertaConfig(
        **_IDS, **_WIDTH, intermediate_size=64, max_position_embeddings=130
    )


def _deberta() -> PreTrainedConfig:
    return transformers.DebertaV2Config(
        **_IDS,
        **_WIDTH,
        intermediate_size=64,
        max_position_embeddings=128,
        relative_attention=True,
        position_buckets=16,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        position_biased_input=False,
        norm_rel_ebd="layer_norm",
    )


def _t5() -> PreTrainedConfig:
    return transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )


_BART_SHAPE = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}


def _bart() -> PreTrainedConfig:
    return transformers.BartConfig(**_IDS, **_BART_SHAPE)


def _mbart() -> PreTrainedConfig:
    return transformers.MBartConfig(**_IDS, **_BART_SHAPE)


def _llava() -> PreTrainedConfig:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_vision(), projection_dim=32),
        text_config=_llama(),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
    )


_QFORMER = {
    "vocab_size": VOCABULARY,
    **_WIDTH,
    "intermediate_size": 64,
    "encoder_hidden_size": 32,
    "max_position_embeddings": 128,
}


def _blip2() -> PreTrainedConfig:
    text = transformers.OPTConfig(
        **_IDS, **_WIDTH, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=128
    )
    return transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**_vision()),
        qformer_config=transformers.Blip2QFormerConfig(**_QFORMER),
        text_config=text,
        num_query_tokens=4,
        image_text_hidden_size=32,
        image_token_index=IMAGE_TOKEN,
    )


def _instructblip() -> PreTrainedConfig:
    return transformers.InstructBlipConfig(
        vision_config=transformers.InstructBlipVisionConfig(**_vision()),
        qformer_config=transformers.InstructBlipQFormerConfig(**_QFORMER),
        text_config=_llama(),
        num_query_tokens=4,
        image_token_index=IMAGE_TOKEN,
    )


_TINY_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": _gpt2,
    "gptj": _gptj,
    "llama": _llama,
    "mistral": _mistral,
    "falcon": _falcon,
    "qwen": _qwen,
    "bert": _bert,
    "roberta": _roberta,
    "deberta": _deberta,
    "t5": _t5,
    "bart": _bart,
    "mbart": _mbart,
    "llava": _llava,
    "blip-2": _blip2,
    "instructblip": _instructblip,
}
TINY: tuple[str, ...] = tuple(_TINY_CONFIGS)
