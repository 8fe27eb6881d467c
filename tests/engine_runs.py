"""Trainings under every engine, as processes of their own: what test_engines.py and bench/engines.py compare."""

import json
import multiprocessing
import runpy
import shutil
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from engine_program import SAMPLE, run_program
from torch import nn

from common.loading import load_model
from common.locking import free_port

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["engine_program"])
ROOT = Path(__file__).resolve().parents[1]
ENGINES = {
    "DDP": [],
    "ZeRO-1": ["--deepspeed", '{"zero_optimization": {"stage": 1}}'],
    "ZeRO-2": ["--deepspeed", str(ROOT / "full" / "ds_zero_2.json")],
    "ZeRO-3": ["--deepspeed", str(ROOT / "full" / "ds_zero_3.json")],
    "FSDP2": ["--fsdp", "true", "--fsdp_config", str(ROOT / "full" / "fsdp2.json")],
}
METHODS = {
    "full": ["full/main.py"],
    "lora": ["lora/main.py", "--learning_rate", "1e-2"],
    "ptuning": ["ptuning/main.py", "--pre_seq_len", "8", "--learning_rate", "1e-2"],
}
STEPS, ROWS = 4, 4  # rows: of a step, over all processes


def command_of(method: str, engine: str, folder: Path, *flags: str, processes: int = 2) -> list[str]:
    """A training of STEPS steps with a checkpoint in the middle, unless ``flags`` say otherwise."""
    program, *own = METHODS[method]
    command = [str(ROOT / program), "--do_train", "--train_file", str(ROOT / "AdvertiseGen" / "train.json")]
    command += ["--prompt_column", "content", "--response_column", "summary", "--model_name_or_path", "demo"]
    command += ["--max_source_length", "32", "--max_target_length", "32", "--max_train_samples", "64"]
    command += ["--per_device_train_batch_size", str(ROWS // processes), "--output_dir", str(folder)]
    command += ["--max_steps", str(STEPS), "--save_steps", str(STEPS // 2), "--logging_steps", "1"]
    return [*command, "--disable_tqdm", "true", "--learning_rate", "1e-3", *own, *ENGINES[engine], *flags]


def run(method: str, engine: str, folder: Path, *flags: str, processes: int = 2, **variables: str) -> tuple[int, str]:
    """(exit code, what was printed) of a training in new processes, forked from one that has imported everything."""
    command, log = command_of(method, engine, folder, *flags, processes=processes), folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    alone = processes == 1
    ranks = [{} if alone else shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]
    ranks = [rank | variables for rank in ranks]
    with pytest.MonkeyPatch.context() as patch:  # for the process that they are forked from, which starts now
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))
        patch.setenv("OMP_NUM_THREADS", "1")
        jobs = [FORKS.Process(target=run_program, args=(command, rank, log)) for rank in ranks]
        for job in jobs:
            job.start()
    running = list(jobs)
    while running and not any(job.exitcode for job in jobs):
        wait([job.sentinel for job in running])
        running = [job for job in running if job.exitcode is None]
    for job in running:  # which would wait for the one that failed
        job.kill()
    return max(abs(job.exitcode or 0) for job in jobs if job not in running), log.read_text(errors="replace")


def train(method: str, engine: str, folder: Path, *flags: str, processes: int = 2) -> list[float]:
    """The loss of every step of a training that must succeed."""
    code, said = run(method, engine, folder, *flags, processes=processes)
    assert code == 0, said[-6000:]
    return losses(folder)


def train_here(method: str, folder: Path, *flags: str) -> list[float]:
    """The same in this process, which need not be started, without any engine."""
    command = command_of(method, "DDP", folder, *flags, processes=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Dropout, "forward", lambda self, inputs: inputs)
        patch.setattr(sys, "argv", command)
        runpy.run_path(command[0], run_name="__main__")
    return losses(folder)


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def interrupt(folder: Path) -> None:
    """Leaves of a finished training what would be there had it been killed after its first checkpoint."""
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    for file in folder.iterdir():
        if file.is_file() and file.name != "run_settings.json":
            file.unlink()


def reload_difference(method: str, folder: Path) -> float:
    """The largest difference of the logits of the live model to those of what it saved."""
    flags = {"full": {}, "lora": {"adapter": folder}, "ptuning": {"ptuning_checkpoint": folder}}[method]
    model = load_model(folder if method == "full" else "demo", **flags)
    with torch.no_grad():
        return (model(SAMPLE).logits - torch.load(folder / "logits.pt")).abs().max().item()


def score_of(method: str, trained: Path, folder: Path) -> dict[str, float]:
    """Scores of what a training saved, in one process, without any engine."""
    flag = {"full": "--model_name_or_path", "lora": "--lora_checkpoint", "ptuning": "--ptuning_checkpoint"}[method]
    command = [sys.executable, str(ROOT / METHODS[method][0]), "--do_predict", flag, str(trained)]
    command += ["--test_file", str(ROOT / "AdvertiseGen" / "dev.json"), "--max_predict_samples", "8"]
    command += ["--prompt_column", "content", "--response_column", "summary", "--output_dir", str(folder)]
    command += ["--max_source_length", "32", "--max_target_length", "32"]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return json.loads((folder / "predict_results.json").read_text(encoding="utf-8"))
