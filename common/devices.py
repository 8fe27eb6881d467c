"""Which device this process computes on, of whatever kind torch finds; and why cards that are here can't be used."""

import importlib.util
import os
import re
import warnings
from pathlib import Path
from types import ModuleType

import psutil
import torch

from common.errors import UserError, note

LOADED_DRIVER = Path("/proc/driver/nvidia/version")  # of the kernel; missing under WSL
DRIVERS = {"13": 580, "12": 525}  # the major version of a CUDA build -> the oldest driver for it, on Linux
INT8_SINCE = (7, 5)  # compute capability of NVIDIA's cards that multiply integers as LLM.int8() does
LARGE = 1024  # hidden size from which on a model is slow on a CPU; the 6B models have 4096, the demos less
OLDER_BUILD = "cu126"  # for drivers of CUDA 12, and for cards from sm_50 on


def this_device(check: bool = True) -> torch.device:
    """The accelerator that torch finds, or the CPU: without one, and with NUM_GPUS=0.

    ``check``: raises UserError if cards are here that this build of PyTorch can't use.
    """
    accelerator = torch.accelerator.current_accelerator()  # the kind that torch was built for, here or not
    if accelerator is None or os.environ.get("NUM_GPUS") == "0" or not torch.accelerator.device_count():
        return torch.device("cpu")
    module = torch.get_device_module(accelerator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same in more words
        started = torch.accelerator.is_available()  # NVML counts cards that CUDA can't start
        if check and not started:
            raise UserError(f"{not_started(module)}; NUM_GPUS=0 computes on the CPU.")
        if check and torch.version.cuda:
            check_kernels(module)
    return accelerator if started else torch.device("cpu")


def count_devices() -> int:
    """How many accelerators this process sees. Raises UserError like ``this_device``."""
    return 0 if this_device().type == "cpu" else torch.accelerator.device_count()


def not_started(module: ModuleType) -> str:
    """Why the cards can't be used, and what helps, as a sentence without its full stop."""
    try:
        module.init()
        reason = "unknown"
    except RuntimeError as error:
        reason = str(error)
    found = re.search(r"found version (\d+)", reason)
    if not found or not torch.version.cuda:
        return f"PyTorch can't start the {module.device_count()} GPUs that are here ({reason.split('. ')[0]})"
    needed, version = torch.version.cuda.partition(".")[0], int(found[1])
    loaded = re.search(r"\d+\.\d+(\.\d+)?", LOADED_DRIVER.read_text()) if LOADED_DRIVER.is_file() else None
    driver = f"driver{f' {loaded[0]}' if loaded else ''} (CUDA {version // 1000}.{version % 1000 // 10})"
    text = (
        f"the NVIDIA {driver} is too old for this build of PyTorch, {torch.__version__} for CUDA "
        f"{torch.version.cuda}: update it to {DRIVERS.get(needed, 'a newer one')} or newer"
    )
    return f"{text}, or {take_build(OLDER_BUILD)}" if version >= 12000 and needed != "12" else text


def check_kernels(module: ModuleType) -> None:
    """Raises UserError if a visible card can't run what this build of PyTorch was compiled for. Makes no tensor."""
    compiled = module.get_arch_list()
    codes = [(kind, int(re.sub(r"\D", "", number))) for kind, _, number in (name.partition("_") for name in compiled)]
    for index in range(module.device_count()):
        major, minor = module.get_device_capability(index)
        own = 10 * major + minor
        # Machine code (sm) runs on later cards of its own generation, the portable one (compute) on all later cards.
        if not any(code <= own and (kind == "compute" or code // 10 == major) for kind, code in codes):
            newest = max(code for _, code in codes)
            remedy = "update PyTorch" if own > newest else take_build(OLDER_BUILD)
            raise UserError(
                f"{module.get_device_name(index)} is sm_{own}, and this build of PyTorch, {torch.__version__}, is for "
                f"{', '.join(compiled)}: {remedy}; CUDA_VISIBLE_DEVICES hides a card, NUM_GPUS=0 all."
            )


def take_build(build: str) -> str:
    version = torch.__version__.partition("+")[0]
    return (
        f"remove .venv and set TORCH_INDEX={build} (in an environment of your own: pip install "
        f"torch=={version}+{build} --extra-index-url https://download.pytorch.org/whl/{build})"
    )


def oldest_capability(device: torch.device) -> tuple[int, int] | None:
    """The lowest compute capability of the visible NVIDIA cards; None for another kind of device. Makes no tensor.

    The oldest card decides, so that all processes of a machine agree; and a tensor would leave a context of every
    process on the first card, before each has been given its own.
    """
    if device.type == "cpu" or not torch.version.cuda:
        return None
    module = torch.get_device_module(device)
    return min(module.get_device_capability(index) for index in range(module.device_count()))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on a CPU, in the host."""
    return psutil.virtual_memory().available if device.type == "cpu" else torch.accelerator.get_memory_info(device)[0]


def check_bits(bits: int | None, device: torch.device) -> None:
    """Raises UserError for quantized weights on a device that bitsandbytes has no kernels for, as NPUs are."""
    if bits and importlib.util.find_spec(f"bitsandbytes.backends.{device.type}") is None:
        raise UserError(
            f"{bits} bit: bitsandbytes has no kernels for this device ({device.type}): take 16 bit, QUANTIZATION_BIT= "
            "(empty) or --quantization_bit 0."
        )
    capability = oldest_capability(device)
    if bits == 8 and capability and capability < INT8_SINCE:
        raise UserError(
            f"8 bit: LLM.int8() needs cards from sm_75 on, and this one is sm_{capability[0]}{capability[1]}: take 4 "
            "bit, QUANTIZATION_BIT=4 or --quantization_bit 4."
        )


def note_cpu(model: str, hidden_size: int) -> None:
    """Says that a large model runs on the CPU for want of a GPU, unless NUM_GPUS=0 asked for that."""
    if hidden_size >= LARGE and os.environ.get("NUM_GPUS") != "0":
        note(
            f"note: PyTorch {torch.__version__} finds no GPU: {model} runs on the CPU, many times slower; NUM_GPUS=0 "
            "says that this is meant."
        )
