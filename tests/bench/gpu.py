"""Measured beside predicted memory, and speed, at the shapes of the 6B models on a GPU: see gpu.sh."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import torch
from memory import make_model, write_rows
from rich.table import Table

from common.errors import UserError, exit_on_user_error
from common.models.registry import SPECS
from common.training.report import console

ROOT = Path(__file__).resolve().parents[2]
TINY = {"chatglm": (64, 2, 4, 256, 4096), "chatglm2": (64, 2, 4, 128, 4096), "chatglm3": (64, 2, 4, 128, 4096)}


def shape_of(generation: str) -> tuple[int, ...]:
    """Hidden size, layers, heads, inner size, vocabulary of the original, or of a tiny one."""
    if os.environ.get("SHAPE") == "tiny":
        return TINY[generation]
    config = SPECS[generation].config()
    sizes = (config.hidden_size, config.num_layers, config.num_attention_heads)
    return *sizes, config.intermediate_size, config.vocab_size


@dataclass(frozen=True)
class Run:
    method: str
    bits: int | None
    rows: int
    source: int
    target: int
    limit: float | None = None  # GB
    trains: bool = True

    def __str__(self) -> str:
        bits = f"{self.bits} bit" if self.bits else "16 bit"
        what = "" if self.trains else "answers, "
        return f"{self.method}, {bits}, {what}{self.rows} x ({self.source} + {self.target})"


RUNS = [
    Run("ptuning", 4, 1, 64, 64, limit=5.2),
    Run("lora", 4, 1, 64, 64, limit=5.2),
    Run("lora", None, 4, 256, 512, limit=14.0),
    Run("ptuning", 8, 1, 64, 64),
    Run("lora", 8, 4, 256, 512),
    Run("lora", 4, 4, 256, 512),
    Run("lora", None, 16, 64, 64, trains=False),
    Run("lora", 4, 16, 64, 64, trains=False),
]


def flags_of(run: Run, model: Path, data: Path, output: Path, steps: int) -> list[str]:
    split = "train_file" if run.trains else "test_file"
    flags = [
        "--do_train" if run.trains else "--do_predict",
        f"--{split}",
        str(data),
        "--model_name_or_path",
        str(model),
    ]
    flags += ["--prompt_column", "content", "--response_column", "summary", "--output_dir", str(output)]
    flags += ["--max_source_length", str(run.source), "--max_target_length", str(run.target), "--report_to", "none"]
    flags += ["--per_device_train_batch_size", str(run.rows), "--per_device_eval_batch_size", str(run.rows)]
    flags += ["--max_steps", str(steps), "--save_strategy", "no", "--disable_tqdm", "true", "--check_memory", "false"]
    flags += ["--activation_checkpointing", "true"]
    flags += ["--quantization_bit", str(run.bits)] if run.bits else []
    return [*flags, *(["--pre_seq_len", "128"] if run.method == "ptuning" else [])]


def measure(run: Run, model: Path, steps: int) -> dict[str, float]:
    """What the program itself wrote down: peaks in bytes, seconds a step, tokens a second."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_rows(folder / "rows.json", run.rows * (steps if run.trains else 1))
        command = [sys.executable, str(ROOT / run.method / "main.py")]
        command += flags_of(run, model, data, folder / "out", steps)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise UserError(f"{run} ended with code {done.returncode}:\n{done.stdout[-3000:]}")
        name = "train" if run.trains else "predict"
        results = json.loads((folder / "out" / f"{name}_results.json").read_text())
    return {key.removeprefix(f"{name}_"): value for key, value in results.items()}


def add(table: Table, generation: str, run: Run, found: dict[str, float], steps: int) -> None:
    """The row of one run."""
    peak = found.get("peak_device_memory", found["peak_host_memory"])
    kept = "" if run.limit is None else f"{run.limit} GB: {'kept' if peak <= run.limit * 1e9 else 'EXCEEDED'}"
    seconds = f"{found['runtime'] / steps:.2f}" if run.trains else ""
    speed = f"{found['tokens'] / found['runtime']:,.0f}" if run.trains else ""
    reserved, predicted = found.get("reserved_device_memory", 0), found["predicted_memory"]
    numbers = [f"{value / 1e9:.2f}" for value in (predicted, peak, reserved)]
    row = [generation, str(run), *numbers, f"{predicted / peak:.3f}", seconds, speed, kept]
    table.add_row(*row)
    print(*row, sep="  ", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the models are made, and deleted again")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", default="", help="part of the names of the runs to do")
    parser.add_argument("--generations", nargs="+", choices=list(TINY), default=list(TINY))
    args = parser.parse_args()
    if os.environ.get("DEVICE", "cuda") == "cuda" and not torch.cuda.is_available():
        raise UserError("this measures a GPU, and none is visible here; SHAPE=tiny DEVICE=cpu tries it without one.")
    table = Table(title="peak memory in GB", title_justify="left")
    for column in ("model", "run", "predicted", "measured", "reserved", "ratio", "s/step", "tokens/s", "limit"):
        table.add_column(column, justify="left" if column in ("model", "run", "limit") else "right")
    for generation in args.generations:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            model = make_model(generation, Path(name), shape=shape_of(generation), device=os.environ["DEVICE"])
            torch.cuda.empty_cache()  # which does nothing without a GPU
            for run in RUNS:
                if args.only in str(run):
                    add(table, generation, run, measure(run, model, args.steps), args.steps)
    console().print(table)
    if torch.cuda.is_available():
        console().print(torch.cuda.get_device_name())


if __name__ == "__main__":
    with exit_on_user_error():
        main()
