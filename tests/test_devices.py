"""No device is assumed: whatever accelerator torch finds is used, or the CPU."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from cards import CARDS, pretend
from conftest import ROOT

from common import devices
from common.devices import check_bits, this_device
from common.errors import UserError
from common.models.precision import compute_dtype

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


def test_a_torch_for_gpus_that_finds_none_takes_the_cpu():
    """As pip installs it on a machine without a GPU: it was built for one, and names it if not asked to look."""
    with pretend("no driver"):
        assert torch.accelerator.current_accelerator() == torch.device("cuda")
        assert this_device() == torch.device("cpu")


def test_the_loaded_driver_is_named(monkeypatch, tmp_path):
    loaded = tmp_path / "version"
    loaded.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\nGCC")
    monkeypatch.setattr(devices, "LOADED_DRIVER", loaded)
    with pretend("old driver"), pytest.raises(UserError, match=r"driver 550.54.14 \(CUDA 12.4\) is too old"):
        this_device()


def test_a_driver_that_no_build_runs_on_can_only_be_updated(monkeypatch):
    monkeypatch.setitem(CARDS, "very old driver", CARDS["old driver"]._replace(driver=11040))
    with pretend("very old driver"), pytest.raises(UserError, match=r"update it to 580 or newer; NUM_GPUS=0"):
        this_device()


def test_cards_that_do_not_start_for_another_reason_are_said(monkeypatch):
    def fail() -> None:
        raise RuntimeError("Unexpected error from cudaGetDeviceCount(): Error 802: system not yet initialized. Did you")

    with pretend("old driver"), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "init", fail)
        with pytest.raises(UserError, match=r"can't start the 8 GPUs .*Error 802: system not yet initialized\); NUM_"):
            this_device()


def test_a_card_that_is_newer_than_pytorch_needs_another_pytorch(monkeypatch):
    monkeypatch.setitem(CARDS, "next", CARDS["5090"]._replace(capability=(13, 0)))
    with pretend("next"), pytest.raises(UserError, match="is sm_130, .*: update PyTorch; CUDA_VISIBLE_DEVICES hides"):
        this_device()


@pytest.mark.parametrize(("cards", "dtype"), [("8 x T4", torch.float16), ("8 x A100", torch.bfloat16)])
def test_the_question_for_bfloat16_puts_nothing_on_a_card(cards, dtype, monkeypatch):
    """The answer of torch is a tensor on the first card, where every process would leave a context."""
    with pretend(cards), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: pytest.fail("asked with a tensor"))
        assert compute_dtype(torch.device("cuda", 5)) == dtype


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_need_a_device_with_kernels(bits):
    """bitsandbytes 0.50 counts NPUs as supported, and has no kernels of theirs."""
    npu = SimpleNamespace(type="npu")  # a name that torch_npu gives to torch
    with pytest.raises(UserError, match=f"{bits} bit: bitsandbytes has no kernels for this device .npu.: take 16 bit"):
        check_bits(bits, npu)
    check_bits(None, npu)
    for kind in ("cpu", "cuda", "xpu"):
        check_bits(bits, torch.device(kind))


def test_8_bit_needs_a_card_that_multiplies_integers():
    volta = r"LLM.int8\(\) needs cards from sm_75 on, and this one is sm_70: take 4 bit"
    with pretend("8 x V100 with CUDA 12.6"), pytest.raises(UserError, match=volta):
        check_bits(8, this_device())
    with pretend("V100 with CUDA 12.6"):
        check_bits(4, this_device())
    with pretend("T4"):
        check_bits(8, this_device())


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
