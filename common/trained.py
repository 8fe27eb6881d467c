"""A trained folder: which one is meant, and the settings that its training recorded."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from common.errors import UserError, say
from common.files import read_json

SETTINGS_FILE = "run_settings.json"
RESULTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
# Recorded settings that hold for the evaluation of a training too.
SHARED = (
    "model_name_or_path",
    "quantization_bit",
    "test_file",
    "validation_file",
    "prompt_column",
    "response_column",
    "history_column",
    "conversation_column",
    "text_column",
    "source_prefix",
    "max_source_length",
    "max_target_length",
)


def find_training(path: str) -> Path:
    """The trained folder itself, or the newest one in a folder of trainings. Raises UserError if there is none."""
    folder = Path(path)
    if any((folder / name).is_file() for name in RESULTS):
        return folder
    results = [file for name in RESULTS for file in folder.glob(f"*/{name}")]
    if not results:
        raise UserError(f"no training in {path}: train first (bash train.sh), or set CHECKPOINT (--checkpoint) to one.")
    newest = max(results, key=lambda file: file.stat().st_mtime).parent
    say(f"newest training: {newest}")
    return newest


def recorded(folder: Path) -> dict[str, Any]:
    """The settings of the training that wrote a folder or one of its checkpoints; {} if it recorded none."""
    return read_json(folder / SETTINGS_FILE) or read_json(folder.parent / SETTINGS_FILE) or {}


def named_base(folder: Path) -> str | None:
    """The base model that a trained folder names."""
    if (folder / "adapter_config.json").is_file():
        return (read_json(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
    config = read_json(folder / "config.json") or {}
    return config.get("base_model_name_or_path") or config.get("_name_or_path")


def evaluation_defaults(checkpoint: str, flags: Collection[str]) -> dict[str, Any]:
    """Defaults of ``flags`` for the evaluation of a trained folder; a flag that the user gives still wins.

    Raises UserError like ``find_training``.
    """
    folder = find_training(checkpoint)
    settings = recorded(folder)
    defaults = {name: settings[name] for name in SHARED if name in settings}
    defaults.setdefault("model_name_or_path", named_base(folder))
    own = next((flag for flag in ("lora_checkpoint", "ptuning_checkpoint") if flag in flags), "model_name_or_path")
    text = bool(defaults.get("text_column"))
    return defaults | {own: str(folder), "output_dir": str(folder), "do_eval": text, "do_predict": not text}
