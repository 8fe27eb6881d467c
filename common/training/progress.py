"""A line for each log of a training, with a bar below it on a terminal and signs of life elsewhere."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerState

from common.terminal import HEARTBEAT, Progress, duration, print_on, short, show

LOGGED = {  # name in the line: name in the log, format
    "loss": ("loss", "{:.4f}"),
    "val": ("eval_loss", "{:.4f}"),
    "rouge-l": ("eval_rouge-l", "{:.1f}"),
    "lr": ("learning_rate", "{:.2g}"),
}


def memory_in_use(device: torch.device) -> int:
    """Bytes: of the tensors on an accelerator, or of this process on a CPU."""
    return psutil.Process().memory_info().rss if device.type == "cpu" else torch.accelerator.memory_allocated(device)


KEPT = (  # of what is logged
    *("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "memory", "eval_loss"),
    *("eval_rouge-1", "eval_rouge-2", "eval_rouge-l", "eval_bleu-4", "eval_runtime", "seconds_left"),
)


class StepLines(TrainerCallback):
    """Prints what is logged, and hands each entry to ``record``: step, epoch, losses, rates, memory, seconds left.

    The Trainer logs a step before it evaluates there: its line waits for the validation loss.
    """

    def __init__(self, record: Callable[[dict[str, Any]], None], as_json: bool):
        self.record, self.as_json = record, as_json
        self.waiting: dict[str, Any] = {}
        self.began = self.told = time.monotonic()
        self.first = 0
        self.bar: Progress | None = None
        self.evaluation: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.began = self.told = time.monotonic()
        self.first = state.global_step
        if state.is_world_process_zero:
            self.bar = Progress("training", state.max_steps, "step", initial=self.first)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.bar is None:
            return
        self.bar.bar.update(state.global_step - self.bar.bar.n)
        if self.bar.bar.disable and time.monotonic() - self.told > HEARTBEAT and not control.should_log:
            self.say(f"{self.place(state)}  left {duration(self.seconds_left(state))}")

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if self.bar is None or not {"loss", "eval_loss"} & logs.keys():
            return
        if "step" in self.waiting and self.waiting["step"] != state.global_step:
            self.flush(state)
        self.waiting |= {name: value for name, value in logs.items() if isinstance(value, (int, float))}
        self.waiting |= {"step": state.global_step, "epoch": state.epoch, "memory": memory_in_use(args.device)}
        if "eval_loss" in logs or not control.should_evaluate:
            self.flush(state)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.flush(state)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        if not state.is_world_process_zero or eval_dataloader is None:
            return
        if self.evaluation is None:
            self.evaluation = Progress("validation", len(eval_dataloader), "batch")
        self.evaluation.update()

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        if self.evaluation:
            self.evaluation.bar.close()
        self.evaluation = None

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.flush(state)
        if self.bar:
            self.bar.bar.close()
        self.bar = None

    def place(self, state: TrainerState) -> str:
        return f"step {state.global_step:,}/{state.max_steps:,}  epoch {state.epoch or 0:.2f}"

    def seconds_left(self, state: TrainerState) -> float:
        done = max(1, state.global_step - self.first)
        return (time.monotonic() - self.began) / done * (state.max_steps - state.global_step)

    def say(self, line: str) -> None:
        self.told = time.monotonic()
        show(line)

    def flush(self, state: TrainerState) -> None:
        """Prints and records the entry that waits."""
        if not self.waiting:
            return
        entry, self.waiting = self.waiting, {}
        entry["seconds_left"] = self.seconds_left(state)
        if self.as_json:
            shown = {name: entry[name] for name in KEPT if name in entry}
            print_on(sys.stdout, json.dumps(shown | {"steps": state.max_steps}))
        else:
            parts = [f"{name} {form.format(entry[key])}" for name, (key, form) in LOGGED.items() if key in entry]
            if "tokens_per_second" in entry:
                parts.append(f"{short(entry['tokens_per_second'])} tokens/s")
            self.say("  ".join([self.place(state), *parts, f"left {duration(entry['seconds_left'])}"]))
        self.record(entry)
