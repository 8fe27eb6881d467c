"""The files of a LoRA adapter, checked before PEFT sees them: an adapter may come from anybody."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from peft import LoraConfig

from common.errors import UserError
from common.files import TEXTS, check_no_text, read_json
from common.models.tensors import tensor_shapes

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
LARGEST_RANK = 1024  # without weights of a larger one
MOST_PATTERNS, LONGEST_PATTERN = 500, 1000
# Ways to begin that need no file and no data.
BEGINNINGS = re.compile(r"gaussian|eva|olora|orthogonal|pissa(_niter_\d{1,2})?")
FLAGS = ("inference_mode", "fan_in_fan_out", "use_rslora", "use_dora", "lora_bias")
TEXT_FIELDS = ("peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version", "bias")
CHECKED = (  # by functions below
    *("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "exclude_modules", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
)
UNUSED = ("auto_mapping",)  # load_adapter takes it away: it names modules to import


def adapter_config(folder: str | Path) -> dict:
    """adapter_config.json of a LoRA adapter. Raises UserError for a folder without a whole adapter, and for settings
    that are not known or could take for ever."""
    folder = Path(folder)
    file = folder / "adapter_config.json"
    config = read_json(file)
    if config is None:
        if file.is_file():
            check_no_text(file, "settings of the adapter", TEXTS[:2])
        raise UserError(f"{folder} holds no LoRA adapter: adapter_config.json is missing or broken.")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} holds an adapter of the kind {config.get('peft_type')!s:.40}, not LORA.")
    if missing := {"r", "lora_alpha", "target_modules"} - config.keys():
        raise UserError(f"{file} lacks {min(missing)}.")
    for name, kinds, highest in (("r", (int,), 2**16), ("lora_alpha", (int, float), 2**24)):
        if type(config[name]) not in kinds or not 1 <= config[name] <= highest:
            raise UserError(f"{file}: {name} is {config[name]!r:.40}, not a number of at least 1, at most {highest:,}.")
    targets, saved = config["target_modules"], config.get("modules_to_save") or []
    for name, layers in (
        ("target_modules", [targets] if isinstance(targets, str) else targets),
        ("modules_to_save", saved),
    ):
        if not isinstance(layers, list) or not all(layer and isinstance(layer, str) for layer in layers):
            raise UserError(f"{file}: {name} is {layers!r:.200}: it must list names of layers.")
    check_fields(file, config)
    check_patterns(file, config)
    weights = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
    if not weights:
        raise UserError(f"{folder} holds no adapter weights: neither {' nor '.join(ADAPTER_FILES)} is there.")
    shapes = tensor_shapes(weights[0])
    check_ranks(file, config, shapes)
    check_names(folder, [] if isinstance(targets, str) else targets, saved, shapes)
    return config


def check_fields(file: Path, config: dict[str, Any]) -> None:
    """Raises UserError for a field that is not known here, unless it says nothing, and for a wrong kind of value."""
    defaults = LoraConfig().to_dict()
    for name, value in config.items():
        known = (*FLAGS, *TEXT_FIELDS, *CHECKED, *UNUSED)
        if name not in known and value and value != defaults.get(name):
            raise UserError(
                f"{file}: {name} is {value!r:.80}, which is not supported: take an adapter without it, or remove the "
                "entry if the adapter does not need it."
            )
        if name in FLAGS and not isinstance(value, bool | None):
            raise UserError(f"{file}: {name} is {value!r:.40}, not true or false.")
        if name in TEXT_FIELDS and not (value is None or isinstance(value, str) and len(value) < 4096):
            raise UserError(f"{file}: {name} is {value!r:.40}, not a short text.")
    begins = config.get("init_lora_weights", True)
    if not isinstance(begins, bool) and not (isinstance(begins, str) and BEGINNINGS.fullmatch(begins)):
        raise UserError(f"{file}: init_lora_weights is {begins!r:.40}, which needs more than an adapter: not read.")
    layers = config.get("layers_to_transform")
    if not all(type(layer) is int for layer in (layers if isinstance(layers, list) else [layers or 0])):
        raise UserError(f"{file}: layers_to_transform is {layers!r:.80}, not numbers of layers.")


def check_ranks(file: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """Raises UserError for ranks far above those of the weights: PEFT allocates matrices first and compares then."""
    highest = max([LARGEST_RANK, *(shape[0] for name, shape in shapes.items() if ".lora_A." in name and shape)])
    for name in ("rank_pattern", "alpha_pattern"):
        for value in (config.get(name) or {}).values():
            if type(value) not in (int, float) or not 0 < value <= 2**24:
                raise UserError(f"{file}: {name} holds {value!r:.40}, not a number above 0.")
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    if any(type(rank) is not int or rank > highest for rank in ranks):
        raise UserError(f"{file} names the rank {max(ranks):,}, and its weights have at most {highest:,}.")


def check_patterns(file: Path, config: dict[str, Any]) -> None:
    """Raises UserError for a pattern that could be compared with names for ever."""
    patterns: list[tuple[str, Any]] = []
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(name)
        patterns += [(name, each) for each in ([value] if isinstance(value, str) else value or [])]
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise UserError(f"{file}: {name} is {config[name]!r:.80}, not an object of names and numbers.")
        patterns += [(name, key) for key in config.get(name) or {}]
    patterns += [("modules_to_save", name) for name in config.get("modules_to_save") or []]
    if len(patterns) > MOST_PATTERNS:
        raise UserError(f"{file} holds {len(patterns):,} names of layers; at most {MOST_PATTERNS} are read.")
    for name, pattern in patterns:
        if not isinstance(pattern, str) or not is_plain(pattern):
            raise UserError(
                f"{file}: {name} holds the pattern {pattern!r:.80}, which may take for ever: write names of layers, or "
                "a pattern with at most three parts like .*, six groups, and no repeated group."
            )


def is_plain(pattern: str) -> bool:
    """Whether comparing a name with a regular expression takes a time that its length bounds.

    No group is repeated, and few parts can match a varying number of varying characters.
    """
    plain = re.sub(r"\\[^sSwWdDbB0-9]", "_", pattern)  # an escaped dot is a dot
    varying = re.findall(r"(?:\.|\\[sSwWD]|\])(?:[*+?]|\{)", plain)
    odd = re.search(r"\)[*+{]|\(\?[^:!=]|\\[0-9]", plain)
    return len(pattern) <= LONGEST_PATTERN and not odd and len(varying) <= 3 and plain.count("(") <= 6


def check_names(folder: Path, targets: list[str], saved: list[str], names: Collection[str]) -> None:
    """Raises UserError if an adapter lacks weights of ``modules_to_save``, or trains embeddings beside them.

    ``names``: of the tensors that the adapter holds.
    """
    for module in saved:
        if not any(f".{module}." in name for name in names):
            raise UserError(
                f"{folder / 'adapter_config.json'}: modules_to_save names {module}, and the adapter holds no weights "
                "of it: copy the adapter again, or take the name out if it was not trained."
            )
    own = [name for name in names if not any(f".{module}." in name for module in saved)]
    if trained := next((name for name in [*targets, *own] if "embed" in name), None):
        raise UserError(
            f"the adapter in {folder} also trains embeddings ({trained}), which is not supported: take an adapter of "
            "linear layers."
        )
