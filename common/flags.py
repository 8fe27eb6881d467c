"""The command line: parses flags into dataclasses, translates old flags, and names a wrong one in one sentence.

A flag that transformers 5 renamed works under its old name too, with one line of advice. Flags are read before torch is
imported, which takes seconds; the dataclasses follow.
"""

import argparse
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any

from common.declared import declared, parser_of
from common.errors import UserError, nearest, note

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
OFF = {"group_by_length": "random"}  # old switch -> the value of the new flag that switches off what is now the default
REMOVED = {  # old flag -> why it has no effect
    flag: reason
    for flags, reason in {
        "logging_dir": "TensorBoard files are written to OUTPUT_DIR/runs",
        "save_safetensors": "the method decides the file format",
        "fp16_backend half_precision_backend fp16_opt_level": "PyTorch's own mixed precision is used",
        "use_mps_device": "the device is found automatically",
        "preprocessing_num_workers": "sentencepiece uses all cores by itself",
        "include_inputs_for_metrics include_for_metrics": "the metrics need no inputs",
        "debug": "a loss that is no longer finite is reported by itself",
        "batch_eval_metrics": "answers are scored together",
        "sortish_sampler": "--train_sampling_strategy group_by_length puts rows of like length together",
        "generation_config": "answers are generated as --max_new_tokens, --num_beams, --do_sample, --top_p and "
        "--temperature say",
        "resize_position_embeddings": "rotary positions need no resizing",
        "use_fast_tokenizer": "there is one tokenizer, and it is fast",
        "forced_bos_token": "ChatGLM generates from its own <sop>",
        "lang": "the language makes no difference",
        "jit_mode_eval": "transformers 5 has no such mode",
        "use_ipex": "PyTorch's own kernels are used",
        "xpu_backend": "the device decides the backend; --ddp_backend sets it",
        "tpu_num_cores tpu_metrics_debug": "TPUs are not supported",
        "past_index": "the model keeps its cache by itself",
        "sharded_ddp": "FairScale is gone; DeepSpeed and FSDP shard",
        "fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap": "it is part of --fsdp_config",
        "use_legacy_prediction_loop": "there is one prediction loop",
        "push_to_hub_organization": "--hub_model_id names the organization too",
        "mp_parameters": "SageMaker's model parallelism is not supported",
        "ray_scope": "there is no hyperparameter search",
        "use_auth_token": "log in with `hf auth login` or set HF_TOKEN",
    }.items()
    for flag in flags.split()
}


def parse_arguments(
    method_arguments: type, argv: list[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """(model, method, data, training) arguments of the command line; ``method_arguments`` is a method's dataclass.

    Raises UserError like ``read_flags``, and for values that contradict each other. Starts nothing.
    """
    return make_arguments(method_arguments, read_flags(method_arguments.__name__, argv, defaults))


def read_flags(kind: str, argv: list[str] | None = None, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values of all flags of a method, whose dataclass is named ``kind``.

    ``defaults``: values of flags from a file; with --checkpoint the records of the training replace them. Only those
    need torch.
    Raises UserError for an unknown flag, naming the nearest known one, or for a value that can't be read.
    """
    argv = translate_old_flags(sys.argv[1:] if argv is None else argv)
    kinds = "ModelArguments", kind, "DataArguments", "TrainingArguments"
    usage = "main.py --do_train --train_file FILE --output_dir FOLDER [--flag value ...]"
    values = values_of(kinds, usage, argv, defaults)
    if values["checkpoint"]:
        from common.trained import evaluation_defaults

        base = values_of(kinds, usage, argv, {"model_name_or_path": None})["model_name_or_path"]
        values = values_of(kinds, usage, argv, evaluation_defaults(values["checkpoint"], declared(kind), base))
    return values


def values_of(
    kinds: Collection[str], usage: str, argv: list[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The values of all flags of the dataclasses that are named. Raises UserError like ``read_flags``."""
    parser = parser_of(kinds, usage)
    parser.set_defaults(**defaults or {})
    argv = translate_old_flags(sys.argv[1:] if argv is None else argv)
    try:
        values, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        reason = re.sub(r"^argument (--\w+)\S*:", r"\1:", str(error))
        raise UserError(f"{reason} (--help lists all flags).") from error
    if unknown:
        flag = unknown[0].partition("=")[0]
        meant = nearest(flag.lstrip("-"), [name for kind in kinds for name in declared(kind)])
        raise UserError(f"unknown flag {flag}" + (f": did you mean --{meant}?" if meant else " (--help lists all)."))
    return vars(values)


def make_arguments(method_arguments: type, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """The (model, method, data, training) arguments with the values of ``read_flags``. Raises UserError."""
    from common.arguments import DataArguments, ModelArguments, TrainingArguments

    return objects_of((ModelArguments, method_arguments, DataArguments, TrainingArguments), values)


def objects_of(kinds: Iterable[type], values: Mapping[str, Any]) -> tuple[Any, ...]:
    """One object of each dataclass, filled with the values of its fields. Raises UserError if they don't fit."""
    try:
        return tuple(
            kind(**{field.name: values[field.name] for field in fields(kind) if field.init and field.name in values})
            for kind in kinds
        )
    except ValueError as error:
        raise UserError(" ".join(str(error).split()).rstrip(".") + ".") from error


def translate_old_flags(argv: list[str]) -> list[str]:
    """Translates the flags that transformers 5 renamed or removed; see ``current_flag``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in RENAMED | REMOVED:
        parser.add_argument(f"--{name}", nargs="?", const="")
    old, argv = parser.parse_known_args(argv)
    for current in filter(None, (current_flag(*flag) for flag in vars(old).items())):
        argv += [f"--{current[0]}", *filter(None, current[1:])]
    return argv


def current_flag(name: str, value: Any) -> tuple[str, Any] | None:
    """The flag and its value under their names in transformers 5; None: it has no effect. Prints a line of advice."""
    if name in REMOVED:
        note(f"advice: --{name} has no effect any more: {REMOVED[name]}.")
        return None
    if name not in RENAMED:
        return name, value
    new_name, new_value = RENAMED[name]
    if new_value and str(value).lower() == "false":
        return (new_name, OFF[name]) if name in OFF else None
    note(f"advice: --{name} is now called --{new_name}{f' {new_value}' if new_value else ''}.")
    return new_name, new_value or value
