"""Frozen weights in 4 or 8 bit, quantized by bitsandbytes while a model is loaded; and checkpoints published packed.

QLoRA: Efficient Finetuning of Quantized LLMs, https://arxiv.org/abs/2305.14314 (NF4, double quantization)
LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, https://arxiv.org/abs/2208.07339

Those (chatglm-6b-int4, chatglm-6b-int8, chatglm2-6b-int4) hold ``X.weight`` as int8 and in ``X.weight_scale`` one
float16 a row. In 4 bit one byte holds two columns: the even one in its high half, the odd one in its low half.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BitsAndBytesConfig

from common.errors import UserError
from common.files import weight_files
from common.models.registry import read_config
from common.models.weights import read_bin

# One line a layer and step where LLM.int8() computes in float16, as it always does; and one about kernels on the hub.
for _module in ("autograd._functions", "backends.cpu.ops"):
    logging.getLogger(f"bitsandbytes.{_module}").setLevel(logging.ERROR)

NOT_QUANTIZED = ["lm_head", "output_layer"]  # the embedding is no linear layer and stays as it is, too


def quantization_config(bits: int | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """NF4 with double quantization, or LLM.int8(); computed in ``dtype``. Raises UserError for other ``bits``."""
    if bits is None:
        return None
    if bits not in (4, 8):
        raise UserError(f"--quantization_bit {bits}: only 4 and 8 exist.")
    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=NOT_QUANTIZED,
    )


def checkpointing_of(bits: int | None) -> dict[str, bool]:
    """How activations are checkpointed. LLM.int8() keeps the inputs of its layers unless no graph is built at first."""
    return {"use_reentrant": bits == 8}


def packed_bits(folder: Path) -> int | None:
    """4 or 8 where the weights of a folder are packed as the original code does it."""
    return read_config(folder).get("quantization_bit") or None


@dataclass(frozen=True)
class PackedWeight:
    """A weight that is unpacked when it is read, which transformers does weight by weight, with ``[...]``."""

    packed: Tensor  # int8, [rows, columns] or, in 4 bit, [rows, columns / 2]
    scale: Tensor  # float16, [rows]
    bits: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.packed), self.packed.shape[1] * 8 // self.bits))

    def __getitem__(self, index) -> Tensor:
        """float32, [rows, columns]: the integers times the scale of their row, not rounded."""
        numbers = self.packed
        if self.bits == 4:
            low = (numbers << 4) >> 4  # both shifts keep the sign
            numbers = torch.stack((numbers >> 4, low), dim=-1).flatten(-2)
        return (numbers * self.scale.float().unsqueeze(-1))[index]


def packed_weights(folder: Path) -> dict[str, Tensor | PackedWeight]:
    """The weights of a folder whose ``packed_bits`` are not None, mapped and not read.

    Raises UserError where a packed weight has no scale, or one of another length.
    """
    bits = packed_bits(folder)
    if bits not in (4, 8):
        raise UserError(f"{folder / 'config.json'}: quantization_bit is {bits}; only 4 and 8 exist.")
    stored: dict[str, Tensor] = {}
    for file in weight_files(folder):
        stored |= load_file(file) if file.suffix == ".safetensors" else read_bin(file)
    weights: dict[str, Tensor | PackedWeight] = {}
    for name, tensor in stored.items():
        if name.endswith(".weight_scale"):
            continue
        if tensor.dtype != torch.int8:
            weights[name] = tensor
            continue
        scale = stored.get(f"{name}_scale")
        if scale is None or scale.shape != tensor.shape[:1]:
            found = "is missing" if scale is None else f"has {scale.numel():,} values for {len(tensor):,} rows"
            raise UserError(f"{folder} can't be unpacked: {name}_scale {found}; copy or download the checkpoint again.")
        weights[name] = PackedWeight(tensor, scale, bits)
    return weights
