"""What a record holds beside the logs: settings, model, machine, data, answers row by row, warnings in words."""

import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from common.arguments import DataArguments, ModelArguments, TrainingArguments
from common.command import VARIABLES, given, origin_of, this_command
from common.data.dataset import Prepared
from common.data.survey import PERCENTILES, Survey
from common.declared import declared
from common.launch.engines import sizes
from common.models.registry import ModelFolder
from common.report.record import now

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets")
# Flags of transformers that say how a training goes, where nobody gave them.
SHOWN = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "seed"),
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("activation_checkpointing", "bf16", "fp16", "train_sampling_strategy"),
)
MOST_ROWS, MOST_CHARACTERS = 10_000, 5_000_000  # of answers in a record
RISES = 1.02  # a validation loss that is so much above its best one
MANY_PASSES, FEW_STEPS, MANY_CUT = 20, 50, 0.05  # epochs, steps, share of the rows


def settings_facts(parts: Sequence[object]) -> list[dict[str, str]]:
    """Each flag that was given or chosen, and those that say how a training goes, with where it came from.

    parts: the objects of model, method, data and training arguments.
    """
    own, found = given(), []
    for part in parts:
        for flag, about in declared(type(part).__name__).items():
            value, origin = vars(part)[flag], origin_of(flag, own)
            chosen = not isinstance(part, TrainingArguments) and value != about.default
            if value in (None, "", []) or not (origin or chosen or flag in SHOWN):
                continue
            source = origin or ("chosen" if value != about.default else "default")
            value = value.value if isinstance(value, Enum) else value
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append({"flag": flag, "value": text, "from": source, "variable": VARIABLES.get(flag, "")})
    order = ("flag", "variable", "file", "script", "chosen", "default")
    return sorted(found, key=lambda setting: order.index(setting["from"]))


def model_facts(folder: ModelFolder, model: PreTrainedModel, model_args: ModelArguments, args: Any) -> dict[str, Any]:
    total, trainable = sizes(model, args)
    return {
        "name": str(model_args.model_name_or_path),
        "path": str(folder.path),
        "family": folder.spec.name,
        "parameters": total,
        "trainable": trainable if args.do_train else 0,
        "dtype": str(model.dtype).removeprefix("torch."),
        "bits": model_args.quantization_bit,
    }


def commit() -> str | None:
    """The commit of these scripts, with -dirty where files differ from it; None outside of git."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """The kind of a device, and the name of a card."""
    name = "" if device.type == "cpu" else f", {torch.get_device_module(device).get_device_name(device)}"
    return f"{device.type}{name}"


def piece_facts(args: TrainingArguments, first_step: int, predicted: int) -> dict[str, Any]:
    """A start of the training: command, machine, versions."""
    return {
        "command": this_command(),
        "started": now(),
        "seconds": 0.0,
        "first_step": first_step,
        "last_step": first_step,
        "tokens": 0,
        "device": device_name(args.device),
        "machine": socket.gethostname(),
        "processes": args.world_size,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit(),
        "memory": {"predicted": predicted},
    }


def data_facts(split: str, data: Prepared, found: Survey | None) -> dict[str, Any]:
    """A split: rows, files, what was lost, and the lengths that a survey found."""
    summary = data.summary
    facts = {
        "split": split,
        "rows": len(data.rows) or len(data.questions),
        "hash": summary["content"],
        "dropped": summary["dropped"] + summary["unlabelled"] + summary["bad_rows"],
        "held_out": len(summary["held_out"]),
        "files": [{name: file[name] for name in ("file", "format", "rows")} for file in summary["findings"]],
    }
    return facts | (survey_facts(found) if found else {})


def survey_facts(found: Survey) -> dict[str, Any]:
    names: dict[str, tuple[list[int], int | None]] = {
        "question": (found.asked, found.source_limit),
        "answer": (found.answered, found.target_limit),
    }
    if found.joint:
        names = {name: (lengths, None) for name, (lengths, _) in names.items()}
        names["both"] = (found.both, found.source_limit + found.target_limit + 1)
    if found.is_text:
        names = {"text": (found.answered, None)}
    lengths = []
    for name, (percentiles, limit) in names.items():
        edges, counts = found.histograms["answer" if name == "text" else name]
        shares = {str(share): value for share, value in zip(PERCENTILES, percentiles, strict=True)}
        lengths.append({"name": name, "limit": limit, "percentiles": shares, "edges": edges, "counts": counts})
    return {"tokens": found.tokens, "cut": found.cut, "lost": found.lost, "lengths": lengths}


def chosen_rows(scores: Sequence[float | None], characters: int) -> list[int]:
    """The rows that a record keeps, in their order: all, or a tenth with the lowest scores and others evenly.

    ``characters``: of all rows.
    """
    most = min(MOST_ROWS, MOST_CHARACTERS * len(scores) // max(1, characters))
    if len(scores) <= most:
        return list(range(len(scores)))
    worst = sorted((row for row, score in enumerate(scores) if score is not None), key=lambda row: scores[row] or 0)
    evenly = np.linspace(0, len(scores) - 1, most * 9 // 10).astype(int).tolist()
    return sorted({*worst[: most // 10], *evenly})


def warnings_of(record: Mapping[str, Any], data_args: DataArguments, keeps_best: bool) -> Iterator[dict[str, str]]:
    """What a person should know about a training, in both languages; while it runs, about what is planned."""
    losses = [(entry["eval_loss"], entry["step"]) for entry in record["logs"] if "eval_loss" in entry]
    if losses:
        best, step = min(losses)
        if losses[-1][0] > RISES * best and losses[-1][1] > step:
            en = "" if keeps_best else " BEST_METRIC=loss keeps the best checkpoint; EARLY_STOPPING=3 ends it there."
            zh = "" if keeps_best else "BEST_METRIC=loss 保留最好的检查点，EARLY_STOPPING=3 及时结束训练。"
            yield {
                "en": f"The validation loss rises since step {step} ({best:.3f} to {losses[-1][0]:.3f}): the model "
                f"learns the training rows by heart.{en}",
                "zh": f"验证损失从第 {step} 步起上升（{best:.3f} 到 {losses[-1][0]:.3f}）：模型开始死记训练数据。{zh}",
            }
    progress, running = record["progress"], record["status"] == "training"
    steps = progress.get("steps" if running else "step", 0)
    if (passes := progress.get("epochs" if running else "epoch") or 0) > MANY_PASSES:
        rows = sum(split["rows"] for split in record["data"] if split["split"] == "train")
        yield {
            "en": f"{passes:.0f} passes over {rows:,} rows teach them by heart: EPOCHS=3 is usual.",
            "zh": f"{rows:,} 条数据训练了 {passes:.0f} 遍，容易死记硬背；一般 EPOCHS=3。",
        }
    if 0 < steps < FEW_STEPS:
        yield {
            "en": f"{steps} steps change little: raise EPOCHS or lower BATCH_SIZE.",
            "zh": f"只有 {steps} 步，变化不大：增大 EPOCHS 或减小 BATCH_SIZE。",
        }
    for split in record["data"]:
        if (cut := split.get("cut", 0)) > MANY_CUT * split["rows"]:
            lengths = f"{data_args.max_source_length} + {data_args.max_target_length}"
            yield {
                "en": f"{cut:,} of {split['rows']:,} {split['split']} rows are cut to {lengths} tokens: raise "
                "MAX_SOURCE_LENGTH or MAX_TARGET_LENGTH.",
                "zh": f"{split['split']} 的 {split['rows']:,} 条中有 {cut:,} 条被截到 {lengths} 个 token：增大 "
                "MAX_SOURCE_LENGTH 或 MAX_TARGET_LENGTH。",
            }
    base, tuned = (record["scores"].get(name, {}) for name in ("base", "tuned"))
    if tuned.get("rouge-l", 0) < base.get("rouge-l", 0):
        yield {
            "en": f"The tuned model scores below its base (ROUGE-L {tuned['rouge-l']:.1f} and {base['rouge-l']:.1f}): "
            "probably too few steps, or a learning rate that is too high.",
            "zh": f"微调后的得分低于基座（ROUGE-L {tuned['rouge-l']:.1f}，基座 {base['rouge-l']:.1f}）："
            "可能步数太少，或学习率太高。",
        }
    if empty := tuned.get("empty", 0):
        yield {
            "en": f"{empty:.0f} answers or references are empty and count as 0.",
            "zh": f"{empty:.0f} 条回答或参考答案为空，记 0 分。",
        }
