"""No device is assumed: whatever accelerator torch finds is used, or the CPU."""

import re

import pytest
import torch
from conftest import ROOT

import common.models.base  # noqa: F401 - chooses the kernels
from common.devices import this_device

# CUDA_VISIBLE_DEVICES is no match: it is the name of a variable, and says which GPUs a process sees.
HARD_CODED = re.compile(r"""\.cuda\(|\btorch\.cuda\b|["']cuda|["']nccl""")
ALLOWED: set[str] = set()  # lines, each under a comment that gives the reason


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


def test_attention_takes_no_kernel_that_plans_anew_for_each_length():
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
