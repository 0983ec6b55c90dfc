"""From an adapter to a folder that transformers loads without peft, checked before it is there.

Source: peft's merge_and_unload; the checks are this course's own.
Taught in: notebook 07, section 3.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftConfig, PeftModel, TaskType
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers import adapters, quantization
from helpers.atomic import whole_folder
from helpers.given import model_folder, unknown
from helpers.quantization.loading import AutoClass

from .exact import Batch, MergeError, difference, on_and_off, output
from .routes import FourBits, check_dtype, merged

LIMIT = 0.02  # of the adapter's effect
NOISE = 1e-5  # of the largest output: what the order of additions does in fp32
ROUTES = ("full precision", "dequantised", "into four bits")
_HEADS = {
    TaskType.CAUSAL_LM: transformers.AutoModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: transformers.AutoModelForSeq2SeqLM,
    TaskType.SEQ_CLS: transformers.AutoModelForSequenceClassification,
    TaskType.TOKEN_CLS: transformers.AutoModelForTokenClassification,
    TaskType.QUESTION_ANS: transformers.AutoModelForQuestionAnswering,
}
_COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("chat_template*", "preprocessor_config.json", "processor_config.json"),
)


class MergeRefused(ValueError):
    """A merge that is impossible, or that would not give the model that was trained."""


@dataclass(frozen=True)
class Deployed:
    """What was written, and how near it is to the model with the adapter beside it.

    ``bytes``: of the weights. ``companions``: the tokenizer's or processor's files that came
    along; empty where neither the adapter's folder nor the base's has any.
    """

    folder: Path
    route: str
    dtype: torch.dtype
    error: MergeError
    bytes: int
    companions: tuple[str, ...]

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        beside_it = f"with {len(self.companions)} files of tokenizer or processor"
        return (
            f"{self.folder}: {self.route}, {name}, {self.bytes:,} bytes, "
            f"{self.error.share:.2%} of the adapter's effect from the trained model, "
            f"{beside_it if self.companions else 'without a tokenizer'}"
        )


def merge_for_deployment(
    model: PeftModel | Path | str,
    out: Path | str,
    *,
    base: Path | str | None = None,
    bits: FourBits | None = None,
    dtype: torch.dtype = torch.float32,
    route: str | None = None,
    batch: Batch | None = None,
) -> Deployed:
    """Merges an adapter, proves that the result is the trained model, then writes it.

    A base in four bits is dequantised first, since that is what the adapter was trained on; any
    other base is merged into as it is. The sum is made in fp32 and rounded once, to ``dtype``. It
    is written beside, loaded again, and compared with the model with its adapter; only then does it
    get its name, with tokenizer or processor and the settings for generation. A model that was
    passed in is not changed; it is copied, so that memory for a second one is needed.

    Args:
        model: with one active adapter, or the folder of an adapter.
        out: a folder that does not exist yet.
        base: folder of the base; needed with a folder whose configuration names none that is
            here, and for "full precision" from a model in four bits.
        bits: how the base was quantised for training, where ``model`` is a folder: the folder does
            not say. None: it was not.
        dtype: of the stored weights.
        route: one of `ROUTES` instead of the right one; it has to pass the same comparison.
        batch: what the model is called with for the comparison; without it, random tokens or
            pixels.

    Raises:
        MergeRefused: the method does not merge, several adapters are active, weights are shared,
            repacked, 8-bit or not finite, ``out`` exists, or the result is further than `LIMIT`
            of the adapter's effect from the trained model.
        AdapterFileError: the adapter's folder is not whole, or does not fit the base.
        ValueError: the base's folder is not whole, or the dtype is no wide enough floating-point
            one.

    Source: for four bits, the measured routes of `helpers.merging.routes`.
    Taught in: notebook 07, section 3.
    """
    out = Path(out)
    if out.exists():
        raise MergeRefused(f"{out} exists; name a folder that does not, or remove it first.")
    if route is not None and route not in ROUTES:
        raise MergeRefused(f"{unknown('route', route, ROUTES)} Or leave it out.")
    check_dtype(dtype)
    if isinstance(model, PeftModel):
        kept, folder, base = model, None, base or _base_folder(model)
        refuse_unmergeable(kept)
        kept = copy.deepcopy(kept)
    else:
        folder = Path(model)
        base = Path(base or _named_base(folder))
        kept = _load(folder, base, bits)
        refuse_unmergeable(kept)
    kept = _computing_in_fp32(kept.eval())
    batch = probe(kept) if batch is None else batch
    on, off = on_and_off(kept, batch)
    route = route or ("dequantised" if _four_bit_layers(kept) else "full precision")
    sum_ = _merge(kept, route, base, dtype)
    _refuse_not_finite(sum_)
    with whole_folder(out) as part:
        sum_.save_pretrained(part)
        companions = _bring_along(part, [folder, base])
        error = _checked(sum_, part, batch, on, off, route, dtype)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return Deployed(out, route, dtype, error, size, companions)


def refuse_unmergeable(model: PeftModel) -> None:
    """Refuse a model whose merge is impossible, or would silently give another model.

    Raises:
        MergeRefused: an adapter without weights to merge, several active ones, one that is merged
            already, shared or repacked or 8-bit weights, or numbers that are not finite.

    Taught in: notebook 07, section 2.
    """
    config, kind = model.active_peft_config, model.active_peft_config.peft_type.value
    if config.is_prompt_learning:
        raise MergeRefused(
            f"{kind} adds virtual tokens, which are inputs; no weight has a place for them, so "
            "deploy the base with the adapter beside it."
        )
    if not hasattr(model.base_model, "merge_and_unload"):
        raise MergeRefused(f"peft cannot merge {kind}; deploy the base with the adapter beside it.")
    if len(model.active_adapters) != 1:
        raise MergeRefused(
            f"Several adapters are active, {model.active_adapters}; choose one with "
            "model.set_adapter(name)."
        )
    for name, module in model.named_modules():
        if getattr(module, "merged", False):
            raise MergeRefused(
                f"The adapter is merged into {name} already; call model.unmerge_adapter() first."
            )
    if shared := _shared(model):
        raise MergeRefused(
            f"{shared[0]} and {shared[1]} hold the same weight, so one's adapter would change "
            "both: for replicated layers call replication.separate(model) of helpers.adapters, for "
            "tied embeddings leave them out of the targets."
        )
    _refuse_not_finite(model)
    _refuse_strange_bits(model)


def probe(model: PeftModel) -> dict[str, Tensor]:
    """A fixed random input: two rows of sixteen tokens, or one image.

    Raises:
        MergeRefused: the model takes something else.
    """
    generator = torch.Generator().manual_seed(0)
    net = model.get_base_model()
    name, config = net.main_input_name, net.config
    found = {}
    if name == "input_ids" and hasattr(config, "vocab_size"):
        found[name] = torch.randint(config.vocab_size, (2, 16), generator=generator)
        if config.is_encoder_decoder:
            found["decoder_input_ids"] = found[name]
    elif name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        side = min(config.image_size, 10 * config.patch_size)
        found[name] = torch.randn(1, config.num_channels, side, side, generator=generator)
    else:
        raise MergeRefused(
            f"{type(net).__name__} takes {name}; pass a small batch to compare on as batch=."
        )
    return {key: value.to(net.device) for key, value in found.items()}


def _named_base(folder: Path) -> Path:
    adapters.check_folder(folder)
    name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not name or not Path(name).is_dir():
        raise MergeRefused(
            f"The adapter was made for {name or 'a base that it does not name'}, which is no "
            "folder here; pass the base's folder as base=."
        )
    return Path(name)


def _base_folder(model: PeftModel) -> Path | None:
    """Where the base of a model in memory came from, if that is a folder here."""
    name = getattr(model.get_base_model().config, "_name_or_path", "")
    return Path(name) if name and Path(name).is_dir() else None


def _load(folder: Path, base: Path, bits: FourBits | None) -> PeftModel:
    adapters.check_folder(folder)
    model_folder(base)
    auto = head_of(PeftConfig.from_pretrained(str(folder)), base)
    net = bits.load(base, auto) if bits else auto.from_pretrained(base)
    return adapters.load(net, folder)


def head_of(config: PeftConfig, base: Path) -> type[AutoClass]:
    """The Auto class for an adapter: that of its task, or else of the base's own architecture."""
    if config.task_type in _HEADS:
        return _HEADS[config.task_type]
    written = transformers.AutoConfig.from_pretrained(base).architectures or ["AutoModel"]
    return getattr(transformers, written[0], transformers.AutoModel)


def _four_bit_layers(model: nn.Module) -> list[Linear4bit]:
    return [layer for layer in model.modules() if isinstance(layer, Linear4bit)]


def _computing_in_fp32(model: PeftModel) -> PeftModel:
    """In place. A stored number stays what it is; only the sums get more digits."""
    for layer in _four_bit_layers(model):
        layer.compute_dtype, layer.compute_type_is_set = torch.float32, True
    for parameter in model.parameters():
        # 4-bit codes may be stored as bfloat16, which is then no number
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.float()
    return model


def _merge(model: PeftModel, route: str, base: Path | None, dtype: torch.dtype) -> PreTrainedModel:
    """The sum by one route; ``model`` is used up."""
    quantised = bool(_four_bit_layers(model))
    if route == "into four bits" and quantised:
        return merged(model)
    if route == "full precision" and not quantised:
        return merged(model).to(dtype)
    if not quantised:
        raise MergeRefused(f"The route {route!r} is for a base in four bits; leave route out.")
    auto = type(model.get_base_model())
    with tempfile.TemporaryDirectory() as folder:
        name = model.active_adapter
        model.save_pretrained(folder, selected_adapters=[name])
        stored = folder if name == "default" else f"{folder}/{name}"
        if route == "dequantised":
            plain = model.unload().dequantize(dtype=torch.float32)
        elif base is None:
            raise MergeRefused("The route 'full precision' needs the folder of the base as base=.")
        else:
            plain = auto.from_pretrained(base, dtype=torch.float32)
        return merged(PeftModel.from_pretrained(plain.float(), stored)).to(dtype)


def _checked(
    sum_: PreTrainedModel,
    part: Path,
    batch: Batch,
    on: Tensor,
    off: Tensor,
    route: str,
    dtype: torch.dtype,
) -> MergeError:
    """The error of what was written, loaded again; refuses one that is too large."""
    back = quantization.keep_weights_unpacked(type(sum_).from_pretrained(part)).eval()
    if not _four_bit_layers(back):
        back = back.float()
    error = difference(_plain_output(back, batch), on, off)
    if acceptable(error):
        return error
    in_memory = sum_ if _four_bit_layers(sum_) else sum_.float()
    if acceptable(difference(_plain_output(in_memory, batch), on, off)):
        raise MergeRefused(
            "The merged model is right in memory, but its folder loads as another one "
            f"({error.share:.1%} of the adapter's effect away): weights that were tied or shared "
            "are stored once; leave them out of the targets."
        )
    raise MergeRefused(_too_far(error, route, dtype))


def acceptable(error: MergeError) -> bool:
    """Whether a merged model counts as the trained one."""
    return error.share <= LIMIT or error.relative <= NOISE


def _too_far(error: MergeError, route: str, dtype: torch.dtype) -> str:
    far = (
        f"The route {route!r} gives a model that is {error.share:.1%} of the adapter's effect away "
        f"from the trained one (at most {LIMIT:.0%})"
    )
    if route == "into four bits":
        return f"{far}: the sum was rounded to four bits again; leave route out."
    if dtype != torch.float32:
        return f"{far}: {dtype} has too few digits for so small an adapter; take torch.float32."
    return f"{far}: the adapter was trained on another base than it was added to."


def _plain_output(model: nn.Module, batch: Batch) -> Tensor:
    return output(model, {key: value.to(model.device) for key, value in batch.items()})


def _shared(model: PeftModel) -> list[str]:
    """Two places that hold one target weight; empty if there are none."""
    targets = {
        module.get_base_layer().weight.data_ptr()
        for module in model.modules()
        if hasattr(module, "get_base_layer") and hasattr(module.get_base_layer(), "weight")
    }
    holders: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.get_base_model().named_parameters(remove_duplicate=False):
        if parameter.data_ptr() in targets and parameter.device.type != "meta":
            holders[parameter.data_ptr()].append(name.replace(".base_layer", ""))
    return next((names for names in holders.values() if len(names) > 1), [])


def _refuse_not_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, Params4bit) or not parameter.is_floating_point():
            continue
        if not bool(torch.isfinite(parameter).all()):
            raise MergeRefused(
                f"{name} holds NaN or infinity: the training diverged, or fp16 overflowed; take "
                "an earlier save, or dtype=torch.float32."
            )


def _refuse_strange_bits(model: PeftModel) -> None:
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise MergeRefused(
                f"bitsandbytes has rearranged the 4-bit weight of {name} for its fast kernel, and "
                "a merge would read other numbers: load the base again with "
                "quantization.load_in_4bit."
            )
    net = model.get_base_model()
    if getattr(net, "is_quantized", False) and not _four_bit_layers(net):
        raise MergeRefused(
            "The base is quantised, but not to bitsandbytes' four bits; merge the adapter into "
            "the weights that it was trained on, dequantised, and compare."
        )


def _bring_along(part: Path, folders: Sequence[Path | None]) -> tuple[str, ...]:
    """Copies tokenizer and processor from the first folder that has some."""
    for folder in filter(None, folders):
        files = sorted(set(_companions(Path(folder))))
        if files:
            for file in files:
                shutil.copyfile(file, part / file.name)
            return tuple(file.name for file in files)
    return ()


def _companions(folder: Path) -> Iterator[Path]:
    for pattern in _COMPANIONS:
        yield from (file for file in folder.glob(pattern) if file.is_file())
