"""The record of a training, and what is made from it: lines, sample answers, model card, predictions.csv, warnings."""

import csv
import json
import os
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from common import command, terminal
from common.arguments import DataArguments, LoraArguments, PrefixArguments
from common.command import VARIABLES, given, origin_of, with_variables
from common.errors import UserError
from common.finetune import run
from common.flags import parse_arguments
from common.methods.lora import Lora
from common.methods.prefix import PTuning
from common.report import facts
from common.report.card import model_card, write_csv
from common.report.facts import chosen_rows, warnings_of
from common.report.record import EMPTY, Record
from common.terminal import Progress
from common.training import evaluation, trainer

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    {"content": f"类型#裙*颜色#{colour}<script>alert(1)</script>", "summary": f"这条{colour}色的裙子 | 很好看。"}
    for colour in "红黄蓝绿紫白黑灰"
]
TRAINING = """--do_train --do_predict --evaluate_base --model_name_or_path demo --use_cpu --max_source_length 48
--max_target_length 24 --per_device_train_batch_size 2 --learning_rate 2e-2 --max_steps 4 --logging_steps 1
--save_steps 2 --eval_strategy steps --eval_steps 2 --report_to none"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("rows")
    for name, rows in (("train.json", ROWS), ("dev.json", ROWS[:4])):
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return f"--train_file {folder}/train.json --validation_file {folder}/dev.json --test_file {folder}/dev.json"


def finetune(flags: str, output_dir: Path, kind: type = PrefixArguments, method: type = PTuning) -> None:
    arguments = parse_arguments(kind, [*flags.split(), "--output_dir", str(output_dir)])
    run(method(arguments[1]), arguments[0], *arguments[2:])


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    finetune(f"{TRAINING} --pre_seq_len 4 {files}", folder)
    return folder


def test_a_record_holds_what_the_trainer_logged(whole):
    found, state = record_of(whole), json.loads((whole / "trainer_state.json").read_text())
    logged = {
        name: [entry[name] for entry in state["log_history"] if name in entry]
        for name in ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second")
    }
    assert logged == {name: [entry[name] for entry in found["logs"] if name in entry] for name in logged}
    assert [entry["step"] for entry in found["logs"]] == [1, 2, 3, 4]
    assert found["status"] == "finished" and found["progress"]["step"] == found["progress"]["steps"] == 4
    assert found["pieces"][0]["tokens"] == state["num_input_tokens_seen"]
    assert found["data"][0]["split"] == "train" and sum(found["data"][0]["lengths"][0]["counts"]) == len(ROWS)
    predicted = json.loads((whole / "predict_results.json").read_text())
    assert found["scores"]["tuned"]["rouge-l"] == predicted["predict_rouge-l"]
    assert found["scores"]["base"]["loss"] == json.loads((whole / "eval_results.json").read_text())["eval_base_loss"]


def test_answers_of_all_rows_stand_beside_their_questions(whole):
    found = record_of(whole)["rows"]
    assert found["total"] == 4 and [row["question"] for row in found["rows"]] == [row["content"] for row in ROWS[:4]]
    for name, file in (("tuned", "generated_predictions.txt"), ("base", "base_predictions.txt")):
        answers = [json.loads(line)["predict"] for line in (whole / file).read_text().splitlines()]
        assert answers == [row[name] for row in found["rows"]]
    table = (whole / "predictions.csv").read_bytes()
    assert table.startswith(b"\xef\xbb\xbf")
    lines = list(csv.DictReader(table.decode("utf-8-sig").splitlines()))
    assert [line["question"] for line in lines] == [row["content"] for row in ROWS[:4]]
    assert [float(line["tuned rouge-l"] or 0) for line in lines] == [row["score"] or 0 for row in found["rows"]]


def test_an_evaluation_of_the_tuned_model_keeps_the_base_beside_it(whole, files, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "out")
    before = record_of(folder)
    test_file = files.split()[-1]
    flags = f"--checkpoint {folder} --do_predict --use_cpu"
    finetune(f"{flags} --test_file {test_file}", folder)
    found = record_of(folder)
    assert found["scores"] == before["scores"] and found["rows"] == before["rows"]
    assert (folder / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
    assert found["logs"] == before["logs"] and found["pieces"] == before["pieces"]
    finetune(f"{flags} --test_file {test_file.replace('dev', 'train')}", folder)
    found = record_of(folder)
    assert list(found["scores"]) == ["tuned"] and found["rows"]["total"] == len(ROWS)
    assert not (folder / "base_predictions.txt").exists()
    assert "predict_base_rouge-l" not in json.loads((folder / "all_results.json").read_text())
    assert not any("base" in row for row in found["rows"]["rows"])


def test_the_last_sample_answers_are_those_of_the_result(whole):
    samples = record_of(whole)["samples"]
    assert [found["step"] for found in samples["answers"]] == [0, 2, 4]
    assert [row["question"] for row in samples["rows"]] == [row["content"] for row in ROWS[:3]]
    rows = record_of(whole)["rows"]["rows"]
    assert samples["answers"][-1]["answers"] == [row["tuned"] for row in rows[:3]]


def test_sample_answers_change_nothing_of_a_training(whole, files, tmp_path):
    finetune(f"{TRAINING} --pre_seq_len 4 {files} --show_answers false", tmp_path)
    assert not record_of(tmp_path)["samples"]["answers"]
    ours, theirs = (torch.load(folder / "pytorch_model.bin", weights_only=True) for folder in (whole, tmp_path))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def halfway(files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("halfway")
    finetune(f"{TRAINING} --pre_seq_len 4 {files}".replace("--max_steps 4", "--max_steps 2"), folder)
    return folder


@pytest.mark.parametrize("broken", [False, True])
def test_a_continued_training_keeps_the_curves_and_counts_all_its_starts(halfway, files, tmp_path, broken, capsys):
    shutil.copytree(halfway, tmp_path / "out")
    if broken:
        (tmp_path / "out" / "run.json").write_text('{"format": 1, "pieces"')
    finetune(f"{TRAINING} --pre_seq_len 4 {files}", tmp_path / "out")
    found = record_of(tmp_path / "out")
    assert [entry["step"] for entry in found["logs"]] == [1, 2, 3, 4]
    pieces = [(piece["first_step"], piece["last_step"]) for piece in found["pieces"]]
    assert pieces == ([(2, 4)] if broken else [(0, 2), (2, 4)])
    assert [answers["step"] for answers in found["samples"]["answers"]] == ([4] if broken else [0, 2, 4])
    assert ("run.json is broken: the report begins anew" in capsys.readouterr().err) == broken
    log = (tmp_path / "out" / "train.log").read_text()
    assert log.count("training finished") == 2 and "continuing from" in log


@pytest.mark.parametrize(
    "change",
    [
        "found.clear()",
        "found.update(format=2)",
        "found.update(logs=3)",
        "found.update(logs=['x'])",
        "found['logs'][0].pop('step')",
        "found['logs'][0].update(loss='low')",
        "found.update(pieces=[{}])",
        "found['pieces'][0].update(tokens='many')",
        "found.update(samples={})",
        "found['samples'].update(answers=[{}])",
        "found.update(data=[1])",
        "found.update(rows={'total': 1, 'rows': [1]})",
        "found['scores'].update(tuned='good')",
        "found['progress'].update(epochs='all')",
        "found['settings'][0].update(value=None)",
    ],
)
def test_a_record_of_another_shape_counts_as_broken(whole, tmp_path, change, capsys):
    found = record_of(whole)
    exec(change, {"found": found})
    (tmp_path / "run.json").write_text(json.dumps(found))
    assert Record(tmp_path, afresh=False).data["pieces"] == []
    assert "is broken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "error", "status", "problem"),
    [
        ("training", UserError("no room."), "failed", "no room."),
        ("training", SystemExit(0), "stopped", ""),
        ("training", KeyboardInterrupt(), "stopped", ""),
        ("finished", UserError("no room."), "finished", ""),
    ],
)
def test_a_record_says_how_a_training_ended(tmp_path, before, error, status, problem):
    record = Record(tmp_path, afresh=True)
    record.data["status"] = before
    with pytest.raises(type(error)), record.open():
        raise error
    found = record_of(tmp_path)
    assert (found["status"], found["problem"]) == (status, problem)


def test_a_whole_record_is_gone_on_with(whole, capsys):
    assert Record(whole, afresh=False).data["logs"] == record_of(whole)["logs"] != []
    assert not capsys.readouterr().err


def test_a_report_that_cannot_be_written_ends_no_training(files, tmp_path, capsys):
    for name in ("run.json", "report.html", "README.md"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "train.log")
    finetune(f"{TRAINING} --pre_seq_len 4 {files}", tmp_path)
    assert (tmp_path / "pytorch_model.bin").is_file() and (tmp_path / "generated_predictions.txt").is_file()
    said = capsys.readouterr().err
    assert said.count("can't be written") == 2 and "all else goes on" in said
    assert all((tmp_path / name).is_dir() for name in ("run.json", "report.html", "README.md"))


def test_the_last_evaluation_of_a_training_is_not_made_twice(whole, monkeypatch, files, tmp_path):
    calls = []
    evaluate = evaluation.FinetuneTrainer.evaluate
    monkeypatch.setattr(evaluation.FinetuneTrainer, "evaluate", lambda *a, **k: calls.append(k) or evaluate(*a, **k))
    finetune(f"{TRAINING} --pre_seq_len 4 {files} --evaluate_base false --show_answers false", tmp_path)
    assert len(calls) == 2  # at steps 2 and 4
    results = [json.loads((folder / "eval_results.json").read_text())["eval_loss"] for folder in (whole, tmp_path)]
    assert results[0] == results[1] == record_of(whole)["logs"][-1]["eval_loss"]


def test_a_log_is_a_line_for_people_or_an_object_for_programs(files, tmp_path, capsys):
    finetune(f"{TRAINING} --pre_seq_len 4 {files} --do_predict false --evaluate_base false", tmp_path / "text")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    shape = r"step (\d)/4  epoch \d\.\d\d  loss \d+\.\d{4}(  val \d+\.\d{4})?  lr \S+  [\d.]+k? tokens/s  left \d+ s"
    found = [re.fullmatch(shape, line) for line in lines]
    assert all(found), lines
    assert [(match[1], bool(match[2])) for match in found] == [("1", False), ("2", True), ("3", False), ("4", True)]
    flags = f"{TRAINING} --pre_seq_len 4 {files} --do_predict false --evaluate_base false --log_format json"
    finetune(flags, tmp_path / "json")
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["step"] for entry in objects] == [1, 2, 3, 4] and objects[3]["steps"] == 4
    assert [entry["loss"] for entry in objects] == [entry["loss"] for entry in record_of(tmp_path / "text")["logs"]]


def test_the_clock_of_a_training_stands_still_while_it_pauses(monkeypatch):
    times = iter([0.0, 1.0, 7.0, 10.0])
    monkeypatch.setattr(trainer.time, "monotonic", lambda: next(times))
    clock = trainer.Clock()  # at 0
    with clock.pause(), clock.pause():  # from 1 to 7
        assert clock.seconds() == 1.0
    assert clock.seconds() == 4.0  # at 10


def test_a_dry_run_ends_in_a_verdict_and_writes_no_report(files, tmp_path, capsys):
    finetune(f"{TRAINING} --pre_seq_len 4 {files} --dry_run", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    verdict = "\n".join(lines[lines.index("dry run: this would start") :])
    for part in (r"P-Tuning v2, 4 steps of 2 rows, 1 epoch", r"about \d+ s of training", r"loss of +4 rows"):
        assert re.search(part, verdict)
    assert re.search(r"memory +[\d.]+ GB predicted at the peak, [\d.]+ GB free\nall checks passed$", verdict)
    assert not {"run.json", "report.html", "train.log"} & {path.name for path in tmp_path.iterdir()}


def test_a_reader_that_leaves_ends_no_training():
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as file:
        for line in ("step 1", "step 2"):
            terminal.print_on(file, line)
        assert os.path.realpath(f"/proc/self/fd/{write}") == os.devnull


def test_what_takes_long_says_so_where_no_bar_is_seen(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "HEARTBEAT", -1.0)
    with Progress("answers", 4, "rows answered") as rows:
        for _ in range(4):
            rows.update()
    said = capsys.readouterr()
    assert [line.split(",")[0] for line in said.out.splitlines()] == [
        f"answers: {n} of 4 rows answered" for n in (1, 2, 3)
    ]
    assert not said.err
    with Progress("answers", 4, "rows answered", shown=False) as rows:
        rows.update(2)
    assert capsys.readouterr() == ("", "")


def test_an_adapter_gets_a_card_that_is_filled(files, tmp_path):
    finetune(f"{TRAINING} --lora_rank 2 {files}", tmp_path, LoraArguments, Lora)
    card = (tmp_path / "README.md").read_text()
    assert "[More Information Needed]" not in card and "library_name: peft" in card
    assert re.search(r"trained by LoRA: 4 steps, 1\.00 epochs of 8 rows, [\d,]+ tokens", card)
    tuned = record_of(tmp_path)["scores"]["tuned"]
    assert re.search(rf"\| ROUGE-L \| [\d.]+ \| {tuned['rouge-l']:.2f} \|", card)
    assert "&lt;script>" in card and "<script" not in card  # texts are no HTML and no columns of their own
    assert "很好看。 |" in card and "裙子 \\| 很" in card
    assert not (tmp_path / "checkpoint-4" / "README.md").exists()
    (tmp_path / "README.md").write_text("my own words")
    finetune(f"{TRAINING} --lora_rank 2 {files}", tmp_path, LoraArguments, Lora)  # it is finished: only answers
    assert (tmp_path / "README.md").read_text() == "my own words"
    assert model_card(record_of(tmp_path)).startswith("---\n")


def test_a_table_for_excel_computes_nothing(tmp_path):
    write_csv(tmp_path / "a.csv", [{"question": "=1+1", "tuned": "-", "row": -3}], ["row", "question", "tuned"])
    assert (tmp_path / "a.csv").read_text("utf-8-sig") == "row,question,tuned\n-3,'=1+1,'-\n"


def test_a_record_of_many_rows_keeps_the_worst_and_others_evenly(monkeypatch):
    monkeypatch.setattr(facts, "MOST_ROWS", 100)
    scores = [float(1000 - row) if row % 2 else None for row in range(1000)]
    kept = chosen_rows(scores, 1000)
    assert len(kept) <= 100 and kept == sorted(kept) and kept[0] == 0
    assert {*range(981, 1000, 2)} <= {*kept}
    assert max(after - before for before, after in pairwise(kept)) < 25
    assert chosen_rows([None] * 100, 1000) == list(range(100))
    assert len(chosen_rows([None] * 100, 100 * 500_000)) <= 10  # long texts: a record must be readable


def record_with(**parts) -> dict:
    return (
        EMPTY
        | {"status": "finished"}
        | {"data": [{"split": "train", "rows": 60, "cut": 0}], "progress": {"step": 100, "epoch": 3}}
        | parts
    )


def losses(*values: float) -> list[dict]:
    return [{"step": step, "eval_loss": value} for step, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, []),
        ({"logs": losses(0.5, 0.4, 0.404)}, []),
        ({"logs": losses(0.5, 0.4, 0.45, 0.6)}, ["rises since step 2 (0.400 to 0.600)"]),
        ({"progress": {"step": 100, "epoch": 200}}, ["200 passes over 60 rows"]),
        ({"progress": {"step": 20, "epoch": 3}}, ["20 steps change little"]),
        ({"data": [{"split": "train", "rows": 60, "cut": 4}]}, ["4 of 60 train rows are cut to 64 + 64 tokens"]),
        ({"scores": {"base": {"rouge-l": 20.0}, "tuned": {"rouge-l": 10.0}}}, ["scores below its base"]),
        ({"scores": {"tuned": {"rouge-l": 10.0, "empty": 3}}}, ["3 answers or references are empty"]),
    ],
)
def test_warnings_say_what_went_wrong_in_both_languages(parts, words):
    found = list(warnings_of(record_with(**parts), DataArguments(max_source_length=64, max_target_length=64), False))
    assert len(found) == len(words)
    assert all(word in warning["en"] for word, warning in zip(words, found, strict=True))
    for warning in found:
        numbers = [set(re.findall(r"\d+(?:\.\d+)?", text)) for text in warning.values()]
        assert numbers[0] == numbers[1]


# Variables beside flags


def test_every_flag_of_the_scripts_is_known_by_its_variable():
    pairs = {}
    for script in [*ROOT.glob("*/*.sh")]:
        text = script.read_text()
        pairs |= dict(re.findall(r'--(\w+) "\$\{?([A-Z_]+)', text))
        for names in re.findall(r"^add_flags ((?:[A-Z_ ]|\\\n)+)", text, re.MULTILINE):
            pairs |= {name.lower(): name for name in names.replace("\\", "").split()}
    del pairs["lora_checkpoint"]  # of merge.sh, whose variable is --checkpoint elsewhere
    assert {flag: VARIABLES.get(flag) for flag in pairs} == pairs


def test_a_setting_knows_where_it_comes_from(monkeypatch):
    line = "cd /here && LR=1e-3 MODEL=demo bash train.sh --max_steps 3 --show-answers=0"
    monkeypatch.setenv("RESUME_COMMAND", line)
    monkeypatch.setattr(
        sys, "argv", ["main.py", *"--learning_rate 1e-3 --pre_seq_len 8 --max_steps 3 --seed 1".split()]
    )
    own = given()
    flags = ("learning_rate", "model_name_or_path", "max_steps", "show_answers", "pre_seq_len", "weight_decay")
    assert [origin_of(flag, own) for flag in flags] == ["variable", "variable", "flag", "flag", "script", ""]
    monkeypatch.setattr(command, "from_file", {"weight_decay", "learning_rate"})
    assert [origin_of(flag, own) for flag in ("learning_rate", "weight_decay")] == ["variable", "file"]
    monkeypatch.delenv("RESUME_COMMAND")
    assert origin_of("learning_rate", given()) == "flag"


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("--validation_file x: missing", "VALIDATION_FILE (--validation_file) x: missing"),
        ("take --quantization_bit 4.", "take QUANTIZATION_BIT=4 (--quantization_bit 4)."),
        ("lower LR (--learning_rate)", "lower LR (--learning_rate)"),
        ("--weight_decay -1", "--weight_decay -1"),
        ("--max_steps must be above 0", "MAX_STEPS (--max_steps) must be above 0"),
        ("a --deepspeed or --fsdp", "a DEEPSPEED (--deepspeed) or --fsdp"),
    ],
)
def test_an_error_of_a_script_names_the_variable_beside_the_flag(monkeypatch, sentence, expected):
    monkeypatch.delenv("RESUME_COMMAND", raising=False)
    assert with_variables(sentence) == sentence
    monkeypatch.setenv("RESUME_COMMAND", "cd / && bash train.sh")
    assert with_variables(sentence) == expected
