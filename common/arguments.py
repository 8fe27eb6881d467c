"""The flags, as dataclasses: those of the official arguments.py, and the training arguments of transformers.

Making one checks its values and starts nothing: it sets up no device and joins no process.
"""

import os
from argparse import ArgumentTypeError
from dataclasses import dataclass, field
from math import gcd
from typing import Literal, NewType

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Seq2SeqTrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import IntervalStrategy

from common.bounds import check_values
from common.declared import truth
from common.devices import this_device
from common.engine import Engine, engine_of, fsdp_config, read_config
from common.models.precision import choose_precision, compute_dtype, half_dtype

# The parser reads these as words, because they may be auto; TrainingArguments turns them into numbers and switches.
Rows = NewType("Rows", int)
Switch = NewType("Switch", bool)
LARGEST_BATCH = 256
USUAL_ROWS = 4  # of a batch where --rows_per_step leaves the batch open, and nothing can be chosen


def flag(help_text: str, default=None, alone=None, **kwargs):
    """A field with its help text, written once where the flag stands; ``alone``: its value if it is given without."""
    optional = {} if alone is None else {"nargs": "?", "const": alone}
    return field(default=default, metadata={"help": help_text, **optional}, **kwargs)


@dataclass
class ModelArguments:
    model_name_or_path: str = flag("demo, demo3, a folder with a checkpoint, or a hub id", "demo")
    config_name: str | None = flag("Folder or hub id of another config")
    tokenizer_name: str | None = flag("Folder or hub id of another tokenizer")
    checkpoint: str | None = flag("Evaluate a training, or the newest one in a folder, with its recorded settings")
    cache_dir: str | None = flag("Folder for models from the hub")
    model_revision: str = flag("Branch, tag or commit of the model on the hub", "main")
    quantization_bit: int | None = flag("Load the frozen base model in 4 or 8 bit; 0: not quantized")

    def __post_init__(self):
        check_values(self)
        self.quantization_bit = self.quantization_bit or None
        if self.quantization_bit not in (None, 4, 8):
            raise ValueError(f"--quantization_bit {self.quantization_bit}: only 4 and 8 exist")


@dataclass
class PrefixArguments:
    ptuning_checkpoint: str | None = flag("Folder of a trained prefix: to evaluate it, or to train it further")
    pre_seq_len: int | None = flag("P-Tuning v2: number of virtual tokens; read from the checkpoint when evaluating")
    prefix_projection: bool = flag("P-Tuning v2: make the prefix with a two-layer network", False)

    def __post_init__(self):
        check_values(self)


@dataclass
class LoraArguments:
    lora_checkpoint: str | None = flag("Folder of a trained adapter: to evaluate it, or to train it further")
    lora_rank: int = flag("LoRA: rank of the two small matrices", 8)
    lora_alpha: int = flag("LoRA: the adapter is scaled by alpha / rank", 32)
    lora_dropout: float = flag("LoRA: dropout of the adapter's input", 0.1)
    lora_target: str | None = flag(
        "LoRA: linear layers, as in a,b, or all-linear; default: query_key_value (GLM-4: q_proj,k_proj,v_proj)"
    )
    use_rslora: bool = flag("LoRA: scale by alpha / sqrt(rank) (rsLoRA), for large ranks", False)
    use_dora: bool = flag("LoRA: learn the magnitude of the weights apart from their direction (DoRA)", False)
    loraplus_lr_ratio: float | None = flag("LoRA: learning rate of the B matrices over that of the A's (LoRA+)")

    def __post_init__(self):
        check_values(self)


@dataclass
class FullArguments:
    save_format: Literal["safetensors", "bin"] = flag(
        "Format of the weights: safetensors, or bin, which the original code reads", "safetensors"
    )


@dataclass
class DataArguments:
    train_file: str | None = flag(
        "Training data (JSON, CSV, Parquet, text): files with commas between them, folder, glob"
    )
    train_datasets: str | None = flag("Folder of training data that common/preprocess.sh made, instead of --train_file")
    validation_file: str | None = flag("Data for --do_eval, in the same formats; default: --validation_split")
    test_file: str | None = flag("Data for --do_predict, in the same formats; default: the validation data")
    validation_split: float = flag("Share of the training rows, or their number, for validation without a file", 0.05)
    probe_file: str | None = flag("General questions with answers: their loss shows what a model forgets in training")
    mix: str | None = flag("Rows of each training file for one row of the first, as in 1,0.3; drawn anew each epoch")
    dataset_name: str | None = flag("A data set on the hub, or a folder, instead of files")
    dataset_config_name: str | None = flag("Configuration of the data set on the hub")
    prompt_column: str | None = flag("Column with the question; default for all columns: told by the names in the rows")
    response_column: str | None = flag("Column with the answer")
    history_column: str | None = flag("Column with earlier rounds: [[question, answer], ...]")
    conversation_column: str | None = flag("Column with a whole conversation: conversations, or messages of OpenAI")
    text_column: str | None = flag("Column with plain text, trained in blocks of --max_source_length tokens")
    text_unit: Literal["paragraph", "file"] = flag("A row of a .txt file: a paragraph, or the whole file", "paragraph")
    skip_bad_rows: bool = flag("Go on without rows that can't be read; they are counted", False)
    strict_data: bool = flag("Refuse rows with fields that are not read", False)
    source_prefix: str = flag("Text put before the question; of a conversation, before the last one", "")
    max_source_length: int = flag("Longest question in tokens; the rest is cut off and reported", 1024)
    max_target_length: int = flag("Longest answer in tokens; the rest is cut off and reported", 128)
    val_max_target_length: int = flag("The same for evaluation; 0: max_target_length", 0)
    pad_to_max_length: bool = flag("Pad every row to the two lengths above, not to the longest of its batch", False)
    packing: bool = flag("Put several training rows into one, up to the two lengths together; none sees another", False)
    ignore_pad_token_for_loss: bool = flag("Leave pad tokens out of the loss", True)
    overwrite_cache: bool = flag("Prepare the data again even if it is cached", False)
    max_train_samples: int | None = flag("Use only the first rows of the training data")
    max_eval_samples: int | None = flag("Use only the first rows of the validation data")
    max_predict_samples: int | None = flag("Use only the first rows of the test data")
    num_beams: int | None = flag("Beams when generating; 1 is greedy")
    do_sample: bool = flag("Sample when generating, as the official evaluation does; default: greedy", False)
    top_p: float = flag("Sampling: share of probability to draw from", 0.7)
    temperature: float = flag("Sampling: temperature", 0.95)
    max_new_tokens: int | None = flag("Longest generated answer in tokens; default: val_max_target_length")
    evaluate_base: bool = flag("With --do_eval and --do_predict: also score the base model", False)
    held_out: bool = field(default=False, init=False)  # whether the validation data are rows of the training data

    def __post_init__(self):
        check_values(self)
        if 1 < self.validation_split != int(self.validation_split):
            raise ValueError("--validation_split must be a share below 1, or a number of rows")
        self.val_max_target_length = self.val_max_target_length or self.max_target_length
        given = [name for name in ("train_file", "train_datasets", "dataset_name") if vars(self)[name]]
        if len(given) > 1:
            raise ValueError(f"the training data are in --{' and in --'.join(given)}: give one of them")
        if self.conversation_column and (self.history_column or self.text_column):
            raise ValueError("--conversation_column can't be used with --history_column or --text_column")
        if self.packing and not self.ignore_pad_token_for_loss:
            raise ValueError("--packing leaves no pads to learn: leave out --ignore_pad_token_for_loss false")
        if self.do_sample and (self.temperature <= 0 or not 0 < self.top_p <= 1):
            raise ValueError("--temperature must be above 0, --top_p above 0 and at most 1")


@dataclass
class PreprocessArguments:
    output_dir: str = flag("Folder for the shards", "train_datasets")
    num_shards: int = flag("Files to write; fewer where there are fewer than 1000 rows for each", 8)
    num_workers: int | None = flag("Processes that work at the same time; default: one for each core")

    def __post_init__(self):
        for name in ("num_shards", "num_workers"):
            if vars(self)[name] is not None and vars(self)[name] < 1:
                raise ValueError(f"--{name} must be at least 1")


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    per_device_train_batch_size: Rows = flag("Rows of a batch on each device (8); auto: the largest that fits")
    gradient_accumulation_steps: int = flag("Batches of one step of the optimizer (1)")
    rows_per_step: int | None = flag("Rows of a step on each device: the flags above that are not given are chosen")
    tokens_per_batch: int | None = flag(
        "Slots of a batch on each device instead of its rows: as many rows of like length as fit, pads counted"
    )
    per_device_eval_batch_size: Rows = flag(
        "Rows that are evaluated and answered together; auto: 8, and as many answers as fit, up to 64, as with 1",
        Rows(8),
    )
    train_sampling_strategy: Literal["group_by_length", "random", "sequential", "batch_rebalance"] = flag(
        "Order of the training rows; group_by_length: those of a step have like lengths, so that few slots hold pads",
        "group_by_length",
    )
    activation_checkpointing: Switch = flag(
        "Compute activations a second time instead of keeping them; auto: if the training does not fit without",
        alone=True,
    )
    check_memory: bool = flag("Refuse to start if the predicted memory is not free; false: only warn", True)
    output_dir: str = flag("Folder for checkpoints, logs and predictions", "output")
    overwrite_output_dir: bool = flag("Start over although the output folder holds an earlier training", False)
    precision: str | None = flag("How to compute: auto, fp32, bf16 or fp16; trained weights are kept in fp32 too")
    plan: bool = flag("Predict the memory, print it, and stop before weights are downloaded", False)
    dry_run: bool = flag("Check everything, prepare the data, and stop before the model is loaded", False)
    ddp_find_unused_parameters: bool | None = flag("Every trained weight is used in every step", False)
    num_train_epochs: float | None = flag("Passes over the training rows; default: 3, or --default_steps")
    default_steps: int = flag("Steps over the shipped rows if neither --max_steps nor --num_train_epochs is given", 0)
    show_answers: bool = flag("Answer 3 rows before the training, and at each evaluation and save", True)
    show_tokens: bool = flag("Print the tokens of the first training row, with their ids and labels", False)
    log_format: Literal["text", "json"] = flag("json: each log is an object on stdout, all else on stderr", "text")
    early_stopping: int | None = flag("Evaluations without improvement that end a training; keeps the best checkpoint")
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": "Trackers besides the terminal, as in wandb,tensorboard; or none, or all"},
    )
    include_num_input_tokens_seen: Literal["non_padding", "all", "no"] = flag(
        "Tokens that the summary counts", "non_padding"
    )
    lacks_gpu: bool = field(default=False, init=False)  # it runs on the CPU for want of a GPU, not by --use_cpu
    # What memory/fit.py chooses; until then the batch has 1 row, and activations are checkpointed.
    batch_sizes: list[int] = field(default_factory=list, init=False)  # to choose from, ascending
    auto_checkpointing: bool = field(default=False, init=False)
    auto_answers: bool = field(default=False, init=False)
    answer_batch_size: int = field(default=0, init=False)  # rows that are answered together
    loss_scaling: bool = field(default=False, init=False)  # of a frozen base in float16, which takes no autocast
    engine: Engine = field(default_factory=Engine, init=False)
    parsed: bool = field(default=False, init=False)

    def __post_init__(self):
        check_values(self)
        for name in ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "liger_kernel_config", "fsdp_config"):
            vars(self)[name] = read_config(name, vars(self)[name]) or None
        if "RANK" not in os.environ:
            self.ddp_backend = None  # one process talks to nobody
        complete_batches(self)
        if self.precision not in (None, "auto", "fp32", "bf16", "fp16"):
            raise ValueError(f"--precision {self.precision}: there are auto, fp32, bf16 and fp16")
        if self.deepspeed and self.fsdp:
            raise ValueError("--deepspeed and --fsdp shard the same things: give one of them")
        complete_evaluation(self)
        device = torch.device("cpu") if self.use_cpu else this_device(check=not self.plan)  # it may be for others
        self.lacks_gpu, self.use_cpu = not self.use_cpu and device.type == "cpu", device.type == "cpu"
        unscaled = self.fsdp and compute_dtype(device) == torch.float16  # a frozen base under FSDP2
        if (self.deepspeed or unscaled) and not (self.precision or self.bf16 or self.fp16):
            self.precision = "auto"  # ZeRO-3 would take float32
        if self.precision:
            self.bf16, self.fp16 = choose_precision(self.precision, device)
        if str(self.fsdp).lower() in ("true", "false"):  # other values are older names of ways to shard
            self.fsdp = str(self.fsdp).lower() == "true"
        if self.fsdp:
            self.fsdp_config = fsdp_config(self)
        self.engine = engine_of(self, self.processes)
        self.dry_run = self.dry_run or self.plan
        checkpointing, self.deepspeed = self.activation_checkpointing, None  # which transformers would set up here
        given = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        self.report_to = [name.strip() for names in given for name in names.split(",")]
        config = read_config("accelerator_config", self.accelerator_config)
        for name in ("dispatch_batches", "gradient_accumulation_kwargs"):
            if config.get(name):
                raise ValueError(f"--accelerator_config: {name} is not supported")
        if unknown := config.keys() - AcceleratorConfig.__dataclass_fields__.keys():
            raise ValueError(f"--accelerator_config: there is no setting {min(unknown)}")
        self.accelerator_config = {"non_blocking": self.dataloader_pin_memory} | config  # a batch travels during a step
        super().__post_init__()
        if self.torch_compile:
            os.environ.pop("TORCHDYNAMO_DISABLE", None)  # of common/__init__.py
        self.deepspeed = self.engine.config or None
        self.activation_checkpointing = checkpointing  # None, which transformers makes False, is decided by checks.py
        half = half_dtype(self)
        if self.fsdp and half:  # Accelerate would add up gradients in 16 bit, and the loss
            self.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(half, torch.float32)
        self.parsed = True

    @property
    def device(self) -> torch.device:
        """The device of this process, set up when it is first asked for: not while transformers (5.23) parses."""
        return super().device if self.parsed else torch.device("cpu")

    @property
    def processes(self) -> int:
        """How many processes train together, as the launcher said; the check before the start runs in one of them."""
        return int(os.environ.get("EXPECTED_PROCESSES") or os.environ.get("WORLD_SIZE") or 1)

    def base_dtype(self, trains_base: bool) -> torch.dtype:
        """The dtype to load the base model in: float32 if it is trained itself, else half precision where that is fast.

        DeepSpeed keeps a float32 copy of trained half-precision weights itself.
        """
        half = half_dtype(self)
        if self.precision == "fp32" or self.do_train and trains_base and not (self.deepspeed and half):
            return torch.float32
        return half or compute_dtype(self.device)

    @property
    def reads_weights(self) -> bool:
        """Whether this process reads weights. Under FSDP2 the first one of all does, and sends each its share."""
        return self.engine.name != "FSDP2" or self.process_index == 0

    @property
    def all_rows_per_step(self) -> int:
        """Rows of one step of the optimizer, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.processes


def complete_batches(args: TrainingArguments) -> None:
    """Turns words into numbers, and notes what is left to choose. Raises ValueError for bad numbers."""
    given, step = args.per_device_train_batch_size, args.rows_per_step or 0
    auto, split = given == "auto", step > 0 and given is None and args.gradient_accumulation_steps is None
    for name in ("train", "eval"):
        value = str(vars(args)[f"per_device_{name}_batch_size"])
        if value == "None":
            continue
        if value != "auto" and not value.removeprefix("-").isdecimal():
            raise ValueError(f"--per_device_{name}_batch_size {value}: give a number of rows, or auto")
        if value != "auto" and int(value) < 1:
            raise ValueError("a batch must have at least 1 row")
    if args.tokens_per_batch and (given is not None or args.rows_per_step):
        raise ValueError(
            "TOKENS_PER_BATCH (--tokens_per_batch) says how large a batch is: leave out BATCH_SIZE "
            "(--per_device_train_batch_size) and ROWS_PER_STEP (--rows_per_step)"
        )
    if args.deepspeed and auto:
        raise ValueError("--per_device_train_batch_size auto: under DeepSpeed give a number")
    chooses = not (args.deepspeed or args.fsdp)  # of their memory too little is known
    if auto:
        args.rows_per_step, step = None, 0
    if auto or split and chooses:
        largest = step & -step or LARGEST_BATCH  # of the powers of two that divide a step
        args.batch_sizes, rows = [2**power for power in range(largest.bit_length())], 1
    elif split:
        rows = gcd(step, USUAL_ROWS)
    elif given is None:
        rows = max(1, step // args.gradient_accumulation_steps) if step else 8
    else:
        rows = int(given)
    args.per_device_train_batch_size = Rows(rows)
    if args.gradient_accumulation_steps is None:
        args.gradient_accumulation_steps = max(1, step // rows)
    rows_word = str(args.per_device_eval_batch_size)
    # The official commands say 1, and greedy answers are the same; several processes need the way out that 1 is.
    args.auto_answers = rows_word == "auto" or rows_word == "1" and chooses and args.processes == 1
    args.per_device_eval_batch_size = Rows(8 if rows_word == "auto" else int(rows_word))
    args.answer_batch_size = args.per_device_eval_batch_size
    word = args.activation_checkpointing
    args.auto_checkpointing = word == "auto" and chooses
    if word is not None:
        try:
            args.activation_checkpointing = Switch(word == "auto" or truth(str(word)))
        except ArgumentTypeError as error:
            raise ValueError(f"--activation_checkpointing {word}: give true, false or auto") from error


def complete_evaluation(args: TrainingArguments) -> None:
    """Sets the flags of evaluations during training that follow from others. Raises ValueError for bad numbers."""
    if args.early_stopping is not None:
        args.load_best_model_at_end = args.restore_callback_states_from_checkpoint = True
    if args.eval_strategy == "steps" and args.eval_steps == 0:
        args.eval_strategy = IntervalStrategy.NO
    if args.load_best_model_at_end and args.eval_steps and args.eval_strategy == args.save_strategy == "steps":
        args.save_steps = args.eval_steps  # a checkpoint for each evaluation, whatever steps a script gives
    if args.metric_for_best_model:
        args.metric_for_best_model = args.metric_for_best_model.lower()  # the report writes ROUGE-L
        args.predict_with_generate |= not args.metric_for_best_model.endswith("loss")
