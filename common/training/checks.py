"""The checks before anything is loaded: a mistake costs no time, and its message is one sentence."""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate.utils import DynamoBackend
from huggingface_hub import whoami
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_liger_kernel_available

from common.arguments import DataArguments, ModelArguments, Switch, TrainingArguments
from common.data.order import SHORTEST, parse_mix
from common.data.shards import summary_of
from common.data.sources import find_files
from common.devices import check_bits, note_cpu
from common.errors import UserError, note
from common.memory.fit import open_shape, row_lengths
from common.methods import Method
from common.methods.prefix import PTuning
from common.metrics import SCORES
from common.models.precision import half_dtype
from common.models.quantization import checkpointing_of
from common.models.registry import ModelFolder, open_model
from common.models.weights import packed_weights
from common.training.checkpoints import check_writable

SPLITS = (  # split, the flag that names its files, the flag that limits its rows
    ("train", "train_file", "max_train_samples"),
    ("validation", "validation_file", "max_eval_samples"),
    ("test", "test_file", "max_predict_samples"),
    ("probe", "probe_file", None),
)
# Trackers whose module or package has another name.
MODULES = {"azure_ml": "azureml", "flyte": "flytekit"}
PACKAGES = {
    "azure_ml": "azureml-core",
    "comet_ml": "comet-ml",
    "flyte": "flytekit",
    "swanlab": "'swanlab[dashboard]<0.8'",  # the callback of transformers breaks on newer ones
}


def needs(split: str, data_args: DataArguments, args: TrainingArguments) -> bool:
    """Whether the flags ask for a split."""
    if split == "probe":
        return bool(data_args.probe_file) and (args.do_eval or args.do_predict)
    return {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}[split]


def check(method: Method, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> ModelFolder:
    """The model's folder. Raises UserError for input that can't work; loads nothing and changes no argument."""
    check_data(data_args, args)
    check_devices(args)
    check_engine(method, data_args, args)
    check_trackers(args)
    check_hub(args)
    check_best_model(args)
    if args.do_train:
        check_optimizer(method, args)
    name, revision = model_args.model_name_or_path, model_args.model_revision
    folder = (open_shape if args.plan else open_model)(name, revision, model_args.cache_dir, model_args.config_name)
    if (other := model_args.config_name) and open_model(other).spec.key != folder.spec.key:
        raise UserError(f"--config_name {other} is the config of another model than {folder.name}: leave it out.")
    if folder.bits and folder.weights:
        packed_weights(folder)
    check_quantization(method, model_args, args, folder)
    if args.lacks_gpu and not args.plan:
        note_cpu(folder.name, folder.config.hidden_size)
    method.check(folder, args.do_train)
    if args.do_train and Path(args.output_dir).resolve() == folder.path.resolve():
        raise UserError(
            f"--output_dir {args.output_dir} is the base model, which would be overwritten: choose another."
        )
    if not args.plan:
        check_writable(Path(args.output_dir))
    length, context = sum(row_lengths(data_args)), folder.config.max_position_embeddings
    if args.do_train and length > context:
        note(f"warning: rows of {length:,} tokens are longer than the context of {folder.name}, {context:,} tokens.")
    return folder


def complete(method: Method, model_args: ModelArguments, args: TrainingArguments, folder: ModelFolder) -> None:
    """Sets the flags that depend on the model: the bits of a packed checkpoint, checkpointing, and loss scaling.

    A user takes bits to save memory, so such a training checkpoints too, unless --activation_checkpointing is false.
    Through a frozen base in float16 the loss is scaled, or small gradients become 0: at 16,384 labels a step a prefix's
    gradient was off by 4%, and scaled by 0.1%. It needs no autocast, which would make float32 of the norms. DeepSpeed
    scales by itself.
    """
    bits = model_args.quantization_bit = model_args.quantization_bit or folder.bits
    if folder.bits and bits != folder.bits:
        note(f"note: {folder.path} is packed in {folder.bits} bit; --quantization_bit {bits} quantizes it anew.")
    if args.activation_checkpointing is None:
        args.activation_checkpointing = Switch(bool(args.do_train and bits))
    if args.do_train and not method.trains_base and args.engine.name == "DDP" and not half_dtype(args):
        args.loss_scaling = args.fp16 = args.base_dtype(method.trains_base) == torch.float16
        args.mixed_precision = "fp16" if args.fp16 else args.mixed_precision
    shared = isinstance(method, PTuning) and folder.spec.key == "glm"
    args.activation_checkpointing_kwargs = args.activation_checkpointing_kwargs or checkpointing_of(bits, shared)


def check_quantization(
    method: Method, model_args: ModelArguments, args: TrainingArguments, folder: ModelFolder
) -> None:
    """Raises UserError if quantized weights would be trained or sharded, or have no kernels on this device."""
    if not (model_args.quantization_bit or folder.bits):
        return
    if not args.plan:
        check_bits(model_args.quantization_bit or folder.bits, args.device)
    source = f"{folder.path} is packed in {folder.bits} bit" if folder.bits else "--quantization_bit"
    if args.do_train and method.trains_base:
        raise UserError(f"{source}: integers have no gradients to train; take LoRA or P-Tuning v2, or 16-bit weights.")
    if args.engine.sharded:
        raise UserError(
            f"{source}: packed weights can't be sharded by {args.engine.name}; take ZeRO-2, DDP, or 16-bit weights."
        )


def check_data(data_args: DataArguments, args: TrainingArguments) -> None:
    """Raises UserError if no job is asked for, or a file for it is missing."""
    if not (args.do_train or args.do_eval or args.do_predict):
        raise UserError("nothing to do: give --do_train, --do_eval or --do_predict.")
    shards = data_args.train_datasets if args.do_train else None
    count = len(summary_of(Path(shards))["findings"]) if shards else 0
    for split, file_flag, _ in SPLITS:
        asked = needs(split, data_args, args)
        if split == "train" and shards or not (asked or args.do_train):
            continue
        files = find_files(vars(data_args)[file_flag] or "")
        if not asked:  # a training records all files, for an evaluation afterwards
            continue
        count = len(files) if split == "train" else count
        if not files and not data_args.dataset_name and not (data_args.held_out and split != "train"):
            job = {"train": "train", "validation": "eval", "test": "predict"}[split]
            variable = f"{split.upper()}_FILE"
            raise UserError(f"there is no file for --do_{job}: set {variable} (--{file_flag}).")
    if data_args.mix and args.do_train:
        parse_mix(data_args.mix, count)
        if args.train_sampling_strategy not in ("random", "group_by_length"):
            raise UserError(
                f"--mix draws rows at random: leave out --train_sampling_strategy {args.train_sampling_strategy}."
            )
    if args.tokens_per_batch and args.do_train:
        check_token_batches(data_args, args)
    if args.do_predict and data_args.text_column:
        raise UserError("--do_predict answers questions; of plain text --do_eval gives loss and perplexity.")
    if args.label_smoothing_factor:
        raise UserError("--label_smoothing_factor is not supported.")


def check_token_batches(data_args: DataArguments, args: TrainingArguments) -> None:
    """Raises UserError where a row may need more slots than a batch has, or a flag orders or counts rows otherwise."""
    slots, strategy = args.tokens_per_batch, args.train_sampling_strategy
    longest = max(SHORTEST, sum(row_lengths(data_args)))
    if slots and slots < longest:
        raise UserError(
            f"--tokens_per_batch {slots} (TOKENS_PER_BATCH): a row may count for {longest:,} tokens: raise it, or "
            "lower the lengths (--max_source_length, --max_target_length)."
        )
    given = {
        "MIX (--mix)": data_args.mix,
        f"--train_sampling_strategy {strategy}": strategy != "group_by_length",
        "--dataloader_drop_last": args.dataloader_drop_last,
    }
    for flag in filter(given.get, given):
        raise UserError(
            f"--tokens_per_batch makes batches of like length from the rows of all files: leave out {flag}."
        )


def check_rows(rows: int, args: TrainingArguments) -> None:
    """Raises UserError where --dataloader_drop_last leaves nothing of an epoch of ``rows`` rows."""
    batch = args.per_device_train_batch_size * args.processes
    if args.dataloader_drop_last and rows < batch:
        raise UserError(
            f"--dataloader_drop_last: {rows:,} rows fill no batch of {batch:,}: leave it out, or lower BATCH_SIZE "
            "(--per_device_train_batch_size)."
        )


def check_devices(args: TrainingArguments) -> None:
    """Raises UserError unless the right number of processes run, with one device each."""
    if args.fp16 and args.device.type == "cpu":
        raise UserError("--fp16 needs a GPU, and none is visible here: leave the flag out.")
    if args.processes != args.world_size and not args.dry_run:
        raise UserError(f"{args.processes} processes were asked for and {args.world_size} are running.")
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to one process: start with bash train.sh, which gives each GPU a process, "
            f"or with torchrun --nproc_per_node {args.n_gpu}, or choose one GPU with CUDA_VISIBLE_DEVICES=0."
        )


def check_trackers(args: TrainingArguments) -> None:
    """Raises UserError for a tracker of --report_to that is unknown, not installed, or too new for the Trainer."""
    trackers, known = args.report_to, sorted(INTEGRATION_TO_CALLBACK)
    for name in trackers:
        if name not in known:
            problem = "it stands alone" if name in ("none", "all") else f"there are {', '.join(known)}, none and all"
            raise UserError(f"--report_to {','.join(trackers)}: {name} is no tracker; {problem}.")
    missing = [name for name in trackers if name != "kubeflow" and not is_installed(MODULES.get(name, name))]
    if missing:
        packages = " ".join(PACKAGES.get(name, name) for name in missing)
        verb = "are" if missing[1:] else "is"
        raise UserError(
            f"--report_to {','.join(trackers)}: {', '.join(missing)} {verb} not installed here: "
            f"{sys.executable} -m pip install {packages}"
        )
    if "swanlab" in trackers and not re.match(r"0\.[0-7]\.", found := version("swanlab")):
        raise UserError(
            f"--report_to swanlab: the Trainer can't use swanlab {found}: "
            f"{sys.executable} -m pip install {PACKAGES['swanlab']}"
        )


def check_hub(args: TrainingArguments) -> None:
    """Raises UserError unless the hub that --push_to_hub writes to can be reached and knows this user."""
    if args.push_to_hub:
        with tried("--push_to_hub"):
            whoami(args.hub_token)


def is_installed(module: str) -> bool:
    """Whether a package can be imported; a mere folder of its name, in which a tracker keeps its runs, is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def check_best_model(args: TrainingArguments) -> None:
    """Raises UserError if the best checkpoint is asked for by a measure that no evaluation of the training gives."""
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    if args.do_train and not metric and args.save_strategy == "best":
        raise UserError("--save_strategy best needs BEST_METRIC (--metric_for_best_model), the measure of the best.")
    if not args.do_train or not metric:
        return
    if args.eval_strategy == "no":
        if not args.load_best_model_at_end and args.save_strategy != "best":
            return
        raise UserError(
            f"the best checkpoint by {metric} needs evaluations during training: give --eval_strategy steps "
            "--eval_steps N (EVAL_STEPS=N), or leave out --load_best_model_at_end and --metric_for_best_model."
        )
    if metric not in ("loss", *SCORES):
        raise UserError(
            f"--metric_for_best_model {metric} (BEST_METRIC): there are loss and, of generated answers, "
            f"{', '.join(SCORES)}."
        )
    if args.greater_is_better is (metric == "loss"):
        raise UserError(f"--greater_is_better {args.greater_is_better} would keep the worst {metric}: leave it out.")


@contextmanager
def tried(flags: str) -> Iterator[None]:
    """Raises UserError for what ``flags`` can't be used for: libraries say most of it only when they are used."""
    try:
        yield
    except Exception as error:  # each library raises its own
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{flags} can't be used: {reason}.") from error


def check_optimizer(method: Method, args: TrainingArguments) -> None:
    """Raises UserError for an optimizer, a schedule, a data loader, a way of checkpointing or a compiler.

    Each is tried on one number, and starts no process.
    """
    number, steps = torch.nn.Parameter(torch.zeros(1)), max(args.max_steps, 100)
    with tried(f"--optim {args.optim.value}" + (f" --optim_args {args.optim_args}" if args.optim_args else "")):
        Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(1, 1))
    if args.optim not in ("adamw_torch", "adamw_torch_fused") and vars(method.args).get("loraplus_lr_ratio"):
        raise UserError(f"--loraplus_lr_ratio trains by AdamW: leave out --optim {args.optim.value}.")
    kwargs = args.lr_scheduler_kwargs
    with tried(f"--lr_scheduler_type {args.lr_scheduler_type.value} --lr_scheduler_kwargs {json.dumps(kwargs or {})}"):
        descent = torch.optim.SGD([number], args.learning_rate)
        get_scheduler(args.lr_scheduler_type, descent, args.get_warmup_steps(steps), steps, kwargs)
    if kwargs := args.activation_checkpointing_kwargs:
        with tried(f"--activation_checkpointing_kwargs {json.dumps(kwargs)}"):
            checkpoint(torch.nn.Identity(), number, **{"use_reentrant": False} | kwargs)
    loading = ("num_workers", "persistent_workers", "multiprocessing_context", "prefetch_factor")
    given = {name: value for name in loading if (value := vars(args)[f"dataloader_{name}"])}
    with tried(" ".join(f"--dataloader_{name} {value}" for name, value in given.items())):
        DataLoader([0], **given)  # type: ignore[arg-type]
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise UserError(f"--use_liger_kernel: {sys.executable} -m pip install liger-kernel")
    if args.torch_compile:
        backend, mode = str(args.torch_compile_backend), args.torch_compile_mode
        with tried(f"--torch_compile_backend {backend}" + (f" --torch_compile_mode {mode}" if mode else "")):
            torch.compile(torch.nn.Identity(), backend=DynamoBackend(backend.upper()).value.lower(), mode=mode)


def check_engine(method: Method, data_args: DataArguments, args: TrainingArguments) -> None:
    """Raises UserError if the engine can't do what the flags ask."""
    engine = args.engine
    if engine.name == "DDP":
        return
    if not args.do_train:
        raise UserError(f"{engine.name} is for training: evaluate without its flag.")
    if engine.name == "DeepSpeed" and engine.sharded and args.fp16 and not method.trains_base:
        raise UserError(f"ZeRO stage 3 trains {method.name} in float32 or --bf16; --fp16 takes stage 2.")
    if engine.config.get("optimizer") and vars(method.args).get("loraplus_lr_ratio"):
        raise UserError(
            "--loraplus_lr_ratio: the --deepspeed file names an optimizer, which knows one rate: remove it."
        )
    if method.trains_base and data_args.evaluate_base:
        raise UserError(f"--evaluate_base: {engine.name} spreads one model, the trained one; evaluate afterwards.")
    if args.save_on_each_node:
        raise UserError(f"--save_on_each_node: {engine.name} needs an output folder that all machines share.")
    if engine.name == "FSDP2" and args.load_best_model_at_end:
        raise UserError("--fsdp can't be used with --load_best_model_at_end.")
