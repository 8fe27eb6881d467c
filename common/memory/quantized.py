"""Quantized layers on the meta device, and the operators of bitsandbytes that meta tensors don't fully describe."""

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.models.quantization import NOT_QUANTIZED, OUTLIER_THRESHOLD

OUTLIERS = 1 / 16  # assumed share of columns that LLM.int8() keeps in 16 bit; its paper finds 1 / 1000
# Bytes that an operator allocates and frees inside: measured with bitsandbytes 0.50 and torch 2.13, but for the last
# two, which were read in its code for CUDA.
WORKSPACE: dict[str, Callable[..., float]] = {
    "bitsandbytes::gemm_4bit": lambda x, _, shape, *__: shape[0] * shape[1] * (x.element_size() + 4 / 64),
    "bitsandbytes::int8_scaled_mm": lambda x, weight, *_: x.shape[0] * weight.shape[0] * 4,
    "bitsandbytes::int8_vectorwise_quant": lambda x, *_: x.numel() * 3,
    "bitsandbytes::int8_mixed_scaled_mm": lambda x, _, weight, __, ___, columns, *____: (
        weight.shape[0] * (x.shape[0] * (4 if x.dtype == torch.float16 else 6) + columns.numel() * x.element_size())
    ),
}


def quantize_inputs(inputs: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """What int8_vectorwise_quant returns: [rows, columns] int8, the scales of the rows, the indices of outliers."""
    columns = int(inputs.shape[-1] * OUTLIERS)
    return (
        inputs.new_empty(inputs.shape, dtype=torch.int8),
        inputs.new_empty(len(inputs), dtype=torch.float32),
        inputs.new_empty(columns, dtype=torch.long),
    )


def multiply_mixed(inputs: Tensor, _, weight: Tensor, __, ___, columns: Tensor, bias=None) -> tuple[Tensor, Tensor]:
    """What int8_mixed_scaled_mm returns: the product, and the columns of the inputs with outliers."""
    return inputs.new_empty(len(inputs), len(weight)), inputs.new_empty(len(inputs), len(columns))


# Operators whose results have sizes that meta tensors don't know.
UNKNOWN_SIZES: dict[str, Callable[..., Any]] = {
    "bitsandbytes::int8_vectorwise_quant": quantize_inputs,
    "bitsandbytes::int8_mixed_scaled_mm": multiply_mixed,
}


def quantized(linear: nn.Linear, bits: int, dtype: torch.dtype) -> nn.Linear:
    """A layer as bitsandbytes quantizes it: NF4 with double quantization, or int8 with one scale per row."""
    rows, columns = linear.weight.shape
    kind: Any = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    flags: dict[str, Any] = {"quant_type": "nf4", "compute_dtype": dtype}
    if bits == 8:
        flags = {"has_fp16_weights": False, "threshold": OUTLIER_THRESHOLD}
    layer = kind(columns, rows, linear.bias is not None, device="meta", **flags).requires_grad_(False)
    if linear.bias is not None:
        layer.bias = linear.bias
    if bits == 4:
        blocks = -(-rows * columns // 64)
        scales = [torch.empty(blocks, dtype=torch.uint8), torch.empty(-(-blocks // 256)), torch.empty(256)]
        second = QuantState(scales[1], code=scales[2], blocksize=256, dtype=torch.float32)
        offset = torch.zeros((), device="cpu")  # its value is asked for when an adapter is put beside the layer
        state = QuantState(scales[0], (rows, columns), torch.empty(16), 64, "nf4", dtype, offset, second)
        packed = torch.empty(-(-rows * columns // 2), 1, dtype=torch.uint8)
        layer.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer
        )
    else:
        layer.weight = bnb.nn.Int8Params(
            torch.empty(rows, columns, dtype=torch.int8), requires_grad=False, has_fp16_weights=False
        )
        scales = [torch.empty(rows)]
        layer.state.CB, layer.state.SCB = layer.weight.data, scales[0]
    layer.scales = scales
    return layer


def quantize(model: PreTrainedModel, bits: int | None, dtype: torch.dtype) -> None:
    """Replaces the linear layers of a model on the meta device as a load in 4 or 8 bit does."""
    for name, module in [*model.named_modules()]:
        if bits and isinstance(module, nn.Linear) and name.rpartition(".")[2] not in NOT_QUANTIZED:
            model.set_submodule(name, quantized(module, bits, dtype))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
