"""Checkpoints and results: whole or absent, those of this training, and never removed by a wrong clock.

tests/sweep lets each change of the disk fail; .ci/run calls it.
"""

import json
import os
import shutil
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from common.arguments import FullArguments, LoraArguments, PrefixArguments
from common.errors import SaveError, UserError
from common.finetune import run
from common.flags import parse_arguments
from common.methods.full import Full
from common.methods.lora import Lora
from common.methods.prefix import PTuning
from common.trained import find_training
from common.training.checkpoints import usable_checkpoints

METHODS = {
    "ptuning": (PTuning, PrefixArguments, "--pre_seq_len 4"),
    "lora": (Lora, LoraArguments, "--lora_rank 2"),
    "full": (Full, FullArguments, ""),
}
TRAINING = """--do_train --model_name_or_path demo --max_source_length 16 --max_target_length 16 --use_cpu
--per_device_train_batch_size 2 --learning_rate 1e-2 --logging_steps 1 --report_to none --save_steps 1 --max_steps 3"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Eight training rows."""
    file = tmp_path_factory.mktemp("rows") / "train.json"
    file.write_text("".join((ROOT / "AdvertiseGen" / "train.json").read_text().splitlines(keepends=True)[:8]))
    return file


def finetune(name: str, rows: Path, folder: Path, *flags: str) -> None:
    method, arguments, own = METHODS[name]
    command = [*TRAINING.split(), *own.split(), "--train_file", str(rows), "--output_dir", str(folder), *flags]
    model_args, method_args, *others = parse_arguments(arguments, command)
    run(method(method_args), model_args, *others)


@pytest.fixture(scope="module", params=METHODS)
def method(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(method, rows, tmp_path_factory) -> Path:
    """Three steps with a checkpoint after each. A test copies it."""
    folder = tmp_path_factory.mktemp(method) / "out"
    finetune(method, rows, folder)
    return folder


@pytest.fixture
def out(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "out"))


def weights(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for kind in ("*.bin", "*.safetensors")
        for path in folder.glob(kind)
        if path.name != "training_args.bin"
    }


def without_result(folder: Path) -> None:
    """As a kill after the last checkpoint leaves it."""
    for name in (*json.loads((folder / "manifest.json").read_text())["files"], "manifest.json"):
        (folder / name).unlink()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "deleted": Path.unlink,
}


def test_every_damage_of_the_newest_checkpoint_is_noticed_and_the_one_before_it_used(trained, tmp_path, capsys):
    args = namedtuple("Args", "load_best_model_at_end max_steps early_stopping")(False, 3, None)
    names = [path.name for path in (trained / "checkpoint-3").iterdir()]
    assert len(names) >= 8
    for name in names:
        for kind, damage in DAMAGES.items():
            out = shutil.copytree(trained, tmp_path / f"{name} {kind}")
            damage(out / "checkpoint-3" / name)
            assert next(usable_checkpoints(out, args, setting_aside=True)) == out / "checkpoint-2"
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert f"{out / 'checkpoint-3'} is damaged: {name} " in said
            assert not (out / "checkpoint-3").exists()
            assert (out / "checkpoint-3.damaged").is_dir()
            shutil.rmtree(out)


def test_a_training_with_a_damaged_checkpoint_ends_like_an_undisturbed_one(method, trained, out, rows):
    without_result(out)
    flip(out / "checkpoint-3" / "optimizer.pt")
    finetune(method, rows, out)
    assert weights(out) == weights(trained)
    assert weights(out / "checkpoint-3") == weights(trained / "checkpoint-3")
    (out / "checkpoint-3.damaged" / "optimizer.pt").stat()


def test_a_damaged_result_is_refused_by_an_evaluation_and_written_again_by_its_training(
    method, trained, out, rows, capsys
):
    name = next(iter(weights(out)))
    flip(out / name)
    with pytest.raises(UserError, match=f"the result in .* is damaged \\({name} has changed\\): give the command of"):
        find_training(out)
    finetune(method, rows, out)
    assert f"the result in {out} is not whole ({name} has changed): it is written again" in capsys.readouterr().err
    assert weights(out) == weights(trained)
    assert find_training(out) == out
    (out / ".result").mkdir()
    with pytest.raises(UserError, match="holds parts of a result, because its last save was interrupted"):
        find_training(out)


def test_a_prolonged_training_never_keeps_the_old_result(method, trained, rows, tmp_path):
    """Killed after its last checkpoint, it takes that one, and the scores of the old result are gone."""
    out = tmp_path / "out"
    finetune(method, rows, out, "--max_steps", "2")
    old = weights(out)
    (out / "predict_results.json").write_text('{"predict_rouge-1": 99.0}')
    shutil.copytree(trained / "checkpoint-3", out / "checkpoint-3")
    finetune(method, rows, out)
    assert weights(out) == weights(trained) != old
    assert not (out / "predict_results.json").exists()


def test_another_training_of_the_same_kind_is_not_continued(method, trained, rows, tmp_path):
    """A checkpoint in another folder is checked like one's own, also without the record beside it."""
    lone = shutil.copytree(trained / "checkpoint-1", tmp_path / "checkpoint-1")
    with pytest.raises(UserError, match=r"holds a training with other settings \(seed was 42, now 7\)"):
        finetune(method, rows, tmp_path / "out", "--resume_from_checkpoint", str(lone), "--seed", "7")
    other = {"ptuning": "lora", "lora": "full", "full": "ptuning"}[method]
    with pytest.raises(UserError, match="holds a training with other settings .*method was"):
        finetune(other, rows, tmp_path / "out", "--resume_from_checkpoint", str(lone))
    finetune(method, rows, tmp_path / "out", "--resume_from_checkpoint", str(lone))
    assert weights(tmp_path / "out") == weights(trained)


def test_a_training_from_an_earlier_checkpoint_sets_the_later_ones_aside(method, trained, out, rows):
    chosen = ("--resume_from_checkpoint", str(out / "checkpoint-1"), "--save_total_limit", "2")
    finetune(method, rows, out, *chosen)
    assert {path.name for path in out.glob("checkpoint-*")} == {
        *("checkpoint-2", "checkpoint-3", "checkpoint-2.aside", "checkpoint-3.aside")
    }
    assert weights(out / "checkpoint-3") == weights(trained / "checkpoint-3")


@pytest.fixture(scope="module")
def prefix(rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prefix") / "out"
    finetune("ptuning", rows, folder)
    return folder


def test_rows_are_compared_by_content(prefix, rows, tmp_path):
    out = shutil.copytree(prefix, tmp_path / "out")
    moved = shutil.copy(rows, tmp_path / "moved.json")
    finetune("ptuning", moved, out, "--max_steps", "4")
    changed = tmp_path / "train.json"
    changed.write_text(rows.read_text().replace("的", "了"))
    with pytest.raises(UserError, match=r"other settings \(TRAIN_FILE \(--train_file\) now gives other rows\)"):
        finetune("ptuning", changed, out, "--max_steps", "5")


def test_a_broken_record_of_settings_is_an_error(prefix, rows, tmp_path):
    out = shutil.copytree(prefix, tmp_path / "out")
    os.truncate(out / "run_settings.json", 50)
    with pytest.raises(UserError, match="run_settings.json is broken"):
        finetune("ptuning", rows, out)
    (out / "run_settings.json").unlink()
    with pytest.raises(UserError, match=r"pre_seq_len was 4, now 5"):
        finetune("ptuning", rows, out, "--pre_seq_len", "5")
    finetune("ptuning", rows, out)


def test_checkpoints_of_another_program_are_left_alone(rows, tmp_path):
    foreign = tmp_path / "out" / "checkpoint-100"
    foreign.mkdir(parents=True)
    (foreign / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(UserError, match="checkpoint-100 was not written by these scripts"):
        finetune("ptuning", rows, tmp_path / "out")
    assert [path.name for path in foreign.iterdir()] == ["pytorch_model.bin"]


def test_checkpoints_are_removed_by_their_steps_whatever_the_clock_says(prefix, rows, tmp_path):
    out = shutil.copytree(prefix, tmp_path / "out")
    for step in (1, 2, 3):
        os.utime(out / f"checkpoint-{step}", (later := time.time() + 1e6 / step, later))
    finetune("ptuning", rows, out, "--max_steps", "5", "--save_total_limit", "2")
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}


def test_the_best_checkpoint_is_kept_and_found_where_the_folder_moved(rows, tmp_path):
    worse = tmp_path / "other.json"  # answers that this training moves away from
    questions = [json.loads(line)["content"] for line in rows.read_text().splitlines()]
    worse.write_text("".join(json.dumps({"content": text, "summary": "类型裤" * 5}) + "\n" for text in questions))
    best = "--do_eval --eval_strategy steps --eval_steps 1 --load_best_model_at_end --save_total_limit 1".split()
    finetune("full", rows, tmp_path / "out", *best, "--validation_file", str(worse))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 1
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    expected = weights(tmp_path / "out")
    assert expected == weights(tmp_path / "out" / "checkpoint-1")
    without_result(tmp_path / "out")
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    finetune("full", rows, moved, *best, "--validation_file", str(worse))
    assert weights(moved) == expected


def test_a_checkpoint_without_room_is_named_and_the_training_goes_on(prefix, rows, tmp_path, monkeypatch, capsys):
    usage = namedtuple("Usage", "free")
    free = iter([10**12, 10**12, 5])  # before the training, before the first and the second checkpoint
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(next(free, 10**12)))
    finetune("ptuning", rows, tmp_path / "out")
    said = capsys.readouterr().err
    assert f"warning: checkpoint-2 is not saved ({tmp_path / 'out'}: 0.0 MB are free" in said
    assert "checkpoint-1 stays the newest, and the training goes on" in said
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    assert weights(tmp_path / "out") == weights(prefix)


def test_a_result_without_room_leaves_the_old_one(prefix, rows, tmp_path, monkeypatch):
    out = shutil.copytree(prefix, tmp_path / "out")

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.training.trainer.write_results", refuse)
    with pytest.raises(SaveError, match="No space left on device"):
        finetune("ptuning", rows, out, "--max_steps", "4")
    assert weights(out) == weights(prefix)
    assert not (out / ".saving").exists()
