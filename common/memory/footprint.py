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
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from common.data.order import SHORTEST
from common.engine import Engine
from common.memory import quantized
from common.models import base, loss
from common.models.cache import GrowingLayer
from common.models.glm4 import WithPrefix
from common.models.quantization import checkpointing_of

CUDA_CONTEXT = 0.5e9  # bytes that a process takes of a GPU before its first tensor
BUCKET = 500_000_000  # elements of DeepSpeed's buckets for gradients, unless its file sets them
GATHERED = 1_000_000_000  # parameters that ZeRO-3 keeps whole at once
# Kind -> the first stage of ZeRO in which each process holds only its share of this kind; FSDP2 is like stage 3.
SHARDED = {"optimizer states": 1, "gradients": 2, "weights": 3, "trained weights": 3}
aten = torch.ops.aten
# Bytes that an operator allocates and frees inside. Read in the source, not measured: the gradient of the query in
# float32, and those of keys and values for every head.
WORKSPACE: dict[str, Callable[..., float]] = quantized.WORKSPACE | {
    "aten::_scaled_dot_product_flash_attention_backward": lambda _, query, key, *__: (
        query.numel() * 4 + 2 * (key.numel() // key.shape[1] * query.shape[1]) * key.element_size()
    ),
}


@dataclass(frozen=True)
class Setup:
    """The settings that decide how much memory a model needs. A batch size of 0 means: not done."""

    batch_size: int
    source_length: int
    target_length: int
    slots: int = 0  # of a training batch, if it has as many rows as fit and not ``batch_size``
    all_labelled: bool = False  # every token may have a label: conversations, plain text
    packed: bool = False  # training rows stand behind each other, which takes a mask
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

    ``host``: what the first process of a training takes of the host beside that, to read or to save all weights.

    The kinds of ``parts``: weights (frozen), trained weights, gradients, optimizer states, activations, logits, and
    workspace (dequantized weights, buckets, gathered shards).
    """

    parts: Counter[str]
    offloaded: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.parts.total()

    def largest(self) -> list[tuple[str, int]]:
        """(kind, bytes) on the device, largest first, without the negligible ones."""
        return [(kind, size) for kind, size in self.parts.most_common() if size >= 5e6]


class Allocations(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, for as long as they live, by kind."""

    def __init__(self, model: nn.Module, vocabulary: int, gpu: bool):
        super().__init__()
        self.vocabulary = vocabulary
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

    def is_weight_gradient(self, tensor: Tensor) -> bool:
        """Whether it is a gradient of an embedding that is the head too, to which another is added."""
        in_backward = torch._C._current_graph_task_id() != -1
        return in_backward and tensor.ndim == 2 and len(tensor) == self.vocabulary and tensor.is_contiguous()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:  # whether a mask hides nothing; False takes more memory
            return False
        if func is aten.add.Tensor and self.is_weight_gradient(args[0]):
            func = aten.add_.Tensor  # as autograd does where no mode looks on
        out = quantized.UNKNOWN_SIZES.get(func.name(), func)(*args, **(kwargs or {}))
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


def attention_doubles(setup: Setup) -> dict[tuple[Any, str], Callable]:
    """Like ``doubles``, for the kernels of attention. The mask "causal": a causal one behind other keys."""

    def flash(query, mask):  # of the cards, those that compute bfloat16 have it
        return (setup.autocast or query.dtype) == torch.bfloat16 and not isinstance(mask, Tensor)

    def can_share(query, key, value, mask):
        return not setup.gpu or flash(query, mask)

    def attention(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False, **_):
        if setup.autocast:
            query, key, value = (x.to(setup.autocast) for x in (query, key, value))
        causal, bias = is_causal or isinstance(attn_mask, str), None
        if setup.gpu and flash(query, attn_mask):
            return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)[0]
        if causal and not is_causal and not setup.gpu:  # there it becomes a mask
            attn_mask, causal = query.new_empty(query.shape[2], key.shape[2], dtype=torch.bool), False
        if isinstance(attn_mask, Tensor):
            bias = torch.where(attn_mask, query.new_zeros(()), query.new_full((), -torch.inf))
        if not setup.gpu:
            on_cpu = aten._scaled_dot_product_flash_attention_for_cpu
            return on_cpu(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)[0]
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        if bias is not None:
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, torch.is_grad_enabled(), 0.0, causal, scale=scale
        )[0]

    return {
        (F, "scaled_dot_product_attention"): attention,
        (base, "can_share"): can_share,
        (base, "causal_lower_right"): lambda *size: "causal",
    }


def doubles(setup: Setup, cast_weights: list[Tensor]) -> dict[tuple[Any, str], Callable]:
    """(module, name) -> what meta tensors call instead: the kernels of the device, and the casts of autocast.

    ``cast_weights`` collects the weights that autocast casts; it keeps them until the forward pass ends.
    """
    linear = F.linear

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

    table = attention_doubles(setup) | {(loss, "computed_dtype"): lambda weight: setup.autocast or weight.dtype}
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
        how = checkpointing_of(setup.bits, isinstance(model, WithPrefix))
        if how["use_reentrant"]:
            model.enable_input_require_grads()
        model.activation_checkpointing_enable(how)
    model.train()
    for shape in (shape for shape in shapes_of(setup) for _ in range(1 + setup.accumulates)):
        if not setup.accumulates:  # of two shapes, each has gradients of its own
            model.zero_grad()
        batch = labelled_batch(shape, shape.batch_size)
        if setup.packed:
            batch["position_ids"] = model.positions(batch["input_ids"], model.config)
        loss = model(**batch, num_items_in_batch=torch.ones((), device="meta"), **setup.engine.loss_flags).loss
        cast_weights.clear()
        torch.autograd.backward(loss)
        del loss, batch


@torch.no_grad()
def loss_step(model: PreTrainedModel, setup: Setup, *_: Any) -> None:
    """The loss of a batch without gradients."""
    model.eval()
    model(**labelled_batch(setup, setup.evaluation_batch_size), **setup.engine.loss_flags)


@torch.no_grad()
def answer_step(model: PreTrainedModel, setup: Setup, *_: Any) -> None:
    """Of an answer the first token, and the last one with all others cached."""
    model.eval()
    count, end = setup.generation_batch_size, setup.source_length + (setup.answer_length or setup.target_length)
    config = model.config
    prefix_length = (config.pre_seq_len or 0) if config.model_type == "chatglm" else 0  # others cache no prefix
    decode_step(model, count, setup.source_length, 0, Cache(layer_class_to_replicate=GrowingLayer))
    shape = (count, config.num_key_value_heads, prefix_length + end - 1, config.head_dim)
    cache = Cache(layer_class_to_replicate=GrowingLayer)
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.empty(2, *shape, dtype=setup.dtype, device="meta").unbind(), layer)
    decode_step(model, count, end, end - 1, cache)


def decode_step(model: PreTrainedModel, rows: int, length: int, cached: int, cache: Cache) -> None:
    """The work of generate() for one token of rows with pads."""
    mask = torch.ones(rows, length, dtype=torch.long, device="meta")
    out = model(mask[:, cached:], attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    out.logits[:, -1].float()


def labelled_batch(setup: Setup, rows: int) -> dict[str, Tensor]:
    """As the collator makes it for the loss."""
    ids = torch.zeros(rows, setup.source_length + setup.target_length, dtype=torch.long, device="meta")
    labels = setup.target_length + setup.all_labelled * setup.source_length
    return {"input_ids": ids, "labels": ids, "label_positions": ids.new_empty(rows * labels)}


def shapes_of(setup: Setup) -> list[Setup]:
    """The batches of a training that may take the most: of a number of slots, the longest rows and the shortest."""
    if not setup.slots:
        return [setup]
    counts = -(-setup.slots // (setup.source_length + setup.target_length)), max(1, setup.slots // SHORTEST)
    same = replace(setup, slots=0, target_length=0, all_labelled=True)
    return [replace(same, batch_size=rows, source_length=setup.slots // rows) for rows in counts]


def steps_of(setup: Setup) -> Iterator[tuple[Callable, Setup]]:
    """The steps of a training or an evaluation, each with the settings that decide its memory."""
    alone = replace(setup, processes=1, answers_in_training=False)
    passive = replace(alone, batch_size=0, slots=0, packed=False, autocast=None, checkpointing=False, accumulates=False)
    if setup.batch_size:
        yield training_step, replace(alone, evaluation_batch_size=0, generation_batch_size=0, answer_length=0)
    if setup.evaluation_batch_size:
        yield loss_step, replace(passive, generation_batch_size=0, answer_length=0)
    if setup.generation_batch_size:
        yield answer_step, replace(passive, evaluation_batch_size=0)


def peak_of(step: Callable, model: PreTrainedModel, setup: Setup) -> Counter[str]:
    """The bytes at the peak of a step, by kind, beside what is stored all the time."""
    with kernels_of(setup) as cast_weights:
        with Allocations(model, model.config.vocab_size, setup.gpu) as allocations:
            step(model, setup, allocations, cast_weights)
        model.zero_grad()
    return allocations.peak


def predict(model: PreTrainedModel, setup: Setup, known: list[tuple[Setup, Counter[str]]]) -> Plan:
    """The peak of one process. ``model``: on the meta device, quantized, with the parameters to train.

    ``known``: the peaks of its steps with the settings that were predicted before, because each takes a second.
    """
    stored: Counter[str] = Counter()
    for tensor in {id(tensor): tensor for tensor in stored_tensors(model)}.values():
        stored["trained weights" if tensor.requires_grad else "weights"] += tensor.nbytes
    trains = bool(setup.batch_size or setup.answers_in_training)
    states = Counter({"optimizer states": 8 * model.num_parameters(only_trainable=True) * trains})
    peaks = [stored]
    for step, own in steps_of(setup):
        peak = next((peak for other, peak in known if other == own), None)
        if peak is None:
            known.append((own, peak := peak_of(step, model, own)))
        peaks.append(stored + peak + (states if step is not answer_step or setup.answers_in_training else Counter()))
        if step is answer_step and not setup.gpu and setup.dtype == torch.float32:
            peaks[-1]["workspace"] += model.config.vocab_size * model.config.hidden_size * 4  # evaluation.py packs it
    return spread(max(peaks, key=Counter.total), model, setup)


def spread(parts: Counter[str], model: PreTrainedModel, setup: Setup) -> Plan:
    """The plan of one of several processes. ``parts``: bytes of a process that trains alone, by kind."""
    n, engine = setup.processes, setup.engine
    everything, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    saves = bool(setup.gpu and setup.batch_size)
    host = parts["trained weights"] * saves  # safetensors writes from the host
    if engine.name == "DDP":
        return Plan(parts + Counter(workspace=4 * trained * (n > 1)), host=host)  # its buckets
    host += parts["weights"] * saves  # the sharding engines read or gather the frozen ones too
    if engine.name == "FSDP2":
        host = max(host, parts["optimizer states"] * saves)  # which it gathers for a checkpoint
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
    return Plan(parts, offloaded, host)
