"""Data files of every format, the messages for bad ones, and the cache that all running jobs share."""

import csv
import json
import multiprocessing
import tracemalloc
from pathlib import Path

import pytest
from conftest import encoded

from common.arguments import DataArguments
from common.data.dataset import Prepared, prepare_dataset
from common.errors import UserError
from common.loading import load_tokenizer

BAD_INPUTS = Path(__file__).parent / "bad_inputs"
ROWS = [{"content": f"类型#裙*颜色#{color}", "summary": f"{color}的裙子。"} for color in ("白色", "黑色", "红色")]


def adgen(**kwargs) -> DataArguments:
    lengths = {"max_source_length": 64, "max_target_length": 64}
    return DataArguments(prompt_column="content", response_column="summary", **(lengths | kwargs))


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare(args: DataArguments, file: Path | None, tokenizer, split: str = "train") -> Prepared:
    return prepare_dataset(args, file and str(file), tokenizer, split)


def counts(prepared: Prepared, *names: str) -> list:
    return [prepared.summary[name] for name in names]


def texts(args: DataArguments, file: Path | None, tokenizer) -> list[str]:
    rows = prepare(args, file, tokenizer).rows
    return [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]


def test_json_lines_json_array_and_csv_give_the_same_rows(tmp_path, demo_tokenizer):
    lines = write_lines(tmp_path / "rows.json", ROWS)
    array = tmp_path / "array.json"
    array.write_text(json.dumps(ROWS, ensure_ascii=False, indent=1), encoding="utf-8")
    table = tmp_path / "table.csv"
    with open(table, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["content", "summary"])
        writer.writeheader()
        writer.writerows(ROWS)
    expected = texts(adgen(), lines, demo_tokenizer)
    assert len(expected) == 3
    assert "黑色的裙子" in expected[1]
    for file in (array, table):
        assert texts(adgen(), file, demo_tokenizer) == expected


def test_the_content_of_tokenized_rows_knows_no_file(tmp_path, demo_tokenizer):
    def content(name: str, rows: list[dict], split: str = "train") -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        return prepare(adgen(), write_lines(tmp_path / name, rows), demo_tokenizer, split).content

    first = content("a/rows.json", ROWS)
    assert content("b/others.json", [row | {"id": 7} for row in ROWS]) == first
    assert len({first, content("c.json", ROWS[::-1]), content("d.json", ROWS[:2]), content("e.json", ROWS * 2)}) == 4
    assert content("a/rows.json", ROWS, "validation") == first  # that of the rows; questions come after them
    assert content("a/rows.json", ROWS, "test") != content("d.json", ROWS[:2], "test")


def test_history_becomes_rounds_and_must_be_pairs(tmp_path, demo_tokenizer):
    row = {"content": "颜色？", "summary": "白色。", "history": [["你好", "您好"]]}
    file = write_lines(tmp_path / "chat.json", [row, row | {"history": []}, row | {"history": None}])
    args = adgen(history_column="history")
    first, second, third = texts(args, file, demo_tokenizer)
    assert first.startswith("[Round 0]\n问:你好\n答:您好\n[Round 1]\n问:颜色?\n答:")
    assert second == third
    assert second.startswith("颜色?")
    with pytest.raises(UserError, match=r"line 1: column 'history' must hold \[\[question, answer\]"):
        prepare(args, BAD_INPUTS / "history.json", demo_tokenizer)


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_plain_text_becomes_blocks_that_lose_nothing(tmp_path, demo_tokenizer, suffix):
    lines = ["颜色，材质。\n" * 9, "", "短", None]
    file = write_lines(tmp_path / "texts.json", [{"text": text} for text in lines])
    if suffix == "csv":
        file = tmp_path / "texts.csv"
        with open(file, "w", encoding="utf-8", newline="") as table:
            csv.writer(table).writerows([["text", "other"], *([text, "x"] for text in lines)])
    prepared = prepare(adgen(text_column="text", max_source_length=16), file, demo_tokenizer)
    assert counts(prepared, "dropped", "truncated", "unlabelled") == [2, 0, 0]
    assert all(len(ids) <= 16 for ids in prepared.rows["input_ids"])
    together = [token for ids in prepared.rows["input_ids"] for token in ids[2:]]
    ids = encoded(demo_tokenizer, [lines[0], lines[2]])
    assert together == [*ids[0], demo_tokenizer.eos_token_id, *ids[1], demo_tokenizer.eos_token_id]


def test_truncated_and_dropped_rows_are_counted(tmp_path, demo_tokenizer):
    empty = {"content": "类型#裙", "summary": ""}
    file = write_lines(tmp_path / "rows.json", [*ROWS, {"content": "长" * 90, "summary": "短"}, empty, empty])
    train = prepare(adgen(), file, demo_tokenizer)
    assert counts(train, "rows", "truncated", "dropped") == [len(train.rows), 1, 2] == [4, 1, 2]
    assert train.summary["first_dropped"].endswith("rows.json, line 5")
    test = prepare(adgen(), file, demo_tokenizer, "test")
    assert counts(test, "rows", "truncated", "dropped") == [len(test.questions), 1, 0] == [6, 1, 0]  # all are answered


def test_lines_are_prepared_in_little_memory(tmp_path, demo_tokenizer):
    """A file of 24 MB: no more than some batches of 1000 rows are in memory at a time."""
    row = json.dumps({"content": "裙", "summary": "白色的裙子。", "other": "x" * 3000}, ensure_ascii=False)
    file = tmp_path / "lines.json"
    file.write_text(f"{row}\n" * 8000, encoding="utf-8")
    tracemalloc.start()
    try:
        assert len(prepare(adgen(), file, demo_tokenizer).rows) == 8000
        assert tracemalloc.get_traced_memory()[1] < file.stat().st_size / 2
    finally:
        tracemalloc.stop()


def test_a_data_set_by_name_gives_the_same_rows_as_its_file(tmp_path, demo_tokenizer, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "named"
    folder.mkdir()
    file = write_lines(folder / "train.json", ROWS)
    named = adgen(dataset_name=str(folder))
    assert texts(named, None, demo_tokenizer) == texts(adgen(), file, demo_tokenizer)
    with pytest.raises(UserError, match="split test"):
        prepare(named, None, demo_tokenizer, "test")


# The cache


def test_the_cache_is_used_until_file_or_settings_change(tmp_path, demo_tokenizer):
    file = write_lines(tmp_path / "rows.json", ROWS)
    assert not prepare(adgen(), file, demo_tokenizer).cached
    assert prepare(adgen(), file, demo_tokenizer).cached
    assert not prepare(adgen(overwrite_cache=True), file, demo_tokenizer).cached
    assert not prepare(adgen(max_target_length=32), file, demo_tokenizer).cached
    write_lines(file, ROWS[:2])
    changed = prepare(adgen(), file, demo_tokenizer)
    assert not changed.cached
    assert len(changed.rows) == 2


def test_a_bad_row_leaves_nothing_in_the_cache(tmp_path, demo_tokenizer, monkeypatch):
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError):
        prepare(adgen(), BAD_INPUTS / "number.json", demo_tokenizer)
    assert list((tmp_path / "cache" / "datasets").iterdir()) == []


def prepare_rows(file: Path) -> tuple[int, bool]:
    prepared = prepare(adgen(), file, load_tokenizer("demo"))
    return len(prepared.rows), prepared.cached


def test_one_of_several_processes_prepares_the_data(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "cache"))
    file = write_lines(tmp_path / "rows.json", ROWS * 500)
    with multiprocessing.get_context("fork").Pool(3) as jobs:
        found = jobs.map(prepare_rows, [file] * 3, chunksize=1)
    assert sorted(found) == [(1500, False), (1500, True), (1500, True)]
