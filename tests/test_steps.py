"""A loss that is not finite names its rows; memory that runs out halves a batch, or is one sentence."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_data import write_lines
from transformers import GenerationMixin

from common.arguments import FullArguments, PrefixArguments
from common.errors import UserError, describe, memory_ran_out
from common.finetune import run
from common.flags import parse_arguments
from common.memory import fit
from common.methods.full import Full
from common.methods.prefix import PTuning
from common.models.base import GLMForConditionalGeneration
from common.training.steps import places
from common.training.trainer import FinetuneTrainer

COMMON = """--model_name_or_path demo --prompt_column content --response_column summary --max_source_length 24
--max_target_length 24 --use_cpu --learning_rate 1e-3 --logging_steps 1 --save_strategy no --report_to none"""
TRAINING = f"{COMMON} --do_train --max_steps 3 --overwrite_output_dir"
AUTO = "--per_device_train_batch_size auto --gradient_accumulation_steps 2"
REASON = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB."


@pytest.fixture
def data(tmp_path) -> Path:
    rows = [{"content": f"类型#裙*数量#{number}", "summary": f"{number}件白色的裙子。" * 2} for number in range(30)]
    return write_lines(tmp_path / "rows.json", rows)


def train(method, arguments, data: Path, output_dir: Path, flags: str) -> list[float]:
    given = f"{TRAINING} --train_file {data} --output_dir {output_dir} {flags}".split()
    model_args, own, *others = parse_arguments(arguments, given)
    run(method(own), model_args, *others)
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def train_full(data: Path, output_dir: Path, flags: str) -> list[float]:
    return train(Full, FullArguments, data, output_dir, f"--learning_rate 1e-3 {flags}")


def break_passes(monkeypatch, first: int, most: int, where: str = "backward") -> list[int]:
    """From pass number ``first`` on, memory runs out with more than ``most`` rows. Returns the rows of all passes."""
    rows: list[int] = []
    step = FinetuneTrainer.compute_loss

    def fail(*args) -> None:
        raise torch.OutOfMemoryError(REASON)

    def compute_loss(trainer, model, inputs, *args, **kwargs):
        rows.append(len(inputs["input_ids"]))
        too_many = len(rows) >= first and rows[-1] > most
        if too_many and where == "forward":
            fail()

        def prepare(layer, args, output) -> None:
            if too_many:
                output.register_hook(fail)

        hook = trainer.accelerator.unwrap_model(model).get_input_embeddings().register_forward_hook(prepare)
        loss = step(trainer, model, inputs, *args, **kwargs)
        hook.remove()
        return loss

    monkeypatch.setattr(FinetuneTrainer, "compute_loss", compute_loss)
    return rows


def test_a_batch_that_was_chosen_is_halved_and_no_step_is_lost(data, tmp_path, monkeypatch, capsys):
    """Memory runs out at the end of a backward pass, in the second batch of a step: it is done again from its start."""
    expected = train_full(data, tmp_path / "whole", "--per_device_train_batch_size 4 --gradient_accumulation_steps 2")
    monkeypatch.setattr(fit, "largest_fitting", lambda *args: 4)
    rows = break_passes(monkeypatch, first=4, most=1)
    losses = train_full(data, tmp_path / "halved", AUTO)
    assert rows == [4, 4, 4, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1, *[1] * 8]
    assert losses == pytest.approx(expected, rel=1e-5)
    saved, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("halved", "whole"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-4, atol=1e-6)
    notes = [line for line in capsys.readouterr().err.splitlines() if "memory ran out" in line]
    assert [line.partition(" tokens: ")[2] for line in notes] == [
        f"rows go through in {parts} parts from here on" for parts in (2, 4)
    ]
    assert notes[0].startswith("note: memory ran out at 4 rows x ")


@pytest.mark.parametrize(
    ("size", "first", "most"), [(AUTO, 5, 0), ("--per_device_train_batch_size 4", 3, 2)], ids=["auto", "given"]
)
def test_one_row_that_is_too_large_and_a_given_batch_are_a_sentence(size, first, most, data, tmp_path, monkeypatch):
    """In the third step, when a checkpoint is whole."""
    monkeypatch.setattr(fit, "largest_fitting", lambda *args: 2)
    break_passes(monkeypatch, first, most, where="forward")
    with pytest.raises(UserError) as error:
        train_full(data, tmp_path / "out", f"{size} --save_strategy steps --save_steps 1")
    rows = 2 if size == AUTO else 4
    start = (
        rf"memory ran out in a batch of {rows} rows x \d+ tokens \(CUDA out of memory. Tried to allocate 2.00 GiB\): "
    )
    assert error.match(start + r"the plan for it is \d.\d GB, and \d+.\d GB were free: take --activation_checkpointing")
    assert str(error.value).endswith(". What was saved before is complete.")


def test_memory_that_runs_out_in_the_optimizer_names_the_batch_too(data, tmp_path, monkeypatch):
    def step(*args, **kwargs):
        raise torch.OutOfMemoryError(REASON)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(UserError, match=r"memory ran out in a batch of 4 rows x \d+ tokens"):
        train_full(data, tmp_path, "--per_device_train_batch_size 4")


def answer(data: Path, output_dir: Path, flags: str) -> list[str]:
    given = f"{COMMON} --do_predict --test_file {data} --output_dir {output_dir} --max_new_tokens 8 {flags}".split()
    model_args, own, *others = parse_arguments(PrefixArguments, given)
    run(PTuning(own), model_args, *others)
    return (output_dir / "generated_predictions.txt").read_text().splitlines()


def test_answers_are_halved_too_and_a_given_number_is_a_sentence(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fit, "largest_fitting", lambda *args: 8)
    expected = answer(data, tmp_path / "whole", "--per_device_eval_batch_size auto")
    rows: list[int] = []

    def generate(model, input_ids, **kwargs):
        rows.append(len(input_ids))
        if len(rows) > 1 and rows[-1] > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return GenerationMixin.generate(model, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(GLMForConditionalGeneration, "generate", generate)
    assert answer(data, tmp_path / "halved", "--per_device_eval_batch_size auto") == expected
    assert rows == [8, 8, 4, *[2] * 11]
    assert "answering 2 at once from here on" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"in a batch of 8 rows x \d+ tokens \(.*can't allocate memory\): the plan"):
        answer(data, tmp_path / "given", "--per_device_eval_batch_size 8")


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("HIP ran dry"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_runs_out_in_many_words(error, ran_out):
    assert memory_ran_out(error) == ran_out
    assert bool(describe(error)) == ran_out


def test_places_name_a_few_rows():
    assert places([[1, 7], [0, 12], [0, 3], [0, 3]], ["a.json", "b.json"]) == (
        "a.json, line or row 3, 12; b.json, line or row 7"
    )
    assert places([(0, line) for line in range(1, 31)], ["a.json"]).endswith(", 19, 20 and 10 more")


def train_prefix(data: Path, output_dir: Path, flags: str) -> list[float]:
    return train(PTuning, PrefixArguments, data, output_dir, f"--pre_seq_len 4 {flags}")


def lines_of(error: pytest.ExceptionInfo, before: str) -> set[int]:
    found = re.search(rf"{before} \S*rows.json, line or row (\d+(?:, \d+)*)", str(error.value))
    assert found, error.value
    return {int(line) for line in found[1].split(", ")}


def test_a_loss_that_is_not_finite_names_the_rows_of_its_batch(data, tmp_path, monkeypatch):
    """Logs come after more steps; the rows are those of the very batch, here the one with row 7 of the file."""
    step, seen = FinetuneTrainer.compute_loss, []

    def compute_loss(trainer, model, inputs, *args, **kwargs):
        seen.append([line for _, line in inputs["origins"]])
        return step(trainer, model, inputs, *args, **kwargs) * (float("nan") if 7 in seen[-1] else 1.0)

    monkeypatch.setattr(FinetuneTrainer, "compute_loss", compute_loss)
    flags = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --max_steps 7 --logging_steps 7"
    with pytest.raises(UserError, match="no longer finite") as error:
        train_prefix(data, tmp_path, flags)
    assert len(seen) == 14
    (wanted,) = (lines for lines in seen if 7 in lines)
    assert lines_of(error, "It began in the batch of") == set(wanted)


def test_a_gradient_that_is_not_finite_names_the_step_before(data, tmp_path, monkeypatch):
    step, seen = FinetuneTrainer.training_step, []

    def training_step(trainer, model, inputs, *args):
        seen.append([line for _, line in inputs["origins"]])
        loss = step(trainer, model, inputs, *args)
        if len(seen) == 2:
            next(weight for weight in model.parameters() if weight.requires_grad).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(FinetuneTrainer, "training_step", training_step)
    with pytest.raises(UserError) as error:
        train_prefix(data, tmp_path, "--per_device_train_batch_size 2 --logging_steps 3")
    assert lines_of(error, "It began in the batch of") == set(seen[2])
    assert lines_of(error, "after a step on") == set(seen[1])
    seen.clear()
    with pytest.raises(UserError) as error:
        train_prefix(data, tmp_path, "--per_device_train_batch_size 2 --logging_steps 2")
    assert lines_of(error, "The gradient came from") == set(seen[1])
