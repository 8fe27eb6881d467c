"""Precisions."""

import torch

from common.arguments import TrainingArguments
from common.launch.engines import compute_dtype


def base_dtype(trains_base: bool, args: TrainingArguments) -> torch.dtype:
    """float32 where the weights themselves are trained; else what was asked for, or 16 bit where that computes fast.

    DeepSpeed keeps a float32 copy of trained 16-bit weights itself.
    """
    by_deepspeed = args.engine == "DeepSpeed"
    if args.do_train and trains_base and not (by_deepspeed and (args.fp16 or args.bf16)):
        return torch.float32
    if args.fp16 or args.bf16:
        return torch.float16 if args.fp16 else torch.bfloat16
    return compute_dtype(args.device)
