"""Matrix products in float32 on CPUs that are not Intel's.

PyTorch computes them with MKL, which uses AVX-512 on Intel's CPUs only. oneDNN, which PyTorch brings for other work,
uses it on all of them, and is 1.3 to 2.6 times as fast on an AMD EPYC. Of a few rows it is another 1.5 times as fast
where it need not arrange the weights for each product.
"""

import ctypes
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.library import Library

SMALLEST = 2**20  # multiplications; of fewer oneDNN's own work takes longer than they do
FEW_ROWS = 16  # that oneDNN arranges the weights of answers for


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


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, of two dimensions each."""
    if fits(left, right):
        return linear(left, right.t())
    return torch.mm(left, right, out=left.new_empty(len(left), right.shape[1]))


def multiply_and_add(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta * bias + alpha * left @ right."""
    if beta == alpha == 1 and bias.ndim == 1 and fits(left, right):
        return linear(left, right.t(), bias)
    out = left.new_empty(len(left), right.shape[1])
    return torch.addmm(bias, left, right, beta=beta, alpha=alpha, out=out)


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """A context in which a model that answers has its weights as ``pack`` arranges them; then they are as before."""
    layers = pack(model)
    try:
        yield
    finally:
        unpack(layers)


def pack(model: nn.Module) -> dict[nn.Linear, Tensor]:
    """Arranges the weights of linear layers for the products of a few rows, where oneDNN computes. No gradients then.

    Each arranged weight takes the place of the plain one, which reads as NaN. Weights that others use too stay: those
    of a tied embedding or of an optimizer's flat buffer, and all beside DoRA, which computes with them. Returns the
    arranged weights.
    """
    layers: dict[nn.Linear, Tensor] = {}
    if not use_onednn() or any("lora_magnitude_vector" in name for name, _ in model.named_parameters()):
        return layers
    users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    for layer in model.modules():
        if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or users[id(layer.weight)] > 1:
            continue
        weight = layer.weight.data
        alone = weight.untyped_storage().nbytes() == weight.nbytes and "forward" not in vars(layer)
        if alone and weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= SMALLEST // 16:
            layers[layer] = torch.ops.mkldnn._reorder_linear_weight(weight, FEW_ROWS)
            layer.weight.data = weight.new_full((), torch.nan).expand_as(weight)
            layer.forward = partial(linear, weight=layers[layer], bias=layer.bias)  # type: ignore[method-assign]
    ctypes.CDLL(None).malloc_trim(0)  # else the plain weights' memory stays with the process, in pieces
    return layers


def unpack(layers: dict[nn.Linear, Tensor]) -> None:
    """Undoes ``pack``, bit for bit, and empties ``layers``: no weight is there twice for longer than its own turn."""
    while layers:
        layer, weight = layers.popitem()
        del layer.forward
        layer.weight.data = weight.to_dense()
