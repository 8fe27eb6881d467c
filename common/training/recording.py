"""What a training tells its record: at its beginning, at each log, and at its end."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerState

from common.arguments import DataArguments, ModelArguments
from common.data.dataset import Prepared
from common.models.registry import ModelFolder
from common.report.facts import data_facts, model_facts, piece_facts, settings_facts, warnings_of
from common.report.record import Record
from common.training.checkpoints import is_finished
from common.training.evaluation import ANSWERS
from common.training.progress import KEPT, StepLines
from common.training.samples import ROWS, Samples
from common.training.summary import peak_memory
from common.training.trainer import FinetuneTrainer

QUESTIONS, SHORT = 6, 60  # questions for a chat to begin with, and their characters


def begin_record(
    trainer: FinetuneTrainer,
    folder: ModelFolder,
    data: Mapping[str, Prepared],
    model_args: ModelArguments,
    data_args: DataArguments,
    checkpoint: Path | None,
) -> Record:
    """The record of the output folder; of a training from its beginning (without ``checkpoint``) a new one."""
    args, method = trainer.args, trainer.method
    trains = args.do_train and not (checkpoint and is_finished(checkpoint, args))
    record = Record(Path(args.output_dir), args.do_train and checkpoint is None)
    facts: dict[str, Any] = {"method": method.name} | ({"status": "training"} if trains else {})
    facts["data"] = [data_facts(split, prepared, prepared.survey) for split, prepared in data.items()]
    if trains or not record.data["settings"]:
        facts["settings"] = settings_facts((model_args, method.args, data_args, args))
        facts["model"] = model_facts(folder, trainer.model, model_args, args)
    else:  # an evaluation of the training that the record is about
        own = [split["split"] for split in facts["data"]]
        before = [split["hash"] for split in record.data["data"] if split["split"] == "test"]
        rows = record.data["rows"]["total"]
        if "test" in data and (data["test"].content not in before or len(data["test"].questions) != rows):
            record.data |= {"scores": {}, "rows": {"total": 0, "rows": []}}  # those of other rows
            if not data_args.evaluate_base:
                (record.folder / ANSWERS["base"]).unlink(missing_ok=True)
        facts["data"] = [split for split in record.data["data"] if split["split"] not in own] + facts["data"]
    if rows := questions_of(data):
        texts = list(dict.fromkeys(rows[: 20 * QUESTIONS]["text"]))
        facts["questions"] = [text for text in texts if 0 < len(text) <= SHORT][:QUESTIONS]
    record.data |= facts
    return record


def questions_of(data: Mapping[str, Prepared]) -> Dataset | None:
    """The questions of the validation or the test rows, if there are any."""
    return next((data[split].questions for split in ("validation", "test") if split in data), None) or None


def watch(
    trainer: FinetuneTrainer,
    record: Record | None,
    start: TrainerState,
    data: Mapping[str, Prepared],
    data_args: DataArguments,
) -> None:
    """Lets a training print its progress, answer sample rows, and record both. ``start``: what it continues from.

    Every process takes part; ``record``: in the first one.
    """
    args, longest = trainer.args, data_args.max_new_tokens or data_args.val_max_target_length
    if record:
        record.data["logs"] = record.data["logs"] or earlier_logs(start)
        record.begin_piece(piece_facts(args, start.global_step, trainer.predicted_memory))
    trainer.add_callback(StepLines(recorder(trainer, record, start, data_args), args.log_format == "json"))
    rows = questions_of(data)
    if not (args.show_answers and rows):
        return
    if record:
        questions = rows[:ROWS]
        pairs = zip(questions["text"], questions["reference"], strict=True)
        record.data["samples"]["rows"] = [{"question": text, "reference": given} for text, given in pairs]

    def answered(found: dict[str, Any]) -> None:
        if record:
            record.data["samples"]["answers"].append(found)

    trainer.add_callback(Samples(trainer, rows, longest, answered))


def earlier_logs(start: TrainerState) -> list[dict[str, Any]]:
    """The logs of before the training went on, where a record lacks them."""
    found: dict[int, dict[str, Any]] = {}
    for log in start.log_history:
        found.setdefault(log["step"], {}).update({name: log[name] for name in KEPT if name in log})
    return list(found.values())


def recorder(
    trainer: FinetuneTrainer, record: Record | None, start: TrainerState, data_args: DataArguments
) -> Callable[[dict[str, Any]], None]:
    """A function that takes what was logged at a step."""

    def take(entry: dict[str, Any]) -> None:
        if record is None:
            return
        state, seconds = trainer.state, trainer.clock.seconds()
        progress = {"step": state.global_step, "steps": state.max_steps, "epoch": state.epoch}
        progress |= {"tokens": state.num_input_tokens_seen}  # of these steps, each counted once
        progress |= {"epochs": state.num_train_epochs, "seconds": seconds, "seconds_left": entry["seconds_left"]}
        peaks = {name.split("_")[1]: size for name, size in peak_memory().items() if name.startswith("peak")}
        piece = {
            "last_step": state.global_step,
            "seconds": seconds,
            "tokens": state.num_input_tokens_seen - start.num_input_tokens_seen,
            "memory": {"predicted": trainer.predicted_memory, **peaks},
        }
        record.data["warnings"] = list(warnings_of(record.data, data_args, bool(trainer.args.load_best_model_at_end)))
        record.log({name: entry[name] for name in KEPT if name in entry}, progress, piece)

    return take


def finish(record: Record, trainer: FinetuneTrainer, data_args: DataArguments) -> None:
    """Takes down the end of a training, or of an evaluation alone."""
    keeps_best = bool(trainer.args.load_best_model_at_end)
    if trainer.args.do_train:
        record.data["best_step"] = trainer.state.best_global_step if keeps_best else None
        record.data["progress"]["seconds_left"] = 0.0
    record.data["status"] = "finished"
    record.data["warnings"] = list(warnings_of(record.data, data_args, record.data["best_step"] is not None))
    record.write(card=True)
