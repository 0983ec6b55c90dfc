"""Real base models: fetched, converted once to a transformers folder, kept in the cache.

Source: data/assets.toml, which names each model's origin.
Taught in: notebook 01, section 2.
"""

import contextlib
import io
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from helpers import assets
from helpers.given import one_of
from helpers.models import whisper

CONVERTED = ("smollm2", "minilm", "dinov2", "whisper")
# Part of the cache folder's name: raise it when a converter changes, and folders are built anew.
CONVERTER_VERSION = 1


def path(name: str) -> Path:
    """Folder of a real base model, for `AutoModelForX.from_pretrained` and `AutoTokenizer`.

    "smollm2": SmolLM2-135M-Instruct, causal LM, 134,515,008 parameters, with tokenizer and chat
    template. "minilm": all-MiniLM-L6-v2, BERT encoder, 22,713,216 parameters, with tokenizer.
    "dinov2": DINOv2-small, vision encoder, 22,056,192 parameters (its mask token is left out),
    with image processor. "whisper": Whisper tiny.en, speech to text, 37,760,256 parameters, with
    feature extractor and tokenizer in one processor, for `AutoModelForSpeechSeq2Seq` and
    `AutoProcessor`. Weights are fp32 safetensors.

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
    one_of("base model", name, CONVERTED)
    digest = assets.asset(name).sha256[:8]
    return assets.cache_dir() / "models" / f"{name}-v{CONVERTER_VERSION}-{digest}"


def _convert(name: str, part: Path) -> None:
    archive = assets.fetch(name)
    converters = {
        "smollm2": _convert_smollm2,
        "minilm": _convert_minilm,
        "dinov2": _convert_dinov2,
        "whisper": _convert_whisper,
    }
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


def _convert_whisper(archive: Path, unpacked: Path, part: Path) -> None:
    _unpack(archive, r"[^/]+/model/(config\.json|model\.bin|tokenizer\.json)", unpacked)
    with _quiet():
        whisper.convert(unpacked, part)


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
