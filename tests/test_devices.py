"""No device is assumed: whatever accelerator torch finds is used, or the CPU."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from common.models.precision import this_device

# CUDA_VISIBLE_DEVICES is no match: it is the name of a variable, and says which GPUs a process sees.
HARD_CODED = re.compile(r"""\.cuda\(|\btorch\.cuda\b|["']cuda|["']nccl""")
ALLOWED = {
    # Of NVIDIA's GPUs alone one can ask whether they compute bfloat16 themselves or emulate it.
    'emulated = device.type == "cuda" and not module.is_bf16_supported(including_emulation=False)'
}


def test_no_line_names_a_kind_of_device():
    files = [file for folder in ("common", "lora", "ptuning", "full") for file in (ROOT / folder).rglob("*.py")]
    lines = {line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()}
    assert set(filter(HARD_CODED.search, lines)) == ALLOWED


@pytest.mark.parametrize(
    "line", ["x.cuda()", "torch.cuda.synchronize()", 'x.to("cuda")', "zeros(2, device='cuda:0')", 'backend="nccl"']
)
def test_what_is_looked_for_is_found(line):
    assert HARD_CODED.search(line)


def test_a_torch_for_gpus_that_finds_none_takes_the_cpu(monkeypatch):
    """As pip installs it on a machine without a GPU: it was built for one, and names it if not asked to look."""
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    assert this_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "cudnn", "blocks"),
    [
        ({}, "1", "expandable_segments:True"),
        ({"TORCH_CUDNN_SDPA_DEPRIORITIZED": "0", "PYTORCH_ALLOC_CONF": "backend:native"}, "0", "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "1", "None"),
    ],
)
def test_settings_of_torch_are_there_before_its_first_attention(given, cudnn, blocks):
    """cuDNN's attention comes last, because it plans anew for each length; a user's own settings stay."""
    names = ("TORCH_CUDNN_SDPA_DEPRIORITIZED", "PYTORCH_ALLOC_CONF")
    code = f"import common, os; print(*map(os.environ.get, {names}))"
    clean = {name: value for name, value in os.environ.items() if name not in names} | given
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [cudnn, blocks]
