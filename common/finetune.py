"""The job of every script, top to bottom: check -> data -> model -> train -> evaluate -> predict -> report."""

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from common.arguments import DataArguments, ModelArguments, TrainingArguments
from common.data.collator import TrainCollator
from common.data.dataset import Encode, Prepared, load_shards, prepare_dataset
from common.encoding import encode_eval, encode_texts, encode_train, stop_ids
from common.errors import UserError
from common.launch.engines import sizes, start_engine
from common.loading import load_tokenizer
from common.memory.fit import check_fits, forecast
from common.methods import Method
from common.metrics import score
from common.models.precision import base_dtype
from common.models.registry import ModelFolder, fetch_weights
from common.models.weights import load_base
from common.training.checkpoints import (
    check_checkpoint,
    check_space,
    copy_trained,
    is_finished,
    is_saved,
    own,
    resume_point,
    settings_of,
    start_run,
)
from common.training.checks import SPLITS, check, complete
from common.training.evaluation import generate_answers
from common.training.report import (
    peak_memory,
    print_first_row,
    print_plan,
    print_prepared,
    print_scores,
    print_settings,
    print_training_summary,
)
from common.training.trainer import FinetuneTrainer


def run(method: Method, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
    """Does what --do_train, --do_eval and --do_predict ask for. Raises UserError for bad input."""
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    start_engine(args)
    folder = check(method, model_args, data_args, args)
    complete(model_args, args, folder)
    memory = forecast(folder, method, model_args, data_args, args)
    if args.plan:
        print_plan(memory)
    check_fits(memory, args)
    if args.plan:
        return
    output_dir = Path(args.output_dir)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output_dir / "runs" / time.strftime("%Y%m%d-%H%M%S"))
    with own(output_dir) if args.owns_output else nullcontext():
        settings = settings_of(folder, method, model_args, data_args, args)
        checkpoint = resume_point(args, settings, method.files) if args.do_train and args.process_index == 0 else None
        checkpoint = broadcast_object_list([checkpoint])[0]
        if checkpoint:
            check_checkpoint(args, checkpoint)
        set_seed(args.seed)
        tokenizer = load_tokenizer(model_args.tokenizer_name or folder)
        data = prepare(data_args, args, tokenizer)
        folder = fetch_weights(folder)
        if args.dry_run:
            return
        model = build_model(method, model_args, args, folder)
        if args.process_index == 0:
            print_settings(method.name, model, folder.path, data_args, args, memory.sentence)
        trainer = build_trainer(method, model, tokenizer, data, data_args, args)
        if args.do_train:
            check_space(output_dir, 3 * sizes(model, args)[1] * 4)  # with Adam's moments
            if args.process_index == 0:
                start_run(
                    output_dir, settings, data_args, method.files, args.overwrite_output_dir and checkpoint is None
                )
            train(trainer, data["train"], tokenizer, checkpoint, memory.plan.total)
        if args.do_eval:
            evaluate(method, trainer, data_args)
        if args.do_predict:
            predict(method, trainer, tokenizer, data["test"], data_args, memory.plan.total)
    state = PartialState()
    state.wait_for_everyone()  # who leaves while others still talk to it can take them along
    state.destroy_process_group()


def prepare(
    data_args: DataArguments, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Prepared]:
    """The tokenized rows of every split that the flags ask for, cut to --max_*_samples."""
    data = {}
    # --overwrite_cache is for one process: the check before the start, or without it the first. The others read.
    checked = "EXPECTED_PROCESSES" in os.environ and args.processes > 1 and not args.dry_run
    overwrite = data_args.overwrite_cache and args.process_index == 0 and not checked
    data_args = replace(data_args, overwrite_cache=overwrite)
    for split, flag, file_flag, limit_flag in SPLITS:
        if not vars(args)[flag]:
            continue
        if split == "train" and data_args.train_datasets:
            prepared = load_shards(data_args, Path(data_args.train_datasets), tokenizer)
        else:
            encoders: dict[str, Encode] = {}
            if split != "test":  # for the loss
                encoders["rows"] = encode_texts if data_args.text_column else encode_train
            if split != "train" and not data_args.text_column:  # to be answered
                encoders["questions"] = encode_eval
            prepared = prepare_dataset(data_args, vars(data_args)[file_flag], tokenizer, split, encoders)
        prepared.limit(vars(data_args)[limit_flag])
        if args.process_index == 0:
            print_prepared(split, prepared)
        data[split] = prepared
    return data


def build_model(
    method: Method, model_args: ModelArguments, args: TrainingArguments, folder: ModelFolder
) -> PreTrainedModel:
    """The model with the parameters to train."""
    dtype, device = base_dtype(args, method.trains_base), None if args.engine.sharded else args.device
    model = load_base(folder, dtype, model_args.quantization_bit, device)
    # The Trainer refuses a quantized base without a PEFT adapter; what trains here stands beside it in float32.
    model._hf_peft_config_loaded = model_args.quantization_bit is not None
    model = method.attach(model)
    if args.activation_checkpointing and args.activation_checkpointing_kwargs.get("use_reentrant"):
        model.enable_input_require_grads()  # or no gradient would come through the first layer
    # DDP would write into frozen weights too when it starts, which all processes of a machine share until then.
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
    validation = data.get("validation")
    score_answers: Callable[[PreTrainedModel], dict[str, float]] | None = None
    if args.predict_with_generate and validation and len(validation.questions):
        score_answers = partial(score_rows, tokenizer=tokenizer, data=validation, data_args=data_args, args=args)
    args.prediction_loss_only = (
        True  # answers are generated by common.training.evaluation, the Trainer computes the loss
    )
    return FinetuneTrainer(
        method=method,
        score_answers=score_answers,
        model=model,
        args=args,
        train_dataset=data["train"].rows if "train" in data else None,
        eval_dataset=validation.rows if validation else None,
        data_collator=TrainCollator(
            tokenizer.pad_token_id,
            -100 if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id,
            data_args.max_source_length + data_args.max_target_length if data_args.pad_to_max_length else 0,
        ),
        processing_class=tokenizer,
    )


def train(
    trainer: FinetuneTrainer,
    data: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None,
    predicted_memory: int,
) -> None:
    """Trains, from a checkpoint where there is one, and saves what was trained into the output folder."""
    args, start = trainer.args, {"global_step": 0, "num_input_tokens_seen": 0}
    if checkpoint:
        start = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if is_finished(start, args):
            if args.engine.name != "DDP" and (args.do_eval or args.do_predict):
                raise UserError(
                    f"the training was finished before: {checkpoint}; evaluate it without {args.engine.name}."
                )
            best = start.get("best_model_checkpoint") if args.load_best_model_at_end else None
            if args.engine.name == "DDP":
                trainer.load_trained(Path(best or checkpoint))
            if args.should_save and not is_saved(Path(args.output_dir), trainer.method.files):
                copy_trained(Path(best or checkpoint), Path(args.output_dir))  # it was interrupted after its last step
            if trainer.is_world_process_zero():
                print(f"the training was finished before: {checkpoint}; --overwrite_output_dir starts over", flush=True)
            return
    if trainer.is_world_process_zero():
        print_first_row(data.rows[0], tokenizer)
        if checkpoint:
            print(f"continuing from {checkpoint}", flush=True)
    if checkpoint and args.engine.name != "DeepSpeed":  # which reads its own shards
        trainer.load_trained(checkpoint)
    trainable = sizes(trainer.model, args)[1]
    metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
    trainer.save_model()
    tokens = trainer.state.num_input_tokens_seen - start["num_input_tokens_seen"]
    memory = {"predicted_memory": predicted_memory, **peak_memory()}
    trainer.save_metrics("train", metrics | memory | {"trainable_parameters": trainable, "train_tokens": tokens})
    trainer.save_state()
    if trainer.is_world_process_zero():
        steps = trainer.state.global_step - start["global_step"]
        print_training_summary(
            trainer.state.log_history,
            metrics,
            steps,
            samples=steps * args.rows_per_step,
            tokens=tokens,
            saved_to=Path(args.output_dir),
        )


@contextmanager
def base_model(method: Method, trainer: FinetuneTrainer) -> Iterator[PreTrainedModel]:
    """The trainer with the model as it is without what was trained."""
    tuned = trainer.model
    with method.base(tuned) as base:
        trainer.model = base
        try:
            yield base
        finally:
            trainer.model = tuned


def evaluate(method: Method, trainer: FinetuneTrainer, data_args: DataArguments) -> None:
    """Writes eval_results.json: the loss on the validation set; beside the base's if asked; of text the perplexity."""
    metrics = {}
    if data_args.evaluate_base:
        with base_model(method, trainer):
            metrics = trainer.evaluate(metric_key_prefix="eval_base")
    metrics |= trainer.evaluate()
    if data_args.text_column:
        losses = {name: value for name, value in metrics.items() if name.endswith("_loss")}
        metrics |= {name.replace("_loss", "_perplexity"): math.exp(loss) for name, loss in losses.items()}
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def answer_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    data_args: DataArguments,
    args: TrainingArguments,
    description: str = "generating",
) -> list[str]:
    """The model's answers to the rows of a split: greedy, with beams, or sampled, as the flags say."""
    generation: dict[str, Any] = {
        "do_sample": False,
        "num_beams": data_args.num_beams or args.generation_num_beams or 1,
    }
    generation["eos_token_id"] = stop_ids(tokenizer)
    if data_args.do_sample:
        generation |= {"do_sample": True, "top_p": data_args.top_p, "temperature": data_args.temperature}
    if args.generation_max_length:  # in transformers this counts the question too
        generation["max_length"] = args.generation_max_length
    else:
        generation["max_new_tokens"] = data_args.max_new_tokens or data_args.val_max_target_length
    prompts, batch_size = list(data.questions["prompt_ids"]), args.per_device_eval_batch_size
    return generate_answers(
        model, tokenizer, prompts, batch_size, description, in_step=args.engine.sharded, **generation
    )


def score_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    data_args: DataArguments,
    args: TrainingArguments,
) -> dict[str, float]:
    """Scores of the model's answers to the rows of a split."""
    return score(answer_rows(model, tokenizer, data, data_args, args), list(data.questions["reference"]))


def predict(
    method: Method,
    trainer: FinetuneTrainer,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    data_args: DataArguments,
    predicted_memory: int,
) -> None:
    """Writes generated_predictions.txt, one {"labels", "predict"} a line, and scores it; beside the base if asked."""
    args, references = trainer.args, list(data.questions["reference"])
    columns = {}
    for name, file_name in (("base", "base_predictions.txt"), ("tuned", "generated_predictions.txt")):
        if name == "base" and not data_args.evaluate_base:
            continue
        with base_model(method, trainer) if name == "base" else nullcontext(trainer.model) as model:
            answers = answer_rows(model, tokenizer, data, data_args, args, f"{name} model")
        if trainer.is_world_process_zero():
            with open(Path(args.output_dir) / file_name, "w", encoding="utf-8") as file:
                for reference, answer in zip(references, answers, strict=True):
                    file.write(json.dumps({"labels": reference, "predict": answer}, ensure_ascii=False) + "\n")
        columns[name] = score(answers, references)
    metrics = {f"predict_{name}": value for name, value in columns["tuned"].items()}
    metrics |= {f"predict_base_{name}": value for name, value in columns.get("base", {}).items()}
    memory = {"predicted_memory": predicted_memory, **peak_memory()}
    trainer.save_metrics("predict", metrics | memory | {"predict_samples": len(references)})
    if trainer.is_world_process_zero():
        print_scores(columns)
        print(f"predictions: {Path(args.output_dir) / 'generated_predictions.txt'}", flush=True)
