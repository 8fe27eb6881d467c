"""The job of every script, top to bottom: check -> data -> model -> train -> evaluate -> predict -> summary."""

import gc
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import release_memory
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerState,
    set_seed,
)

from common.arguments import DataArguments, ModelArguments, TrainingArguments
from common.data.collator import packed_batch, train_batch
from common.data.dataset import Prepared, prepare_dataset
from common.data.order import order_of
from common.data.shards import load_shards
from common.data.survey import overlap, survey
from common.data.tables import MODEL_INPUTS
from common.encoding import has_roles
from common.errors import UserError
from common.files import check_no_links
from common.launch.engines import sizes, start_engine
from common.loading import tokenizer_of
from common.locking import guard
from common.memory.fit import check_fits, forecast, row_lengths
from common.methods import Method
from common.metrics import score
from common.models.registry import ModelFolder, fetch_weights, open_model
from common.models.weights import load_base
from common.report.record import Record
from common.terminal import logged, show
from common.trained import COLUMNS, LOG_FILE, PAGE_FILE, PASSES, base_of
from common.training import checkpoints, summary
from common.training.checks import SPLITS, check, check_rows, complete, needs
from common.training.choices import choose
from common.training.data_report import print_survey, warn_of_overlap
from common.training.evaluation import ANSWERS, Judgement, answer_rows, base_model, judge
from common.training.first_row import print_first_row
from common.training.preemption import saved_at_signals
from common.training.progress import StepLines
from common.training.recording import begin_record, finish, watch
from common.training.samples import Samples
from common.training.saves import Saves, tidy
from common.training.scores import save_judgements
from common.training.trainer import FinetuneTrainer

# What the imports made stays: each full look of the collector, as at the start of a training, would take 0.4 s for it.
gc.freeze()


def run(method: Method, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
    """Trains, evaluates and predicts as the flags ask. Raises UserError for bad input."""
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    start_engine(args)
    choose(data_args, args)
    folder = check(method, model_args, data_args, args)
    complete(method, model_args, args, folder)
    memory = forecast(folder, method, model_args, data_args, args)
    if args.plan:
        summary.print_plan(memory, args)
    check_fits(memory, args)
    if args.plan:
        return
    output_dir = Path(args.output_dir)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output_dir / "runs" / time.strftime("%Y%m%d-%H%M%S"))
    lock = guard("output folder", output_dir, wait=False, inside=True)
    # The check on another machine does not lock the folder, which the machines may share.
    locks = args.should_save and not (args.dry_run and os.environ.get("MACHINE_RANK", "0") != "0")
    with lock if locks else nullcontext(), logged(args.log_format == "json") as log_into:
        if locks:
            if args.do_train:
                check_no_links(output_dir)
            tidy(output_dir)
        set_seed(args.seed)
        tokenizer = tokenizer_of(folder, model_args.tokenizer_name)
        data = prepare(data_args, args, tokenizer)
        content = data["train"].content if args.do_train else None
        settings = checkpoints.settings_of(folder, method, model_args, data_args, args, content)
        looks = args.do_train and (locks or not args.dry_run)
        checkpoint = checkpoints.agreed_point(args, settings, method.files) if looks else None
        folder = fetch_weights(folder)
        if args.dry_run:
            if args.process_index == 0:
                summary.print_verdict(folder, method, data, memory, args)
            return
        found = {}
        if data_args.evaluate_base and method.trains_base and (args.do_eval or args.do_predict):
            found["base"] = judge_alone(method, base_folder(folder, args), tokenizer, data, model_args, data_args, args)
            release_memory()
        model = build_model(method, model_args, args, folder)
        if args.process_index == 0:
            summary.print_settings(folder, model, memory, data_args, args)
        trainer = build_trainer(method, model, tokenizer, data, data_args, args)
        trainer.forecast = memory
        if args.do_train:
            open_output(trainer, settings, data_args, checkpoint)
        record = None
        if args.process_index == 0:
            log_into(output_dir / LOG_FILE)
            record = begin_record(trainer, folder, data, model_args, data_args, checkpoint)
        with record.open() if record else nullcontext():
            train_and_judge(trainer, data, data_args, found, checkpoint, record)
    state = PartialState()
    state.wait_for_everyone()  # a process that exits early can crash its peers
    state.destroy_process_group()


def train_and_judge(
    trainer: FinetuneTrainer,
    data: dict[str, Prepared],
    data_args: DataArguments,
    found: dict[str, Judgement],
    checkpoint: Path | None,
    record: Record | None,
) -> None:
    """``found``: the base, if it was judged before; ``record``: in the first process."""
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    if args.do_train:
        with checkpoints.kept(output_dir), saved_at_signals(trainer):
            train(trainer, data, data_args, checkpoint, record)
    if args.do_eval or args.do_predict:
        judge_both(trainer, data, data_args, found, record)
    if record:
        finish(record, trainer, data_args)
        beside = f", beside it predictions.csv and {ANSWERS['tuned']}" if args.do_predict else ""
        show(f"report: {output_dir / PAGE_FILE}{beside}")


def judge_both(
    trainer: FinetuneTrainer,
    data: dict[str, Prepared],
    data_args: DataArguments,
    found: dict[str, Judgement],
    record: Record | None,
) -> None:
    """Does what --do_eval and --do_predict ask; ``found``: the base, if it was judged before."""
    summary.reset_peak_memory()
    if record and trainer.args.do_train:
        record.data["status"] = "evaluating"
        record.write()
    if data_args.evaluate_base and not trainer.method.trains_base:
        with base_model(trainer):
            found["base"] = judge(trainer, data, data_args, "base")
    found["tuned"] = judge(trainer, data, data_args, "tuned")
    save_judgements(trainer, data, data_args, found, record)


def prepare(
    data_args: DataArguments, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Prepared]:
    """The tokenized rows of every split that the flags ask for, cut to --max_*_samples.

    Where rows are held out, it names them as the validation data.
    """
    data = {}
    # Only one process overwrites the cache, the check before the start or else the first process; the others read it.
    checked = "EXPECTED_PROCESSES" in os.environ and args.processes > 1 and not args.dry_run
    overwrite = data_args.overwrite_cache and args.process_index == 0 and not checked
    for split, file_flag, limit_flag in SPLITS:
        if not needs(split, data_args, args):
            continue
        own = copy(data_args)
        own.overwrite_cache = overwrite
        if split == "probe":
            vars(own).update(dict.fromkeys(COLUMNS), source_prefix="")
        if split == "train" and data_args.train_datasets:
            prepared = load_shards(own, Path(data_args.train_datasets), tokenizer)
        else:
            prepared = prepare_dataset(own, vars(data_args)[file_flag], tokenizer, split)
        if prepared.held_out:
            data_args.validation_file = data_args.test_file = prepared.held_out
        if limit_flag and (limit := vars(data_args)[limit_flag]) is not None:
            prepared.rows, prepared.questions = prepared.rows.take(limit), prepared.questions.take(limit)
        if split == "train":
            prepared.order = order_of(prepared.rows, data_args.mix, len(prepared.summary["findings"]), args)
            check_rows(prepared.rows_per_epoch, args)
        data[split] = prepared
        if args.process_index == 0:
            show_data(split, data, data_args, args, has_roles(tokenizer))
    return data


def show_data(
    split: str, data: Mapping[str, Prepared], data_args: DataArguments, args: TrainingArguments, joint: bool
) -> None:
    """Prints what was read, and the data report; ``joint``: question and answer share their room."""
    if split == "test" and data_args.test_file == data_args.validation_file and "validation" in data:
        return
    prepared = data[split]
    summary.print_prepared(split, prepared, in_full=split == "train" or not data_args.held_out)
    if split == "train" or split == "validation" and not data_args.held_out:
        limits = data_args.max_source_length, data_args.max_target_length
        found = prepared.survey = survey(prepared.rows, *limits, joint)
        print_survey(split, found, prepared.files, prepared.summary["scripts"], full=args.dry_run)
    if split == "validation" and "train" in data:
        warn_of_overlap(len(prepared.rows), *overlap(data["train"].rows, prepared.rows))
    if split == "train" and args.do_train:
        summary.print_length(prepared, args)


def build_model(
    method: Method, model_args: ModelArguments, args: TrainingArguments, folder: ModelFolder
) -> PreTrainedModel:
    """The model with the parameters to train."""
    dtype, device = args.base_dtype(method.trains_base), None if args.engine.sharded else args.device
    model = load_base(folder, dtype, model_args.quantization_bit, device, args.reads_weights, args.do_train)
    # The Trainer refuses a quantized base without a PEFT adapter; here a float32 prefix or adapter trains beside it.
    model._hf_peft_config_loaded = model_args.quantization_bit is not None
    model = method.attach(model)
    if args.activation_checkpointing and args.activation_checkpointing_kwargs.get("use_reentrant"):
        model.enable_input_require_grads()  # or no gradient would come through the first layer
    # DDP would write into the frozen weights when it starts, and end their sharing by all processes of a machine.
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return model


def build_trainer(
    method: Method,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: dict[str, Prepared],
    data_args: DataArguments,
    args: TrainingArguments,
) -> FinetuneTrainer:
    validation, train = data.get("validation"), data.get("train")
    args.remove_unused_columns = False  # the origin of a row travels with it
    args.prediction_loss_only = True  # training/evaluation.py generates answers, the Trainer computes the loss
    collate = partial(
        train_batch,
        pad_token_id=tokenizer.pad_token_id,
        label_pad_token_id=-100 if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id,
        length=data_args.max_source_length + data_args.max_target_length if data_args.pad_to_max_length else 0,
    )
    trainer = FinetuneTrainer(
        method=method,
        model=model,
        args=args,
        train_dataset=train.rows.select_columns([*MODEL_INPUTS, "file", "line"]) if train else None,
        eval_dataset=validation.rows.select_columns(MODEL_INPUTS) if validation else None,
        data_collator=collate,
        processing_class=tokenizer,
    )
    for callback in (ProgressCallback, PrinterCallback):  # training/progress.py prints instead
        trainer.remove_callback(callback)
    if train:
        trainer.order = train.order
        if data_args.packing:
            positions, room = partial(model.positions, config=model.config), sum(row_lengths(data_args))
            trainer.collate = partial(packed_batch, positions=positions, room=room, **collate.keywords)
        if train.order:
            trainer.add_callback(train.order)
        trainer.finite_loss.files = [str(file["file"]) for file in train.summary["findings"]]
    if args.predict_with_generate and validation and len(validation.questions):
        references = list(validation.questions["reference"])
        trainer.score_answers = lambda: score(answer_rows(trainer, validation, data_args), references)
    return trainer


def base_folder(folder: ModelFolder, args: TrainingArguments) -> ModelFolder:
    """The base of a fully trained model: what a training starts from, or what a trained folder names."""
    return folder if args.do_train else fetch_weights(open_model(base_of(folder.path)))


def judge_alone(
    method: Method,
    folder: ModelFolder,
    tokenizer: PreTrainedTokenizerBase,
    data: dict[str, Prepared],
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
) -> Judgement:
    """What the base does, before the tuned model is in memory: a device may not hold both."""
    model = build_model(method, model_args, args, folder)
    return judge(build_trainer(method, model, tokenizer, data, data_args, args), data, data_args, "base")


def open_output(
    trainer: FinetuneTrainer, settings: dict[str, Any], data_args: DataArguments, checkpoint: Path | None
) -> None:
    """Prepares the output folder of a training. Raises SaveError if its disk has no room for a checkpoint."""
    args, folder = trainer.args, Path(trainer.args.output_dir)
    size = 3 * sizes(trainer.model, args)[1] * 4  # of a checkpoint, with Adam's moments
    checkpoints.check_space(folder, size)
    trainer.saves = Saves(folder, settings, max(0, args.save_total_limit or 0), size)
    args.save_total_limit = None  # the Trainer would remove checkpoints by the times of their folders
    if args.process_index == 0:
        passes = {name: vars(args)[name] for name in PASSES}
        start_over = args.overwrite_output_dir and checkpoint is None
        checkpoints.start_run(folder, settings | passes, data_args, trainer.method.files, start_over, checkpoint)


def train(
    trainer: FinetuneTrainer,
    data: Mapping[str, Prepared],
    data_args: DataArguments,
    checkpoint: Path | None,
    record: Record | None,
) -> None:
    """Trains, from a checkpoint if there is one, and saves the result into the output folder."""
    args, start = trainer.args, TrainerState()
    if checkpoint:
        start = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if checkpoints.is_finished(checkpoint, args):
            finish_again(trainer, checkpoint, start)
            return
    if trainer.is_world_process_zero():
        print_first_row(data["train"].rows[0], trainer.processing_class, args.show_tokens)
        if checkpoint:
            show(f"continuing from {checkpoint}")
    if checkpoint and args.engine.name != "DeepSpeed" and args.reads_weights:  # DeepSpeed reads its own shards
        trainer.load_trained(checkpoint)
    trainer.resumed_from = checkpoint
    trainable = sizes(trainer.model, args)[1]
    summary.reset_peak_memory()
    if args.early_stopping:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping))
    watch(trainer, record, start, data, data_args)
    metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
    for callback in (EarlyStoppingCallback, StepLines, Samples):  # they would look at every evaluation
        trainer.remove_callback(callback)
    tokens = trainer.state.num_input_tokens_seen - start.num_input_tokens_seen
    memory = {"predicted_memory": trainer.predicted_memory, **summary.peak_memory()}
    metrics |= checkpoints.metrics_of(trainer.state)  # also of the steps before a pause
    trainer.save_result(metrics | memory | {"trainable_parameters": trainable, "train_tokens": tokens})
    if trainer.is_world_process_zero():
        steps = trainer.state.global_step - start.global_step
        seconds = trainer.clock.seconds()
        summary.print_training_summary(args, data["train"], trainer.state, seconds, steps, tokens)
    if trainer.optimizer is not None and args.engine.name != "DeepSpeed":
        trainer.optimizer.state.clear()  # answers may need its memory


def finish_again(trainer: FinetuneTrainer, checkpoint: Path, state: TrainerState) -> None:
    """Leaves trainer and output folder as after the training that ended in ``checkpoint``."""
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    result = checkpoint
    if args.engine.name != "DDP" and (args.do_eval or args.do_predict):
        raise UserError(f"the training was finished before: {checkpoint}; evaluate it without {args.engine.name}.")
    if checkpoint.resolve() != output_dir.resolve():  # it was interrupted after its last step
        best = args.load_best_model_at_end and state.best_global_step and not checkpoints.is_result(checkpoint)
        result = checkpoint.with_name(f"checkpoint-{state.best_global_step}") if best else checkpoint
        if args.should_save:
            with trainer.saves.result(state.global_step, state.best_global_step) as folder:
                checkpoints.copy_trained(result, state, folder)
    if args.engine.name == "DDP":
        trainer.load_trained(result)
    if trainer.is_world_process_zero():
        show(f"the training was finished before: {checkpoint}; --overwrite_output_dir starts over")
