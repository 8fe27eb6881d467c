"""Evaluation of the tuned and the base model: the loss of rows, and the scores of answers."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, release_memory
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from common.arguments import DataArguments
from common.data.collator import left_pad
from common.data.dataset import Prepared
from common.data.tables import MODEL_INPUTS
from common.encoding import stop_ids
from common.errors import note
from common.files import written
from common.manifest import flush
from common.models.cache import GrowingLayer
from common.models.products import packed, use_onednn
from common.terminal import Progress
from common.training.steps import room_for, size_of
from common.training.trainer import FinetuneTrainer

CACHED_WEIGHTS = 2**19  # 2 MB in float32
ANSWERS = {"base": "base_predictions.txt", "tuned": "generated_predictions.txt"}


@contextmanager
def head_in_parts(model: PreTrainedModel) -> Iterator[None]:
    """Where MKL computes, lets the output layer compute with parts of its weight that a core's cache holds.

    For the few rows of a generation step and a large vocabulary it takes two thirds of the time. oneDNN gains nothing.
    """
    head = model.get_output_embeddings()
    plain = not use_onednn() and type(head) is nn.Linear and head.bias is None and type(head.weight) is nn.Parameter
    if not plain or head.weight.ndim != 2 or head.weight.device.type != "cpu":  # or a shard of it
        yield
        return
    parts = head.weight.detach().split(max(1, CACHED_WEIGHTS // head.in_features))
    head.forward = lambda inputs: torch.cat([nn.functional.linear(inputs, part) for part in parts], dim=-1)
    try:
        yield
    finally:
        del head.forward


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    description: str = "generating",
    in_step: bool = False,
    may_halve: bool = False,
    shown: bool = True,
    advice: Callable[[], str] = lambda: "take smaller batches",
    **generation,
) -> list[str]:
    """The answer to each prompt (token ids), in their order, on every process.

    Prompts of similar length share a batch, so that little is padded, and the processes divide the batches among
    themselves. ``in_step``: whether they also divide the weights, so that all must generate as long as one does.
    ``generation`` goes to ``model.generate``. Where memory runs out, it halves the batches if it ``may_halve`` them;
    else it raises UserError, with the ``advice``.
    """
    state = PartialState()
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    model.eval()  # the Trainer calls train() before every step
    answers: list[tuple[int, str]] = []
    bar = Progress(description, len(prompts), "rows answered", shown and state.is_main_process)
    with bar, packed(model), head_in_parts(model):
        done = 0  # prompts, of all processes
        while done < len(by_length):
            # Processes that share the weights must generate equally often: the last batch is done again by some.
            start = done + batch_size * state.process_index
            batch = by_length[start : start + batch_size] or by_length[-batch_size:]
            inputs = left_pad([prompts[i] for i in batch], tokenizer.pad_token_id)
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            output = None
            with room_for(partial(size_of, inputs), advice, may_halve and len(batch) > 1):
                cache = Cache(layer_class_to_replicate=GrowingLayer)
                output = model.generate(
                    **inputs, use_cache=True, past_key_values=cache, synced_gpus=in_step, **generation
                )
            if output is None:
                batch_size = len(batch) // 2
                note(f"note: memory ran out at {size_of(inputs)}: answering {batch_size} at once from here on")
                release_memory()
                continue
            texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            if start < len(by_length):
                answers += zip(batch, (text.strip() for text in texts), strict=True)
            done += batch_size * state.num_processes
            bar.update(len(batch) * state.num_processes)
    return [text for _, text in sorted(gather_object(answers))]


@contextmanager
def base_model(trainer: FinetuneTrainer) -> Iterator[None]:
    """A context in which the trainer holds the base model."""
    tuned = trainer.model
    with trainer.method.base(tuned) as trainer.model:
        try:
            yield
        finally:
            trainer.model = tuned


def probe_loss(trainer: FinetuneTrainer, data: Mapping[str, Prepared]) -> dict[str, float]:
    """The model's loss on the general questions, if there are any."""
    if "probe" not in data:
        return {}
    rows = data["probe"].rows.select_columns(MODEL_INPUTS)
    return {"probe_loss": trainer.evaluate(rows, metric_key_prefix="probe")["probe_loss"]}


def answer_rows(
    trainer: FinetuneTrainer, data: Prepared, data_args: DataArguments, description: str = "generating"
) -> list[str]:
    """The model's answers to the questions of a split: greedy, with beams, or sampled, as the flags ask."""
    args, tokenizer = trainer.args, trainer.processing_class
    generation: dict[str, Any] = {"do_sample": False, "eos_token_id": stop_ids(tokenizer)}
    generation["num_beams"] = data_args.num_beams or args.generation_num_beams or 1
    if data_args.do_sample:
        generation |= {"do_sample": True, "top_p": data_args.top_p, "temperature": data_args.temperature}
    if args.generation_max_length:  # in transformers this counts the question too
        generation["max_length"] = args.generation_max_length
    else:
        generation["max_new_tokens"] = data_args.max_new_tokens or data_args.val_max_target_length
    prompts, rows = list(data.questions["prompt_ids"]), args.answer_batch_size
    generation |= {"may_halve": args.auto_answers and args.world_size == 1, "advice": trainer.advice}
    return generate_answers(trainer.model, tokenizer, prompts, rows, description, args.engine.sharded, **generation)


class Judgement(NamedTuple):
    """What one model did: the metrics of the validation rows, the general questions' loss, answers to the test rows."""

    metrics: dict[str, float]
    probed: dict[str, float]
    answers: list[str]


def is_evaluated(trainer: FinetuneTrainer) -> bool:
    """Whether the last evaluation of the training was of its last step, and that is what it keeps."""
    (step, metrics), state = trainer.evaluated, trainer.state
    reloaded = trainer.args.load_best_model_at_end and state.best_global_step != step
    return trainer.args.do_train and step == state.global_step and "eval_loss" in metrics and not reloaded


def judge(trainer: FinetuneTrainer, splits: Mapping[str, Prepared], data_args: DataArguments, name: str) -> Judgement:
    """Does what --do_eval and --do_predict ask of the trainer's model; ``name``: base or tuned.

    Writes generated_predictions.txt or base_predictions.txt, one {"labels", "predict"} per line in the order of the
    file; labels are empty without a reference.
    """
    args = trainer.args
    metrics: dict[str, float] = {}
    answers: list[str] = []
    if args.do_eval and name == "tuned" and is_evaluated(trainer):
        metrics = trainer.evaluated[1]
    elif args.do_eval:
        metrics = trainer.evaluate(metric_key_prefix="eval_base" if name == "base" else "eval")
    if args.do_predict:
        data, references = splits["test"], splits["test"].questions["reference"]
        answers = answer_rows(trainer, data, data_args, f"{name} model")
        if trainer.is_world_process_zero():
            rows = (
                {"labels": given or "", "predict": answer} for given, answer in zip(references, answers, strict=True)
            )
            write_rows(Path(args.output_dir) / ANSWERS[name], rows)
    return Judgement(metrics, probe_loss(trainer, splits), answers)


def write_rows(file: Path, rows: Iterable[dict[str, str]]) -> None:
    """Replaces a file of JSON lines in one step. Raises SaveError; then the file is as it was."""
    new = file.with_suffix(".partial")
    with written(new, "make room and give the same command again"):
        with open(new, "w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        flush(new)
        os.replace(new, file)
