"""Does it fit? Predicted memory beside what there is, before anything is loaded; what to change; the largest batch.

bash common/memory.sh                          what a training script needs, told by the same variables
python common/memory/fit.py --table                the three 6B models by method and bits, as Markdown
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
import torch
from accelerate.utils import gather_object
from rich.table import Table
from transformers import PreTrainedConfig

from common.arguments import (
    BatchSize,
    DataArguments,
    FullArguments,
    LoraArguments,
    ModelArguments,
    PrefixArguments,
    TrainingArguments,
    parse_arguments,
)
from common.errors import UserError, exit_on_user_error, say
from common.files import gb, read_json
from common.hub.download import fetch_small_files
from common.launch.machines import number, whole_number
from common.loading import DEMOS, resolve_model
from common.memory.footprint import CUDA_CONTEXT, Plan, Setup, predict
from common.methods.full import Method, base_dtype, full, lora, p_tuning
from common.models.registry import GENERATIONS, Generation, generation_of
from common.training.checkpoints import SETTINGS_FILE
from common.training.report import console

ROOT = Path(__file__).resolve().parents[2]
LARGEST_BATCH = 256
MARGIN = 0.9  # of what there is, that a batch chosen here may take
MARGIN_ON_CPU = 0.5  # where the C library keeps much of what was freed
DOUBT = 1.15  # by which a prediction for DeepSpeed and FSDP2, which is coarser, may exceed what there is
METHODS: dict[str, tuple[type, Callable[[Any], Method]]] = {
    "ptuning": (PrefixArguments, p_tuning),
    "lora": (LoraArguments, lora),
    "full": (FullArguments, full),
}
PLAIN_NAMES = {"chatglm-6b": "chatglm", "chatglm2-6b": "chatglm2", "chatglm3-6b": "chatglm3"}


class Memory(NamedTuple):
    """What check_memory found: bytes at the peak of one process, and the same beside what there is, in words."""

    predicted: int
    sentence: str


class Case(NamedTuple):
    """A training or an evaluation whose memory is asked for."""

    generation: Generation
    config: PreTrainedConfig
    method: Method
    setup: Setup

    def plan(self) -> Plan:
        return predict(self.generation.model, self.config, self.method, self.setup)

    def changed(self, method: Method | None = None, **setup: Any) -> "Case":
        return self._replace(method=method or self.method, setup=replace(self.setup, **setup))


def shape_of(name: str) -> tuple[Generation, PreTrainedConfig]:
    """What config.json of a model says; of the three 6B models it need not be there."""
    plain = Path(name).name
    if plain in PLAIN_NAMES and not Path(name).is_dir():
        generation = GENERATIONS[PLAIN_NAMES[plain]]
        return generation, generation.config()
    local = name in DEMOS or Path(name).is_dir()
    folder = resolve_model(name) if local else fetch_small_files(name)
    generation = generation_of(folder)
    return generation, generation.config.from_pretrained(folder)


def setup_of(
    method: Method, bits: int | None, data_args: DataArguments, args: TrainingArguments, gpu: bool, generates: bool
) -> Setup:
    """``gpu``: whether it is for one, here or elsewhere; ``generates``: whether questions will be answered."""
    trains = bool(args.do_train)
    dtype = base_dtype(method, args)
    if gpu and args.device.type == "cpu" and dtype == torch.float32:  # planned for a GPU elsewhere
        dtype = torch.float32 if method.trains_base and args.engine == "DDP" and trains else torch.bfloat16
    half = torch.float16 if args.fp16 else torch.bfloat16
    own_text = bool(data_args.text_column)
    answer_length = data_args.max_new_tokens or data_args.val_max_target_length
    return Setup(
        batch_size=args.per_device_train_batch_size if trains else 0,
        source_length=data_args.max_source_length,
        target_length=0 if own_text else data_args.max_target_length + 1,
        all_labelled=bool(own_text or data_args.conversation_column),
        bits=bits,
        dtype=dtype,
        autocast=half if trains and (args.fp16 or args.bf16) and args.engine != "DeepSpeed" else None,
        checkpointing=bool(args.activation_checkpointing),
        accumulates=args.gradient_accumulation_steps > 1,
        evaluation_batch_size=args.per_device_eval_batch_size if args.do_eval else 0,
        generation_batch_size=args.per_device_eval_batch_size * (data_args.num_beams or 1) if generates else 0,
        answer_length=0 if answer_length == data_args.max_target_length else answer_length,
        gpu=gpu,
        processes=args.processes,
        engine=args.engine,
        zero=args.zero,
        offload=args.offload,
    )


def processes_here(args: TrainingArguments) -> int:
    here = os.environ.get("PROCESSES_PER_MACHINE") or os.environ.get("LOCAL_WORLD_SIZE") or args.processes
    return int(here)


def there_is(args: TrainingArguments) -> int:
    """Bytes that one process may take: what is free on its GPU, or its share of what is free on the host."""
    if args.device.type != "cpu":
        return torch.accelerator.get_memory_info(args.device)[0]
    return psutil.virtual_memory().available // processes_here(args)


def parts_of(plan: Plan) -> dict[str, int]:
    """What lies on the device, by kind, largest first."""
    parts = {name: size for name, size in vars(plan).items() if name != "offloaded" and size >= 5e6}
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def case_of_arguments(
    method: Method, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, folder: Path
) -> Case:
    """What is about to run here."""
    generation = generation_of(folder)
    config = generation.config.from_pretrained(folder)
    generates = bool(args.do_predict or args.do_eval and args.predict_with_generate)
    gpu = args.device.type != "cpu"
    setup = setup_of(method, model_args.quantization_bit, data_args, args, gpu, generates)
    return Case(generation, config, method, setup)


def check_memory(
    method: Method, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, folder: Path
) -> Memory:
    """Raises UserError where it can't fit; chooses the batch size where that is asked for."""
    case, available = case_of_arguments(method, model_args, data_args, args, folder), there_is(args)
    if args.do_train and args.per_device_train_batch_size.auto:
        case = choose_batch_size(case, args, data_args, available)
    plan = case.plan()
    sentence = lacking(plan, available, args)
    if sentence:
        changes = advice(case, lambda plan: not lacking(plan, available, args), args)
        sentence = f"{sentence}: {changes}; --check_memory false tries it all the same."
        if args.check_memory:
            raise UserError(sentence)
        say(f"warning: {sentence}")
    return Memory(plan.total, f"{gb(plan.total)} predicted at the peak, {gb(available)} free")


def lacking(plan: Plan, available: int, args: TrainingArguments) -> str:
    """What does not fit, in a sentence without its full stop; "" where all does."""
    offloaded, host = plan.offloaded * processes_here(args), psutil.virtual_memory().available
    if offloaded > host:
        return f"offloading needs {gb(offloaded)} of this machine's memory and {gb(host)} are free"
    if plan.total <= available * (1 if args.engine == "DDP" else DOUBT):
        return ""
    parts = ", ".join(f"{name} {gb(size)}" for name, size in list(parts_of(plan).items())[:3])
    return f"this needs about {gb(plan.total)} of memory ({parts}) and {gb(available)} are free on {args.device}"


def choose_batch_size(case: Case, args: TrainingArguments, data_args: DataArguments, available: int) -> Case:
    """Sets the largest power of two that fits in every process; of a training that is continued, its own."""
    earlier = read_json(Path(args.output_dir) / SETTINGS_FILE) or {}
    others = args.gradient_accumulation_steps * args.processes
    size = earlier.get("rows_per_step", 0) // others if not args.overwrite_output_dir else 0
    if size:
        reason = f"as in the training that {args.output_dir} holds"
    else:
        limit = min(LARGEST_BATCH, data_args.max_train_samples or LARGEST_BATCH)
        margin = MARGIN if case.setup.gpu else MARGIN_ON_CPU
        sizes = [2**power for power in range(limit.bit_length())]
        fitting = [1]
        while sizes:  # by bisection
            middle = len(sizes) // 2
            fits = case.changed(batch_size=sizes[middle]).plan().total <= margin * available
            fitting += sizes[middle : middle + 1] * fits
            sizes = sizes[middle + 1 :] if fits else sizes[:middle]
        size = max(fitting)
        reason = f"the largest power of two that fits into {gb(available)}, at most {limit}"
    if args.world_size > 1:  # all ask, also where machines find different things in their folders
        size = min(gather_object([size]))
    args.per_device_train_batch_size = BatchSize(size)
    if args.process_index == 0:
        say(f"batch size {size}: {reason}")
    return case.changed(batch_size=size)


def advice(case: Case, fits: Callable[[Plan], bool], args: TrainingArguments) -> str:
    """The two cheapest changes of which each suffices alone; where none does, the first few that do together."""
    alone: list[str] = []
    together: dict[str, str] = {}
    all_changed, enough = case, False
    for flag, name, change in changes(case, args):
        if fits(case.changed(**change).plan()):
            alone.append(name)
        if len(alone) == 2:
            break
        if not alone and not enough:
            together[flag] = name
            all_changed = all_changed.changed(**change)
            enough = fits(all_changed.plan())
    if alone:
        return " or ".join(alone) + " makes it fit"
    if enough:
        return " and ".join(together.values()) + " together make it fit"
    return "no change that is known here makes it fit; it takes a smaller model or more memory"


def changes(case: Case, args: TrainingArguments) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What can be changed, from what costs least on: its kind, in words, and what becomes of the setup and method."""
    setup = case.setup
    trains, trains_base = setup.batch_size > 0, setup.batch_size > 0 and case.method.trains_base
    if trains and not setup.checkpointing:
        yield "checkpointing", "--activation_checkpointing true", {"checkpointing": True}
    if max(setup.generation_batch_size, setup.evaluation_batch_size) > 1:
        sizes = {name: min(1, vars(setup)[name]) for name in ("generation_batch_size", "evaluation_batch_size")}
        yield "eval", "--per_device_eval_batch_size 1", sizes
    accumulated = setup.batch_size * args.gradient_accumulation_steps
    for rows in sorted({setup.batch_size // 4, min(setup.batch_size, 1)} - {setup.batch_size, 0}, reverse=True):
        flags = f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulated // rows}"
        if accumulated % rows == 0:
            yield "batch", flags, {"batch_size": rows, "accumulates": True}
    if setup.bits != 4 and not trains_base and not args.sharded:
        yield "bits", "--quantization_bit 4", {"bits": 4}
    source, target = setup.source_length // 2, setup.target_length // 2
    flags = f"--max_source_length {source}" + f" --max_target_length {target}" * (target > 0)
    yield "lengths", flags, {"source_length": source, "target_length": target}
    if not trains_base:
        return
    if setup.gpu:
        sharded = {"engine": "DeepSpeed", "dtype": torch.bfloat16, "autocast": None, "zero": {"stage": 3}}
        for count in (2, 4, 8):
            if count > setup.processes:
                name = f"{count} GPUs with --deepspeed full/ds_zero_3.json"
                yield "engine", name, sharded | {"processes": count}
        yield "engine", "--deepspeed full/ds_zero_3_offload.json", sharded | {"offload": (True, True)}
    dtype = torch.bfloat16 if setup.gpu else torch.float32
    single = {"engine": "DDP", "dtype": dtype, "autocast": None, "zero": {}, "offload": (False, False)}
    low_rank = single | {"method": lora(LoraArguments())}
    yield "method", "LoRA (lora/train.sh)", low_rank
    yield "method", "LoRA (lora/train.sh) with --quantization_bit 4", low_rank | {"bits": 4}


def flags_of(script: str, **variables: str) -> list[str]:
    """The program's flags that a training script would start it with: what is default stands there and nowhere else."""
    environment = os.environ | {"PRINT_FLAGS": "true", "EVALUATE": "false"} | variables
    done = subprocess.run(["bash", str(ROOT / script)], env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{script} can't be asked for its settings (see above).")
    return done.stdout.splitlines()[1:]  # without the program itself


def case_of(method_name: str, argv: list[str], gpu: bool) -> tuple[Case, TrainingArguments]:
    """What a training script would run, on another machine perhaps, told by its flags."""
    arguments, make = METHODS[method_name]
    model_args, method_args, data_args, args = parse_arguments(arguments, [*argv, "--dry_run"])
    if gpu and args.precision == "auto" or args.engine == "DeepSpeed" and not args.fp16:
        args.bf16 = True
    method = make(method_args)
    generation, config = shape_of(model_args.model_name_or_path)
    bits = model_args.quantization_bit or vars(config).get("quantization_bit")  # which a packed checkpoint says
    setup = setup_of(method, bits, data_args, args, gpu, bool(args.do_predict))
    return Case(generation, config, method, setup), args


def print_plan(case: Case, plan: Plan, device_memory: float) -> None:
    """``device_memory``: bytes, 0 where none is asked about."""
    setup = case.setup
    table = Table(title=f"{case.generation.name}, {case.method.name}: predicted memory", title_justify="left")
    table.add_column("at the peak")
    table.add_column("GB", justify="right")
    for name, size in parts_of(plan).items():
        table.add_row(LABELS[name], f"{size / 1e9:,.2f}")
    table.add_section()
    table.add_row("of a process on its device", f"{plan.total / 1e9:,.2f}")
    if setup.gpu:
        table.add_row("CUDA itself, beside that", f"{CUDA_CONTEXT / 1e9:,.2f}")
    if plan.offloaded:
        table.add_row("of a process on the host", f"{plan.offloaded / 1e9:,.2f}")
    console().print(table)
    bits = f"{setup.bits} bit" if setup.bits else str(setup.dtype).removeprefix("torch.")
    console().print(
        f"{setup.batch_size} x ({setup.source_length} + {setup.target_length}) tokens, {bits}, "
        f"{'with' if setup.checkpointing else 'without'} gradient checkpointing, "
        f"{setup.processes} process{'es under ' + setup.engine if setup.processes > 1 else ''}"
        + (f", answers {setup.generation_batch_size} rows at once" if setup.generation_batch_size else "")
    )


LABELS = {
    "weights": "weights",
    "trained": "trained weights",
    "gradients": "gradients",
    "optimizer": "the optimizer's states",
    "activations": "activations",
    "logits": "logits",
    "workspace": "workspace (dequantized weights, buckets)",
}


def print_table() -> None:
    """The three 6B models by method and bits, each with the defaults of its training script, as Markdown."""
    models = list(PLAIN_NAMES)
    print("| method | weights | lengths, batch |", " | ".join(models), "|")
    print("|---|---|---|" + "---:|" * len(models))
    for method in METHODS:
        for bits in ("4", "8", "") if method != "full" else ("",):
            cells = []
            for model in models:
                argv = flags_of(f"{method}/train.sh", MODEL=model, QUANTIZATION_BIT=bits)
                case, _ = case_of(method, argv, gpu=True)
                cells.append(f"{case.plan().total / 1e9:.1f} GB")
            setup = case.setup
            shape = f"{setup.source_length} + {setup.target_length - 1}, {setup.batch_size}"
            kind = f"{bits} bit" if bits else "32 bit" if method == "full" else "16 bit"
            print("|", " | ".join([case.method.name, kind, shape, *cells]), "|", flush=True)


def main() -> None:
    if sys.argv[1:] == ["--table"]:
        print_table()
        return
    method = os.environ.get("METHOD", "lora")
    if method not in METHODS:
        raise UserError(f"METHOD={method}: there are {', '.join(METHODS)}.")
    device = os.environ.get("DEVICE") or "gpu"
    if device not in ("gpu", "cpu"):
        raise UserError(f"DEVICE={device}: there are gpu and cpu.")
    gpu = device == "gpu"
    visible = torch.accelerator.get_memory_info()[1] if gpu and torch.accelerator.is_available() else 0
    memory = number(os.environ, "DEVICE_MEMORY", 0) * 1e9 or visible
    os.environ["EXPECTED_PROCESSES"] = str(whole_number(os.environ, "NUM_GPUS", 1) or 1)
    engine = ["--deepspeed", os.environ["DEEPSPEED"]] if os.environ.get("DEEPSPEED") else []
    case, args = case_of(method, [*flags_of(f"{method}/train.sh"), *engine, *sys.argv[1:]], gpu)
    plan = case.plan()
    print_plan(case, plan, memory)
    if not memory:
        return
    needed = CUDA_CONTEXT * gpu
    if plan.total + needed <= memory:
        console().print(f"fits into {gb(memory)}, of which {gb(memory - plan.total - needed)} remain")
        return
    changes = advice(case, lambda plan: plan.total + needed <= memory, args)
    raise UserError(f"this needs about {gb(plan.total + needed)} and does not fit into {gb(memory)}: {changes}.")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
