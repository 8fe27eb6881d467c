"""What an evaluation, a chat and a merge read of a training: which one, its base, and the settings that it recorded."""

import json
import os
import shutil
from pathlib import Path

import pytest
from shell import ROOT, flags_of, run_here

from common.arguments import LoraArguments, PrefixArguments
from common.errors import UserError
from common.flags import parse_arguments
from common.trained import base_of

ROW = {"question": "类型#裙*颜色#白色", "answer": "一条白色的裙子。"}


def write_rows(file: Path, count: int) -> Path:
    file.write_text("".join(f"{json.dumps(ROW, ensure_ascii=False)}\n" for _ in range(count)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Path:
    """One step of LoRA in 4 bit with columns and lengths of its own, in a folder of trainings; its base may go."""
    folder = tmp_path_factory.mktemp("trainings")
    base = shutil.copytree(ROOT / "common" / "demo" / "chatglm3", folder / "base" / "chatglm3-6b")
    run_here(
        "lora/train.sh",
        *("--do_predict", "false", "--evaluate_base", "false", "--report_to", "none", "--save_strategy", "no"),
        MODEL=str(base),
        TRAIN_FILE=str(write_rows(folder / "train.json", 4)),
        VALIDATION_FILE=str(write_rows(folder / "dev.json", 3)),
        PROMPT_COLUMN="question",
        RESPONSE_COLUMN="answer",
        MAX_SOURCE_LENGTH="40",
        MAX_TARGET_LENGTH="6",
        BATCH_SIZE="2",
        MAX_STEPS="1",
        QUANTIZATION_BIT="4",
        OUTPUT_DIR=str(folder / "output" / "mine"),
    )
    return folder / "output" / "mine"


def evaluation(training: Path, **variables: str) -> dict:
    """The values of all flags that lora/evaluate.sh comes to."""
    argv = flags_of("lora/evaluate.sh", CHECKPOINT=str(training), **variables)
    return {name: value for part in parse_arguments(LoraArguments, argv) for name, value in vars(part).items()}


def test_an_evaluation_is_that_of_the_training(training, tmp_path):
    """With nothing said but where it is: base, columns, lengths, bits and file are those that it recorded."""
    folder = training.parents[1]
    recorded = {
        "model_name_or_path": str(folder / "base" / "chatglm3-6b"),
        "lora_checkpoint": str(training),
        "quantization_bit": 4,
        "prompt_column": "question",
        "response_column": "answer",
        "max_source_length": 40,
        "max_target_length": 6,
        "test_file": str(folder / "dev.json"),
        "do_predict": True,
        "do_eval": False,
        "output_dir": str(training),
    }
    found = evaluation(training)
    assert {name: found[name] for name in recorded} == recorded
    run_here("lora/evaluate.sh", CHECKPOINT=str(training.parent), OUTPUT_DIR=str(tmp_path), EVAL_BATCH_SIZE="2")
    assert len((tmp_path / "generated_predictions.txt").read_text().splitlines()) == 3


def test_a_variable_that_is_set_wins(training, tmp_path):
    other = str(write_rows(tmp_path / "other.json", 1))
    given = {"MODEL": "demo3", "TEST_FILE": other, "PROMPT_COLUMN": "answer", "MAX_TARGET_LENGTH": "9"}
    found = evaluation(training, QUANTIZATION_BIT="8", **given)
    assert [found["model_name_or_path"], found["test_file"], found["prompt_column"]] == ["demo3", other, "answer"]
    assert (found["max_source_length"], found["max_target_length"], found["quantization_bit"]) == (40, 9, 8)


def test_an_empty_variable_turns_off_what_was_recorded(training):
    assert evaluation(training, QUANTIZATION_BIT="")["quantization_bit"] is None


def test_plain_text_is_evaluated_by_its_loss(training, tmp_path):
    shutil.copytree(training, tmp_path / "text")
    settings = json.loads((training / "run_settings.json").read_text())
    settings |= {"text_column": "answer", "validation_file": settings["test_file"]}
    (tmp_path / "text" / "run_settings.json").write_text(json.dumps(settings))
    found = evaluation(tmp_path / "text")
    assert (found["do_eval"], found["do_predict"], found["text_column"]) == (True, False, "answer")
    assert found["validation_file"] == settings["test_file"]


def test_of_several_trainings_the_newest_is_meant(training, tmp_path, capsys):
    """By its result: a training that is under way has none yet."""
    for name, seconds in (("older", 1000), ("newer", 2000)):
        shutil.copytree(training, tmp_path / name)
        os.utime(tmp_path / name / "adapter_model.safetensors", (seconds, seconds))
    (tmp_path / "under way").mkdir()
    assert evaluation(tmp_path)["lora_checkpoint"] == str(tmp_path / "newer")
    assert f"newest training: {tmp_path / 'newer'}\n" in capsys.readouterr().err


def test_a_checkpoint_on_the_way_has_the_settings_of_its_training(training, tmp_path):
    shutil.copytree(training, tmp_path / "mine")
    checkpoint = shutil.copytree(training, tmp_path / "mine" / "checkpoint-1")
    (checkpoint / "run_settings.json").unlink()
    found = evaluation(checkpoint)
    assert (found["lora_checkpoint"], found["max_source_length"]) == (str(checkpoint), 40)


PROGRAMS = ("lora/evaluate.sh", "lora/cli_demo.sh", "lora/merge.sh")


def error_of(capsys) -> str:
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    return error


def test_a_base_that_is_gone_is_one_sentence_everywhere(training, tmp_path, capsys):
    mine = shutil.copytree(training, tmp_path / "mine")
    config = json.loads((mine / "adapter_config.json").read_text())
    (mine / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/chatglm3-6b"}))
    said = f"error: {mine} was trained on /gone/chatglm3-6b, which does not exist any more: "
    said += "set MODEL (--model_name_or_path) to the base model."
    for script in PROGRAMS:
        assert run_here(script, check=False, CHECKPOINT=str(mine)) == 2
        assert error_of(capsys) == said


def test_no_training_yet_is_one_sentence_everywhere(tmp_path, capsys):
    said = f"error: no training in {tmp_path}: run train.sh first, or set CHECKPOINT (--checkpoint) to a training."
    for script in PROGRAMS:
        assert run_here(script, check=False, CHECKPOINT=str(tmp_path)) == 2
        assert error_of(capsys) == said
    with pytest.raises(UserError, match="no training in"):
        parse_arguments(PrefixArguments, flags_of("ptuning/evaluate.sh", CHECKPOINT=str(tmp_path / "nowhere")))


def test_a_whole_model_is_not_its_own_base(tmp_path):
    """_name_or_path names the base of a prefix; in the config of a whole model it is the model's own name."""
    (tmp_path / "config.json").write_text('{"_name_or_path": "demo"}')
    with pytest.raises(UserError, match="does not name its base model"):
        base_of(tmp_path)
    (tmp_path / "config.json").write_text('{"_name_or_path": "demo", "pre_seq_len": 8}')
    assert base_of(tmp_path) == "demo"
