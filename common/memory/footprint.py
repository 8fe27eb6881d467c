"""Predicts the memory of a training or an evaluation from a model without weights.

The model itself shows its memory: on the meta device, where tensors have shapes and no content, it does one step of
training or generation, and every storage that comes and goes is counted. This file only adds the operators that meta
tensors compute differently from a CPU or a GPU (``doubles``, ``WORKSPACE``), and the shares of several processes.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.autograd._functions import MatMul8bitFp
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from common.arguments import Engine
from common.models.quantization import NOT_QUANTIZED, checkpointing_of

CUDA_CONTEXT = 0.5e9  # bytes that a process takes of a GPU before its first tensor
BUCKET = 500_000_000  # elements of DeepSpeed's buckets for gradients, unless its file sets them
GATHERED = 1_000_000_000  # parameters that ZeRO-3 keeps whole at once
# Kind -> the first stage of ZeRO in which each process holds only its share of this kind; FSDP2 is like stage 3.
SHARDED = {"optimizer states": 1, "gradients": 2, "weights": 3, "trained weights": 3}
aten = torch.ops.aten
# Bytes that an operator allocates and frees inside. Measured, like the doubles, with torch 2.13, bitsandbytes 0.50.
WORKSPACE: dict[str, Callable[..., float]] = {
    "bitsandbytes::gemm_4bit": lambda x, _, shape, *__: shape[0] * shape[1] * (x.element_size() + 4 / 64),
    "bitsandbytes::int8_scaled_mm": lambda x, weight, *_: x.shape[0] * weight.shape[0] * 4,
}


@dataclass(frozen=True)
class Setup:
    """The settings that decide how much memory a model needs. A batch size of 0 means: not done."""

    batch_size: int
    source_length: int
    target_length: int
    all_labelled: bool = False  # every token may have a label: conversations, plain text
    bits: int | None = None
    dtype: torch.dtype = torch.float32  # of the base model's weights that are not quantized
    autocast: torch.dtype | None = None
    checkpointing: bool = False
    accumulates: bool = False
    evaluation_batch_size: int = 0  # rows per batch of the loss without gradients
    generation_batch_size: int = 0  # rows x beams that are answered together
    answer_length: int = 0  # generated tokens; 0: target_length
    answers_in_training: bool = False  # beside the optimizer's states, which are freed after the training
    gpu: bool = True  # False: a CPU, whose operators keep other things
    processes: int = 1
    engine: Engine = Engine()


@dataclass(frozen=True)
class Plan:
    """Predicted bytes of one process: on its device at the peak, and offloaded to the host.

    The kinds of ``parts``: weights (frozen), trained weights, gradients, optimizer states, activations, logits, and
    workspace (dequantized weights, buckets, gathered shards).
    """

    parts: Counter[str]
    offloaded: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.parts.total()

    def largest(self) -> list[tuple[str, int]]:
        """(kind, bytes) on the device, largest first, without the negligible ones."""
        return [(kind, size) for kind, size in self.parts.most_common() if size >= 5e6]


class Allocations(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, for as long as they live, by kind.

    ``labels``: the number of positions that a boolean mask selects; meta tensors don't know it.
    """

    def __init__(self, model: nn.Module, vocabulary: int, labels: int, gpu: bool):
        super().__init__()
        self.vocabulary, self.labels = vocabulary, labels
        self.unit = 512 if gpu else 64  # bytes that an allocation is rounded up to
        self.sums: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        # Weights are counted apart.
        self.live = {tensor.untyped_storage()._cdata: ("weights", 0) for tensor in stored_tensors(model)}

    def hold(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.live:
            return
        size = -(-storage.nbytes() // self.unit) * self.unit
        self.live[storage._cdata] = (kind, size)
        self.sums[kind] += size
        weakref.finalize(storage, self.release, storage._cdata)
        self.note()

    def release(self, key: int) -> None:
        kind, size = self.live.pop(key)
        self.sums[kind] -= size

    def rename(self, tensor: Tensor, kind: str) -> None:
        key = tensor.untyped_storage()._cdata
        was, size = self.live[key]
        self.live[key] = (kind, size)
        self.sums[was] -= size
        self.sums[kind] += size

    def note(self, workspace: float = 0) -> None:
        now = self.sums + Counter(workspace=int(workspace))
        if now.total() > self.peak.total():
            self.peak = now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:  # whether a mask hides nothing; False takes more memory
            return False
        if func is aten.index.Tensor and args[1][0].dtype == torch.bool:
            out = args[0].new_empty(self.labels, *args[0].shape[args[1][0].ndim :])
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                logits = tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
                kind = "workspace" if "dequantize" in func.name() else "logits" if logits else "activations"
                self.hold(tensor, kind)
        if func.name() in WORKSPACE:  # it is freed when the result is there
            self.note(WORKSPACE[func.name()](*args))
        return out


def stored_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and the scales that bitsandbytes keeps beside quantized weights."""
    for module in model.modules():
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
        yield from vars(module).get("scales", ())


def quantized(linear: nn.Linear, bits: int, dtype: torch.dtype) -> nn.Linear:
    """A layer as bitsandbytes quantizes it: NF4 with double quantization, or int8 with one scale per row."""
    rows, columns = linear.weight.shape
    kind: Any = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    flags: dict[str, Any] = {"quant_type": "nf4", "compute_dtype": dtype} if bits == 4 else {"has_fp16_weights": False}
    layer = kind(columns, rows, linear.bias is not None, device="meta", **flags).requires_grad_(False)
    if linear.bias is not None:
        layer.bias = linear.bias
    if bits == 4:
        blocks = -(-rows * columns // 64)
        scales = [torch.empty(blocks, dtype=torch.uint8), torch.empty(-(-blocks // 256)), torch.empty(256)]
        second = QuantState(scales[1], code=scales[2], blocksize=256, dtype=torch.float32)
        offset = torch.zeros((), device="cpu")  # its value is asked for when an adapter is put beside the layer
        state = QuantState(scales[0], (rows, columns), torch.empty(16), 64, "nf4", dtype, offset, second)
        packed = torch.empty(-(-rows * columns // 2), 1, dtype=torch.uint8)
        layer.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer
        )
    else:
        layer.weight = bnb.nn.Int8Params(
            torch.empty(rows, columns, dtype=torch.int8), requires_grad=False, has_fp16_weights=False
        )
        scales = [torch.empty(rows)]
        layer.state.CB, layer.state.SCB = layer.weight.data, scales[0]
    layer.scales = scales
    return layer


def quantize(model: PreTrainedModel, setup: Setup) -> None:
    """Replaces the linear layers of a model on the meta device as a load in 4 or 8 bit does."""
    for name, module in [*model.named_modules()]:
        if setup.bits and isinstance(module, nn.Linear) and name.rpartition(".")[2] not in NOT_QUANTIZED:
            model.set_submodule(name, quantized(module, setup.bits, setup.dtype))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = setup.bits == 4, setup.bits == 8


def doubles(setup: Setup, cast_weights: list[Tensor]) -> dict[tuple[Any, str], Callable]:
    """(module, name) -> what meta tensors call instead: the kernels of the device, and the casts of autocast.

    ``cast_weights`` collects the weights that autocast casts; it keeps them until the forward pass ends.
    """
    linear = F.linear

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if setup.autocast:
            query, key, value = (x.to(setup.autocast) for x in (query, key, value))
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        bias = None
        if attn_mask is not None:
            bias = torch.where(attn_mask, query.new_zeros(()), query.new_full((), -torch.inf))
        if not setup.gpu:
            flash = aten._scaled_dot_product_flash_attention_for_cpu
            return flash(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale)[0]
        if bias is not None:
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, torch.is_grad_enabled(), 0.0, is_causal, scale=scale
        )[0]

    def autocast_linear(inputs, weight, bias=None):
        weight, bias = (x if x is None else x.to(setup.autocast) for x in (weight, bias))
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass
            cast_weights.append(weight)
        return linear(inputs.to(setup.autocast), weight, bias)

    def dropout(inputs, p=0.5, training=True, inplace=False):
        return torch.native_dropout(inputs, p, True)[0] if training and p else inputs

    def rms_norm(inputs, shape, weight=None, eps=None):
        # The fused kernel keeps its input, as that of LayerNorm; meta tensors would keep a copy in float32.
        return torch.native_layer_norm(inputs, shape, weight, None, eps)[0]

    def matmul_8bit(inputs, weight, state, bias=None, **_):
        return MatMul8bitFp.apply(inputs, weight, None, bias, state)

    table: dict[tuple[Any, str], Callable] = {(F, "scaled_dot_product_attention"): attention}
    if setup.gpu:
        table |= {(F, "dropout"): dropout, (F, "rms_norm"): rms_norm}
    elif setup.batch_size:
        table[bnb, "matmul"] = matmul_8bit
    if setup.autocast:
        table[F, "linear"] = autocast_linear
    return table


@contextmanager
def kernels_of(setup: Setup) -> Iterator[list[Tensor]]:
    """Puts the doubles in place. Yields the list of cast weights."""
    cast_weights: list[Tensor] = []
    table = doubles(setup, cast_weights)
    originals = {(module, name): vars(module)[name] for module, name in table}
    try:
        for (module, name), double in table.items():
            setattr(module, name, double)
        yield cast_weights
    finally:
        for (module, name), original in originals.items():
            setattr(module, name, original)


def training_step(model: PreTrainedModel, setup: Setup, allocations: Allocations, cast_weights: list[Tensor]) -> None:
    """Forward and backward passes; the optimizer's states are counted apart."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.register_post_accumulate_grad_hook(lambda weight: allocations.rename(weight.grad, "gradients"))
    if setup.checkpointing:
        how = checkpointing_of(setup.bits)
        if how["use_reentrant"]:
            model.enable_input_require_grads()
        model.activation_checkpointing_enable(how)
    model.train()
    for _ in range(1 + setup.accumulates):
        batch = fake_batch(setup.batch_size, setup.source_length + setup.target_length)
        count = torch.ones((), device="meta")
        loss = model(**batch, labels=batch["input_ids"], num_items_in_batch=count, **setup.engine.loss_flags).loss
        cast_weights.clear()
        torch.autograd.backward(loss)
        del loss, batch


@torch.no_grad()
def loss_step(model: PreTrainedModel, setup: Setup) -> None:
    """The loss of a batch without gradients."""
    model.eval()
    batch = fake_batch(setup.evaluation_batch_size, setup.source_length + setup.target_length)
    model(**batch, labels=batch["input_ids"], **setup.engine.loss_flags)


@torch.no_grad()
def answer_step(model: PreTrainedModel, setup: Setup) -> None:
    """Of an answer the first token, and the last one with all others cached."""
    model.eval()
    count, end = setup.generation_batch_size, setup.source_length + (setup.answer_length or setup.target_length)
    config = model.config
    prefix_length = vars(config).get("pre_seq_len") or 0
    decode_step(model, fake_batch(count, setup.source_length), 0, None)
    shape = (count, config.num_key_value_heads, prefix_length + end - 1, config.head_dim)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.empty(2, *shape, dtype=setup.dtype, device="meta").unbind(), layer)
    decode_step(model, fake_batch(count, end), end - 1, cache)


def decode_step(model: PreTrainedModel, batch: dict[str, Tensor], cached: int, cache: DynamicCache | None) -> None:
    """The work of generate() for one token."""
    batch["input_ids"] = batch["input_ids"][:, cached:]
    out = model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
    out.logits[:, -1].float()


def fake_batch(batch_size: int, length: int) -> dict[str, Tensor]:
    ids = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def predict(model: PreTrainedModel, setup: Setup) -> Plan:
    """The peak of one process. ``model``: on the meta device, quantized, with the parameters to train."""
    config = model.config
    labels = setup.target_length + setup.all_labelled * setup.source_length
    stored: Counter[str] = Counter()
    for tensor in {id(tensor): tensor for tensor in stored_tensors(model)}.values():
        stored["trained weights" if tensor.requires_grad else "weights"] += tensor.nbytes
    states = Counter({"optimizer states": 8 * model.num_parameters(only_trainable=True) * bool(setup.batch_size)})
    peaks = [stored]
    with kernels_of(setup) as cast_weights:
        if setup.batch_size:
            with Allocations(model, config.vocab_size, setup.batch_size * labels, setup.gpu) as allocations:
                training_step(model, setup, allocations, cast_weights)
            peaks.append(stored + states + allocations.peak)
            model.zero_grad()
            del allocations
    for step, rows, in_training in (
        (loss_step, setup.evaluation_batch_size, True),
        (answer_step, setup.generation_batch_size, setup.answers_in_training),
    ):
        if not rows:
            continue
        with kernels_of(replace(setup, batch_size=0, autocast=None)):
            with Allocations(model, config.vocab_size, rows * labels, setup.gpu) as allocations:
                step(model, setup)
            peaks.append(stored + allocations.peak + (states if in_training else Counter()))
            if step is answer_step and not setup.gpu and setup.dtype == torch.float32:
                peaks[-1]["workspace"] += config.vocab_size * config.hidden_size * 4  # the packed head of evaluation.py
    return spread(max(peaks, key=Counter.total), model, setup)


def spread(parts: Counter[str], model: PreTrainedModel, setup: Setup) -> Plan:
    """The plan of one of several processes. ``parts``: bytes of a process that trains alone, by kind."""
    n, engine = setup.processes, setup.engine
    everything, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    if engine.name == "DDP":
        return Plan(parts + Counter(workspace=4 * trained * (n > 1)))  # its buckets
    if engine.name == "FSDP2":
        stage, size = 3, (setup.autocast or setup.dtype).itemsize
        units = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
        layer = max(sum(weight.numel() for weight in unit.parameters()) for unit in units)
        root = everything - sum(weight.numel() for unit in units for weight in unit.parameters())
        parts["workspace"] += size * (root + 2 * layer) + 4 * layer * bool(parts["gradients"])  # gathered, and whole
    else:
        zero = engine.config["zero_optimization"]
        stage, size = zero["stage"], setup.dtype.itemsize
        parts["trained weights"] = size * trained
        parts["gradients"] = (size + 4 * (stage > 1)) * trained
        parts["optimizer states"] = (8 + 4 * (size < 4)) * trained  # with the float32 copies of half weights
        bucket = zero.get("reduce_bucket_size", BUCKET)
        bucket = model.config.hidden_size**2 if bucket == "auto" else int(bucket)  # as transformers does
        if not setup.gpu:  # there, memory that is never written to takes nothing
            bucket = min(bucket, trained)
        parts["workspace"] += bucket * size * (2 if zero.get("overlap_comm") and stage < 3 else 1) * bool(stage)
        if stage == 3:
            parts["workspace"] += size * min(everything, int(zero.get("stage3_max_live_parameters", GATHERED)))
    for kind, first_stage in SHARDED.items():
        parts[kind] //= n if stage >= first_stage else 1
    moved = ("optimizer states", "gradients") * engine.offload[0] + ("weights", "trained weights") * engine.offload[1]
    offloaded = sum(parts.pop(kind) for kind in moved)
    if engine.name == "DeepSpeed":  # it keeps more on the host: weights, gradients and both moments in float32
        offloaded = 16 * trained // (n if stage else 1) * engine.offload[0] + 2 * everything // n * engine.offload[1]
    return Plan(parts, offloaded)
