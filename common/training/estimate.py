"""How long will it take? A prediction before the weights are read, from the speed of matrix products on this device."""

import time
import warnings
from copy import deepcopy

import torch

from common.arguments import TrainingArguments
from common.data.dataset import Prepared
from common.memory.fit import Forecast
from common.models.registry import ModelFolder, empty_model

MEASURED = 0.3  # seconds
EFFICIENCY = 0.6  # of a training, whose other operations take time too


def products_per_second(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second in [rows, size] x [size, 4 size]."""
    left, right = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, size), (size, 4 * size)))
    done, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < MEASURED or done < 2:
        torch.mm(left, right)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        done += 1
    return done * 2 * rows * size * 4 * size / passed


def training_seconds(
    folder: ModelFolder, data: Prepared, steps: int, memory: Forecast, args: TrainingArguments
) -> float:
    """Seconds of ``steps`` steps, without evaluations: 2 operations a weight and token forward, 2 backward.

    2 more for gradients of the weights where all are trained, and 2 for activations that are computed again.
    """
    case = memory.case
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = empty_model(folder.spec, deepcopy(folder.config))
    weights = model.num_parameters() - model.get_input_embeddings().weight.numel()
    assert data.survey
    tokens = min(data.survey.tokens / max(1, data.survey.rows), case.setup.source_length + case.setup.target_length)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    slots = args.tokens_per_batch * args.gradient_accumulation_steps if args.tokens_per_batch else rows * tokens
    operations = 4 + 2 * case.method.trains_base + 2 * bool(case.setup.checkpointing)
    batch = max(1, round(slots / args.gradient_accumulation_steps))
    speed = products_per_second(min(batch, 4096), folder.config.hidden_size, case.setup.dtype, args.device)
    return steps * slots * weights * operations / speed / EFFICIENCY
