"""Sixteen trainings at once: do all of them finish, how long does it take, how much memory do they take together?

    python tests/bench/launches.py                       16 jobs of 2 processes each, 5 times over, from empty caches
    python tests/bench/launches.py --jobs 4 --repeats 1

The jobs are the scripts as a user types them: P-Tuning v2, LoRA, full-parameter training and the last under DeepSpeed,
in turn, all on the same model and data. Memory is the proportional set size (PSS) of all their processes, so that
pages which they share count once.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
from loading import pss
from rich.table import Table

from common.terminal import console

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("ptuning/train.sh", "lora/train.sh", "full/train.sh", "full/ds_train_finetune.sh")
FLAGS = ["--do_predict", "false", "--evaluate_base", "false", "--max_train_samples", "64", "--disable_tqdm", "true"]


def start(job: int, folder: Path, processes: int, steps: int) -> subprocess.Popen:
    script = SCRIPTS[job % len(SCRIPTS)]
    variables = {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "CHATGLM_CACHE": str(folder / "cache"),
        "OUTPUT_DIR": str(folder / str(job)),
        "NUM_PROCESSES": str(processes),
        "OMP_NUM_THREADS": "1",
        "MAX_STEPS": str(steps),
        "BATCH_SIZE": "2",
        "EVALUATE": "false",
    }
    with open(folder / f"{job}.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(
            ["bash", str(ROOT / script), *FLAGS], env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT
        )


def memory_of(jobs: list[subprocess.Popen]) -> int:
    """Bytes that the jobs and all their children take together."""
    total = 0
    for job in jobs:
        try:
            family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        total += sum(pss(process.pid) for process in family)
    return total


def measure(count: int, processes: int, steps: int) -> tuple[int, float, float]:
    """(jobs that finished, seconds, peak bytes) of so many jobs started at once."""
    with tempfile.TemporaryDirectory() as name:
        folder, peak, done = Path(name), 0.0, threading.Event()
        begin = time.monotonic()
        jobs = [start(job, folder, processes, steps) for job in range(count)]

        def watch() -> None:
            nonlocal peak
            while not done.wait(2):
                peak = max(peak, memory_of(jobs))

        watcher = threading.Thread(target=watch)
        watcher.start()
        codes = [job.wait() for job in jobs]
        done.set()
        watcher.join()
        for job, code in enumerate(codes):
            if code:
                console().print(f"job {job} ended with {code}:\n{(folder / f'{job}.log').read_text()[-2000:]}")
        return codes.count(0), time.monotonic() - begin, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2, help="of each job")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    table = Table(title=f"{args.jobs} launches of {args.processes} processes at once", title_justify="left")
    for column in ("run", "finished", "seconds", "peak memory, GB"):
        table.add_column(column, justify="right")
    for run in range(1, args.repeats + 1):
        finished, seconds, peak = measure(args.jobs, args.processes, args.steps)
        table.add_row(str(run), f"{finished} of {args.jobs}", f"{seconds:.0f}", f"{peak / 1e9:.1f}")
        console().print(f"run {run}: {finished} of {args.jobs} in {seconds:.0f} s, {peak / 1e9:.1f} GB")
    console().print(table)


if __name__ == "__main__":
    main()
