"""Whisper tiny.en: from a CTranslate2 file to a transformers folder, and a shorter window.

Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision".
Taught in: notebook 01, section 5.
"""

import json
import struct
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from helpers.assets import AssetError

# Ids of the English-only vocabulary. The end doubles as padding: mask labels by length, not by id.
END, START, PREVIOUS, NO_TIMESTAMPS = 50256, 50257, 50360, 50362
POSITIONS_PER_SECOND = 50  # the second convolution halves the 100 log-mel frames of a second
SAMPLES_PER_SECOND = 16_000
# What CTranslate2 stacks in linear_0, linear_1… of self-attention and of cross-attention.
_FUSED = {
    "self": ("q_proj k_proj v_proj", "out_proj"),
    "encoder": ("q_proj", "k_proj v_proj", "out_proj"),
}
_DTYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16}


def shorten_audio(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, seconds: int
) -> None:
    """Cuts Whisper's window of 30 seconds in place: clips of a few seconds then run faster.

    The encoder reads its whole window, silence included, so four seconds cost about an eighth of
    thirty. Its position vectors are sinusoids whose first rows are the same for any length: they
    are cut, not retrained. Do it before an adapter is added.

    Args:
        model: its encoder keeps 50 positions a second.
        processor: its feature extractor pads and cuts to the same window.
        seconds: the new window.

    Raises:
        ValueError: `seconds` is below 1 or above the window that the model has.

    Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022,
    section 2.2.
    Taught in: notebook 01, section 5.
    """
    encoder, rows = model.get_encoder(), seconds * POSITIONS_PER_SECOND
    present = encoder.embed_positions.num_embeddings
    if not 1 <= seconds <= present // POSITIONS_PER_SECOND:
        raise ValueError(
            f"The window can be cut to 1 to {present // POSITIONS_PER_SECOND} seconds, "
            f"not to {seconds}."
        )
    positions = encoder.embed_positions.weight.detach()[:rows].clone()
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(positions, freeze=True)
    model.config.max_source_positions = encoder.config.max_source_positions = rows
    encoder.max_source_positions = rows
    extractor = processor.feature_extractor
    extractor.chunk_length = seconds
    extractor.n_samples = seconds * SAMPLES_PER_SECOND
    extractor.nb_max_frames = extractor.n_samples // extractor.hop_length


def accept_no_text(model: WhisperForConditionalGeneration) -> None:
    """Lets Whisper ignore text inputs that are None, which peft's wrapper passes on.

    peft's model for "SEQ_2_SEQ_LM" always passes `input_ids` and `inputs_embeds`. Whisper has no
    such inputs and hands them to its decoder, which then gets `input_ids` twice and raises a
    TypeError. Call it before the adapter is added.

    Source: peft, `PeftModelForSeq2SeqLM.forward`; transformers, `WhisperModel.forward`.
    Taught in: notebook 01, section 5.
    """
    model.register_forward_pre_hook(_without_empty_text, with_kwargs=True)


def _without_empty_text(
    module: torch.nn.Module, args: tuple, kwargs: dict[str, object]
) -> tuple[tuple, dict[str, object]]:
    text = ("input_ids", "inputs_embeds")
    return args, {k: v for k, v in kwargs.items() if k not in text or v is not None}


def convert(unpacked: Path, part: Path) -> None:
    """CTranslate2's fp16 file and tokenizer in `unpacked` to a transformers folder in fp32.

    Raises:
        AssetError: the file is damaged, or does not hold Whisper tiny.en.
    """
    found = json.loads((unpacked / "config.json").read_text(encoding="utf-8"))
    config, weights = _config(), _weights(read_ctranslate2(unpacked / "model.bin"))
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wanted.pop("proj_out.weight")  # the same matrix as the decoder's embedding
    if {name: tensor.shape for name, tensor in weights.items()} != wanted:
        raise AssetError("model.bin does not hold the weights of Whisper tiny.en.")
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(part)
    _generation(found).save_pretrained(part)
    tokenizer = transformers.WhisperTokenizerFast(
        tokenizer_file=str(unpacked / "tokenizer.json"),
        pad_token="<|endoftext|>",
        model_max_length=config.max_target_positions,
    )
    extractor = transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    WhisperProcessor(extractor, tokenizer).save_pretrained(part)


def read_ctranslate2(file: Path) -> dict[str, torch.Tensor]:
    """The variables of a CTranslate2 model of file version 6, by name.

    Raises:
        AssetError: the file is cut off, or of another version.

    Source: CTranslate2, `python/ctranslate2/specs/model_spec.py`.
    """
    raw = bytearray(file.read_bytes())
    try:
        return _variables(raw)
    except (struct.error, ValueError, KeyError) as error:
        raise AssetError(
            f"{file.name} is damaged or no CTranslate2 file of version 6; delete the archive that "
            "it comes from, and it is fetched again."
        ) from error


def _variables(raw: bytearray) -> dict[str, torch.Tensor]:
    place = 0

    def number(kind: str) -> int:
        nonlocal place
        [value] = struct.unpack_from(f"<{kind}", raw, place)
        place += struct.calcsize(f"<{kind}")
        return value

    def text() -> str:
        nonlocal place
        length = number("H")  # with a zero byte at the end
        place += length
        return raw[place - length : place - 1].decode("utf-8")

    if number("I") != 6:
        raise ValueError("another file version")
    text(), number("I")  # the model's kind and its revision
    tensors = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype, size = _DTYPES[number("B")], number("I")
        flat = torch.frombuffer(raw, dtype=dtype, offset=place, count=size // dtype.itemsize)
        tensors[name] = flat.reshape(shape)
        place += size
    return tensors


def _weights(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names to fp32 tensors; query, key and value are cut out of one matrix."""
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if not tensor.is_floating_point():
            continue  # counts and switches, which the configuration holds
        for key, piece in _pieces(name, tensor.float()):
            weights[f"model.{key}"] = piece.contiguous()
    return weights


def _pieces(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    key = name.replace("/", ".").replace("layer_norm.gamma", "layer_norm.weight")
    key = key.replace("layer_norm.beta", "layer_norm.bias").replace(".layer_", ".layers.")
    key = key.replace(".layers.norm", ".layer_norm")
    key = key.replace("position_encodings.encodings", "embed_positions.weight")
    key = key.replace("embeddings.weight", "embed_tokens.weight")
    key = key.replace("ffn.layer_norm", "final_layer_norm").replace("ffn.linear_0", "fc1")
    key = key.replace("ffn.linear_1", "fc2").replace("self_attention", "self_attn")
    key = key.replace(".attention.", ".encoder_attn.")
    key = key.replace("attn.layer_norm", "attn_layer_norm")
    block, found, kind = key.partition("_attn.linear_")
    if not found:
        return [(key, tensor)]
    place, _, kind = kind.partition(".")
    names = _FUSED[block.rpartition(".")[2]][int(place)].split()
    parts = zip(names, tensor.chunk(len(names)), strict=True)
    # Whisper's keys have no bias; the file writes zeros for it.
    return [
        (f"{block}_attn.{which}.{kind}", piece)
        for which, piece in parts
        if (which, kind) != ("k_proj", "bias")
    ]


def _config() -> transformers.WhisperConfig:
    return transformers.WhisperConfig(
        vocab_size=51_864,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        pad_token_id=END,
        bos_token_id=END,
        eos_token_id=END,
        decoder_start_token_id=START,
        architectures=["WhisperForConditionalGeneration"],
        dtype="float32",
    )


def _generation(found: dict) -> transformers.GenerationConfig:
    """What Whisper needs to write: the tokens it starts with, and those it must not write."""
    return transformers.GenerationConfig(
        decoder_start_token_id=START,
        no_timestamps_token_id=NO_TIMESTAMPS,
        prev_sot_token_id=PREVIOUS,
        suppress_tokens=found["suppress_ids"],
        begin_suppress_tokens=found["suppress_ids_begin"],
        alignment_heads=found["alignment_heads"],
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        is_multilingual=False,
        return_timestamps=False,
    )
