"""Trainings on data of one's own: what they are judged on, how long they last, which checkpoint they keep."""

import json
import shutil
from pathlib import Path

import pytest
from test_finetune import PREDICTION, ROOT, finetune, losses
from transformers import TrainerState

from common.arguments import PrefixArguments
from common.errors import UserError
from common.flags import parse_arguments
from common.training.choices import choose

SHIPPED = ROOT / "AdvertiseGen" / "train.json"
ROWS = SHIPPED.read_text().splitlines()[:60]
TRAINING = """--do_train --model_name_or_path demo --pre_seq_len 8 --max_source_length 64 --max_target_length 16
--use_cpu --per_device_train_batch_size 16 --per_device_eval_batch_size 10 --learning_rate 2e-2 --logging_steps 1"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "mine.json"
    file.write_text("\n".join(ROWS))
    return file


@pytest.fixture(scope="module")
def general(mine) -> Path:
    rows = [{"instruction": f"第{number}个问题", "output": f"第{number}个回答"} for number in range(30)]
    file = mine.with_name("general.jsonl")
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def chosen(*flags: str) -> tuple:
    """The (data, training) arguments, completed."""
    *_, data_args, args = parse_arguments(PrefixArguments, ["--do_train", "--use_cpu", *flags])
    choose(data_args, args)
    return data_args, args


# Validation data


def test_own_rows_are_judged_on_themselves(mine, tmp_path, capfd):
    flags = f"{TRAINING} --train_file {mine} --max_steps 2 --eval_strategy steps --eval_steps 1 --do_predict"
    finetune(f"{flags} --evaluate_base", tmp_path)
    out = capfd.readouterr().out
    assert f"train: {mine}: pairs of content and summary, 60 questions with answers" in out
    assert "train: 50 of 60 rows tokenized" in out and "10 held out for validation" in out
    held_out = [json.loads(line) for line in (tmp_path / "held_out" / "1-mine.jsonl").read_text().splitlines()]
    assert len(held_out) == 10 and all(json.dumps(row, ensure_ascii=False) in ROWS for row in held_out)
    answers = [json.loads(line)["labels"] for line in (tmp_path / "generated_predictions.txt").read_text().splitlines()]
    assert [answer[:3] for answer in answers] == [row["summary"][:3] for row in held_out]
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [1, 2]
    recorded = json.loads((tmp_path / "run_settings.json").read_text())
    assert recorded["test_file"] == recorded["validation_file"] == str(tmp_path / "held_out" / "1-mine.jsonl")


def test_evaluations_change_nothing_of_a_training(mine, tmp_path):
    flags = f"{TRAINING} --train_file {mine} --validation_file {mine} --max_steps 4"
    finetune(flags, tmp_path / "alone")
    finetune(f"{flags} --eval_strategy steps --eval_steps 1", tmp_path / "evaluated")
    assert losses(tmp_path / "evaluated") == losses(tmp_path / "alone")


def test_the_shipped_rows_have_their_validation_file_and_steps():
    data_args, args = chosen("--train_file", str(SHIPPED), "--do_predict", "--default_steps", "250")
    assert data_args.test_file == data_args.validation_file == str(SHIPPED.with_name("dev.json"))
    assert (data_args.held_out, args.max_steps) == (False, 250)


def test_a_given_validation_file_is_the_test_file_too(mine):
    data_args, _ = chosen("--train_file", str(mine), "--do_predict", "--validation_file", "dev.json")
    assert (data_args.held_out, data_args.test_file) == (False, "dev.json")


def test_without_a_split_nothing_is_scored(mine, capfd):
    flags = ("--train_file", str(mine), "--do_predict", "--eval_strategy", "steps", "--validation_split", "0")
    data_args, args = chosen(*flags)
    assert (data_args.held_out, args.do_predict, args.do_eval, args.eval_strategy.value) == (False, False, False, "no")
    assert "nothing is scored" in capfd.readouterr().err


@pytest.mark.parametrize("wish", ["--early_stopping 2", "--load_best_model_at_end --metric_for_best_model rouge-l"])
def test_without_a_split_there_is_no_best_checkpoint(wish, mine):
    flags = f"--train_file {mine} --do_predict --eval_strategy steps --eval_steps 1 --validation_split 0 {wish}"
    with pytest.raises(UserError, match="--validation_split 0 leaves no rows to tell the best checkpoint by"):
        chosen(*flags.split())


# Length


@pytest.mark.parametrize(
    ("flags", "steps", "epochs"),
    [
        ("", -1, 3),
        ("--default_steps 250", -1, 3),
        ("--default_steps 250 --num_train_epochs 2", -1, 2),
        ("--default_steps 250 --max_steps 7", 7, 3),
        ("--num_train_epochs 2 --max_steps 7", 7, 2),
    ],
)
def test_own_rows_are_trained_for_epochs_unless_steps_are_given(flags, steps, epochs, mine):
    _, args = chosen("--train_file", str(mine), *flags.split())
    assert (args.max_steps, args.num_train_epochs) == (steps, epochs)


def test_epochs_given_for_the_shipped_rows_win_over_default_steps():
    _, args = chosen("--train_file", str(SHIPPED), "--default_steps", "250", "--num_train_epochs", "1")
    assert (args.max_steps, args.num_train_epochs) == (-1, 1)


@pytest.mark.parametrize(
    ("flags", "says", "warns"),
    [
        ("--num_train_epochs 3", "12 steps of 16 rows: 3 epochs of 60 rows", "12 steps change little"),
        ("--max_steps 90", "90 steps of 16 rows: 22.5 epochs of 60 rows", "22 passes teach"),
    ],
)
def test_steps_and_epochs_are_printed_and_extremes_warned_about(flags, says, warns, mine, tmp_path, capfd):
    finetune(f"{TRAINING} --train_file {mine} {flags} --dry_run", tmp_path)
    captured = capfd.readouterr()
    assert says in captured.out and warns in captured.err


# Mixing


def test_a_mixed_training_continues_bit_for_bit(mine, general, tmp_path, capfd):
    flags = f"{TRAINING} --train_file {mine},{general} --mix 1,0.3 --max_steps 10 --save_steps 6"
    finetune(flags, tmp_path / "whole")
    out = capfd.readouterr().out
    assert f"train: an epoch mixes 60 rows of {mine} + 18 rows of {general}" in out
    assert "10 steps of 16 rows: 2 epochs of 78 rows" in out
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "again" / "checkpoint-6")  # in the second epoch
    finetune(flags, tmp_path / "again")
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")


def test_of_mixed_files_the_first_one_is_held_out(mine, general, tmp_path):
    finetune(f"{TRAINING} --train_file {mine},{general} --mix 1,1 --do_eval --max_steps 1", tmp_path)
    assert [file.name for file in (tmp_path / "held_out").iterdir()] == ["1-mine.jsonl"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--mix 1", "numbers for 1 files, but the training has 2"),
        ("--mix 1,1 --train_sampling_strategy sequential", "leave out --train_sampl"),
    ],
)
def test_a_mix_that_does_not_fit_is_refused(flags, says, mine, general, tmp_path):
    with pytest.raises(UserError, match=says):
        finetune(f"{TRAINING} --train_file {mine},{general} {flags}", tmp_path)


# The best checkpoint, and what is forgotten


def test_a_training_that_gets_worse_ends_early_with_its_best_checkpoint(mine, tmp_path, capfd):
    plain = [
        {"content": f"类型#裤*风格#{style}", "summary": f"这条裤子的风格是{style}。"} for style in ("潮流", "休闲")
    ]
    (tmp_path / "dev.json").write_text("\n".join(map(json.dumps, plain)))  # the style that the training leaves
    flags = f"{TRAINING} --train_file {mine} --max_steps 30 --learning_rate 0.5 --validation_file {tmp_path}/dev.json"
    flags += " --eval_strategy steps --eval_steps 1 --early_stopping 2"
    folder = tmp_path / "out"
    finetune(flags, folder)
    state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    found = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
    best = min(found, key=lambda step: found[step])
    assert state.global_step == best + 2 < 30
    prefix = "pytorch_model.bin"
    assert (folder / prefix).read_bytes() == (folder / f"checkpoint-{best}" / prefix).read_bytes()
    assert f"checkpoint-{best} (loss {found[best]:.4f})" in capfd.readouterr().out
    finetune(flags, folder)
    assert "the training was finished before" in capfd.readouterr().out


def test_the_best_answers_can_choose_the_checkpoint(mine, tmp_path):
    flags = (
        "--max_steps 3 --eval_strategy steps --eval_steps 1 --load_best_model_at_end --metric_for_best_model ROUGE-L"
    )
    finetune(f"{TRAINING} --train_file {mine} {flags}", tmp_path)
    state = TrainerState.load_from_json(str(tmp_path / "trainer_state.json"))
    scores = {entry["step"]: entry["eval_rouge-l"] for entry in state.log_history if "eval_rouge-l" in entry}
    assert state.best_metric == max(scores[step] for step in (1, 2, 3))


def test_the_loss_on_general_questions_stands_beside_the_scores(mine, general, tmp_path, capfd):
    flags = f"--max_steps 2 --do_predict --evaluate_base --probe_file {general}"
    finetune(f"{TRAINING} --train_file {mine} {flags}", tmp_path)
    assert "loss on PROBE_FILE" in capfd.readouterr().out
    found = json.loads((tmp_path / "predict_results.json").read_text())
    assert found["predict_base_probe_loss"] != found["predict_probe_loss"] > 0


def test_a_probe_of_another_shape_is_refused(mine, tmp_path):
    (tmp_path / "probe.json").write_text('{"text": "nur Text"}')
    with pytest.raises(UserError, match=r"probe.json, line 1: is plain text, and here questions with answers"):
        finetune(
            f"{TRAINING} --train_file {mine} --do_predict --probe_file {tmp_path / 'probe.json'}", tmp_path / "out"
        )


# Answers to all rows


def test_each_row_is_answered_in_order_and_scored_where_it_can_be(tmp_path, capfd):
    rows = [{"content": f"类型#裙*颜色#{color}", "summary": color * (i % 2)} for i, color in enumerate("白黑红黄")]
    (tmp_path / "test.json").write_text("\n".join(json.dumps(row) for row in rows))
    finetune(
        f"{PREDICTION} --pre_seq_len 8 --test_file {tmp_path}/test.json".replace("--pre_seq_len 8", ""), tmp_path / "a"
    )
    lines = [json.loads(line) for line in (tmp_path / "a" / "generated_predictions.txt").read_text().splitlines()]
    assert [line["labels"] for line in lines] == ["", "黑", "", "黄"]
    assert "2 of 4 questions have no reference: answered, not scored" in capfd.readouterr().out
    (tmp_path / "bare.json").write_text("\n".join(json.dumps({"content": row["content"]}) for row in rows))
    finetune(f"{PREDICTION} --test_file {tmp_path}/bare.json", tmp_path / "b")
    bare = [
        json.loads(line)["predict"] for line in (tmp_path / "b" / "generated_predictions.txt").read_text().splitlines()
    ]
    assert bare == [line["predict"] for line in lines]
    assert "predict_rouge-l" not in json.loads((tmp_path / "b" / "predict_results.json").read_text())
