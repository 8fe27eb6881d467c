"""The values that flags may have, in one table: those of transformers accept nearly everything."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from common.command import flag_of

ABOVE_0, BELOW_1, BELOW_INFINITY = math.nextafter(0, 1), math.nextafter(1, 0), math.nextafter(math.inf, 0)
MANY = 10**9  # of what is counted
STEPS = 10**12  # more than any training has: a checkpoint or a log that never comes
SEEDS = 2**32 - 1

# Flag -> (lowest, highest). The default of a flag is allowed too.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "pre_seq_len": (1, MANY),
    "lora_rank": (1, MANY),
    "lora_alpha": (1, 10**6),
    "lora_dropout": (0, BELOW_1),
    "loraplus_lr_ratio": (ABOVE_0, 10**6),
    # data
    "validation_split": (0, MANY),
    "max_source_length": (3, MANY),
    "max_target_length": (3, MANY),
    "val_max_target_length": (3, MANY),
    **dict.fromkeys(("max_train_samples", "max_eval_samples", "max_predict_samples"), (1, MANY)),
    # answers
    **dict.fromkeys(("num_beams", "max_new_tokens"), (1, MANY)),
    "top_p": (0, 1),
    "temperature": (0, MANY),
    # the optimizer
    "learning_rate": (ABOVE_0, 1e12),
    "weight_decay": (0, 100),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, BELOW_1)),
    "adam_epsilon": (1e-38, 1),  # the smallest number of float32
    "max_grad_norm": (0, BELOW_INFINITY),
    "label_smoothing_factor": (0, BELOW_1),
    "neftune_noise_alpha": (0, MANY),
    # batches, steps and epochs
    "rows_per_step": (1, MANY),
    "tokens_per_batch": (1, MANY),
    "gradient_accumulation_steps": (1, MANY),
    "max_steps": (1, STEPS),
    "default_steps": (0, STEPS),
    "num_train_epochs": (ABOVE_0, MANY),
    "warmup_steps": (0, STEPS),
    "logging_steps": (0, STEPS),
    "save_steps": (0, STEPS),
    "eval_steps": (0, STEPS),
    "eval_delay": (0, STEPS),
    "early_stopping": (1, MANY),
    "save_total_limit": (0, MANY),
    **dict.fromkeys(("eval_accumulation_steps", "torch_empty_cache_steps"), (1, MANY)),
    # processes
    **dict.fromkeys(("seed", "data_seed"), (0, SEEDS)),
    "dataloader_num_workers": (0, 128),
    "dataloader_prefetch_factor": (1, MANY),
    "ddp_bucket_cap_mb": (1, MANY),
    "ddp_timeout": (1, MANY),
}


KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list of texts",
    dict: "an object of JSON",
}


def check_values(args: Any) -> None:
    """Raises ValueError for a flag, a field of a dataclass, whose value has another type or lies out of its bounds.

    The parser of the command line knows types and choices, a YAML file does not.
    """
    types = get_type_hints(type(args))
    for field in fields(args):
        value = vars(args)[field.name] if field.init else None
        if value is None or value == field.default:
            continue
        lowest, highest = BOUNDS.get(field.name, (-math.inf, math.inf))
        missed = missed_type(value, types[field.name], field.metadata.get("choices"))
        if not missed and isinstance(value, int | float) and not lowest <= value <= highest:
            missed = missed_bound(value, lowest, highest)
        if missed:
            raise ValueError(f"{flag_of(field.name)} must be {missed}, not {value!r:.80}")


def missed_type(value: Any, hint: Any, choices: Iterable[str] | None) -> str:
    """What a value must be, and is not, by the type and the choices of its flag; "" if it is that."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    enums = [part for part in parts if isinstance(part, type) and issubclass(part, Enum)]
    if enums:
        choices = [member.value for member in enums[0]]
    elif get_origin(hint) is Literal:
        choices = get_args(hint)
    if choices:
        return "" if value in choices else f"one of {', '.join(choices)}"
    known = {get_origin(part) or part for part in parts if part is not NoneType}
    fitting = known | ({int} if float in known else set()) | ({str} if list in known else set())
    if not known <= KINDS.keys() or type(value) in fitting and is_texts(value):
        return ""
    return " or ".join(KINDS[kind] for kind in KINDS if kind in known)


def is_texts(value: Any) -> bool:
    return not isinstance(value, list) or all(isinstance(item, str) for item in value)


def missed_bound(value: float, lowest: float, highest: float) -> str:
    """The bound that a value misses; nan misses both."""
    if value < lowest:
        return "above 0" if lowest == ABOVE_0 else f"at least {lowest:g}"
    if value > highest:
        return "below 1" if highest == BELOW_1 else "finite" if highest == BELOW_INFINITY else f"at most {highest:g}"
    return KINDS[float]
