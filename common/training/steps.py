"""The batches of a training: which rows the loss of one that is not finite comes from, and memory that runs out in one.

Nothing here looks at a tensor in a step that goes well, for which a GPU would have to wait.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from common.arguments import TrainingArguments
from common.errors import OutOfMemory, UserError, first_sentences, memory_ran_out

REMEMBERED = 4096  # batches since the last log; a loss on a GPU takes 512 bytes
NAMED = 20  # rows that a message names


class Seen(NamedTuple):
    """A batch that went through."""

    step: int
    loss: Tensor  # a scalar on the device
    origins: list[tuple[int, int]]  # index of the file, line or row


class FiniteLoss(TrainerCallback):
    """Ends a training whose loss or gradients are no longer finite before that is saved or evaluated.

    It reads the logs, which the Trainer has gathered from all processes, and then names the rows of the batch where it
    began. A nan or inf of any step since the last log stays in the logged mean.
    """

    def __init__(self, last_checkpoint: Callable[[], Path | None]):
        self.last_checkpoint = last_checkpoint
        self.seen: deque[Seen] = deque(maxlen=REMEMBERED)
        self.files: Sequence[str] = ()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_log |= control.should_save or control.should_evaluate or control.should_training_stop

    on_epoch_end = on_step_end  # the Trainer logs, then evaluates, then saves

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        """Raises UserError. In fp16, gradients that overflow are part of training: they are left out."""
        grad_norm = 0.0 if args.fp16 else logs.get("grad_norm", 0.0)
        if math.isfinite(logs.get("loss", 0.0)) and math.isfinite(grad_norm):
            self.seen.clear()
            return
        found = [first_not_finite(self.seen, self.files)]
        where = min(gather_object(found) if args.world_size > 1 else found)[1]
        cause = "float16 overflows: use --precision bf16 or fp32, or " if args.fp16 else ""
        raise UserError(
            f"the loss is no longer finite (nan or inf) at step {state.global_step}: {cause}lower --learning_rate "
            f"(now {args.learning_rate:g}). {where}Last good checkpoint: "
            f"{self.last_checkpoint() or 'none was saved yet'}."
        )


def first_not_finite(seen: Sequence[Seen], files: Sequence[str]) -> tuple[float, str]:
    """(place in the training, sentence about the rows) of the first batch whose loss is not finite.

    Where it is the first batch of a step, and all after it are like it, the step before may have broken the weights.
    Where there is none, the gradient of the last step is not finite.
    """
    if not seen:
        return math.inf, ""
    finite = torch.stack([batch.loss for batch in seen]).isfinite().tolist()
    steps = [batch.step for batch in seen]
    rows = [origin for batch in seen if batch.step == steps[-1] for origin in batch.origins]
    if all(finite):
        return steps[-1] + 1, f"The gradient came from {places(rows, files)}. "
    first = finite.index(False)
    text = f"It began in the batch of {places(seen[first].origins, files)}"
    if first and not any(finite[first:]) and steps[first] > steps[first - 1]:
        before = [origin for batch in seen if batch.step == steps[first - 1] for origin in batch.origins]
        text += f", after a step on {places(before, files)}"
    return steps[first], f"{text}. "


def places(origins: Sequence[tuple[int, int]], files: Sequence[str]) -> str:
    """Rows as in "train.json, line or row 3, 17"; at most NAMED of them."""
    lines: dict[int, list[str]] = {}
    rows = sorted({(file, line) for file, line in origins})  # pinned memory makes lists of tuples
    for file, line in rows[:NAMED]:
        lines.setdefault(file, []).append(str(line))
    named = "; ".join(f"{files[file]}, line or row {', '.join(found)}" for file, found in lines.items())
    left = len(rows) - NAMED
    return named + (f" and {left:,} more" if left > 0 else "")


def parts_of(inputs: Mapping[str, Any], parts: int) -> Iterator[dict[str, Tensor]]:
    """The rows of a batch in at most so many parts; without ``label_positions``, which a model then finds itself."""
    names = [name for name in ("input_ids", "labels", "position_ids") if name in inputs]
    rows = zip(*(inputs[name].chunk(parts) for name in names), strict=True)
    return (dict(zip(names, row, strict=True)) for row in rows)


def size_of(inputs: Mapping[str, Any]) -> str:
    """As in "8 rows x 1,024 tokens"."""
    rows, tokens = inputs["input_ids"].shape
    return f"{rows} row{'s' * (rows > 1)} x {tokens:,} tokens"


@contextmanager
def room_for(size: Callable[[], str], advice: Callable[[], str], goes_on: bool = False) -> Iterator[None]:
    """Where memory runs out in a batch it raises OutOfMemory, unless the caller ``goes_on`` with less.

    ``size``: of the batch, as ``size_of`` says it; ``advice``: what would fit.
    """
    try:
        yield
    except Exception as error:
        if not memory_ran_out(error):
            raise
        if not goes_on:
            reason = first_sentences(error) or type(error).__name__
            raise OutOfMemory(f"memory ran out in a batch of {size()} ({reason}): {advice()}.") from error


def may_halve(args: TrainingArguments) -> bool:
    """Whether a batch was chosen here and may go through in parts.

    One of several processes can't leave the others, and DDP, ZeRO and FSDP2 don't forget a backward pass that failed.
    """
    return bool(args.batch_sizes) and args.parallel_mode.value == "not_parallel"
