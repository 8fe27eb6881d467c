"""Frozen weights in 4 or 8 bit, quantized by bitsandbytes while a model is loaded; and checkpoints published packed.

QLoRA: Efficient Finetuning of Quantized LLMs, https://arxiv.org/abs/2305.14314 (NF4, double quantization)
LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, https://arxiv.org/abs/2208.07339

Published packed checkpoints (chatglm-6b-int4, chatglm-6b-int8, chatglm2-6b-int4) store ``X.weight`` as int8 and
``X.weight_scale`` as one float16 per row. In 4 bit a byte stores two columns: the even one in its high half, the odd
one in its low half.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from common.errors import UserError

NOT_QUANTIZED = ["lm_head", "output_layer"]  # the embedding is no linear layer, so it is not quantized either

# LLM.int8() multiplies columns of the input in which a value is as large as this in 16 bit, the others in 8. The paper
# finds such columns in all layers of models from 6.7 billion weights on, and a loss that is lost without them. Finding
# them makes the host wait for the GPU in every layer: who wants speed takes 4 or 16 bit.
OUTLIER_THRESHOLD = 6.0


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
        llm_int8_threshold=OUTLIER_THRESHOLD,
    )


def allow_reordering(model: PreTrainedModel, trained: bool) -> None:
    """Stops bitsandbytes from reordering 4 bit weights where it must not.

    On CPUs with AVX512-BF16 it does so at the first answer, for products that are 8 to 60 times faster. A reordered
    weight passes no gradient on, and not every shape can be reordered.
    """
    from bitsandbytes.nn import Linear4bit  # its import takes seconds, and other jobs do without

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            fits = layer.out_features % 32 == 0 and layer.in_features % 64 == 0
            layer.support_avx512bf16_for_cpu = layer.support_avx512bf16_for_cpu and fits and not trained


def checkpointing_of(bits: int | None, shared: bool = False) -> dict[str, bool]:
    """Keywords of checkpointing. LLM.int8() keeps the inputs of its layers unless the first pass has no graph.

    ``shared``: layers use what was computed together and is no input of theirs; such a first pass would lose its graph.
    """
    return {"use_reentrant": bits == 8 and not shared}


@dataclass(frozen=True)
class PackedWeight:
    """A weight that unpacks when it is read. transformers reads weight by weight, with ``[...]``."""

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
