"""Data files of every form, read as a stream; what is wrong with bad ones; the cache that all running jobs share."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.arguments import DataArguments
from common.data import rows
from common.data.dataset import prepare_dataset
from common.data.rows import find_files, read_rows
from common.encoding import encode_batch
from common.errors import UserError

BAD_INPUTS = Path(__file__).parent / "bad_inputs"
ROWS = [{"content": f"类型#裙*颜色#{color}", "summary": f"{color}的裙子。"} for color in ("白色", "黑色", "红色")]


def adgen(**kwargs) -> DataArguments:
    lengths = {"max_source_length": 64, "max_target_length": 64}
    return DataArguments(prompt_column="content", response_column="summary", **(lengths | kwargs))


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(prepared, tokenizer) -> list[str]:
    return [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in prepared.rows]


def test_json_lines_json_array_and_csv_give_the_same_rows(tmp_path, demo_tokenizer):
    lines = write_lines(tmp_path / "rows.json", ROWS)
    array = tmp_path / "array.json"
    array.write_text(json.dumps(ROWS, ensure_ascii=False, indent=1), encoding="utf-8")
    table = tmp_path / "table.csv"
    with open(table, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["content", "summary"])
        writer.writeheader()
        writer.writerows(ROWS)
    expected = texts(prepare_dataset(adgen(), str(lines), demo_tokenizer, "train"), demo_tokenizer)
    assert len(expected) == 3
    assert "黑色的裙子" in expected[1]
    for file in (array, table):
        assert texts(prepare_dataset(adgen(), str(file), demo_tokenizer, "train"), demo_tokenizer) == expected


def test_lists_and_globs_name_several_files(tmp_path):
    first, second = write_lines(tmp_path / "a.json", ROWS), write_lines(tmp_path / "b.json", ROWS)
    assert find_files(f"{first}, {second}") == [first, second]
    assert find_files(str(tmp_path / "*.json")) == [first, second]
    for missing in (str(tmp_path / "c.json"), str(tmp_path / "*.csv")):
        with pytest.raises(UserError, match="no data file"):
            find_files(missing)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("broken_line.json", r"broken_line.json, line 2: broken JSON"),
        ("broken_array.json", r"broken_array.json, line 3: broken JSON"),
        ("other_columns.json", r"line 1: no column 'content'; there are 'question', 'answer'"),
        ("number.json", r"line 2: column 'summary' holds int 7, expected a string"),
        ("nothing_to_learn.json", r"no row with a question and an answer: 3 rows lack one"),
        ("empty.json", r"empty.json: no row .* there are no rows at all"),
        ("no_objects.json", r"row 1: expected an object"),
        ("broken.csv", r"line 3: this row has more or fewer fields"),
        ("open_quote.csv", r"broken CSV"),
    ],
)
def test_bad_files_are_named_with_their_line(file, says, demo_tokenizer):
    with pytest.raises(UserError, match=says):
        prepare_dataset(adgen(), str(BAD_INPUTS / file), demo_tokenizer, "train")


def test_text_that_is_not_utf8_is_refused(tmp_path):
    file = tmp_path / "gbk.json"
    file.write_bytes('{"content": "你好", "summary": "好"}\n'.encode("gbk"))
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_rows(file))


def test_history_becomes_rounds_and_must_be_pairs(tmp_path, demo_tokenizer):
    row = {"content": "颜色？", "summary": "白色。", "history": [["你好", "您好"]]}
    file = write_lines(tmp_path / "chat.json", [row, row | {"history": []}, row | {"history": None}])
    args = adgen(history_column="history")
    first, second, third = texts(prepare_dataset(args, str(file), demo_tokenizer, "train"), demo_tokenizer)
    assert first.startswith("[Round 0]\n问:你好\n答:您好\n[Round 1]\n问:颜色?\n答:")
    assert second == third
    assert second.startswith("颜色?")
    with pytest.raises(UserError, match=r"line 1: column 'history' must hold \[\[question, answer\]"):
        prepare_dataset(args, str(BAD_INPUTS / "history.json"), demo_tokenizer, "train")


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_plain_text_becomes_blocks_that_lose_nothing(tmp_path, demo_tokenizer, suffix):
    lines = ["颜色，材质。\n" * 9, "", "短", None]
    file = write_lines(tmp_path / "texts.json", [{"text": text} for text in lines])
    if suffix == "csv":
        file = tmp_path / "texts.csv"
        with open(file, "w", encoding="utf-8", newline="") as table:
            csv.writer(table).writerows([["text", "other"], *([text, "x"] for text in lines)])
    prepared = prepare_dataset(adgen(text_column="text", max_source_length=16), str(file), demo_tokenizer, "train")
    assert (prepared.dropped, prepared.truncated, prepared.unlabelled) == (2, 0, 0)
    assert all(len(ids) <= 16 for ids in prepared.rows["input_ids"])
    together = [token for ids in prepared.rows["input_ids"] for token in ids[2:]]
    ids = encode_batch(demo_tokenizer, [lines[0], lines[2]])
    assert together == [*ids[0], demo_tokenizer.eos_token_id, *ids[1], demo_tokenizer.eos_token_id]


def test_truncated_and_dropped_rows_are_counted(tmp_path, demo_tokenizer):
    empty = {"content": "类型#裙", "summary": ""}
    file = write_lines(tmp_path / "rows.json", [*ROWS, {"content": "长" * 90, "summary": "短"}, empty, empty])
    train = prepare_dataset(adgen(), str(file), demo_tokenizer, "train")
    assert (len(train.rows), train.truncated, train.dropped) == (4, 1, 2)
    assert train.first_dropped.endswith("rows.json, line 5")
    test = prepare_dataset(adgen(), str(file), demo_tokenizer, "test")
    assert (len(test.questions), test.truncated, test.dropped) == (4, 1, 2)


# A JSON array is read as a stream

ARRAYS = [
    '[{"a": "x"}, {"a": "}],["}]',
    ' \n[\n {"a": 1, "b": [1, {"c": "\\"\\u4e00\\\\"}]}\n ,\n{"a": null} ]\n',
    '[{"a": "裙" , "b": 1.5e3},{}]',
    "[]",
    " [ \n]",
]
BROKEN_ARRAYS = [
    '[\n{"a": 1},\n{"a" 2}\n]',
    '[\n{"a": 1},\n{"a": 2}\n',
    '[\n{"a": 1}\n{"a": 2}\n]',
    '[\n{"a": 1},\n,{"a": 2}\n]',
    '[\n,{"a": 1}]',
    '[{"a": 1}]\n{"a": 2}',
    '[\n{"a": "un\nfinished"}]',
]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("text", ARRAYS)
def test_an_array_gives_what_json_reads_however_it_is_cut_into_chunks(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(rows, "CHUNK", chunk)
    file = tmp_path / "array.json"
    file.write_text(text, encoding="utf-8")
    found = list(read_rows(file))
    assert [row for _, row in found] == json.loads(text)
    assert [place for place, _ in found] == [f"{file}, row {number}" for number in range(1, len(found) + 1)]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("text", BROKEN_ARRAYS)
def test_a_broken_array_is_refused_at_the_line_where_json_refuses_it(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(rows, "CHUNK", chunk)
    file = tmp_path / "array.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(UserError, match=f"array.json, line {expected.value.lineno}: broken JSON"):
        list(read_rows(file))


PREPARE_BIG = """
import resource, sys
from common.arguments import DataArguments
from common.data.dataset import prepare_dataset
from common.loading import load_tokenizer
args = DataArguments(prompt_column="content", response_column="summary", max_source_length=64, max_target_length=64)
tokenizer = load_tokenizer("demo")
for file in sys.argv[1:]:
    prepared = prepare_dataset(args, file, tokenizer, "train")
    print(len(prepared.rows), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_big_files_are_prepared_in_little_memory(tmp_path, monkeypatch):
    """16 MB of JSON lines, then of an array: the peak grows by less than the size of the file."""
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "cache"))
    row = json.dumps({"content": "类型#裙", "summary": "白色的裙子。", "other": "x" * 2000}, ensure_ascii=False)
    count, files = 8000, [write_lines(tmp_path / "small.json", ROWS), tmp_path / "lines.json", tmp_path / "array.json"]
    files[1].write_text(f"{row}\n" * count, encoding="utf-8")
    files[2].write_text("[" + ",\n".join([row] * count) + "]", encoding="utf-8")
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", PREPARE_BIG, *map(str, files)]
    said = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True).stdout
    counts, (small, *peaks) = zip(*(map(int, line.split()) for line in said.splitlines()), strict=True)
    assert counts == (3, count, count)
    for file, peak in zip(files[1:], peaks, strict=True):
        assert peak - small < file.stat().st_size / 1e6, file


def test_a_data_set_by_name_gives_the_same_rows_as_its_file(tmp_path, demo_tokenizer, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "named"
    folder.mkdir()
    file = write_lines(folder / "train.json", ROWS)
    named = adgen(dataset_name=str(folder))
    expected = texts(prepare_dataset(adgen(), str(file), demo_tokenizer, "train"), demo_tokenizer)
    assert texts(prepare_dataset(named, None, demo_tokenizer, "train"), demo_tokenizer) == expected
    with pytest.raises(UserError, match="split test"):
        prepare_dataset(named, None, demo_tokenizer, "test")


# The cache


def test_the_cache_is_used_until_file_or_settings_change(tmp_path, demo_tokenizer):
    file = write_lines(tmp_path / "rows.json", ROWS)
    assert not prepare_dataset(adgen(), str(file), demo_tokenizer, "train").cached
    assert prepare_dataset(adgen(), str(file), demo_tokenizer, "train").cached
    assert not prepare_dataset(adgen(overwrite_cache=True), str(file), demo_tokenizer, "train").cached
    assert not prepare_dataset(adgen(max_target_length=32), str(file), demo_tokenizer, "train").cached
    write_lines(file, ROWS[:2])
    changed = prepare_dataset(adgen(), str(file), demo_tokenizer, "train")
    assert not changed.cached
    assert len(changed.rows) == 2


def test_a_bad_row_leaves_nothing_in_the_cache(tmp_path, demo_tokenizer, monkeypatch):
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError):
        prepare_dataset(adgen(), str(BAD_INPUTS / "number.json"), demo_tokenizer, "train")
    assert list((tmp_path / "cache" / "datasets").iterdir()) == []


PREPARE = """
import sys
from common.arguments import DataArguments
from common.data.dataset import prepare_dataset
from common.loading import load_tokenizer
args = DataArguments(prompt_column="content", response_column="summary", max_source_length=64, max_target_length=64)
prepared = prepare_dataset(args, sys.argv[1], load_tokenizer("demo"), "train")
print(len(prepared.rows), prepared.cached)
"""


def test_one_of_several_processes_prepares_the_data(tmp_path, demo_folder, monkeypatch):
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "cache"))
    file = write_lines(tmp_path / "rows.json", ROWS * 500)
    command = [sys.executable, "-c", PREPARE, str(file)]
    root = Path(__file__).resolve().parents[1]
    jobs = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(job.communicate()[0].strip() for job in jobs)
    assert said == ["1500 False", "1500 True"]
