"""Matrix products in float32 on CPUs that are not Intel's.

PyTorch computes them with MKL, which uses AVX-512 on Intel's CPUs only. oneDNN, which PyTorch brings for other work,
uses it on all of them, and is 1.3 to 2.6 times as fast on an AMD EPYC.
"""

import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.library import Library

SMALLEST = 2**20  # multiplications; of fewer oneDNN's own work takes longer than they do


@cache
def use_onednn() -> Library | None:
    """Lets oneDNN compute ``torch.mm`` and ``torch.addmm`` in this process, where MKL would leave AVX-512 unused."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX512" or not torch.backends.mkldnn.is_available() or is_intel():
        return None
    kernels = Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Overriding a previously registered kernel": on purpose
        kernels.impl("mm", multiply, "CPU", allow_override=True)
        kernels.impl("addmm", multiply_and_add, "CPU", allow_override=True)
    return kernels  # they last as long as this object does, and the cache keeps it


def is_intel() -> bool:
    file = Path("/proc/cpuinfo")
    return not file.exists() or "GenuineIntel" in file.read_text()


def fits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == torch.float32 and len(left) * right.numel() >= SMALLEST


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, of two dimensions each."""
    if fits(left, right):
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    return torch.mm(left, right, out=left.new_empty(len(left), right.shape[1]))


def multiply_and_add(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta * bias + alpha * left @ right."""
    if beta == alpha == 1 and bias.ndim == 1 and fits(left, right):
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    out = left.new_empty(len(left), right.shape[1])
    return torch.addmm(bias, left, right, beta=beta, alpha=alpha, out=out)
