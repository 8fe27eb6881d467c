"""Runs a program with FSDP2 on CPUs, for tests only: Accelerate knows FSDP on accelerators and would run plain DDP.

python tests/fsdp_on_cpu.py PROGRAM FLAGS...
"""

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accelerate import PartialState
from accelerate.utils import DistributedType

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
if "LOCAL_RANK" in os.environ:
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
