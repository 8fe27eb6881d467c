"""Finds a trained folder, its base model, and the settings that its training recorded."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from common.errors import UserError, note
from common.files import read_json
from common.hub.hubs import is_hub_name
from common.manifest import MANIFEST, damage
from common.models.registry import is_local

SETTINGS_FILE = "run_settings.json"
RUN_FILE, PAGE_FILE, LOG_FILE = "run.json", "report.html", "train.log"  # the report of a training
ON_ITS_WAY = ".result"  # the folder in a trained folder that holds a whole result until all of it is in its place
WEIGHTS = r"(adapter_model|model|pytorch_model)[.-].*(bin|safetensors)"  # what an evaluation reads
RESULTS = (
    *("adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("model.safetensors", "model.safetensors.index.json"),
)
COLUMNS = ("prompt_column", "response_column", "history_column", "conversation_column", "text_column", "source_prefix")
# Recorded settings that a continued training takes over where its flags leave them open.
PASSES = ("per_device_train_batch_size", "activation_checkpointing")
# Recorded settings that hold for the evaluation of a training too.
FILES = ("test_file", "validation_file", "probe_file")
SHARED = ("quantization_bit", *FILES, *COLUMNS, "text_unit", "max_source_length", "max_target_length")


def find_training(path: str | Path) -> Path:
    """The trained folder itself, or the newest one in a folder of trainings.

    Raises UserError if there is none, or as ``check_result``.
    """
    folder = Path(path)
    if holds_result(folder):
        check_result(folder)
        return folder
    results = [file for name in RESULTS for file in folder.glob(f"*/{name}")]
    if not results:
        raise UserError(f"no training in {path}: run train.sh first, or set CHECKPOINT (--checkpoint) to a training.")
    newest = max(results, key=lambda file: file.stat().st_mtime).parent
    note(f"newest training: {newest}")
    check_result(newest)
    return newest


def holds_result(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RESULTS)


def check_result(folder: Path) -> None:
    """Raises UserError for a result that a kill left in parts, or whose weights are not as they were written."""
    again = "give the command of its training again, which completes it"
    if (folder / ON_ITS_WAY).exists():
        raise UserError(f"{folder} holds parts of a result, because its last save was interrupted: {again}.")
    sealed = (folder / MANIFEST).exists()  # by these scripts, and copied with it
    if sealed and (problem := damage(folder, WEIGHTS)):
        raise UserError(f"the result in {folder} is damaged ({problem}): {again}.")


def recorded(folder: Path) -> dict[str, Any]:
    """The settings of the training that wrote a folder or one of its checkpoints; {} if it recorded none."""
    return read_json(folder / SETTINGS_FILE) or read_json(folder.parent / SETTINGS_FILE) or {}


def recorded_base(folder: Path) -> tuple[str, Any]:
    """What a trained folder holds (an adapter, a prefix or a model), and the base that it names, if it does."""
    adapter = read_json(folder / "adapter_config.json")
    config = adapter or read_json(folder / "config.json") or {}
    of_prefix = config.get("pre_seq_len") and config.get("_name_or_path")  # in a whole model: its own name
    kind = "adapter" if adapter else "prefix" if config.get("pre_seq_len") else "model"
    return kind, config.get("base_model_name_or_path") or of_prefix


def base_of(folder: Path, given: str | None = None, named: str | None = None) -> str:
    """The base model of a trained folder: ``given`` by the user, ``named`` by the caller, or named in the folder.

    Raises UserError if there is no such model.
    """
    base = given or named or recorded_base(folder)[1]
    if isinstance(base, str) and (is_local(base) or is_hub_name(base)):
        return base
    problem = f"was trained on {base!s:.200}, which does not exist any more" if base else "does not name its base model"
    raise UserError(f"{folder} {problem}: set MODEL (--model_name_or_path) to the base model.")


def evaluation_defaults(checkpoint: str, flags: Collection[str], base: str | None) -> dict[str, Any]:
    """Defaults of ``flags`` for the evaluation of a trained folder; ``base``: the base model if the user gives it.

    Raises UserError like ``find_training`` and ``base_of``.
    """
    folder = find_training(checkpoint)
    settings = recorded(folder)
    defaults = {name: settings[name] for name in SHARED if name in settings}
    text = bool(defaults.get("text_column"))
    defaults |= {"output_dir": str(folder), "do_eval": text, "do_predict": not text}
    own = next((flag for flag in ("lora_checkpoint", "ptuning_checkpoint") if flag in flags), None)
    if own is None:
        return defaults | {"model_name_or_path": str(folder)}
    return defaults | {own: str(folder), "model_name_or_path": base_of(folder, base)}
