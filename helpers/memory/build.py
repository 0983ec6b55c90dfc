"""A fake model: real classes, shapes, dtypes and sharing, without a byte of weights.

Source: PyTorch, ``FakeTensorMode``; the classes are those of transformers, peft, bitsandbytes.
Taught in: notebook 03, section 7.
"""

from __future__ import annotations

import bitsandbytes
import torch
from bitsandbytes.functional import quantize_4bit
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from helpers.quantization import HEADS

_AUTO = (
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)


def auto_class(config: PreTrainedConfig) -> type:
    """The Auto class whose model trains on what that architecture is for.

    Raises:
        ValueError: none does.
    """
    if type(config).__name__ in ("BertConfig", "RobertaConfig", "DebertaV2Config"):
        return AutoModelForSequenceClassification
    found = next((auto for auto in _AUTO if type(config) in auto._model_mapping), None)
    if found is None:
        raise ValueError(
            f"A {config.model_type} model has no head to train on text; models that do are "
            "language models, encoders such as BERT, T5's kind and models that read pictures."
        )
    return found


def task_type(config: PreTrainedConfig) -> str:
    """peft's name of what the model is trained for."""
    if auto_class(config) is AutoModelForSequenceClassification:
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if auto_class(config) is AutoModelForSeq2SeqLM else "CAUSAL_LM"


def base(config: PreTrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model of a config; run it inside `FakeTensorMode`."""
    model = auto_class(config).from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()  # part of the initialisation, which is left out
    return model


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that `from_pretrained` packs into 4 bits: all linear ones but the output heads.

    An architecture can keep some in 32 bits, as T5 does with `wo`.
    """
    head = model.get_output_embeddings()
    kept = {*HEADS, *(model._keep_in_fp32_modules or ())}
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
        and layer is not head
        and not kept & set(name.split("."))
    }


def pack(
    model: PreTrainedModel,
    name: str,
    compute_dtype: torch.dtype,
    quant_type: str,
    double_quant: bool,
) -> bitsandbytes.nn.Linear4bit:
    """Replaces one linear layer by bitsandbytes' 4-bit layer; returns the new one."""
    layer = model.get_submodule(name)
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    rows, columns = weight.shape
    packed, state = quantize_4bit(
        weight.detach().contiguous(), compress_statistics=double_quant, quant_type=quant_type
    )
    # Params4bit cannot wrap a fake tensor: a plain parameter carries what its users ask for.
    with unset_fake_temporarily(), torch.device("meta"):
        new = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, compute_dtype=compute_dtype)
    new.weight = nn.Parameter(packed, requires_grad=False)
    new.weight.quant_state = new.quant_state = state
    new.weight.quant_type, new.weight.compress_statistics = quant_type, double_quant
    new.weight.bnb_quantized, new.weight.blocksize = True, state.blocksize
    new.weight.quant_storage = torch.uint8
    new.bias = layer.bias
    new.support_avx512bf16_for_cpu = False
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return new


def quantised_tensors(layer: bitsandbytes.nn.Linear4bit) -> list[Tensor]:
    """All tensors that stand for a 4-bit weight: codes, constants and their tables."""
    state = layer.weight.quant_state
    found = [layer.weight, state.absmax, state.code]
    if state.nested:
        found += [state.offset, state.state2.absmax, state.state2.code]
    return found


def adapted(
    model: PreTrainedModel, config: PeftConfig | None, *, four_bit: bool, checkpointing: bool
) -> PreTrainedModel | PeftModel:
    """The model with its adapter, ready to train; without a config everything trains."""
    if four_bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    if config is not None:
        model = _with_adapter(model, config)
    if checkpointing:
        # The generator's state would be kept per layer, on the host; it is of no interest here.
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        model.enable_input_require_grads()
    return model.train()


_LOOK_AT_VALUES = (PeftType.BOFT, PeftType.SHIRA, PeftType.UNILORA)


def _with_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """A few methods look at values while they are built: theirs are made for real, then faked."""
    if config.peft_type not in _LOOK_AT_VALUES:
        return get_peft_model(model, config)
    fake = active_fake_mode()
    with unset_fake_temporarily():
        adapted = get_peft_model(model, config)
    for module in adapted.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and not isinstance(tensor, FakeTensor):
                new = nn.Parameter(fake.from_tensor(tensor.data), tensor.requires_grad)
                module._parameters[name] = new
        for name, tensor in module._buffers.items():
            if tensor is not None and not isinstance(tensor, FakeTensor):
                module._buffers[name] = fake.from_tensor(tensor)
    return adapted


def buffers_on_the_host(model: nn.Module) -> list[Tensor]:
    """What peft makes on the processor and leaves there: a layer's own buffers, such as BOFT's.

    It moves an adapter's parameters and dictionaries to the card, and these at each call.
    """
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
