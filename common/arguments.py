"""Command-line flags: those of the official arguments.py, and the training arguments of transformers.

A flag that transformers 5 renamed works under its old name too, with one line of advice.
"""

import difflib
import os
import sys
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from common.errors import UserError, say
from common.launch.engines import choose_precision, deepspeed_config, fsdp_config, is_sharded, join, offloads

RENAMED = {  # old flag -> new flag, and its value where the old one was a switch
    "evaluation_strategy": ("eval_strategy", None),
    "warmup_ratio": ("warmup_steps", None),  # a value below 1 is a share of all steps
    "per_gpu_train_batch_size": ("per_device_train_batch_size", None),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size", None),
    "no_cuda": ("use_cpu", None),
    "gradient_checkpointing": ("activation_checkpointing", None),
    "gradient_checkpointing_kwargs": ("activation_checkpointing_kwargs", None),
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
    "adafactor": ("optim", "adafactor"),
    "torchdynamo": ("torch_compile_backend", None),
    "push_to_hub_token": ("hub_token", None),
    "push_to_hub_model_id": ("hub_model_id", None),
}
REMOVED = {  # old flag -> why it is ignored
    "logging_dir": "TensorBoard files are written to OUTPUT_DIR/runs",
    "save_safetensors": "the file format is fixed by what is trained",
    "fp16_backend": "PyTorch's own mixed precision is used",
    "half_precision_backend": "PyTorch's own mixed precision is used",
    "fp16_opt_level": "PyTorch's own mixed precision is used",
    "use_mps_device": "the device is found automatically",
    "preprocessing_num_workers": "sentencepiece uses all cores by itself",
    "include_inputs_for_metrics": "the metrics need no inputs",
    "resize_position_embeddings": "rotary positions need no resizing",
    "use_fast_tokenizer": "there is one tokenizer, and it is fast",
    "forced_bos_token": "ChatGLM generates from its own <sop>",
    "lang": "the language makes no difference",
    "jit_mode_eval": "transformers 5 has no such mode",
    "use_ipex": "PyTorch's own kernels are used",
    "xpu_backend": "the backend is chosen for the device; --ddp_backend sets it",
    "tpu_num_cores": "TPUs are not supported",
    "tpu_metrics_debug": "TPUs are not supported",
    "past_index": "the model keeps its cache by itself",
    "sharded_ddp": "FairScale is gone; DeepSpeed and FSDP shard",
    "fsdp_min_num_params": "it is part of --fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "it is part of --fsdp_config",
    "use_legacy_prediction_loop": "there is one prediction loop",
    "push_to_hub_organization": "--hub_model_id names the organization too",
    "mp_parameters": "SageMaker's model parallelism is not supported",
    "ray_scope": "there is no hyperparameter search",
    "use_auth_token": "log in with `hf auth login` or set HF_TOKEN",
}


def told(help_text: str, default=None, **kwargs):
    """A field with its help text, written once where the flag stands."""
    return field(default=default, metadata={"help": help_text}, **kwargs)


@dataclass
class ModelArguments:
    model_name_or_path: str = told("demo, demo3, a folder with a checkpoint, or a hub id", "demo")
    config_name: str | None = told("Folder or hub id of the config, where it is not the model's own")
    tokenizer_name: str | None = told("Folder or hub id of the tokenizer, where it is not the model's own")
    cache_dir: str | None = told("Where models from the hub are stored")
    model_revision: str = told("Branch, tag or commit of the model on the hub", "main")
    quantization_bit: int | None = told("4 or 8: the bits that the frozen base model is loaded in")

    def __post_init__(self):
        if self.quantization_bit not in (None, 4, 8):
            raise ValueError(f"--quantization_bit {self.quantization_bit}: only 4 and 8 exist")


@dataclass
class PrefixArguments:
    ptuning_checkpoint: str | None = told("Folder of a trained prefix: to evaluate it, or to train it further")
    pre_seq_len: int | None = told("P-Tuning v2: number of virtual tokens; read from the checkpoint when evaluating")
    prefix_projection: bool = told("P-Tuning v2: make the prefix with a two-layer network", False)

    def __post_init__(self):
        if self.pre_seq_len is not None and self.pre_seq_len < 1:
            raise ValueError("--pre_seq_len must be at least 1")


@dataclass
class LoraArguments:
    lora_checkpoint: str | None = told("Folder of a trained adapter: to evaluate it, or to train it further")
    lora_rank: int = told("LoRA: rank of the two small matrices", 8)
    lora_alpha: int = told("LoRA: the adapter is scaled by alpha / rank", 32)
    lora_dropout: float = told("LoRA: dropout of the adapter's input", 0.1)
    lora_target: str | None = told(
        "LoRA: linear layers by commas, or all-linear; default: query_key_value (GLM-4: q_proj,k_proj,v_proj)"
    )
    use_rslora: bool = told("LoRA: scale by alpha / sqrt(rank) (rsLoRA), for large ranks", False)
    use_dora: bool = told("LoRA: learn the magnitude of the weights apart from their direction (DoRA)", False)
    loraplus_lr_ratio: float | None = told("LoRA: learning rate of the B matrices over that of the A's (LoRA+)")

    def __post_init__(self):
        if self.lora_rank < 1 or self.lora_alpha < 1:
            raise ValueError("--lora_rank and --lora_alpha must be at least 1")
        if self.loraplus_lr_ratio is not None and self.loraplus_lr_ratio <= 0:
            raise ValueError("--loraplus_lr_ratio must be above 0")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError("--lora_dropout must be at least 0 and below 1")


@dataclass
class FullArguments:
    save_format: str = told("Format of the weights: safetensors, or bin, which the original code reads", "safetensors")

    def __post_init__(self):
        if self.save_format not in ("safetensors", "bin"):
            raise ValueError(f"--save_format {self.save_format}: there are safetensors and bin")


@dataclass
class DataArguments:
    train_file: str | None = told("Training data: JSON, JSON lines or CSV; several files by commas or a glob")
    train_datasets: str | None = told("Folder of training data that common/preprocess.sh made, instead of --train_file")
    validation_file: str | None = told("Data for --do_eval, in the same formats")
    test_file: str | None = told("Data for --do_predict, in the same formats")
    dataset_name: str | None = told("A data set on the hub, or a folder, instead of files")
    dataset_config_name: str | None = told("Configuration of the data set on the hub")
    prompt_column: str = told("Column with the question", "prompt")
    response_column: str = told("Column with the answer", "response")
    history_column: str | None = told("Column with earlier rounds: [[question, answer], ...]")
    conversation_column: str | None = told("Column with a whole conversation: conversations, or messages of OpenAI")
    text_column: str | None = told("Column with plain text, trained in blocks of --max_source_length tokens")
    source_prefix: str = told("Text put before the question; of a conversation, before the last one", "")
    max_source_length: int = told("Longest question in tokens, the rest is cut off and reported", 1024)
    max_target_length: int = told("Longest answer in tokens, the rest is cut off and reported", 128)
    val_max_target_length: int = told("The same for evaluation; 0: max_target_length", 0)
    pad_to_max_length: bool = told("Pad every row to the two lengths above, not to the longest of its batch", False)
    ignore_pad_token_for_loss: bool = told("Leave pad tokens out of the loss", True)
    overwrite_cache: bool = told("Prepare the data again even if it is cached", False)
    max_train_samples: int | None = told("Use only the first rows of the training data")
    max_eval_samples: int | None = told("Use only the first rows of the validation data")
    max_predict_samples: int | None = told("Use only the first rows of the test data")
    num_beams: int | None = told("Beams when generating; 1 is greedy")
    do_sample: bool = told("Sample when generating, as the official evaluation does; default: greedy", False)
    top_p: float = told("Sampling: share of probability to draw from", 0.7)
    temperature: float = told("Sampling: temperature", 0.95)
    max_new_tokens: int | None = told("Longest generated answer in tokens; default: val_max_target_length")
    evaluate_base: bool = told("With --do_predict: also score the model without what was trained", False)

    def __post_init__(self):
        self.val_max_target_length = self.val_max_target_length or self.max_target_length
        if self.train_datasets and (self.train_file or self.dataset_name):
            raise ValueError("--train_datasets replaces --train_file and --dataset_name: give one of them")
        if self.conversation_column and (self.history_column or self.text_column):
            raise ValueError("--conversation_column can't be used with --history_column or --text_column")
        if self.max_source_length < 3 or self.max_target_length < 3:
            raise ValueError("--max_source_length and --max_target_length must be at least 3 tokens")
        if self.do_sample and (self.temperature <= 0 or not 0 < self.top_p <= 1):
            raise ValueError("--temperature must be above 0, --top_p above 0 and at most 1")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples", "max_new_tokens", "num_beams"):
            if vars(self)[name] is not None and vars(self)[name] < 1:
                raise ValueError(f"--{name} must be at least 1")


class BatchSize(int):
    """A number of rows, or ``auto``: the largest that fits, which common/memory/fit.py finds; until then it is 1."""

    auto: bool

    def __new__(cls, rows: int | str) -> "BatchSize":
        size = super().__new__(cls, 1 if rows == "auto" else rows)
        size.auto = rows == "auto"
        return size

    def __reduce__(self):
        return int, (int(self),)  # what is saved is a plain number


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    per_device_train_batch_size: BatchSize = told("Rows of a batch on each device; auto: the largest that fits", 8)
    check_memory: bool = told("Refuse what does not fit into memory by prediction; false: only warn", True)
    output_dir: str = told("Where checkpoints, logs and predictions are written", "output")
    overwrite_output_dir: bool = told("Start over although the output folder holds an earlier training", False)
    precision: str | None = told("auto, fp32, bf16 or fp16: how to compute; what is trained is kept in fp32 too")
    plan: bool = told("Predict the memory, print it, and stop before anything is downloaded", False)
    dry_run: bool = told("Check everything that can be checked, prepare the data, and stop before the model", False)
    ddp_find_unused_parameters: bool | None = told("All that trains is used in every step", False)
    report_to: None | str | list[str] = told("Where logs go besides the terminal", "tensorboard")
    include_num_input_tokens_seen: str = told("Which tokens are counted for the summary", "non_padding")

    def __post_init__(self):
        if not isinstance(self.per_device_train_batch_size, BatchSize):
            self.per_device_train_batch_size = BatchSize(self.per_device_train_batch_size)
        if self.per_device_train_batch_size.auto and self.deepspeed:
            raise ValueError("--per_device_train_batch_size auto: under DeepSpeed give a number")
        if self.per_device_train_batch_size < 1 or self.per_device_eval_batch_size < 1:
            raise ValueError("a batch must have at least 1 row")
        if self.precision not in (None, "auto", "fp32", "bf16", "fp16"):
            raise ValueError(f"--precision {self.precision}: there are auto, fp32, bf16 and fp16")
        choose_precision(self)
        if str(self.fsdp).lower() in ("true", "false"):  # else an older way to say how to shard
            self.fsdp = str(self.fsdp).lower() == "true"
        if self.deepspeed and self.fsdp:
            raise ValueError("--deepspeed and --fsdp shard the same things: give one of them")
        if self.deepspeed:
            self.deepspeed = deepspeed_config(self)
        if self.fsdp:
            self.fsdp_config = fsdp_config(self)
        self.engine = "DeepSpeed" if self.deepspeed else "FSDP2" if self.fsdp else "DDP"
        self.offload, self.sharded = offloads(self), is_sharded(self)
        self.zero = dict(self.deepspeed["zero_optimization"]) if self.deepspeed else {}
        self.dry_run = self.dry_run or self.plan
        if self.dry_run:  # which looks at the input in one process, whatever engine will run
            self.deepspeed = self.fsdp = None
        join(self)
        self.may_checkpoint = self.activation_checkpointing is None  # which becomes False
        super().__post_init__()
        if self.fsdp and (self.bf16 or self.fp16):  # Accelerate would add up gradients in 16 bit, and the loss
            dtype = torch.bfloat16 if self.bf16 else torch.float16
            self.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(dtype, torch.float32)

    @property
    def processes(self) -> int:
        """How many train together: what the launcher said, which a check before the start must believe."""
        return int(os.environ.get("EXPECTED_PROCESSES") or os.environ.get("WORLD_SIZE") or 1)

    @property
    def owns_output(self) -> bool:
        """Whether this process holds the lock of the output folder, which machines may share, also while they check."""
        return self.should_save and not (self.dry_run and os.environ.get("MACHINE_RANK", "0") != "0")

    @property
    def rows_per_step(self) -> int:
        """Rows of one step of the optimizer, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.processes


def translate_old_flags(argv: list[str]) -> list[str]:
    """Official spellings -> those of transformers 5, with one line of advice each on stderr."""
    translated, tokens = [], iter(argv)
    pending = next(tokens, None)
    while (token := pending) is not None:
        pending = next(tokens, None)
        name, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or name not in RENAMED | REMOVED:
            translated.append(token)
            continue
        if not equals and pending is not None and not pending.startswith("--"):
            value, pending = pending, next(tokens, None)
        if name in REMOVED:
            say(f"advice: --{name} has no effect any more: {REMOVED[name]}.")
            continue
        new_name, new_value = RENAMED[name]
        if new_value and value.lower() == "false":
            continue
        value = new_value or value
        translated += [f"--{new_name}", *([value] if value else [])]
        say(f"advice: --{name} is now called --{new_name}{f' {new_value}' if new_value else ''}.")
    return translated


class FlagParser(HfArgumentParser):
    """Says what is wrong in one sentence instead of listing three hundred flags."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists all flags).")


def parse_arguments(method_arguments: type, argv: list[str] | None = None) -> tuple[Any, ...]:
    """(model, method, data, training) arguments of the command line; ``method_arguments`` is a method's dataclass.

    Raises UserError for an unknown flag, naming the nearest known one, or a bad value.
    """
    usage = "main.py --do_train --train_file FILE --output_dir FOLDER [--flag value ...]"
    return parse_dataclasses((ModelArguments, method_arguments, DataArguments, TrainingArguments), usage, argv)


def parse_dataclasses(kinds: tuple[type, ...], usage: str, argv: list[str] | None = None) -> tuple[Any, ...]:
    """One object of each dataclass, filled from the command line. Raises UserError as ``parse_arguments`` does."""
    parser = FlagParser(kinds, usage=usage, allow_abbrev=False)
    argv = translate_old_flags(sys.argv[1:] if argv is None else argv)
    known = [option for action in parser._actions for option in action.option_strings]
    for token in argv:
        name = token.partition("=")[0]
        if name.startswith("--") and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"unknown flag {name}" + (f": did you mean {nearest[0]}?" if nearest else "."))
    try:
        return parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        raise UserError(" ".join(str(error).split()).rstrip(".") + ".") from error
