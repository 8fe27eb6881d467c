"""The output folder: who owns it, with which settings it was written, and from where a training continues."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from common.arguments import DataArguments, ModelArguments, TrainingArguments
from common.errors import UserError

SETTINGS_FILE = "run_settings.json"
# What decides where a training leads. The number of steps is not among them: a training may be prolonged.
MODEL_SETTINGS = ("model_name_or_path", "quantization_bit", "pre_seq_len", "prefix_projection")
DATA_SETTINGS = ("train_file", "dataset_name", "prompt_column", "response_column", "history_column", "source_prefix")
LENGTH_SETTINGS = ("max_source_length", "max_target_length")


def settings_of(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> dict:
    """The settings that a continued training must share with its beginning."""
    settings = {name: asdict(model_args)[name] for name in MODEL_SETTINGS}
    settings |= {name: asdict(data_args)[name] for name in DATA_SETTINGS + LENGTH_SETTINGS}
    settings |= {
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": str(args.lr_scheduler_type.value),
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        "rows_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
    }
    return settings


def check_writable(folder: Path) -> None:
    """Raises UserError where the folder can't be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b" ")
        probe.unlink()
    except OSError as error:
        raise UserError(f"can't write to the output folder {folder}: {error.strerror}.") from error


def check_space(folder: Path, needed: int) -> None:
    """Raises UserError where less than ``needed`` bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk of {folder} has {free / 1e6:,.1f} MB free and a checkpoint needs {needed / 1e6:,.1f} MB: "
            "make room or choose another --output_dir."
        )


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints from which a training can continue, oldest first; trainer_state.json is written last."""
    wanted = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
    found = [path for path in folder.glob("checkpoint-*") if all((path / name).is_file() for name in wanted)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def resume_point(args: TrainingArguments, settings: dict) -> Path | None:
    """The checkpoint to continue from; None to start from the beginning.

    An earlier training in the same folder is continued if its settings are these. Raises UserError if they differ,
    or if the checkpoint that was asked for is not complete.
    """
    folder = Path(args.output_dir)
    asked = args.resume_from_checkpoint
    if asked and asked.lower() not in ("true", "yes", "1"):
        if Path(asked) not in complete_checkpoints(Path(asked).parent):
            raise UserError(f"{asked} is no complete checkpoint: trainer state, optimizer or scheduler is missing.")
        return Path(asked)
    if args.overwrite_output_dir and not asked:
        return None
    checkpoints = complete_checkpoints(folder)
    if asked and not checkpoints:
        raise UserError(f"--resume_from_checkpoint: {folder} holds no complete checkpoint.")
    earlier_file = folder / SETTINGS_FILE
    if checkpoints and earlier_file.is_file():
        earlier = json.loads(earlier_file.read_text(encoding="utf-8"))
        differing = [
            f"{name} was {earlier.get(name)!r}, now {value!r}"
            for name, value in settings.items()
            if earlier.get(name) != value
        ]
        if differing:
            raise UserError(
                f"{folder} holds a training with other settings ({'; '.join(differing)}): choose another --output_dir, "
                "or --overwrite_output_dir to start over."
            )
    return checkpoints[-1] if checkpoints else None


def start_run(folder: Path, settings: dict, start_over: bool) -> None:
    """Writes the settings down; the checkpoints of an earlier training go where starting over was asked for."""
    for checkpoint in folder.glob("checkpoint-*") if start_over else ():
        shutil.rmtree(checkpoint)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")
