"""A model of the 6B shapes, made on the device: predicted and measured memory, and speed. See gpu.sh.

The weights are random, made and quantized one by one on the device, and never written to a disk. A step is that of the
Trainer without what is around it: loss of the labels alone, AdamW, a base in half precision, new parameters in float32.
"""

import gc
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

import torch
from gpu import CUDA, DEVICE, TINY, read_lines, say, steps_in_time
from memory import allocator_peak
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedConfig, PreTrainedModel

from common.arguments import LoraArguments, PrefixArguments
from common.data.collator import left_pad, train_batch
from common.engine import Engine
from common.memory.fit import Case
from common.memory.footprint import Setup, stored_tensors
from common.methods import Method
from common.methods.lora import Lora
from common.methods.prefix import PTuning
from common.models.precision import compute_dtype
from common.models.quantization import checkpointing_of, quantization_config
from common.models.registry import SPECS, ModelFolder, empty_model

# Dense bf16 operations a second without sparsity, as NVIDIA states them; the first part of a name that fits.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}
# Hidden size, layers, heads, inner size and vocabulary of tiny models.
SHAPES = {"chatglm": (64, 2, 4, 256, 4096), "chatglm2": (64, 2, 4, 128, 4096), "chatglm3": (64, 2, 4, 128, 4096)}
SHORTER = 32 if TINY else 1  # by which lengths are divided
NEW_TOKENS = 64 // SHORTER
SECONDS = 1.5  # of timed steps for each setting


class Setting(NamedTuple):
    """A training, or with ``answers`` the answering of ``rows`` questions at once."""

    method: str
    rows: int
    source: int
    target: int
    checkpointing: bool = False
    answers: bool = False

    def __str__(self) -> str:
        what = f"{self.method}, {self.rows} x ({self.source} + {self.target})"
        return what + ", answers" * self.answers + ", checkpointing" * self.checkpointing


SETTINGS = [
    *(Setting("ptuning", 1, 64, 64, way) for way in (True, False)),
    *(Setting("ptuning", 16, 64, 64, way) for way in (True, False)),
    Setting("ptuning", 4, 64, 64),
    *(Setting("lora", 1, 2048, 2048, way) for way in (False, True)),
    *(Setting("lora", 4, 256, 512, way) for way in (True, False)),
    *(Setting("lora", 1, 4096, 4096, way) for way in (True, False)),
    Setting("lora", 8, 64, 64, answers=True),
    Setting("lora", 64, 64, 64, answers=True),
    Setting("lora", 4, 64, 64),
    *(Setting("lora", 4, 2048, 2048, way) for way in (True, False)),
    *(Setting("lora", 16, 256, 512, way) for way in (True, False)),
]


class RandomWeight(NamedTuple):
    """A weight that is drawn when it is read; transformers reads weight by weight, with ``[...]``."""

    shape: torch.Size
    mean: float
    deviation: float
    dtype: torch.dtype

    def __getitem__(self, index) -> Tensor:  # type: ignore[override]
        return torch.empty(self.shape, dtype=self.dtype, device=DEVICE).normal_(self.mean, self.deviation)[index]


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def half() -> torch.dtype:
    """The dtype of a frozen base: that of the programs."""
    return compute_dtype(torch.device(DEVICE))


def config_of(kind: str, layers: int | None = None) -> PreTrainedConfig:
    """The original's, or a tiny one; ``layers``: fewer than it has."""
    config = SPECS[kind].config()
    if TINY:
        hidden, config.num_layers, heads, config.intermediate_size, config.vocab_size = SHAPES[kind]
        config.hidden_size, config.num_attention_heads = hidden, heads
        if kind == "chatglm":
            config.mask_token_id, config.gmask_token_id, config.bos_token_id, config.eos_token_id = (
                4092,
                4093,
                4094,
                4095,
            )
        else:
            config.kv_channels = hidden // heads
    if kind != "chatglm":
        config.generation = kind
    config.num_layers = layers or config.num_layers
    return config


def make_model(kind: str, bits: int | None, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
    """A model with random weights on the device, quantized as a load quantizes it."""
    spec, config = SPECS[kind], config_of(kind, layers)
    torch.manual_seed(0)
    empty = empty_model(spec, config)
    # LLM.int8() keeps columns with a value above 6 apart: few in trained models, all of a product of larger weights.
    deviation = 0.005 if bits == 8 else 0.02
    drawn = {
        name: RandomWeight(weight.shape, 1.0 if "norm" in name and weight.ndim == 1 else 0.0, deviation, dtype)
        for name, weight in empty.named_parameters()
    }
    model = spec.model.from_pretrained(
        None,
        state_dict=drawn,
        config=config,
        dtype=dtype,
        device_map={"": torch.device(DEVICE)},
        quantization_config=quantization_config(bits, dtype),
    )
    model.generation_config.eos_token_id = None  # no answer ends early
    return model


def new_method(name: str) -> Method:
    return Lora(LoraArguments()) if name == "lora" else PTuning(PrefixArguments(pre_seq_len=128 // SHORTER))


def random_row(config: PreTrainedConfig, source: int, target: int) -> dict[str, list[int]]:
    """A row of ``source`` tokens without labels and ``target`` with them; without target a question."""
    special = [config.gmask_token_id, config.bos_token_id] if "gmask_token_id" in vars(config) else []
    ids = [random.randint(100, 4000) for _ in range(source - len(special))] + special
    answer = [random.randint(100, 4000) for _ in range(target)]
    return {"input_ids": ids + answer, "labels": [-100] * source + answer}


def make_batch(config: PreTrainedConfig, rows: int, source: int, target: int, pads: bool = False) -> dict[str, Tensor]:
    """A batch as the programs make it, on the device; ``pads``: its rows have different lengths."""
    cut = [index * target // (2 * rows) if pads else 0 for index in range(rows)]
    made = [random_row(config, source, target - less) for less in cut]
    batch = train_batch(made, config.pad_token_id)
    return on_device(batch)


def on_device(batch: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a batch, on the device: what the Trainer hands to the model."""
    return {name: value.to(DEVICE) for name, value in batch.items() if isinstance(value, Tensor)}


def optimizer_of(model: PreTrainedModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)


def train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> Tensor:
    """Returns the loss, on the device."""
    loss = model(**batch, **Engine().loss_flags).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def answer(model: PreTrainedModel, rows: int, source: int, new: int = NEW_TOKENS) -> None:
    """Generates ``new`` tokens for each of ``rows`` random questions, the half of them shorter."""
    prompts = [random_row(model.config, source - index % 2 * source // 4, 0)["input_ids"] for index in range(rows)]
    inputs = on_device(left_pad(prompts, model.config.pad_token_id))
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=new, do_sample=False, use_cache=True)


def set_checkpointing(model: PreTrainedModel, bits: int | None, on: bool) -> None:
    if not on:
        model.gradient_checkpointing_disable()
        return
    how = checkpointing_of(bits)
    if how["use_reentrant"]:
        model.enable_input_require_grads()
    model.activation_checkpointing_enable(how)


def work_of(model: PreTrainedModel, setting: Setting, bits: int | None) -> Callable[[], None]:
    """What one setting does again and again."""
    source, target = setting.source // SHORTER, setting.target // SHORTER
    if setting.answers:
        model.eval()
        return lambda: answer(model, setting.rows, source, target)
    model.train()
    set_checkpointing(model, bits, setting.checkpointing)
    optimizer, batch = optimizer_of(model), make_batch(model.config, setting.rows, source, target)
    return lambda: train_step(model, optimizer, batch)


def clock(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def seconds_of(work: Callable[[], object]) -> float:
    """The median of 2 to 6 calls, as many as SECONDS allow."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < SECONDS and len(times) < 6:
        times.append(clock(work))
    return sorted(times)[len(times) // 2]


def peak_of(
    model: PreTrainedModel, make: Callable[[], Callable[[], None]]
) -> tuple[Callable[[], None], dict[str, int]]:
    """Does the work twice. Returns it, and its peaks in bytes with the weights: of the allocator, and reserved."""

    def twice() -> Callable[[], object]:
        work = make()
        work()
        work()
        synchronize()
        return work

    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work = twice()
        return work, {"measured": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    weights = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in stored_tensors(model)}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        work = twice()
    return work, {"measured": weights + allocator_peak(recorded)}


def setup_of(setting: Setting, bits: int | None) -> Setup:
    rows = setting.rows
    return Setup(
        batch_size=0 if setting.answers else rows,
        source_length=setting.source // SHORTER,
        target_length=setting.target // SHORTER,
        bits=bits,
        dtype=torch.bfloat16 if CUDA else torch.float32,
        checkpointing=setting.checkpointing,
        generation_batch_size=rows if setting.answers else 0,
        gpu=CUDA,
    )


def plan(kind: str, bits: int | None) -> None:
    """Says the predicted bytes of each setting."""
    spec = SPECS[kind]
    folder = ModelFolder(kind, Path(kind), spec, config_of(kind), bits=None, weights=())
    for setting in steps_in_time(SETTINGS, reserve=5):
        total = Case(folder, new_method(setting.method), setup_of(setting, bits), known=[]).plan().total
        say(setting=str(setting), predicted=total)


def utilization(parameters: int, tokens: float) -> float | None:
    """MFU of a training with a frozen base: 4 operations for each parameter and token, of the card's peak."""
    name = torch.cuda.get_device_name() if CUDA else ""
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    return round(4 * parameters * tokens / peak, 4) if peak else None


def measure_setting(model: PreTrainedModel, setting: Setting, bits: int | None, parameters: int) -> None:
    """Says peaks and speed of one setting."""
    work, peaks = peak_of(model, lambda: work_of(model, setting, bits))
    seconds = seconds_of(work)
    length = NEW_TOKENS if setting.answers else (setting.source + setting.target) // SHORTER
    tokens = setting.rows * length / seconds
    found: dict[str, Any] = {"ms": round(1000 * seconds, 1), "tokens_s": round(tokens, 1)}
    found["rows_s"] = round(setting.rows / seconds, 2)
    if not setting.answers:
        found["mfu"] = utilization(parameters, tokens)
    say(setting=str(setting), length=length, **peaks, **found)


def settings_that_fit(predicted: dict[str, int]) -> Iterator[Setting]:
    for setting in steps_in_time(SETTINGS, reserve=12):
        if CUDA and predicted.get(str(setting), 0) > 0.93 * torch.cuda.mem_get_info()[1]:
            say(setting=str(setting), left_out="the plan says that it does not fit")
        else:
            yield setting


def measure(kind: str, bits: int | None) -> PreTrainedModel:
    """Makes the model and measures each setting on it: P-Tuning v2 first, then LoRA. Returns it with LoRA."""
    start = time.perf_counter()
    model = make_model(kind, bits, half())
    synchronize()
    parameters = empty_model(SPECS[kind], config_of(kind)).num_parameters()
    seconds = round(time.perf_counter() - start, 1)
    say(
        setting="made",
        parameters=parameters,
        seconds=seconds,
        **({} if not CUDA else {"measured": torch.cuda.memory_allocated()}),
    )
    predicted = {
        line["setting"]: line["predicted"]
        for line in read_lines()
        if line["item"] == f"plan {kind} {bits or 16}" and "predicted" in line
    }
    method = ""
    for setting in settings_that_fit(predicted):
        if setting.method != method:
            method = setting.method
            model.base_model.prefix_encoder = None
            model = new_method(method).attach(model)
        try:
            measure_setting(model, setting, bits, parameters)
        except RuntimeError as error:  # memory that runs out is one
            say(setting=str(setting), failed=str(error).splitlines()[0][:300])
        model.zero_grad()
    return model
