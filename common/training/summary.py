"""What a training says in the terminal: data, settings, first row, scores side by side, final summary."""

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedModel, TrainerState

from common.arguments import DataArguments, TrainingArguments
from common.data.dataset import Prepared
from common.errors import note
from common.files import gb
from common.launch.engines import sizes
from common.memory.fit import Forecast, margins, needed
from common.memory.footprint import CUDA_CONTEXT
from common.methods import Method
from common.metrics import SCORES
from common.models.registry import ModelFolder
from common.report.facts import FEW_STEPS, MANY_PASSES
from common.terminal import duration, many, print_pairs, show
from common.training.estimate import training_seconds
from common.training.first_row import visible

SHOWN = 120  # characters of an answer


def print_prepared(split: str, data: Prepared, in_full: bool = True) -> None:
    """Prints the number of rows, and what was cut or left out; in full, each file's format and unread fields too."""
    summary = data.summary
    for found in summary["findings"] if in_full else ():
        unit = "rows to answer" if split == "test" else found["unit"]
        show(f"{split}: {found['file']}: {found['format']}, {found['rows']:,} {unit}")
        for name, count in found["unread"].items():
            note(f"note: {found['file']}: {name!r} is not read ({count:,} rows)")
        if found["empty_answers"]:
            note(f"note: {found['file']}: {found['empty_answers']:,} empty answers of the assistant are left out")
    if summary["bad_rows"]:
        note(f"note: {summary['bad_rows']:,} bad rows are left out, first {': '.join(summary['bad'][0][:2])}")
    left = len(data.questions) or len(data.rows)
    count = f"{left:,}" if left == summary["rows"] else f"{left:,} of {summary['rows']:,}"
    notes = [f"{count} rows {'prepared before' if data.cached else 'tokenized'}", f"{summary['truncated']:,} truncated"]
    if data.held_out:
        notes.append(f"{len(summary['held_out']):,} held out for validation, and their copies left out")
    if summary["shortened"]:
        notes.append(f"{summary['shortened']:,} without their oldest turns")
    if summary["dropped"]:
        first = f"(an empty text?), first {summary['first_dropped']}"
        notes.append(f"{summary['dropped']:,} dropped with nothing to learn {first}")
    if summary["unlabelled"]:
        notes.append(f"{summary['unlabelled']:,} dropped because nothing of their answers fits the lengths")
    show(f"{split}: {', '.join(notes)}")


def length_of(data: Prepared, args: TrainingArguments) -> tuple[int, float]:
    """(steps, epochs) of a training."""
    batches = math.ceil(math.ceil(data.rows_per_epoch / args.per_device_train_batch_size) / args.processes)
    if args.tokens_per_batch and data.order:
        batches = len(data.order)
    steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil((args.num_train_epochs or 0) * steps_per_epoch)
    return steps, steps / steps_per_epoch


def print_length(data: Prepared, args: TrainingArguments) -> None:
    """Prints steps and epochs, the mix of the files, and a warning for too many passes or too few steps."""
    steps, passes = length_of(data, args)
    if mix := mix_of(data):
        show(f"train: an epoch mixes {mix}")
    show(
        f"train: {many(steps, 'step')} of {size_of_step(args)}: {many(passes, 'epoch')} of {data.rows_per_epoch:,} rows"
    )
    if passes > MANY_PASSES:
        note(f"warning: {passes:.0f} passes teach the rows by heart: EPOCHS=3 (--num_train_epochs 3) is usual.")
    elif steps < FEW_STEPS:
        note(f"warning: {steps} steps change little: raise EPOCHS (--num_train_epochs) or lower BATCH_SIZE.")


def size_of_step(args: TrainingArguments) -> str:
    """As in "16 rows"."""
    if args.tokens_per_batch:
        return f"{args.tokens_per_batch * args.gradient_accumulation_steps * args.processes:,} slots"
    return f"{args.all_rows_per_step} rows"


def mix_of(data: Prepared) -> str:
    """The rows that an epoch takes of each file; "" if none are mixed."""
    counts = data.order.counts if data.order else []
    if len(counts) < 2:
        return ""
    files = zip(counts, data.summary["findings"], strict=True)
    return " + ".join(f"{count:,} rows of {found['file']}" for count, found in files)


def print_plan(memory: Forecast, args: TrainingArguments) -> None:
    """The predicted memory of a process by kind, the settings that decide it, and whether it fits."""
    (folder, method, setup, _), plan, available = memory
    sizes_of = {**dict(plan.largest()), "a process on its device": plan.total}
    sizes_of |= {f"{name}, beside that": size for name, size in margins(plan, setup).items()}
    if setup.gpu:
        sizes_of["CUDA itself, beside that"] = int(CUDA_CONTEXT)
    if plan.offloaded:
        sizes_of["a process on the host"] = plan.offloaded
    if plan.host >= 5e6:
        sizes_of["whole weights on the host, in the first process"] = plan.host
    title = f"{folder.spec.name}, {method.name}: predicted memory at the peak"
    print_pairs(title, {name: f"{size / 1e9:10,.2f} GB" for name, size in sizes_of.items()})
    accumulated = f", accumulated {args.gradient_accumulation_steps} times" if setup.accumulates else ""
    answers = f", answers {setup.generation_batch_size} rows at once" if setup.generation_batch_size else ""
    rows = f"batches of {setup.slots:,} slots, rows of" if setup.slots else f"{setup.batch_size} x"
    show(
        f"{rows} ({setup.source_length} + {setup.target_length}) tokens{accumulated}, "
        f"{f'{setup.bits} bit' if setup.bits else str(setup.dtype).removeprefix('torch.')}, "
        f"{'with' if setup.checkpointing else 'without'} gradient checkpointing, "
        f"{setup.processes} process{'es under ' + setup.engine.name if setup.processes > 1 else ''}{answers}"
    )
    size = needed(plan, setup)
    if size <= available:
        show(f"fits into {gb(available)}; {gb(available - size)} remain")


def print_verdict(
    folder: ModelFolder, method: Method, data: Mapping[str, Prepared], memory: Forecast, args: TrainingArguments
) -> None:
    """The end of --dry_run: what would run, for how long, and that nothing speaks against it."""
    case, plan, available = memory
    pairs: dict[str, object] = {"model": f"{folder.spec.name}, {folder.path}", "output": args.output_dir}
    if args.do_train:
        steps, passes = length_of(data["train"], args)
        seconds = training_seconds(folder, data["train"], steps, memory, args)
        pairs["training"] = f"{method.name}, {many(steps, 'step')} of {size_of_step(args)}, {many(passes, 'epoch')}"
        pairs["time"] = f"about {duration(seconds)} of training, as predicted from matrix products on {args.device}"
    for split, name in (("validation", "loss of"), ("test", "answers to")):
        if split in data:
            pairs[name] = many(len(data[split].questions) or len(data[split].rows), "row")
    size = needed(plan, case.setup)
    pairs["memory"] = f"{gb(size)} predicted at the peak, {gb(available)} free"
    print_pairs("dry run: this would start", pairs)
    show("all checks passed" if size <= available else "all checks passed but that of the memory")


def print_scores(columns: Mapping[str, Mapping[str, float]]) -> None:
    """Scores and losses of several models side by side; with two, the ratio too."""
    names = {metric: metric.upper() for metric in SCORES}
    names |= {"loss": "validation loss", "perplexity": "perplexity", "probe_loss": "loss on PROBE_FILE"}
    ratio = [" / ".join([*columns][::-1])] if len(columns) == 2 else []
    headers = [Column(name, justify="right") for name in (*columns, *ratio)]
    table = Table("scores, 0 to 100", *headers, box=None, padding=(0, 2, 0, 0))
    for metric, name in names.items():
        values = [scores.get(metric) for scores in columns.values()]
        if not any(value is not None for value in values):
            continue
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        if ratio:
            cells.append(f"{values[1] / values[0]:.2f}x" if values[0] and values[1] is not None else "-")
        table.add_row(name, *cells)
    if table.row_count:
        show(table)
    for name, scores in columns.items():
        if scores.get("empty"):
            show(f"{name}: pairs with an empty answer or reference, which count as 0: {scores['empty']}")


def print_answers(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with row, question, reference, tuned and perhaps base, cut to a few lines of a terminal."""
    for row in rows:
        for name in ("question", "reference", "base", "tuned"):
            if row.get(name) is not None:
                title = f"row {row['row']} {name}" if name == "question" else f"  {name}"
                show(Text.assemble((f"{title:<15}", "dim"), visible(str(row[name]))[:SHOWN]))


def peak_memory() -> dict[str, int]:
    """Peak memory of this process in bytes, and of its accelerator where it has one."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    peaks = {"peak_host_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.accelerator.is_available():
        peaks["peak_device_memory"] = torch.accelerator.max_memory_allocated()
        peaks["reserved_device_memory"] = torch.accelerator.max_memory_reserved()
    return peaks


def reset_peak_memory() -> None:
    """Lets ``peak_memory`` begin anew on the accelerator; a process can't reset that of the host."""
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()


def print_settings(
    folder: ModelFolder, model: PreTrainedModel, memory: Forecast, data_args: DataArguments, args: TrainingArguments
) -> None:
    """Prints the settings of the run."""
    case, plan, available = memory
    total, trainable = sizes(model, args)
    pairs: dict[str, object] = {
        "model": f"{folder.path}, {total / 1e6:,.1f} million parameters, {str(model.dtype).removeprefix('torch.')}",
        "device": f"{args.device}, {many(args.world_size, 'process', 'processes')}"
        f"{f' under {args.engine.name}' if args.world_size > 1 else ''}, "
        f"{many(torch.get_num_threads(), 'thread')} each; {gb(plan.total)} of memory predicted, {gb(available)} free",
    }
    if args.do_train:
        pairs["method"] = f"{case.method.name}, {trainable:,} trainable parameters"
        pairs["training"] = (
            f"{size_of_step(args)} a step ({args.tokens_per_batch or args.train_batch_size} x "
            f"{args.gradient_accumulation_steps} accumulated x {args.world_size}) of "
            f"{data_args.max_source_length} + {data_args.max_target_length} tokens, learning rate "
            f"{args.learning_rate:g}, seed {args.seed}"
        )
    print_pairs("settings", pairs)


def print_training_summary(
    args: TrainingArguments, data: Prepared, state: TrainerState, seconds: float, steps: int, tokens: int
) -> None:
    """state: as the Trainer returns it; seconds: of this run, without evaluations; tokens: real ones, without pads."""
    best = args.load_best_model_at_end and state.best_model_checkpoint
    rows = f", {steps * args.all_rows_per_step / seconds:,.2f} samples/s"
    losses, validated = (
        [f"{entry[name]:.4f} (step {entry['step']})" for entry in state.log_history if name in entry]
        for name in ("loss", "eval_loss")
    )
    speed = f"{tokens / seconds:,.0f} tokens/s" + rows * (not args.tokens_per_batch)
    peaks = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.2f} GB" for name, size in peak_memory().items())
    pairs = {
        "loss": " -> ".join(losses[:1] + losses[-1:]) or "no step was left to train",
        **({"validation loss": " -> ".join(validated[:1] + validated[-1:])} if validated else {}),
        **({"best checkpoint": f"{best} ({args.metric_for_best_model} {state.best_metric:.4f})"} if best else {}),
        **({"mix of an epoch": mix} if (mix := mix_of(data)) else {}),
        "speed": f"{steps:,} steps in {duration(seconds)}, {speed}, without evaluations",
        "memory": peaks,
        "saved to": args.output_dir,
    }
    print_pairs("training finished", pairs)
