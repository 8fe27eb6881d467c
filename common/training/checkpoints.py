"""The output folder: the settings of its training, and what a training continues from."""

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerState

from common.arguments import DataArguments, ModelArguments, TrainingArguments
from common.data.sources import find_files
from common.errors import OutOfMemory, SaveError, UserError, describe, differences, disk_problem, note, other_owner
from common.files import check_states, lack_of_room, read_json, write_json
from common.manifest import damage, read_manifest
from common.methods import Method
from common.models.registry import ModelFolder
from common.trained import COLUMNS, SETTINGS_FILE
from common.training.saves import checkpoint_folders, put, remove_training, write_results

# Files of a checkpoint that only a training needs.
STATES = re.compile(r"optimizer\.|scheduler\.pt|scaler\.pt|rng_state|latest$|zero_to_|global_step")

FORMER = {"train_sampling_strategy": "random", "tokens_per_batch": None}  # what trainings did before it was recorded


def settings_of(
    folder: ModelFolder,
    method: Method,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    content: str | None,
) -> dict[str, Any]:
    """The settings that a continued training must share with its beginning; only its length may change.

    ``content``: the hash of the training rows, as they were tokenized; None if nothing is trained.
    """
    lengths = ("max_source_length", "max_target_length", "max_train_samples")
    names = ("dataset_name", *COLUMNS, "text_unit", "mix", *lengths, "ignore_pad_token_for_loss")
    return {
        "model": str(folder.path.resolve()),
        "method": method.name,
        "quantization_bit": model_args.quantization_bit,
        **{name: value for name, value in vars(method.args).items() if name != "save_format"},  # which may change
        **{name: vars(data_args)[name] for name in names},
        "validation_split": data_args.validation_split if data_args.held_out else 0,
        **{
            name: vars(args)[name]
            for name in ("learning_rate", "weight_decay", "seed", "train_sampling_strategy", "tokens_per_batch")
        },
        "lr_scheduler_type": str(args.lr_scheduler_type.value),
        "rows_per_step": args.all_rows_per_step,
        "training_rows": content,
    }


def check_same(place: Path, earlier: dict[str, Any], settings: dict[str, Any], remedy: str) -> None:
    """Raises UserError if a training had other settings. Files may lie elsewhere; their rows count."""
    if not (differing := differences(FORMER | earlier, settings)):
        return
    if "training_rows" not in earlier:
        raise UserError(
            f"{place} holds a training of an earlier version of these scripts, which recorded no hash of its rows: "
            "train on from its weights in another --output_dir (--lora_checkpoint, --ptuning_checkpoint or "
            "--model_name_or_path), or --overwrite_output_dir to start over."
        )
    if differing.startswith("training_rows was"):
        differing = "TRAIN_FILE (--train_file) now gives other rows"
    raise UserError(f"{place} holds a training with other settings ({differing}): {remedy}.")


def check_writable(folder: Path) -> None:
    """Raises UserError where the folder can't be made or written to, SaveError where its disk has no room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b" ")
    except OSError as error:
        reason, kind = f"{error.strerror}{other_owner(folder)}", SaveError if disk_problem(error) else UserError
        raise kind(f"can't write to the output folder {folder}: {reason}.") from error


def check_space(folder: Path, needed: int) -> None:
    """Raises SaveError where less than ``needed`` bytes are free."""
    if problem := lack_of_room(folder, needed):
        raise SaveError(f"on the disk of {folder}, {problem}: make room or choose another --output_dir.")


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Errors that a user can mend say that the checkpoints in the folder are complete, if there are any."""
    try:
        yield
    except Exception as error:
        ours = isinstance(error, UserError) and not isinstance(error, OutOfMemory)
        sentence = None if ours else describe(error)
        if sentence is None or not checkpoint_folders(folder):
            raise
        raise UserError(f"{sentence} What was saved before is complete.") from error


def agreed_point(args: TrainingArguments, settings: dict[str, Any], files: Iterable[str]) -> Path | None:
    """``resume_point`` of the first process, on all processes, which check that they can continue from there."""
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and (args.overwrite_output_dir or args.resume_from_checkpoint):
        note("note: SLURM has started this job again, so it goes on from its newest checkpoint.")
        args.overwrite_output_dir, args.resume_from_checkpoint = False, None
    found = resume_point(args, settings, files) if args.process_index == 0 else None
    if found := broadcast_object_list([found])[0]:
        check_checkpoint(args, found)
    return found


def resume_point(args: TrainingArguments, settings: dict[str, Any], files: Iterable[str]) -> Path | None:
    """What to continue from: a checkpoint, or the output folder itself if its result is all that is asked for.

    None: the beginning. A damaged checkpoint is set aside, and the one before it counts. ``files``: the names that a
    result may have. Raises UserError if an earlier training had other settings, if the checkpoint that the user chose
    is damaged, and where nothing can be continued but something would be overwritten.
    """
    folder, asked = Path(args.output_dir), args.resume_from_checkpoint
    chosen = Path(asked) if asked and asked.lower() not in ("true", "yes", "1") else None
    if chosen:
        if problem := damage(chosen) or lacks_states(chosen, args):
            raise UserError(f"--resume_from_checkpoint {chosen} is not whole: {problem}. Name another, or none.")
        check_same(
            chosen, (read_manifest(chosen) or {}).get("settings", {}), settings, "choose another checkpoint, or none"
        )
        if problem := best_problem(chosen, args):
            raise UserError(f"--resume_from_checkpoint {chosen}: {problem}. Name another, or none.")
        return chosen
    if args.overwrite_output_dir and not asked:
        return None
    result, there = read_manifest(folder), [name for name in files if (folder / name).exists()]
    recorded = recorded_settings(folder) if result or there or checkpoint_folders(folder) else None
    if recorded:
        check_same(folder, recorded, settings, "choose another --output_dir, or --overwrite_output_dir to start over")
    finished = bool(result) and is_finished(folder, args)
    problem = damage(folder) if finished or not result else ""  # an unfinished one is replaced anyway
    if not problem and finished:
        return folder
    for checkpoint in usable_checkpoints(folder, args, setting_aside=bool(recorded)):
        if result and problem:
            note(f"note: the result in {folder} is not whole ({problem}): it is written again.")
        return checkpoint
    problem = damage(folder) if there else ""
    if asked or problem:
        problem = f"; of its result, {problem}" if problem else ""
        raise UserError(
            f"{folder} holds no whole checkpoint{problem}: choose another --output_dir, or --overwrite_output_dir to "
            "start over."
        )
    return None


def recorded_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the training in a folder; None if there was none. Raises UserError for a broken record."""
    record = folder / SETTINGS_FILE
    if record.exists():
        if (found := read_json(record)) is None:
            raise UserError(
                f"{record} is broken, so the settings of the training in {folder} are not known: restore it, or delete "
                "it; then those in the checkpoints count."
            )
        return found
    manifests = map(read_manifest, [folder, *reversed(checkpoint_folders(folder))])
    return next((manifest["settings"] for manifest in manifests if manifest and "settings" in manifest), None)


def lacks_states(checkpoint: Path, args: TrainingArguments) -> str:
    """Why a training can't go on from here, as after --save_only_model; "" if it can, or has no step to go."""
    states = [checkpoint / name for name in ("latest", "scheduler.pt")]
    return "" if any(map(Path.is_file, states)) or is_finished(checkpoint, args) else "it holds no optimizer states"


def is_result(folder: Path) -> bool:
    return not folder.name.startswith("checkpoint-")


def best_problem(checkpoint: Path, args: TrainingArguments) -> str:
    """Why the best checkpoint until then can't be used, if it will be needed; "" if it can."""
    best = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).best_global_step
    folder = checkpoint.with_name(f"checkpoint-{best}")
    if not (args.load_best_model_at_end and best) or folder == checkpoint or is_result(checkpoint):
        return ""
    problem = damage(folder)
    return f"the best checkpoint until then, {folder}, is not whole: {problem}" if problem else ""


def usable_checkpoints(folder: Path, args: TrainingArguments, setting_aside: bool) -> Iterator[Path]:
    """The whole checkpoints of a training, newest first; it names and renames each damaged one that it meets.

    A training that keeps its best checkpoint needs that one too. Raises UserError for checkpoints of another program,
    unless ``setting_aside``.
    """
    for checkpoint in reversed(checkpoint_folders(folder)):
        if problem := damage(checkpoint):
            if not setting_aside:
                raise UserError(
                    f"{checkpoint} was not written by these scripts ({problem}): choose another --output_dir, and "
                    "train on from its weights by --lora_checkpoint, --ptuning_checkpoint or --model_name_or_path."
                )
            aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
            put(checkpoint, aside)
            note(f"note: {checkpoint} is damaged: {problem}. It is now {aside.name}; the one before it is used.")
            continue
        if problem := lacks_states(checkpoint, args) or best_problem(checkpoint, args):
            note(f"note: {checkpoint} is passed over: {problem}.")
            continue
        yield checkpoint


def check_checkpoint(args: TrainingArguments, checkpoint: Path) -> None:
    """Raises UserError for a checkpoint that this machine lacks or the engine can't continue with as many processes."""
    looks = args.local_process_index == 0 and args.process_index != 0  # on another machine; the first has looked
    if looks and (problem := damage(checkpoint)):
        raise UserError(
            f"{checkpoint} is not whole on this machine ({socket.gethostname()}): {problem}. Let all machines share "
            "the output folder, or train with --save_on_each_node (without --deepspeed or --fsdp)."
        )
    if checkpoint.resolve() == Path(args.output_dir).resolve():  # the result
        return
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


def is_finished(folder: Path, args: TrainingArguments) -> bool:
    """Whether a checkpoint or a result has reached the end of this training, or was stopped early there."""
    if not (folder / "trainer_state.json").is_file():
        return False
    state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    stopper = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    if args.early_stopping and stopper.get("early_stopping_patience_counter", 0) >= args.early_stopping:
        return True
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return state.global_step >= state.max_steps and state.num_train_epochs >= args.num_train_epochs


def start_run(
    folder: Path,
    settings: dict[str, Any],
    data_args: DataArguments,
    files: Iterable[str],
    start_over: bool,
    checkpoint: Path | None,
) -> None:
    """Records the settings and the files for an evaluation, with held-out rows in ``folder``.

    It removes the earlier training when starting over, and sets aside what came after the ``checkpoint``.
    """
    if start_over:
        remove_training(folder, files)
    own = [path.resolve() for path in checkpoint_folders(folder)]
    begun = checkpoint and checkpoint.resolve()
    for later in own[own.index(begun) + 1 :] if begun in own else ():
        put(later, later.with_name(f"{later.name}.aside"))
        note(f"note: {later} is now {later.name}.aside, because the training goes on from {checkpoint}.")
    names = ("test_file", "validation_file", "probe_file")
    if data_args.held_out:  # the cache may be emptied
        shutil.copytree(str(data_args.validation_file), folder / "held_out", dirs_exist_ok=True)
        data_args.test_file = data_args.validation_file = str(folder / "held_out")
    trained = {
        "train_file": full_paths(data_args.train_file),
        "train_datasets": data_args.train_datasets and str(Path(data_args.train_datasets).resolve()),
    }
    evaluated = {name: ",".join(full_paths(vars(data_args)[name])) for name in names}
    write_json(folder / SETTINGS_FILE, settings | trained | evaluated)


def full_paths(patterns: str | None) -> list[str]:
    return [str(file.resolve()) for file in find_files(patterns or "")]


def metrics_of(state: TrainerState) -> dict[str, Any]:
    """What a state says about all steps of its training; each log holds the mean loss since the one before."""
    logs = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
    steps = [step - before for (step, _), before in zip(logs, [0, *(step for step, _ in logs)], strict=False)]
    total = sum(count * loss for count, (_, loss) in zip(steps, logs, strict=True))
    return {"epoch": state.epoch, "total_flos": state.total_flos, "train_loss": total / max(1, state.global_step)}


def copy_trained(checkpoint: Path, state: TrainerState, folder: Path) -> None:
    """Copies the result of the training that ended with ``state``, without what only a training needs."""
    for name in (read_manifest(checkpoint) or {"files": {}})["files"]:
        if not STATES.match(name):
            shutil.copy2(checkpoint / name, folder / name)
    state.save_to_json(str(folder / "trainer_state.json"))
    write_results(folder, "train", metrics_of(state))
