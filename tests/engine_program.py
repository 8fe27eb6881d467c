"""One process of a training as the tests of engines need it: without dropout, and with FSDP2 on CPUs.

Dropout differs from process to process, so that two processes could not be compared with one. Accelerate knows FSDP on
accelerators only, and would run plain DDP on a CPU. Beside what is saved at the end, the logits of the live model for
SAMPLE are written, to be compared with those of what was saved. TOLD_AT: the rank and the step at which SIGTERM comes.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed  # noqa: F401  imported once, in the process that all others are forked from
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn

import common.finetune
import common.models.loss
import common.models.weights
import common.training.preemption
from common.methods.full import Full
from common.methods.lora import Lora
from common.training.trainer import FinetuneTrainer

SAMPLE = torch.arange(300, 316).reshape(1, 16)


class LogitsTrainer(FinetuneTrainer):
    def training_step(self, *args, **kwargs) -> torch.Tensor:
        if os.environ.get("TOLD_AT") == f"{os.environ.get('RANK')} {self.state.global_step}":
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self.model_wrapped.eval()
        with torch.no_grad():
            logits = self.model_wrapped(SAMPLE).logits
        self.model_wrapped.train()
        if self.args.should_save:
            torch.save(logits, Path(output_dir or self.args.output_dir) / "logits.pt")


def run_program(command: list[str], environment: dict[str, str], log: Path) -> None:
    """Runs a program with its flags; what it prints goes into ``log``."""
    os.environ |= environment
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    nn.Dropout.forward = lambda self, inputs: inputs
    if "--fsdp" in command:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
        if os.environ.get("RANK", "0") != "0":  # the first process alone may read weights
            common.models.weights.read_base = Full.restore = Lora.restore = None
    # As where processes have different numbers of labels: one computes its loss in parts and the other at once.
    common.models.loss.LARGEST_PART = 2**25 if os.environ.get("RANK") == "1" else 2**17
    common.finetune.FinetuneTrainer = LogitsTrainer
    common.training.preemption.LOOK_EVERY = 0.0
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
