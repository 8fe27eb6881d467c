"""The dtypes that a device computes and loads models in."""

import torch
from transformers import Seq2SeqTrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from common.devices import oldest_capability

BFLOAT16_SINCE = (8, 0)  # compute capability of NVIDIA's cards that compute in it themselves


def compute_dtype(device: torch.device) -> torch.dtype:
    """float32 on a CPU, where half precision is slow; else bfloat16, or float16 where a card would emulate it."""
    if device.type == "cpu":
        return torch.float32
    capability = oldest_capability(device)
    fast = capability >= BFLOAT16_SINCE if capability else is_torch_bf16_gpu_available()
    return torch.bfloat16 if fast else torch.float16


def choose_precision(precision: str, device: torch.device) -> tuple[bool, bool]:
    """(bf16, fp16): which of the two half precisions auto, fp32, bf16 or fp16 stands for on a device."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "auto": compute_dtype(device)}.get(precision)
    return dtype == torch.bfloat16, dtype == torch.float16


def half_dtype(args: Seq2SeqTrainingArguments) -> torch.dtype | None:
    """float16 or bfloat16, as --fp16 and --bf16 ask; None without them."""
    if args.fp16:
        return torch.float16
    return torch.bfloat16 if args.bf16 else None
