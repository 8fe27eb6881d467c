"""The output folder: its owner, its recorded settings, and the checkpoint that a training continues from."""

import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerState

from common.arguments import DataArguments, ModelArguments, TrainingArguments
from common.data.sources import find_files
from common.errors import UserError, describe, differences, other_owner
from common.files import check_states, indexed_files, is_complete, read_json, write_json
from common.methods import Method
from common.models.registry import ModelFolder
from common.trained import COLUMNS, SETTINGS_FILE


def settings_of(
    folder: ModelFolder, method: Method, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> dict:
    """The settings that a continued training must share with its beginning; only its length may change."""
    lengths = ("max_source_length", "max_target_length", "max_train_samples")
    names = ("dataset_name", *COLUMNS, "text_unit", "mix", *lengths, "ignore_pad_token_for_loss")
    return {
        "model": str(folder.path.resolve()),
        "method": method.name,
        "quantization_bit": model_args.quantization_bit,
        **{name: value for name, value in vars(method.args).items() if name != "save_format"},  # which may change
        "train_file": full_paths(data_args.train_file),
        "train_datasets": data_args.train_datasets and str(Path(data_args.train_datasets).resolve()),
        **{name: vars(data_args)[name] for name in names},
        "validation_split": data_args.validation_split if data_args.held_out else 0,
        **{name: vars(args)[name] for name in ("learning_rate", "weight_decay", "seed")},
        "lr_scheduler_type": str(args.lr_scheduler_type.value),
        "rows_per_step": args.all_rows_per_step,
    }


def full_paths(patterns: str | None) -> list[str]:
    return [str(file.resolve()) for file in find_files(patterns or "")]


def check_writable(folder: Path) -> None:
    """Raises UserError where the folder can't be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b" ")
    except OSError as error:
        reason = f"{error.strerror}{other_owner(folder)}"
        raise UserError(f"can't write to the output folder {folder}: {reason}.") from error


def check_space(folder: Path, needed: int) -> None:
    """Raises UserError where less than ``needed`` bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk of {folder} has {free / 1e6:,.1f} MB free and a checkpoint needs {needed / 1e6:,.1f} MB: "
            "make room or choose another --output_dir."
        )


def is_complete_checkpoint(folder: Path) -> bool:
    """Whether a training can continue from it: a kill or a full disk in the middle of saving leaves parts."""
    tensors = [*folder.glob("*.bin"), *folder.glob("*.safetensors")]
    if (folder / "latest").is_file():  # DeepSpeed names the folder of its states there when all are written
        tensors += (folder / (folder / "latest").read_text().strip()).glob("*.pt")
    else:
        fsdp = folder / "optimizer.bin"
        tensors += [fsdp if fsdp.exists() else folder / "optimizer.pt", folder / "scheduler.pt"]
    whole = all(file.is_file() and is_complete(file) for file in tensors)
    return whole and read_json(folder / "trainer_state.json") is not None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints from which a training can continue, oldest first."""
    return list(filter(is_complete_checkpoint, checkpoint_folders(folder)))


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Errors that a user can mend say that the checkpoints in the folder are complete, if there are any."""
    try:
        yield
    except Exception as error:
        sentence = None if isinstance(error, UserError) else describe(error)
        if sentence is None or not complete_checkpoints(folder):
            raise
        raise UserError(f"{sentence} What was saved before is complete.") from error


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints of a training, complete or not, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(filter(Path.is_dir, found), key=lambda path: int(path.name.rpartition("-")[2]))


def resume_point(args: TrainingArguments, settings: dict, files: Iterable[str]) -> Path | None:
    """The checkpoint to continue from; None to start from the beginning.

    An earlier training in the same folder is continued if its settings are these. Raises UserError if they differ,
    or if the given checkpoint is not complete. ``files``: names; a finished training leaves one of them.
    """
    folder = Path(args.output_dir)
    asked = args.resume_from_checkpoint
    chosen = Path(asked) if asked and asked.lower() not in ("true", "yes", "1") else None
    if chosen and not is_complete_checkpoint(chosen):
        raise UserError(f"{chosen} is no complete checkpoint: state, weights, optimizer or scheduler is missing.")
    if chosen and chosen.resolve().parent != folder.resolve():
        return chosen
    if args.overwrite_output_dir and not asked:
        return None
    checkpoints = complete_checkpoints(folder)
    if asked and not chosen and not checkpoints:
        raise UserError(f"--resume_from_checkpoint: {folder} holds no complete checkpoint.")
    earlier = read_json(folder / SETTINGS_FILE) or settings
    begun = chosen or checkpoints or any((folder / name).exists() for name in files)
    if begun and (differing := differences(earlier, settings)):
        raise UserError(
            f"{folder} holds a training with other settings ({differing}): choose another --output_dir, "
            "or --overwrite_output_dir to start over."
        )
    return chosen or next(reversed(checkpoints), None)


def check_checkpoint(args: TrainingArguments, checkpoint: Path) -> None:
    """Raises UserError for a checkpoint that this machine lacks or the engine can't continue with as many processes."""
    if not is_complete_checkpoint(checkpoint):
        raise UserError(
            f"{checkpoint} is not complete on this machine ({socket.gethostname()}): let all machines share the output "
            "folder, or train with --save_on_each_node (without --deepspeed or --fsdp)."
        )
    check_states(checkpoint)
    latest = checkpoint / "latest"
    engine = "DeepSpeed" if latest.is_file() else "FSDP2" if (checkpoint / "optimizer.bin").is_file() else "DDP"
    if engine != args.engine.name:
        raise UserError(
            f"{checkpoint} was written under {engine}, and this is {args.engine.name}: continue it with the same "
            "--deepspeed or --fsdp, or without either after DDP."
        )
    if engine != "DeepSpeed":
        return
    written_by = len(list((checkpoint / latest.read_text().strip()).glob("*_optim_states.pt")))
    if written_by != args.processes:
        raise UserError(
            f"{checkpoint} was written by {written_by} processes, and ZeRO can't spread its optimizer states over "
            f"{args.processes}: continue with {written_by}, or train on from its weights in a new --output_dir "
            f"(--model_name_or_path, --lora_checkpoint or --ptuning_checkpoint {checkpoint})."
        )


def is_finished(state: TrainerState, args: TrainingArguments) -> bool:
    """Whether the state of a checkpoint has reached the end of this training, or was stopped early there."""
    stopper = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    if args.early_stopping and stopper.get("early_stopping_patience_counter", 0) >= args.early_stopping:
        return True
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return state.global_step >= state.max_steps and state.num_train_epochs >= args.num_train_epochs


def start_run(folder: Path, settings: dict, data_args: DataArguments, files: Iterable[str], start_over: bool) -> None:
    """Records the settings and the files for an evaluation, with held-out rows in ``folder``.

    It removes the earlier training when starting over.
    """
    if start_over:
        for checkpoint in checkpoint_folders(folder):
            print(f"starting over: {checkpoint} is deleted", flush=True)
            shutil.rmtree(checkpoint)
        for file in [path for name in files for path in parts_of(folder / name)]:
            file.unlink()
    names = ("test_file", "validation_file", "probe_file")
    if data_args.held_out:  # the cache may be emptied
        shutil.copytree(str(data_args.validation_file), folder / "held_out", dirs_exist_ok=True)
        data_args.test_file = data_args.validation_file = str(folder / "held_out")
    evaluated = {name: ",".join(full_paths(vars(data_args)[name])) for name in names}
    write_json(folder / SETTINGS_FILE, settings | evaluated)


def parts_of(file: Path) -> list[Path]:
    """An existing weight file; if it is an index, the files that it names too."""
    if not file.is_file():
        return []
    return [file, *(indexed_files(file) or [] if file.suffix == ".json" else [])]


def is_saved(folder: Path, files: Iterable[str]) -> bool:
    """Whether a training has left its complete result, one of ``files``."""
    found = [parts_of(folder / name) for name in files]
    return any(parts and all(part.is_file() and is_complete(part) for part in parts) for parts in found)


def copy_trained(checkpoint: Path, folder: Path) -> None:
    """Copies the result out of a checkpoint, without the states that only a training needs."""
    trainer = ("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json")
    states = shutil.ignore_patterns(*trainer, "latest", "zero_to_*", "global_step*")
    shutil.copytree(checkpoint, folder, ignore=states, dirs_exist_ok=True)
