"""The settings of DeepSpeed from a user's file, under today's names and checked by DeepSpeed itself.

Files of several years are in use: DeepSpeed reads their old names, but what predicts the memory and what completes the
settings would not see them.
"""

import json
from typing import Any

from accelerate.utils import patch_environment
from pydantic import ValidationError

from common.errors import UserError

SECTIONS = ("fp16", "bf16", "optimizer", "scheduler", "zero_optimization")
PLACES = {  # class of DeepSpeed -> section
    "DeepSpeedZeroConfig": "zero_optimization",
    "DeepSpeedFP16Config": "fp16",
    "DeepSpeedBF16Config": "bf16",
}
NUMBERS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("steps_per_print", "gradient_predivide_factor"),
)
OFFLOADS = {  # old switch -> section
    "cpu_offload": "offload_optimizer",
    **dict.fromkeys(("cpu_offload_param", "cpu_offload_params"), "offload_param"),
}
GATHERS = "stage3_gather_16bit_weights_on_model_save"
OLD_GATHERS = "stage3_gather_fp16_weights_on_model_save"
# transformers puts numbers that depend on the model in place of "auto" here; elsewhere "auto" is DeepSpeed's default.
OF_THE_MODEL = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


def current_settings(given: dict[str, Any], file: Any) -> dict[str, Any]:
    """The settings under today's names, with numbers for texts that are numbers. Raises UserError for a bad section."""
    config = {name: as_number(value) if not isinstance(value, dict) else value for name, value in given.items()}
    if "bfloat16" in config:
        config.setdefault("bf16", config.pop("bfloat16"))
    if config.get("zero_optimization") is True:  # of 2020
        config["zero_optimization"] = {"stage": 1}
    for name in SECTIONS:
        section = config[name] = as_number(config.get(name) or {})
        parts = {name: section}
        if isinstance(section, dict):
            inner = {f"{name}.{key}": section.get(key) for key in ("params", *OFFLOADS.values())}
            parts |= {place: part for place, part in inner.items() if part is not None}
        for place, part in parts.items():
            if not isinstance(part, dict):
                raise UserError(f"{file}: {place} is {part!r:.40}, not an object with settings.")
    for name in NUMBERS:
        if config.get(name, "auto") != "auto" and not isinstance(config[name], int | float):
            raise UserError(f'{file}: {name} is {config[name]!r}: give a number, or "auto".')
    config["zero_optimization"] = current_zero(config["zero_optimization"], file)
    return {name: value for name, value in config.items() if value != {}}


def as_number(value: Any) -> Any:
    """The value with numbers, true and false in place of texts that say them, also inside."""
    if isinstance(value, dict):
        return {name: as_number(part) for name, part in value.items()}
    try:
        read = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return read if isinstance(read, int | float) else value


def current_zero(given: dict[str, Any], file: Any) -> dict[str, Any]:
    """The section of ZeRO. Where a file sets an old name and its new one, the new one counts."""
    with patch_environment(PYTORCH_NVML_BASED_CUDA_CHECK="1"):  # DeepSpeed would set it for good: reading sets nothing
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    zero = {(fields[name].alias if name in fields else None) or name: value for name, value in given.items()}
    if zero.setdefault("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"{file}: zero_optimization.stage is {zero['stage']!r}: give 0, 1, 2 or 3.")
    for old, section in OFFLOADS.items():
        if isinstance(zero.get(old), bool) and zero.pop(old) and not zero.get(section):
            zero[section] = {"device": "cpu"}
    pinned = zero.pop("cpu_offload_use_pin_memory", None)
    for section in OFFLOADS.values():
        if pinned is not None and zero.get(section):
            zero[section] = {"pin_memory": pinned} | zero[section]
    if OLD_GATHERS in zero:
        zero.setdefault(GATHERS, zero.pop(OLD_GATHERS))
    zero.pop(OLD_GATHERS, None)
    return {name: value for name, value in zero.items() if value != "auto" or name in OF_THE_MODEL}


def check_settings(config: dict[str, Any], file: Any) -> None:
    """Raises UserError for what DeepSpeed would refuse. ``config``: with numbers for "auto", as for one process."""
    from deepspeed.runtime.config import DeepSpeedConfig

    zero = {name: value for name, value in config["zero_optimization"].items() if value != "auto"}
    alone = {name: value for name, value in config.items() if name != "train_batch_size"}
    try:
        DeepSpeedConfig(alone | {"zero_optimization": zero})
    except ValidationError as error:
        first = error.errors()[0]
        place = " ".join(".".join(map(str, (PLACES.get(error.title, error.title), *first["loc"]))).split())
        value = f" is {first['input']!r}" if first["loc"] else ""
        problem = "there is no such setting" if first["type"] == "extra_forbidden" else first["msg"].rstrip(".")
        raise UserError(f"{file}: {place}{value}: {problem}.") from error
    except Exception as error:  # its checks are assertions, and attributes of what should be an object
        raise UserError(f"{file}: DeepSpeed can't use it: {' '.join(str(error).split()).rstrip('.')}.") from error
