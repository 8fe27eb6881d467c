"""Rows that are held out of training data: how many, which, and that no copy of them is trained."""

import json
import shutil
from pathlib import Path

import pytest

from common.arguments import DataArguments
from common.data.dataset import Prepared, prepare_dataset
from common.data.survey import columns_of
from common.errors import UserError


def write(file: Path, questions: list[str]) -> Path:
    file.write_text("".join(json.dumps({"prompt": text, "response": f"答{text}"}) + "\n" for text in questions))
    return file


def prepare(file: Path, tokenizer, share: float = 0.05) -> Prepared:
    args = DataArguments(validation_split=share, max_source_length=32, max_target_length=32)
    args.held_out = True
    return prepare_dataset(args, str(file), tokenizer, "train")


def held_out(prepared: Prepared) -> list[str]:
    files = sorted(Path(prepared.held_out or "").iterdir())
    return [json.loads(line)["prompt"] for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("rows", "share", "count"),
    [(60, 0.05, 10), (400, 0.05, 20), (12_000, 0.05, 500), (12, 0.05, 6), (2, 0.05, 1), (60, 0.5, 30), (60, 7, 7)],
)
def test_the_number_of_held_out_rows(rows, share, count, tmp_path, demo_tokenizer):
    prepared = prepare(write(tmp_path / "a.json", [f"问{i}" for i in range(rows)]), demo_tokenizer, share)
    assert (len(held_out(prepared)), len(prepared.rows)) == (count, rows - count)


def test_the_choice_depends_on_the_texts_alone(tmp_path, demo_tokenizer):
    questions = [f"问{i}" for i in range(60)]
    chosen = held_out(prepare(write(tmp_path / "a.json", questions), demo_tokenizer))
    assert chosen == sorted(chosen, key=questions.index)  # the order of the file
    other = held_out(prepare(write(tmp_path / "b.json", questions[::-1]), demo_tokenizer))
    assert other == chosen[::-1]


def test_copies_of_a_held_out_row_are_not_trained(tmp_path, demo_tokenizer):
    prepared = prepare(write(tmp_path / "a.json", [f"问{i % 30}" for i in range(90)]), demo_tokenizer)
    chosen = held_out(prepared)
    assert len(set(chosen)) == len(chosen) == 10
    lines = (tmp_path / "a.json").read_text().splitlines()
    trained = {json.loads(lines[line - 1])["prompt"] for line in columns_of(prepared.rows, "line")["line"]}
    assert len(prepared.rows) == 60 and trained.isdisjoint(chosen)


def test_files_of_different_formats_keep_their_fields(tmp_path, demo_tokenizer):
    write(tmp_path / "a.json", [f"问{i}" for i in range(40)])
    rows = [{"instruction": f"做{i}", "input": "", "output": f"好{i}"} for i in range(40)]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    args = DataArguments(validation_split=20)
    args.held_out = True
    prepared = prepare_dataset(args, f"{tmp_path}/a.json,{tmp_path}/b.json", demo_tokenizer, "train")
    assert [found["format"] for found in prepared.summary["findings"]] == ["pairs of prompt and response", "Alpaca"]
    again = prepare_dataset(DataArguments(), prepared.held_out, demo_tokenizer, "validation")
    assert len(again.rows) == len(again.questions) == 20 and len(again.files) == 2


@pytest.mark.parametrize(
    ("questions", "share", "says"),
    [(["问"] * 60, 0.05, "1 different rows are too few"), (["一", "二", "三"], 3, "3 .* too few to hold 3")],
)
def test_too_few_different_rows_are_refused(questions, share, says, tmp_path, demo_tokenizer):
    with pytest.raises(UserError, match=says):
        prepare(write(tmp_path / "a.json", questions), demo_tokenizer, share)


def test_the_rows_survive_the_cache(tmp_path, demo_tokenizer, monkeypatch):
    file = write(tmp_path / "a.json", [f"问{i}" for i in range(60)])
    first, second = prepare(file, demo_tokenizer), prepare(file, demo_tokenizer)
    assert (first.cached, second.cached) == (False, True)
    assert first.rows[:] == second.rows[:] and held_out(first) == held_out(second)
    chosen = held_out(first)
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "another"))
    assert held_out(prepare(Path(shutil.copy(file, tmp_path / "copy.json")), demo_tokenizer)) == chosen
