"""The reports in the terminal: settings, first row, scores side by side, final summary."""

import math
import resource
import sys
from collections.abc import Mapping

import torch
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from common.arguments import DataArguments, TrainingArguments
from common.data.dataset import Prepared
from common.errors import note
from common.files import gb
from common.launch.engines import sizes
from common.memory.fit import Forecast, margins, needed
from common.memory.footprint import CUDA_CONTEXT
from common.metrics import SCORES
from common.models.registry import ModelFolder
from common.tokenizers.chatglm4 import ChatGLM4Tokenizer

MANY_PASSES, FEW_STEPS = 20, 50


def console() -> Console:
    """Standard output, wide enough for whole paths where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, soft_wrap=True)


def print_pairs(title: str, pairs: Mapping[str, object]) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in pairs.items():
        table.add_row(f"  {name}", str(value))
    console().print(table)


def print_prepared(split: str, data: Prepared, in_full: bool = True) -> None:
    """Prints the number of rows, and what was cut or left out; in full, each file's format and unread fields too."""
    summary = data.summary
    for found in summary["findings"] if in_full else ():
        unit = "rows to answer" if split == "test" else found["unit"]
        console().print(f"{split}: {found['file']}: {found['format']}, {found['rows']:,} {unit}")
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
    console().print(f"{split}: {', '.join(notes)}")


def print_length(data: Prepared, args: TrainingArguments) -> None:
    """Prints steps and epochs, the mix of the files, and a warning for too many passes or too few steps."""
    rows = data.rows_per_epoch
    batches = math.ceil(math.ceil(rows / args.per_device_train_batch_size) / args.processes)
    if args.tokens_per_batch and data.order:
        batches = len(data.order)
    steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil((args.num_train_epochs or 0) * steps_per_epoch)
    passes = steps / steps_per_epoch
    if mix := mix_of(data):
        console().print(f"train: an epoch mixes {mix}")
    console().print(f"train: {steps:,} steps of {size_of_step(args)}: {passes:.3g} epochs of {rows:,} rows")
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
    console().print(
        f"{rows} ({setup.source_length} + {setup.target_length}) tokens{accumulated}, "
        f"{f'{setup.bits} bit' if setup.bits else str(setup.dtype).removeprefix('torch.')}, "
        f"{'with' if setup.checkpointing else 'without'} gradient checkpointing, "
        f"{setup.processes} process{'es under ' + setup.engine.name if setup.processes > 1 else ''}{answers}"
    )
    size = needed(plan, setup)
    if size <= available:
        console().print(f"fits into {gb(available)}; {gb(available - size)} remain")


def print_first_row(row: Mapping[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Every token of a row with its id and its label, in as many columns as fit; - is a position without a label."""
    tokens = [readable(tokenizer, index) for index in row["input_ids"]]
    labels = ["-" if label == -100 else str(label) for label in row["labels"]]
    cells = list(zip(tokens, map(str, row["input_ids"]), labels, strict=True))
    titles, longest, gap = ("token", "id", "label"), 24, 4
    widths = [min(max(map(cell_len, column)), longest) for column in zip(titles, *cells, strict=True)]
    across = max(1, (console().width + gap) // (sum(widths) + len(titles) - 1 + gap))
    down = -(-len(cells) // across)
    columns = Table.grid(padding=(0, gap, 0, 0))
    parts = []
    for first in range(0, len(cells), down):
        headers = [
            Column("token", overflow="fold", max_width=longest),
            *(Column(t, justify="right") for t in titles[1:]),
        ]
        parts.append(Table(*headers, box=None, padding=(0, 1, 0, 0), pad_edge=False))
        for cell in cells[first : first + down]:
            parts[-1].add_row(*cell)
    columns.add_row(*parts)
    learned = len(labels) - labels.count("-")
    console().print(f"first training row: {len(tokens):,} tokens, {learned:,} with a label", columns, sep="\n")


def readable(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    """A token as text, with ▁ for a blank and escapes for control characters."""
    token = tokenizer.convert_ids_to_tokens(index)
    if tokenizer.is_fast or isinstance(tokenizer, ChatGLM4Tokenizer):
        # GLM-4 stores bytes as other characters; only whole characters can be decoded.
        text = tokenizer.decode([index])
        token = token if "\ufffd" in text else text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in token.replace(" ", "▁"))


def print_scores(columns: Mapping[str, Mapping[str, float]]) -> None:
    """Scores of several models side by side, and their loss on the general questions; with two, the ratio too."""
    ratio = [" / ".join([*columns][::-1])] if len(columns) == 2 else []
    headers = [Column(name, justify="right") for name in (*columns, *ratio)]
    table = Table("metric", *headers, title="scores, 0 to 100", title_justify="left")
    first = next(iter(columns.values()))
    for metric, name in {**{metric: metric.upper() for metric in SCORES}, "probe_loss": "loss on PROBE_FILE"}.items():
        if metric not in first:
            continue
        values = [scores[metric] for scores in columns.values()]
        cells = [f"{value:.2f}" for value in values]
        if ratio:
            cells.append(f"{values[1] / values[0]:.2f}x" if values[0] else "-")
        table.add_row(name, *cells)
    if table.row_count:
        console().print(table)
    for name, scores in columns.items():
        if scores.get("empty"):
            console().print(f"{name}: {scores['empty']} empty predictions or references count as 0")


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
        "device": f"{args.device}, {args.world_size} process{'es' if args.world_size > 1 else ''}, "
        f"{torch.get_num_threads()} threads each",
        "memory": f"{gb(plan.total)} predicted at the peak, {gb(available)} free",
        "lengths": f"{data_args.max_source_length} + {data_args.max_target_length} tokens",
        "output": args.output_dir,
    }
    if args.do_train:
        length = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
        pairs["method"] = f"{case.method.name}, {trainable:,} trainable parameters"
        pairs["training"] = (
            f"{length} of {size_of_step(args)} ({args.tokens_per_batch or args.train_batch_size} x "
            f"{args.gradient_accumulation_steps} accumulated x {args.world_size}), learning rate "
            f"{args.learning_rate:g}, seed {args.seed}"
        )
    print_pairs("settings", pairs)


def print_training_summary(
    args: TrainingArguments,
    data: Prepared,
    state: TrainerState,
    metrics: Mapping[str, float],
    steps: int,
    tokens: int,
) -> None:
    """state, metrics: as the Trainer returns them; tokens: real ones, without pads, of all processes in this run."""
    best = args.load_best_model_at_end and state.best_model_checkpoint
    seconds = metrics["train_runtime"]
    rows = f", {steps * args.all_rows_per_step / seconds:,.2f} samples/s"
    losses, validated = (
        [f"{entry[name]:.4f} (step {entry['step']})" for entry in state.log_history if name in entry]
        for name in ("loss", "eval_loss")
    )
    pairs = {
        "loss": " -> ".join(losses[:1] + losses[-1:]) or "no step was left to train",
        **({"validation loss": " -> ".join(validated)} if validated else {}),
        **({"best checkpoint": f"{best} ({args.metric_for_best_model} {state.best_metric:.4f})"} if best else {}),
        "steps": steps,
        **({"mix of an epoch": mix} if (mix := mix_of(data)) else {}),
        "time": f"{seconds:,.1f} s",
        "speed": f"{tokens / seconds:,.0f} tokens/s" + rows * (not args.tokens_per_batch),
        **{name.replace("_", " "): f"{size / 1e9:.2f} GB" for name, size in peak_memory().items()},
        "saved to": args.output_dir,
    }
    print_pairs("training finished", pairs)
