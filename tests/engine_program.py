"""Runs a program as the tests of engines need it: without dropout, and with FSDP2 on CPUs.

    python tests/engine_program.py PROGRAM FLAGS...

Dropout differs from process to process, so that two processes could not be compared with one. Accelerate knows FSDP on
accelerators only, and would run plain DDP on a CPU. Beside what is saved at the end, the logits of the live model for
SAMPLE are written, for whoever loads it again.
"""

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn

import common.finetune
import common.models.loss
from common.training.trainer import FinetuneTrainer

SAMPLE = torch.arange(300, 316).reshape(1, 16)


class LogitsTrainer(FinetuneTrainer):
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self.model_wrapped.eval()
        with torch.no_grad():
            logits = self.model_wrapped(SAMPLE).logits
        self.model_wrapped.train()
        if self.args.should_save:
            torch.save(logits, Path(output_dir or self.args.output_dir) / "logits.pt")


if __name__ == "__main__":
    nn.Dropout.forward = lambda self, inputs: inputs
    if "--fsdp" in sys.argv:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        if "--dry_run" not in sys.argv:
            PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    # As where processes have different numbers of labels: one computes its loss in parts and the other at once.
    common.models.loss.LARGEST_PART = 2**25 if os.environ.get("RANK") == "1" else 2**17
    common.finetune.FinetuneTrainer = LogitsTrainer
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
