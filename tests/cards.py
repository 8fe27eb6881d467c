"""Pretended cards: torch reports them, so that the product decides as it would beside them. None of them computes.

    with pretend("8 x A100"):
        launcher.count_processes()     # 8

torch is told what its CUDA build, the driver and the cards are; everything above it, libraries included, runs as it is.
CUDA_VISIBLE_DEVICES is obeyed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.torch_version import TorchVersion
from transformers.utils import import_utils

from common.launch import launcher

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version {}). Please update your GPU driver by downloading and "
    "installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"
KERNELS = {  # build of torch 2.13 for x86-64 -> what its kernels are compiled for
    "13.0": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
    "12.6": ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"],
}


class Cards(NamedTuple):
    """Equal cards, with the driver and the build of torch that see them."""

    model: str = ""
    capability: tuple[int, int] = (0, 0)
    gigabytes: float = 0  # of each card, all of it free but for what CUDA takes
    count: int = 1
    build: str | None = "13.0"  # the CUDA version of torch; None: its CPU build
    driver: int = 13000  # the newest CUDA version of the driver, as torch writes it; 0: no driver

    @property
    def usable(self) -> bool:
        """Whether CUDA starts; NVML counts the cards even if it does not."""
        return bool(self.count and self.build and self.driver // 1000 >= int(self.build.partition(".")[0]))

    @property
    def word(self) -> str:
        """The build as a version of torch names it."""
        return f"cu{self.build.replace('.', '')}" if self.build else "cpu"


T4 = Cards("Tesla T4", (7, 5), 16)
RTX_2080_TI = Cards("NVIDIA GeForce RTX 2080 Ti", (7, 5), 11)
RTX_3090 = Cards("NVIDIA GeForce RTX 3090", (8, 6), 24)
RTX_4090 = Cards("NVIDIA GeForce RTX 4090", (8, 9), 24)
RTX_5090 = Cards("NVIDIA GeForce RTX 5090", (12, 0), 32)
V100 = Cards("Tesla V100-SXM2-32GB", (7, 0), 32)
P100 = Cards("Tesla P100-PCIE-16GB", (6, 0), 16)
A100 = Cards("NVIDIA A100-SXM4-80GB", (8, 0), 80)
H100 = Cards("NVIDIA H100 80GB HBM3", (9, 0), 80)
SINGLE = {
    **{"T4": T4, "2080 Ti": RTX_2080_TI, "3090": RTX_3090, "4090": RTX_4090, "5090": RTX_5090},
    **{"V100": V100, "P100": P100, "A100": A100, "H100": H100},
    "V100 with CUDA 12.6": V100._replace(build="12.6"),
}
CARDS = {
    "none": Cards(count=0, build=None),
    "no driver": Cards(count=0, driver=0),
    "old driver": A100._replace(count=8, driver=12040),
    **SINGLE,
    **{f"8 x {name}": cards._replace(count=8) for name, cards in SINGLE.items()},
}


def visible(cards: Cards) -> int:
    """How many of the cards CUDA_VISIBLE_DEVICES leaves visible."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return cards.count if chosen is None else min(cards.count, len([index for index in chosen.split(",") if index]))


def start_cuda(cards: Cards) -> None:
    """As torch.cuda.init. Raises RuntimeError with torch's own words."""
    if not cards.usable:
        raise RuntimeError(TOO_OLD.format(cards.driver) if cards.driver else NO_DRIVER)


@contextmanager
def pretend(name: str) -> Iterator[Cards]:
    """torch sees the cards of CARDS[name] until the end of the block."""
    cards = CARDS[name]
    memory = int(cards.gigabytes * 1e9)
    properties = SimpleNamespace(
        name=cards.model, major=cards.capability[0], minor=cards.capability[1], total_memory=memory
    )
    with pytest.MonkeyPatch.context() as patch:
        accelerator = torch.device("cuda") if cards.build else None
        patch.setattr(torch._C, "_accelerator_getAccelerator", lambda: accelerator)
        patch.setattr(torch, "__version__", TorchVersion(f"2.13.0+{cards.word}"))
        patch.setattr(torch.version, "cuda", cards.build)
        patch.setattr(torch.accelerator, "get_memory_info", lambda device=None: (memory - 500_000_000, memory))
        for function in ("memory_allocated", "max_memory_allocated", "max_memory_reserved"):
            patch.setattr(torch.accelerator, function, lambda device=None: 0)
        for function, answer in {
            "is_available": lambda: cards.usable and visible(cards) > 0,
            "device_count": lambda: visible(cards) if cards.build else 0,
            "init": lambda: start_cuda(cards),
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_arch_list": lambda: KERNELS[cards.build] if cards.build else [],
            "get_device_properties": lambda device=None: properties,
            "get_device_capability": lambda device=None: cards.capability,
            "get_device_name": lambda device=None: cards.model,
            "mem_get_info": lambda device=None: (memory - 500_000_000, memory),
        }.items():
            patch.setattr(torch.cuda, function, answer)
        if cards.driver and cards.count:
            patch.setattr(launcher, "CARDS", ("null",))  # a device file that is here
        import_utils.is_torch_bf16_gpu_available.cache_clear()
        yield cards
    import_utils.is_torch_bf16_gpu_available.cache_clear()
    AcceleratorState._reset_state(reset_partial_state=True)  # which remembers the device
