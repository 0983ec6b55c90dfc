"""A merged model as an ONNX file, for runtimes that know neither Python nor PyTorch.

Source: torch.onnx.export and onnxruntime.
Taught in: notebook 07, section 7.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers.atomic import whole_folder

INPUTS = ("input_ids", "attention_mask")
MODEL = "model.onnx"
TRACED = (2, 7)  # rows and tokens of the pass that the exporter watches
PROBES = ((1, 1), (2, 7), (3, 20))  # and of those that are compared


class ExportError(ValueError):
    """A model that cannot be exported as asked, or whose file computes something else."""


def to_onnx(model: PreTrainedModel, folder: Path | str, *, tolerance: float = 1e-4) -> Path:
    """Write a text model to ``folder/model.onnx`` with torch's exporter, and verify the file.

    The graph takes ``input_ids`` and ``attention_mask``, both (rows, tokens) of any size, and
    gives the logits (or the last hidden state, for a model without a head). It holds no cache:
    it reads whole rows. Weights lie beside it in ``model.onnx.data``. onnxruntime runs it on
    other shapes than the exporter saw before the folder gets its name.

    Args:
        model: merged, not quantised, on the CPU; left as it was.
        folder: a new one.
        tolerance: how far an output may be off, as a share of the largest one.

    Raises:
        ExportError: adapters that are not merged, 4-bit layers, an existing folder, or outputs
            that differ by more.

    Source: PyTorch, "torch.onnx.export" with ``dynamo=True``. Taught in: notebook 07, section 7.
    """
    folder = Path(folder)
    _refuse(model, folder)
    with whole_folder(folder) as part:
        _export(model, part / MODEL)
        if (gap := largest_gap(model, part / MODEL)) > tolerance:
            raise ExportError(
                f"the file's outputs differ by {gap:.1e} of the largest one, more than "
                f"{tolerance:.0e}; nothing was written."
            )
    return folder / MODEL


def run_onnx(file: Path | str, batch: Mapping[str, Tensor]) -> Tensor:
    """The output of an exported model for ``input_ids`` and ``attention_mask``: (rows, length, …).

    Raises:
        ExportError: no such file, or one that onnxruntime cannot read.

    Taught in: notebook 07, section 7.
    """
    return _session(Path(file))(batch)


@torch.no_grad()
def largest_gap(model: PreTrainedModel, file: Path | str) -> float:
    """The largest difference between file and model, as a share of the largest output.

    On random rows of three shapes, one with padding on the left, the shapes of which the exporter
    saw only one. Padding itself is left out: nobody reads it.

    Raises:
        ExportError: the file cannot be read.
    """
    run = _session(Path(file))
    gaps, largest = [0.0], 0.0
    for shape in PROBES:
        batch = _rows(model, *shape)
        wanted = _output(model, **batch)
        seen = batch["attention_mask"].bool()
        where = seen if wanted.shape[:2] == seen.shape else ...
        gaps.append((run(batch) - wanted)[where].abs().max().item())
        largest = max(largest, wanted.abs().max().item())
    return max(gaps) / largest


def _refuse(model: nn.Module, folder: Path) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ExportError("the model has adapters: merge them first, with merge_and_unload().")
    if getattr(model, "is_quantized", False):
        raise ExportError(
            "the model is quantised, and ONNX knows no such layer: export the merged model in "
            "full precision."
        )
    if not hasattr(model, "config"):
        raise ExportError(f"{type(model).__name__} is no transformers model with a config.")
    if folder.exists():
        raise ExportError(f"{folder} exists; give a folder that does not.")


def _rows(model: PreTrainedModel, rows: int, tokens: int) -> dict[str, Tensor]:
    """Random token ids; of three rows the first is padded on its left quarter."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size - 1, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if rows > 2:
        mask[0, : tokens // 4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _output(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    found = model(input_ids=input_ids, attention_mask=attention_mask)
    return found.logits if "logits" in found else found[0]


class _OneOutput(nn.Module):
    """What the graph gives: one tensor, and no cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return _output(self.model, input_ids, attention_mask)


def _export(model: PreTrainedModel, file: Path) -> None:
    rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens")
    shapes = {name: {0: rows, 1: tokens} for name in INPUTS}
    was_training, cached = model.training, getattr(model.config, "use_cache", None)
    model.eval()
    model.config.use_cache = False
    try:
        with _silent():
            torch.onnx.export(
                _OneOutput(model),
                tuple(_rows(model, *TRACED).values()),
                file,
                dynamo=True,
                external_data=True,
                input_names=list(INPUTS),
                output_names=["output"],
                dynamic_shapes=shapes,
                verbose=False,
            )
    finally:
        model.train(was_training)
        if cached is None:
            del model.config.use_cache
        else:
            model.config.use_cache = cached


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter reports its stages, and every operator of packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _session(file: Path):
    """A call from a batch to the output of the file."""
    import onnxruntime  # only here: it is large, and nothing else in the course needs it

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each reason
        raise ExportError(f"{file} is no ONNX file that can be run: {error}") from error

    def run(batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: batch[name].numpy() for name in INPUTS}
        return torch.from_numpy(session.run(None, inputs)[0])

    return run
