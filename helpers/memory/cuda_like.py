"""Where a CUDA card allocates otherwise than a processor does, each difference with its reason.

A prediction runs on fake tensors of the processor, since autograd on fake CUDA tensors aborts on a
build of PyTorch without CUDA. What the card would do otherwise is put in here, and nowhere else.

Source: PyTorch and bitsandbytes, the files that each function names.
Taught in: notebook 03, section 7.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from unittest import mock

import bitsandbytes.functional
import torch
from torch import Tensor, _meta_registrations
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers.memory.gpus import Gpu
from helpers.memory.tracker import Trace

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
_GEMM_4BIT = torch.ops.bitsandbytes.gemm_4bit
_MATRIX_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
_SDPA = functional.scaled_dot_product_attention
_SOFTMAX = functional.softmax


class Extra:
    """Bytes that a CUDA operator takes inside itself, for `Tracker(extra=…)`.

    Also books the matrix library's workspaces, which stay: one when the main thread first
    multiplies, one when the thread of autograd does.

    Source: PyTorch, aten/src/ATen/cuda/CUDABlas.cpp and native/cuda/SoftMax.cu; bitsandbytes,
    backends/cuda/ops.py.
    """

    def __init__(self, trace: Trace, gpu: Gpu) -> None:
        self.trace = trace
        self.gpu = gpu
        self._with_workspace: set[str] = set()

    def __call__(
        self, func: torch._ops.OpOverload, args: tuple, kwargs: dict
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        packet = func._overloadpacket
        after: tuple[int, ...] = ()
        if packet in _MATRIX_PRODUCTS or packet is _GEMM_4BIT:
            self._workspace()
        if packet is aten._softmax_backward_data:
            after += (args[0].nbytes,)  # gradient x output
        return (_unpacked(args, kwargs) if packet is _GEMM_4BIT else ()), after

    def _workspace(self) -> None:
        # PyTorch runs backward in a thread of its own, which has a workspace of its own.
        thread = "autograd" if self.trace.phase == "backward" else "main"
        if thread not in self._with_workspace:
            self._with_workspace.add(thread)
            self.trace.allocate(self.gpu.workspace, "workspace", "cuBLAS workspace")


def _unpacked(args: tuple, kwargs: dict) -> tuple[int, ...]:
    """The block constants in 32 bits, and the whole weight in the dtype of the product.

    bitsandbytes has a kernel without them, for batches of a few tokens only.
    """
    rows, columns = args[2]
    nested = kwargs.get("absmax_8bit")
    constants = () if nested is None else (4 * nested.numel(),)
    return (*constants, rows * columns * args[0].element_size())


class _FusedAttention(torch.autograd.Function):
    """Allocates and saves what a fused attention kernel does; computes nothing."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        kernel: str,
    ) -> Tensor:
        batch, heads, length, _ = query.shape
        # (batch, length, heads, width) in memory, as the kernels write it
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        rows = length if kernel == "flash" else -(-length // 32) * 32
        normaliser = query.new_empty((batch, heads, rows), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, normaliser, bias)
        ctx.kernel = kernel
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        query, key, value, _, normaliser, bias = ctx.saved_tensors
        batch, heads, length, width = query.shape
        if ctx.kernel == "flash":
            rows = -(-length // 128) * 128
            inside = [
                normaliser.new_empty(batch, heads, rows),
                normaliser.new_empty(batch, rows, heads, -(-width // 32) * 32),
            ]
            if key.shape[1] != heads:  # one key and value gradient per query head, then summed
                inside += [key.new_empty(batch, key.shape[2], heads, width) for _ in range(2)]
        else:
            inside = [normaliser.new_empty(batch, heads, length)]
            if query.dtype in HALF:  # the query's gradient is summed in 32 bits
                inside.append(normaliser.new_empty(query.shape))
        grads = [
            t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2)
            for t in (query, key, value)
        ]
        needs_bias = bias is not None and ctx.needs_input_grad[3]
        return *grads, bias.new_empty(bias.shape) if needs_bias else None, None


def _attention(gpu: Gpu, repeat_heads: bool) -> Callable[..., Tensor]:
    """PyTorch's choice of a kernel on that card.

    Source: PyTorch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
    """

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        if repeat_heads and groups > 1:
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        flash = gpu.flash and query.dtype in HALF and attn_mask is None
        if not flash and key.shape[1] != query.shape[1]:
            with sdpa_kernel(SDPBackend.MATH):  # the other fused kernel wants equal head counts
                return _SDPA(
                    query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                    enable_gqa=enable_gqa,
                )  # fmt: skip
        bias = None if attn_mask is None else _as_bias(attn_mask, query)
        return _FusedAttention.apply(query, key, value, bias, "flash" if flash else "efficient")

    return attention


def _as_bias(mask: Tensor, query: Tensor) -> Tensor:
    """A mask as the kernel takes it: numbers to add, rows padded to a multiple of eight."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.full((), -math.inf, dtype=query.dtype))
    columns = mask.shape[-1]
    if columns % 8:
        mask = functional.pad(mask, (0, 8 - columns % 8))[..., :columns]
    return mask


def _softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """CUDA turns fp16 into fp32 inside the kernel; elsewhere a 32-bit copy is made first."""
    if input.dtype == torch.float16 and dtype == torch.float32:
        return aten._softmax(input, dim, True)
    return _SOFTMAX(input, dim, _stacklevel, dtype)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """On CUDA dropout keeps a mask of one byte per number; elsewhere a mask of the input's size."""
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _dense_instead(indices: Tensor, values: Tensor, size: tuple[int, ...]) -> Tensor:
    """Fake tensors have no gradient through a sparse one; a dense one stands in, for a moment."""
    return values.new_zeros(size).index_put((indices[0], indices[1]), values)


@contextlib.contextmanager
def cuda_like(gpu: Gpu, *, repeat_heads: bool) -> Iterator[None]:
    """PyTorch's functions allocate as on the card, as long as the context lasts.

    Args:
        gpu: the card.
        repeat_heads: key and value heads are copied until there is one for each query head, before
            attention is called. Cards without flash attention need it, or they fall back on a
            kernel that keeps the whole table of scores.
    """
    # Made first on fake tensors, this table would stay fake for every later real quantisation.
    bitsandbytes.functional.quantize_blockwise(torch.zeros(256))
    with (
        mock.patch.object(
            functional, "scaled_dot_product_attention", _attention(gpu, repeat_heads)
        ),
        mock.patch.object(functional, "softmax", _softmax),
        mock.patch.object(functional, "dropout", _dropout),
        mock.patch.object(torch, "sparse_coo_tensor", _dense_instead),
        # PyTorch's own rules for tensors without data know of CUDA: there an SVD's third factor
        # lies in rows, and the first rows of it are a view that keeps the whole factor alive.
        mock.patch.object(_meta_registrations, "device_hint", lambda _: "cuda"),
    ):
        yield
