"""A training that is told to end: it saves, ends, and continues as if nothing had been."""

import json
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from engine_runs import STEPS, command_of, run, train
from safetensors.torch import load_file
from shell import run_program

from common.training.trainer import FinetuneTrainer

EVALUATED = ["--validation_file", str(ROOT / "AdvertiseGen" / "dev.json"), "--max_eval_samples", "8"]
EVALUATED += ["--eval_strategy", "steps", "--eval_steps", "1", "--per_device_eval_batch_size", "2"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(folder: Path, whole: Path) -> None:
    ours, theirs = weights(folder), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def evaluations(folder: Path) -> list[tuple[int, float]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A training that nothing interrupted, with dropout."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert run_program(command_of("lora", "DDP", folder, *EVALUATED, processes=1)) == 0
    return folder


@pytest.mark.parametrize(
    ("number", "code", "during", "step"),
    [("SIGTERM", 0, "training_step", 2), ("SIGINT", 130, "prediction_step", 3), ("SIGUSR1", 0, "training_step", STEPS)],
)
def test_one_process_continues_bit_for_bit(whole, tmp_path, monkeypatch, capfd, number, code, during, step):
    """The evaluation that was due is left out, or ends early, and is made up for."""
    command = command_of("lora", "DDP", tmp_path / "out", *EVALUATED, "--save_steps", "100", processes=1)
    inner, handlers = getattr(FinetuneTrainer, during), signal.getsignal(signal.SIGTERM)

    def tell(self: FinetuneTrainer, *args, **kwargs):
        if self.state.global_step == step - (during == "training_step"):
            os.kill(os.getpid(), signal.Signals[number])
        return inner(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, during, tell)
        patch.setattr("sys.orig_argv", ["python", *command])
        assert run_program(command) == code
    said = capfd.readouterr().err.splitlines()
    assert f"{number}: step {step} of {STEPS} is saved in {tmp_path / 'out'}. This command continues:" in said
    assert said[-1] == f"cd {shlex.quote(os.getcwd())} && {shlex.join(['python', *command])}"
    assert signal.getsignal(signal.SIGTERM) == handlers
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert evaluations(tmp_path / "out" / f"checkpoint-{step}") == evaluations(whole)[: step - 1]

    assert run_program(command) == 0
    assert_same(tmp_path / "out", whole)
    if step < STEPS:
        assert evaluations(tmp_path / "out") == evaluations(whole)


@pytest.mark.parametrize("engine", ["DDP", "ZeRO-2"])
def test_a_signal_to_one_process_ends_both_at_the_same_step(tmp_path, engine):
    flags = ["--save_steps", "100"]
    train("lora", engine, tmp_path / "whole", *flags)
    code, said = run("lora", engine, tmp_path / "out", *flags, TOLD_AT="1 0")
    assert code == 0 and "SIGTERM: step" in said and "Traceback" not in said, said
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] in (["checkpoint-2"], ["checkpoint-3"])
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    train("lora", engine, tmp_path / "out", *flags)
    assert_same(tmp_path / "out", tmp_path / "whole")
