"""Does it fit? Predicted memory against free memory, before any weight is read; what to change; the largest batch."""

import os
import warnings
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from accelerate.utils import gather_object

from common.arguments import (
    LARGEST_BATCH,
    DataArguments,
    LoraArguments,
    ModelArguments,
    Rows,
    Switch,
    TrainingArguments,
)
from common.devices import free_memory
from common.engine import Engine
from common.errors import UserError, note
from common.files import gb, read_json
from common.launch.machines import number
from common.memory.footprint import CUDA_CONTEXT, Plan, Setup, predict
from common.memory.quantized import quantize
from common.methods import Method
from common.methods.lora import Lora
from common.models.registry import SPECS, ModelFolder, empty_model, is_local, open_model
from common.trained import PASSES, SETTINGS_FILE

# A GPU needs more than the allocator hands out: its unused fragments, 0.6% of that with expandable_segments and 2 to
# 6% without, 14% at worst (tests/bench/RESULTS.md); and NCCL's buffers in each of several processes, 544 MB with two
# A100, 688 MB with more (https://github.com/NVIDIA/nccl/issues/964).
FRAGMENTATION = 0.05
NCCL = 700_000_000  # bytes
MARGIN_ON_CPU = 0.5  # share of the free memory that a choice may take: the C library keeps much of what was freed
MOST_ANSWERS = 64  # rows that are answered together, where that is chosen
MOST_TOKENS = 2**21  # of a pass of one process
BUSY = 2048  # tokens of a pass from which a GPU computes all the time, rather than wait for kernels to start
ENGINE_TOLERANCE = 1.15  # factor by which a prediction for DeepSpeed and FSDP2, a coarser one, may exceed the memory


class Case(NamedTuple):
    """A training or an evaluation to predict."""

    folder: ModelFolder
    method: Method
    setup: Setup
    known: list[tuple[Setup, Counter[str]]]  # the peaks of steps that were predicted before, with this method

    def plan(self) -> Plan:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about an adapter's weights, which are lost on the meta device
            model = empty_model(self.folder.spec, deepcopy(self.folder.config)).to(self.setup.dtype)
            model.name_or_path = str(self.folder.path)
            quantize(model, self.setup.bits, self.setup.dtype)
            model = self.method.attach(model)
        return predict(model, self.setup, self.known)

    def changed(self, method: Method | None = None, **setup: Any) -> "Case":
        changed = self._replace(setup=replace(self.setup, **setup))
        return changed._replace(method=method, known=[]) if method else changed


class Forecast(NamedTuple):
    """The predicted memory of a case, and the memory that one process may take, in bytes."""

    case: Case
    plan: Plan
    available: int


def open_shape(name: str, revision: str, cache_dir: str | None, config_name: str | None) -> ModelFolder:
    """The model to plan for. The three 6B models need no folder and no hub."""
    plain = Path(name).name.lower().removesuffix("-6b")
    if name.endswith("-6b") and plain in ("chatglm", "chatglm2", "chatglm3") and not is_local(name):
        spec = SPECS[plain]
        return ModelFolder(name, Path(name), spec, spec.config(), bits=None, weights=())
    return open_model(name, revision, cache_dir, config_name)


def forecast(
    folder: ModelFolder, method: Method, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> Forecast:
    """Predicts the memory of this run; chooses what the flags leave open: batch, checkpointing, answers at once.

    Raises UserError for a pass that no machine can hold: to predict it would take minutes.
    """
    if args.tokens_per_batch and args.do_train:
        args.per_device_train_batch_size = Rows(args.tokens_per_batch // sum(row_lengths(data_args)))
    case = Case(folder, method, setup_of(method, model_args.quantization_bit, data_args, args), known=[])
    setup = case.setup
    rows = max(setup.batch_size, setup.evaluation_batch_size, setup.generation_batch_size)
    if (tokens := max(rows * (setup.source_length + setup.target_length), setup.slots)) > MOST_TOKENS:
        raise UserError(
            f"a pass of {tokens:,} tokens is more than any machine holds: lower BATCH_SIZE "
            "(--per_device_train_batch_size), TOKENS_PER_BATCH (--tokens_per_batch), EVAL_BATCH_SIZE "
            "(--per_device_eval_batch_size) or the lengths."
        )
    available = card_memory(args) or free_share(args)
    if args.do_train and (args.batch_sizes or args.auto_checkpointing):
        case = choose_passes(case, args, data_args, available)
    args.auto_answers = args.auto_answers and not (args.per_device_eval_batch_size == 1 and data_args.do_sample)
    if args.auto_answers and case.setup.generation_batch_size:
        case = choose_answers(case, args, available)
    return Forecast(case, case.plan(), available)


def check_fits(found: Forecast, args: TrainingArguments) -> None:
    """Raises UserError if the prediction exceeds the free memory; only warns with ``--check_memory false``."""
    case, plan, available = found
    problem = shortage(case, plan, available, args)
    if problem and not args.check_memory:
        note(f"warning: {problem}.")
    elif problem:
        note(f"{problem}: looking for a change that helps")
        changes = advice(case, lambda case: not shortage(case, case.plan(), available, args), args)
        raise UserError(f"{problem}: {changes}; --check_memory false starts it anyway.")


def what_would_fit(found: Forecast | None, args: TrainingArguments, trains: bool) -> str:
    """What to change where memory ran out all the same, in a training or in an evaluation: the two cheapest changes.

    Each plan of a 6B model takes seconds.
    """
    if found is None:
        return "smaller batches, shorter lengths or --quantization_bit 4 take less"
    case = found.case if trains else found.case.changed(batch_size=0)
    size = needed(case.plan(), case.setup)
    planned = (
        (flags, needed((less := case.changed(**change)).plan(), less.setup)) for flags, change in changes(case, args)
    )
    smaller = islice(((flags, less) for flags, less in planned if less < size), 2)
    advice = " or ".join(f"{flags} ({gb(less)})" for flags, less in smaller)
    return f"the plan for it is {gb(size)}, and {gb(found.available)} were free: take {advice or 'a smaller model'}"


def setup_of(method: Method, bits: int | None, data_args: DataArguments, args: TrainingArguments) -> Setup:
    gpu = bool(card_memory(args)) or args.device.type != "cpu"  # here or elsewhere
    trains = bool(args.do_train)
    generates = bool(args.do_predict or args.do_eval and args.predict_with_generate)
    dtype = args.base_dtype(method.trains_base)
    half = torch.float16 if args.fp16 else torch.bfloat16
    mixed = args.fp16 or args.bf16
    if gpu and args.device.type == "cpu" and args.precision != "fp32":  # planned for a card that is not here
        mixed = mixed or args.precision == "auto" or args.engine.name == "DeepSpeed"
        if not (method.trains_base and trains and args.engine.name != "DeepSpeed"):
            dtype = half
    source_length, target_length = row_lengths(data_args)
    answer_length = data_args.max_new_tokens or data_args.val_max_target_length
    return Setup(
        batch_size=args.per_device_train_batch_size if trains else 0,
        slots=args.tokens_per_batch if trains and args.tokens_per_batch else 0,
        source_length=source_length,
        target_length=target_length,
        all_labelled=bool(data_args.text_column or data_args.conversation_column),
        packed=data_args.packing,
        bits=bits,
        dtype=dtype,
        autocast=half if trains and mixed and not args.loss_scaling and args.engine.name != "DeepSpeed" else None,
        checkpointing=bool(args.activation_checkpointing),
        accumulates=args.gradient_accumulation_steps > 1,
        evaluation_batch_size=args.per_device_eval_batch_size if args.do_eval else 0,
        generation_batch_size=args.answer_batch_size * (data_args.num_beams or 1) if generates else 0,
        answers_in_training=bool(trains and args.predict_with_generate and args.eval_strategy != "no"),
        answer_length=0 if answer_length == data_args.max_target_length else answer_length,
        gpu=gpu,
        processes=args.processes,
        engine=args.engine,
    )


def row_lengths(data_args: DataArguments) -> tuple[int, int]:
    """The most tokens of question and answer in a training row; plain text is all of one kind."""
    return data_args.max_source_length, 0 if data_args.text_column else data_args.max_target_length + 1


def processes_here(args: TrainingArguments) -> int:
    return int(os.environ.get("PROCESSES_PER_MACHINE") or os.environ.get("LOCAL_WORLD_SIZE") or args.processes)


def card_memory(args: TrainingArguments) -> int:
    """Bytes of the card that DEVICE_MEMORY (GB) describes for --plan, without CUDA's own; 0 if it is not set."""
    size = number(os.environ, "DEVICE_MEMORY", 0.0) if args.plan else 0
    return max(1, int(size * 1e9 - CUDA_CONTEXT)) if size else 0


def free_share(args: TrainingArguments) -> int:
    """Bytes that one process may take: free on its GPU, or its share of the host."""
    return free_memory(args.device) // (processes_here(args) if args.device.type == "cpu" else 1)


def margins(plan: Plan, setup: Setup) -> dict[str, int]:
    """{name: bytes} that a process takes of its GPU beside the plan; nothing on a CPU."""
    if not setup.gpu:
        return {}
    buffers = {"NCCL's buffers": NCCL} if setup.processes > 1 else {}
    return {"fragmentation": int(plan.total * FRAGMENTATION), **buffers}


def needed(plan: Plan, setup: Setup) -> int:
    """Bytes that must be free for a process on its device."""
    return plan.total + sum(margins(plan, setup).values())


def shortage(case: Case, plan: Plan, available: int, args: TrainingArguments) -> str:
    """The part that does not fit, as a sentence without its full stop; "" if all fits."""
    whole = plan.host if os.environ.get("MACHINE_RANK", "0") == "0" else 0
    on_host, host = whole + plan.offloaded * processes_here(args), psutil.virtual_memory().available
    if on_host > host and not card_memory(args):
        cause = "offloading" if plan.offloaded else "reading and saving the weights"
        return f"{cause} needs {gb(on_host)} of this machine's memory and {gb(host)} are free"
    size = needed(plan, case.setup)
    if size <= available * (1 if args.engine.name == "DDP" else ENGINE_TOLERANCE):
        return ""
    largest = [*plan.largest()[:3], *margins(plan, case.setup).items()]
    parts = ", ".join(f"{name} {gb(size)}" for name, size in largest)
    device = "a card of DEVICE_MEMORY" if card_memory(args) else args.device
    return f"this needs about {gb(size)} of memory ({parts}) and {gb(available)} are free on {device}"


def largest_fitting(cases: list[Case], sizes: list[int], available: int) -> int:
    """The largest of ``sizes`` whose case fits; 0 if none does. ``cases``: in ascending order of their memory.

    Each plan of a 6B model takes seconds, and mostly the largest fits.
    """
    room = available if cases[0].setup.gpu else MARGIN_ON_CPU * available

    def too_large(case: Case) -> bool:
        return needed(case.plan(), case.setup) > room

    if not too_large(cases[-1]):
        return sizes[-1]
    if len(cases) == 1 or too_large(cases[0]):
        return 0
    return sizes[bisect(cases[1:-1], False, key=too_large)]


def choose_passes(case: Case, args: TrainingArguments, data_args: DataArguments, available: int) -> Case:
    """Sets batch, accumulation and checkpointing where they are open; a continued training keeps its own."""
    largest = args.rows_per_step or data_args.max_train_samples or LARGEST_BATCH
    sizes = [size for size in args.batch_sizes if size <= largest] or [case.setup.batch_size]
    earlier = {} if args.overwrite_output_dir else read_json(Path(args.output_dir) / SETTINGS_FILE) or {}
    size, checkpoints = (earlier.get(name) for name in PASSES)
    if size in sizes and checkpoints is not None:
        checkpoints = checkpoints if args.auto_checkpointing else case.setup.checkpointing
        reason = f"as in the training that {args.output_dir} holds"
    else:
        size, checkpoints = fastest_passes(case, sizes, args, available)
        reason = f"the largest power of two, at most {sizes[-1]}, for {gb(available)}"
    if args.world_size > 1:  # devices differ, and the output folders of machines may
        found = gather_object([(size, checkpoints)])
        size, checkpoints = min(size for size, _ in found), any(checkpoints for _, checkpoints in found)
    chosen = changed_passes(case, size, checkpoints, args)
    args.per_device_train_batch_size, args.activation_checkpointing = Rows(size), Switch(checkpoints)
    args.gradient_accumulation_steps = accumulation(size, args)
    if args.process_index == 0 and args.batch_sizes:
        note(f"batch size {size}: {reason}")
    if args.process_index == 0 and args.auto_checkpointing:
        note(f"gradient checkpointing: {'on, to save memory' if checkpoints else 'off, the training fits without it'}")
    return chosen


def accumulation(size: int, args: TrainingArguments) -> int:
    """Batches of ``size`` rows in a step."""
    if args.batch_sizes and args.rows_per_step:
        return args.rows_per_step // size
    return args.gradient_accumulation_steps


def changed_passes(case: Case, size: int, checkpoints: bool, args: TrainingArguments) -> Case:
    """The case with another batch; accumulation makes up the rest of a step."""
    return case.changed(batch_size=size, checkpointing=checkpoints, accumulates=accumulation(size, args) > 1)


def fastest_passes(case: Case, sizes: list[int], args: TrainingArguments, available: int) -> tuple[int, bool]:
    """(batch size, whether to checkpoint): the largest of ``sizes`` that fits, or the one that is nearest to it.

    Without checkpointing a step computes 2 passes and not 3. It is left out if then at least half of the largest batch
    fits, or one that keeps a GPU busy: on an H200 a step of 1 x 128 tokens took 204 ms with it and 100 without.
    """
    training = case.changed(evaluation_batch_size=0, generation_batch_size=0)
    if args.auto_checkpointing:
        size = largest_fitting([changed_passes(training, size, False, args) for size in sizes], sizes, available)
        tokens = size * (case.setup.source_length + case.setup.target_length)
        if 2 * size >= sizes[-1] or tokens >= BUSY:
            return size, False
    checkpoints = args.auto_checkpointing or case.setup.checkpointing
    cases = [changed_passes(training, size, checkpoints, args) for size in sizes]
    size = largest_fitting(cases, sizes, available)
    if not size:  # accumulating gradients may take more than a larger batch
        _, size = min((cases[i].plan().total, sizes[i]) for i in (0, -1))
    return size, checkpoints


def choose_answers(case: Case, args: TrainingArguments, available: int) -> Case:
    """Sets how many rows are answered together: the largest power of two that fits in every process."""
    beams = case.setup.generation_batch_size // args.answer_batch_size
    sizes = [2**power for power in range(MOST_ANSWERS.bit_length())]
    answering = case.changed(batch_size=0, evaluation_batch_size=0)
    cases = [answering.changed(generation_batch_size=size * beams) for size in sizes]
    size = largest_fitting(cases, sizes, available) or sizes[0]
    args.answer_batch_size = min(gather_object([size])) if args.world_size > 1 else size
    return case.changed(generation_batch_size=args.answer_batch_size * beams)


def advice(case: Case, fits: Callable[[Case], bool], args: TrainingArguments) -> str:
    """Names up to two changes that are enough alone, cheapest first, else the first few that are enough together."""
    known = list(changes(case, args))
    enough = (name for name, change in known if fits(case.changed(**change)))
    alone = list(islice(enough, 2))  # each plan of a 6B model takes seconds
    if alone:
        return " or ".join(alone) + " makes it fit"
    together = case
    for count, (_, change) in enumerate(known, 1):
        together = together.changed(**change)
        if count > 1 and fits(together):
            return " and ".join(name for name, _ in known[:count]) + " together make it fit"
    return "no change that is known here makes it fit; it takes a smaller model or more memory"


def changes(case: Case, args: TrainingArguments) -> Iterator[tuple[str, dict[str, Any]]]:
    """At most four changes, cheapest first: (flags, arguments of ``Case.changed``)."""
    setup = case.setup
    if setup.batch_size and not setup.checkpointing:
        yield "--activation_checkpointing true", {"checkpointing": True}
    fewer, longest = setup.slots // 2, setup.source_length + setup.target_length
    if fewer >= longest:
        flags = f"--tokens_per_batch {fewer} --gradient_accumulation_steps {2 * args.gradient_accumulation_steps}"
        yield flags, {"slots": fewer, "batch_size": fewer // longest, "accumulates": True}
    rows = max(1, setup.batch_size // 4)
    accumulated = setup.batch_size * args.gradient_accumulation_steps
    if not setup.slots and setup.batch_size > rows and accumulated % rows == 0:
        flags = f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulated // rows}"
        yield flags, {"batch_size": rows, "accumulates": True}
    elif max(setup.generation_batch_size, setup.evaluation_batch_size) > 1:
        sizes = {name: min(1, vars(setup)[name]) for name in ("generation_batch_size", "evaluation_batch_size")}
        yield "--per_device_eval_batch_size 1", sizes
    if setup.batch_size and case.method.trains_base:
        half = {"dtype": torch.bfloat16 if setup.gpu else torch.float32, "autocast": None}
        if setup.gpu:
            zero = {"zero_optimization": {"stage": 3}}
            engine = Engine("DeepSpeed", sharded=True, offload=(True, True), config=zero)
            yield "--deepspeed full/ds_zero_3_offload.json", half | {"engine": engine}
        low_rank = {"method": Lora(LoraArguments()), "engine": Engine(), "bits": 4}
        yield "LoRA (lora/train.sh) with --quantization_bit 4", half | low_rank
        return
    if setup.bits != 4 and not args.engine.sharded:
        yield "--quantization_bit 4", {"bits": 4}
    source, target = setup.source_length // 2, setup.target_length // 2
    flags = f"--max_source_length {source}" + f" --max_target_length {target}" * (target > 0)
    yield flags, {"source_length": source, "target_length": target}
