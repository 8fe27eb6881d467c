"""Data files -> rows: which files are meant, their kinds and encodings, and the places of rows and mistakes."""

import codecs
import gzip
import io
import json
import os
import tracemalloc
import zipfile
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from common.data.rows import Row, read_rows
from common.data.sources import find_files, source_of
from common.errors import UserError

CHINESE = [
    {"content": "你好，世界", "summary": "这是一个回答"},
    {"content": "颜色、材质", "summary": "“白色”的裙子；很好看。"},
    {"content": "类型#上衣*材质#牛仔布", "summary": "简约而不简单的牛仔外套，白色的衣身十分百搭。"},
]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines_of(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def found(file: Path, unit: str = "file") -> list:
    """(number, content) of good rows, (number, problem) of bad ones."""
    return [(row.number, row.problem or row.content) for row in read_rows(file, unit)]


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as error:
        list(read_rows(file))
    return str(error.value)


def workbook(part: str = "xl/workbook.xml") -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr(part, "<x/>")
    return content.getvalue()


# Which files


def test_lists_and_globs_name_several_files(tmp_path):
    first, second = write(tmp_path / "a.json", "{}"), write(tmp_path / "b.json", "{}")
    assert find_files(f"{first}, {second},") == [first, second]
    assert find_files(str(tmp_path / "*.json")) == [first, second]
    assert find_files("") == []
    for missing in (tmp_path / "c.json", tmp_path / "*.csv"):
        with pytest.raises(UserError) as error:
            find_files(str(missing))
        assert str(error.value) == f"no data file {missing} (looked in {os.getcwd()})."


def test_a_file_of_that_very_name_wins(tmp_path, monkeypatch):
    names = ("train[1].json", "train1.json", "a,b.json", "a", "b.json", "what?.csv")
    files = {name: write(tmp_path / name, "{}") for name in names}
    for name in ("train[1].json", "a,b.json", "what?.csv"):
        assert find_files(str(files[name])) == [files[name]]
    assert find_files(f"{files['a']},{files['a,b.json']} , {files['b.json']}") == [
        files[name] for name in ("a", "a,b.json", "b.json")
    ]
    files["train[1].json"].unlink()
    assert find_files(str(tmp_path / "train[1].json")) == [files["train1.json"]]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files("~/a,b.json,~/train*.json") == [files["a,b.json"], files["train1.json"]]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "~x", "{}")
    assert find_files("~x") == [Path("~x")]


def test_a_folder_gives_its_data_files_by_name_and_the_rest_is_named_once(tmp_path, capfd):
    names = ("b.JSONL", "a.csv", "c.txt", "d.parquet", "e.tsv", "f.ndjson", "README.md", "t.xlsx", ".hidden.json")
    for name in names:
        write(tmp_path / name, "x")
    (tmp_path / "folder.json").mkdir()
    for _ in range(2):
        files = find_files(f"{tmp_path}/")
        assert [file.name for file in files] == ["a.csv", "b.JSONL", "c.txt", "d.parquet", "e.tsv", "f.ndjson"]
    assert capfd.readouterr().err == f"note: in {tmp_path}/ these are not read: README.md, folder.json, t.xlsx\n"
    assert [file.name for file in find_files(f"{tmp_path}/*.*s*")] == [
        "a.csv",
        "e.tsv",
        "f.ndjson",
        "t.xlsx",
    ]
    assert capfd.readouterr().err == f"note: in {tmp_path}/*.*s* these are not read: folder.json\n"
    write(tmp_path / "folder.json" / "dataset_info.json", "{}")  # as datasets and LLaMA-Factory describe their data
    with pytest.raises(UserError, match=r"no data file in the folder .*folder.json: \.json, .* and \.parquet are read"):
        find_files(str(tmp_path / "folder.json"))


# Kinds


@pytest.mark.parametrize(
    "name", ["x.json", "x.jsonl", "x.NDJSON", "x.txt", "x.csv", "x.log", "x.json.bak", "x", "x.parquet"]
)
@pytest.mark.parametrize("text", ['\n{"a": "b"}\n{"a": 1}', ' [\n {"a": "b"}, {"a": 1}]', '{\n"a": "b"\n}{\n"a": 1}'])
def test_json_is_told_by_its_content(tmp_path, name, text):
    assert [row.content for row in read_rows(write(tmp_path / name, text))] == [{"a": "b"}, {"a": 1}]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv", "x.tsv", "x.txt", "x.parquet", "x.other"])
@pytest.mark.parametrize("content", [b"", b"\n \r\n", codecs.BOM_UTF8, codecs.BOM_UTF16_LE], ids=range(4))
def test_an_empty_file_has_no_rows(tmp_path, name, content):
    assert found(write(tmp_path / name, content)) == []


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.xlsx", workbook(), "is an Excel workbook: save it as CSV UTF-8"),
        ("t.csv", workbook(), "is an Excel workbook: save it as CSV UTF-8"),
        ("t.xlsx", b"PK\x03\x04cut", "is an Excel workbook: save it as CSV UTF-8"),
        ("t.xls", codecs.BOM_UTF16_LE + b"a\0", "is an Excel workbook: save it as CSV UTF-8"),
        (
            "t.json",
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99),
            "is an Excel workbook or another Office file: save",
        ),
        ("t.txt", workbook("word/document.xml"), "is a Word document: save it as plain text"),
        ("t.json", workbook("data/train.json"), "is an archive: unpack it"),
        ("t.json.gz", gzip.compress(b"{}", mtime=0), "is an archive: unpack it"),
        ("t.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
        ("t.json", "\ufeff\n<!DOCTYPE html>\n<html>", "is a web page that was saved as data: download the file itself"),
        ("t.csv", "<HTML lang=en>", "is a web page that was saved as data"),
        ("t.json", "<!-- 404 -->\n<html>", "is a web page that was saved as data"),
        ("t.json", '<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "is a web page that was saved"),
        ("t.pdf", b"%PDF-1.7\n", "is a PDF document"),
        ("t.parquet", "a,b\n1,2\n", "is no Parquet file: copy or download it again."),
        ("t.parquet", b"PAR1" + bytes(50), "broken Parquet after row 0"),
        ("t.md", "# Data", "the ending .md is not read unless the file holds JSON: .json, .jsonl"),
        ("t", "a,b\n1,2", "a name without ending is not read"),
    ],
)
def test_other_kinds_are_named_with_the_remedy(tmp_path, name, content, says):
    file = write(tmp_path / name, content)
    message = refusal(file)
    assert message.startswith(str(file))
    assert says in message


# JSON


@pytest.mark.parametrize(
    "text",
    [
        '\ufeff[{"a": "x"}, {"a": "}],["}]',
        ' \n[\n {"a": 1, "b": [1, {"c": "\\"\\u4e00\\\\"}]}\n ,\n{"a": null} ]\n',
        " [ \n]",
        '\ufeff \n\n{"a": 1}\n \t\n{"a": ["x"]}\n\n',
        '{"a": "x\u2028y\x85\x0c"}\n{"a": {"b": [1.5, true]}}',
        "\n",
    ],
    ids=["array", "array over lines", "empty array", "lines", "separators that end no line", "blank"],
)
def test_arrays_and_lines_give_what_json_reads(tmp_path, text):
    """With a byte order mark and blank lines. Rows of an array are counted, those of lines have the line's number."""
    file = write(tmp_path / "rows.json", text.replace("\x0c", "\\f"))
    plain = text.replace("\x0c", "\\f").strip("\ufeff")
    if "[" in text.split('"')[0]:
        expected = [Row(f"{file}, row {number}", number, row) for number, row in enumerate(json.loads(plain), 1)]
    else:
        lines = [(number, line) for number, line in enumerate(plain.split("\n"), 1) if line.strip()]
        expected = [Row(f"{file}, line {number}", number, json.loads(line)) for number, line in lines]
    assert list(read_rows(file)) == expected


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_all_systems(tmp_path, end):
    file = write(tmp_path / "rows.json", end.join(['{"a": 1}', "", '{"a" 2}', '{"a": 3}']))
    problem = "broken JSON: Expecting ':' delimiter (column 6)"
    assert found(file) == [(1, {"a": 1}), (3, problem), (4, {"a": 3})]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ('\n{\n "a": {\n  "b": [1]\n }\n}\n', [2]),
        ('{\n"a": 1\n}\n\n{\n"a": 2\n}{"a": 3}', [1, 5, 7]),
        ('{"a": 1} {"a": 2}\n{"a": 3}{"a": 4}', [1, 1, 2, 2]),
        ('{"m": [{"role": 1},\n{"role": 2}\n]}\n{"m":\n{"a": [\n{}]}}', [1, 4]),
        ('{"m": [\n{"role": "user"},\n{"role": "x"}\n]}\n{"m": []}', [1, 5]),
        ('[{"a": 1}]\n\n[{"a": 2}, {"a": 3}][]', [1, 2, 3]),
        ('\ufeff{"a": 1}\n\ufeff{"a": 2}\n', [1, 2]),
    ],
    ids=range(7),
)
def test_several_values_one_after_another(tmp_path, text, numbers):
    values, position, decoder = [], 0, json.JSONDecoder()
    bare = text.replace("\ufeff", "")
    while rest := bare[position:].lstrip():
        value, end = decoder.raw_decode(rest)
        values += value if isinstance(value, list) else [value]
        position = len(bare) - len(rest) + end
    assert found(write(tmp_path / "rows.json", text)) == list(zip(numbers, values, strict=True))


@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_that_holds_the_rows_is_unwrapped_and_the_rest_named(tmp_path, capfd, indent):
    file = tmp_path / "rows.json"
    content = {
        "version": "1.0",
        "rows": [{"q": "a", "m": [{"role": "user", "content": "x"}]}, 7, {"q": "b"}],
        "of": [1],
    }
    write(file, json.dumps(content, indent=indent))
    rows = list(read_rows(file))
    assert [row.content for row in rows] == [content["rows"][0], {}, content["rows"][2]]
    assert [row.place for row in rows] == [f"{file}, row {number}" for number in (1, 2, 3)]
    assert rows[1].problem.startswith("expected an object")
    assert list(read_rows(file)) == rows
    assert capfd.readouterr().err == f"note: {file}: the rows are in 'rows'; not read: 'version', 'of'\n"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": []}]},
        {"id": "1", "conversations": [{"from": "human", "value": "a"}]},
        {"dialogue": [{"role": "user", "content": "a"}]},
        {"instruction": "a", "output": "b", "entities": [{"name": "c"}]},
        {"tools": [{"name": "f"}]},
        {"conversations": [{"human": "a", "assistant": "b"}]},
        {"id": 1, "chat": {"turns": [{"q": "a"}]}},
        {"data": ["a", "b"]},
        {},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_that_is_a_row_stays_one(tmp_path, row, indent):
    assert found(write(tmp_path / "rows.json", json.dumps(row, indent=indent))) == [(1, row)]


def test_the_one_list_of_rows_may_lie_deeper(tmp_path, capfd):
    file = write(tmp_path / "rows.json", json.dumps({"data": {"train": [{"q": "a"}], "test": []}}))
    assert found(file) == [(1, {"q": "a"})]
    assert capfd.readouterr().err == f"note: {file}: the rows are in 'train'; not read: 'test'\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"train": [{"q": "a"}], "test": [{"q": "b"}]}, "holds several lists of rows (train, test): give each a file"),
        ({"data": {"train": [{"q": "a"}], "dev": [{"q": "b"}]}}, "holds several lists of rows (train, dev)"),
        ({"prompt": {"0": "a", "1": "b"}, "response": {"0": "c", "1": "d"}}, "is a table by columns or by index"),
        ({"0": {"prompt": "a", "response": "c"}, "1": {"prompt": "b", "response": "d"}}, "is a table by columns or"),
    ],
)
def test_one_object_that_holds_the_rows_otherwise_is_refused(tmp_path, content, says):
    file = write(tmp_path / "rows.json", json.dumps(content))
    assert refusal(file).startswith(f"{file} {says}")


def test_an_object_among_others_is_a_row(tmp_path):
    row = {"data": [{"q": "a"}]}
    assert found(write(tmp_path / "rows.json", lines_of([row, row]))) == [(1, row), (2, row)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[\n{"a": 1},\n{"a" 2}\n]', ", line 3: broken JSON: Expecting ':' delimiter (column 6)"),
        ('[\n{"a": 1},\n{"a": 2}\n', ", line 4: broken JSON"),
        ('[\n{"a": 1}\n{"a": 2}\n]', ", line 3: broken JSON: Expecting ',' delimiter (column 1)"),
        ('[\r\n{"a": 1},\r\n]', ", line 2: broken JSON: a comma after the last row (column 9)"),
        ('[\n,{"a": 1}]', ", line 2: broken JSON"),
        ('[{"a": 1}]\n{"a": 2}', ", line 2: broken JSON: Extra data"),
        ('[\n{"a": "un\nfinished"}]', ", line 2: broken JSON"),
        ("[" * 100_000, ", line 1: broken JSON: nested too deeply"),
        ('{\n"a": 1\n"b": 2\n}', ", line 3: broken JSON: Expecting ',' delimiter (column 1)"),
        ('{\n"a": 1\n}\n{\n"a": 1,\n', ", line 6: broken JSON"),
        ('{\n"a": 1\n},\n{\n"a": 2}', ", line 3: broken JSON: Extra data (column 2)"),
        ('{"data": [\n{"a": 1}\n{"a": 2}]}', ", line 3: broken JSON"),
    ],
    ids=range(12),
)
def test_json_that_cannot_be_read_on_is_refused_with_its_line(tmp_path, text, says):
    file = write(tmp_path / "rows.json", text)
    assert refusal(file).startswith(f"{file}{says}")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"a" 2}', "broken JSON: Expecting ':' delimiter (column 6)"),
        ('{"a": 1', "broken JSON: Expecting ',' delimiter (column 8)"),
        ('{"a": 1,', "broken JSON: Expecting property name"),
        ('{"a": "x', "broken JSON: Unterminated string starting at (column 7)"),
        ('{"a": 1},', "broken JSON: Extra data (column 9)"),
        ('{"a": "x\0"}', "broken JSON: Invalid control character at (column 9)"),
        ('{"a": ' + "[" * 100_000, "broken JSON: nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "broken JSON: Exceeds the limit"),
        ('{"a": 1, "b": 2, "b": 3}', "duplicate key 'b' in one object"),
        ('{"a": [{"b": 2, "b": 2}]}', "duplicate key 'b' in one object"),
        ('{"a": [{"b": 2, "b": 2}, ' + "[" * 100_000, "broken JSON: nested too deeply"),
        ("null", 'expected an object like {"prompt": …}, found NoneType'),
        ('["a"]', 'expected an object like {"prompt": …}, found list'),
    ],
    ids=range(13),
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_line_is_one_bad_row(tmp_path, bad, says, place):
    lines = ['{"a": 1}', '{"a": 2}']
    lines.insert(place, bad)
    if bad.startswith("[") and place == 0:  # then the file holds arrays
        lines.insert(0, '{"a": 0}')
    file = write(tmp_path / "rows.json", "\n".join(lines) + "\n")
    rows = list(read_rows(file))
    assert [row.number for row in rows] == list(range(1, len(lines) + 1))
    [row] = [row for row in rows if row.problem]
    assert row.problem.startswith(says)
    assert (row.place, row.content) == (f"{file}, line {lines.index(bad) + 1}", {})
    assert row.excerpt == bad[:60]


def test_a_bad_item_of_an_array_is_one_bad_row(tmp_path):
    items = ['{"a": 1}', "null", '{"a": 1,\n "a": 2}', '{"a": ' + "1" * 5000 + "}", '"x"', '{"a": 2}']
    rows = list(read_rows(write(tmp_path / "rows.json", f"[{','.join(items)}]")))
    problems = ["", "expected an object", "duplicate key 'a'", "broken JSON: Exceeds", "expected an object", ""]
    assert [row.number for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row.problem.startswith(problem) for row, problem in zip(rows, problems, strict=True))
    assert [row.content for row in rows if not row.problem] == [{"a": 1}, {"a": 2}]
    assert rows[2].excerpt.startswith('{"a": 1, "a": 2},')
    assert all(len(row.excerpt) <= 60 for row in rows)


@pytest.mark.parametrize("first", ["{}", '{"a" 1}'])
def test_lines_are_read_in_little_memory(tmp_path, first):
    row = json.dumps({"content": "裙" * 300, "summary": "白色的裙子。"}, ensure_ascii=False)
    file = write(tmp_path / "lines.json", f"{first}\n" + f"{row}\n" * 20_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(file)) == 20_001
        assert tracemalloc.get_traced_memory()[1] < 6e6 < file.stat().st_size / 3
    finally:
        tracemalloc.stop()


# Encodings


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
        (b"", "gb18030"),
        (b"", "gbk"),
    ],
)
def test_every_encoding_gives_the_same_rows(tmp_path, capfd, mark, encoding):
    names = list(CHINESE[0])
    table = "\r\n".join(";".join(row) for row in [names, *(list(row.values()) for row in CHINESE)])
    contents = {"a.json": lines_of(CHINESE), "b.json": json.dumps(CHINESE, ensure_ascii=False), "c.csv": table}
    for name, content in contents.items():
        file = write(tmp_path / name, mark + content.encode(encoding))
        for _ in range(2):
            assert [row.content for row in read_rows(file)] == CHINESE
        note = f"note: {file} is read as GB18030, because it is not UTF-8\n" if encoding.startswith("gb") else ""
        assert capfd.readouterr().err == note
    novel = write(tmp_path / "d.txt", mark + "　　第一段。\r\n第二行\r\n".encode(encoding))
    assert found(novel) == [(1, {"text": "　　第一段。\n第二行"})]


@pytest.mark.parametrize(
    "text",
    [
        "你好",
        "四,“他说”好啊",
        "𠀀你好😀ü",
        "說過這個國家的繁體字，還有時間嗎？",
        "价格：€25，℃ ① —— 好",
        "朱镕基，王堃",
    ],
)
def test_short_text_in_gb18030_is_read(tmp_path, text):
    assert found(write(tmp_path / "x.json", json.dumps({"a": text}, ensure_ascii=False).encode("gb18030"))) == [
        (1, {"a": text})
    ]


@pytest.mark.parametrize("border", range(-4, 1))
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "gb18030"])
def test_a_character_may_lie_across_two_chunks(tmp_path, border, encoding):
    row = {"a": "x" * ((2**20 - 7 + border) // (2 if encoding == "utf-16" else 1)) + "你😀好" * 9 + "，世界是这样的"}
    file = write(tmp_path / "x.json", json.dumps(row, ensure_ascii=False).encode(encoding))
    assert found(file) == [(1, row)]
    damaged = write(
        tmp_path / "y.json", file.read_bytes() + "\r\n".encode(encoding).removeprefix(b"\xff\xfe") + b"\xff"
    )
    assert f"line 2: byte 0xff at offset {damaged.stat().st_size - 1} is not" in refusal(damaged)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("damage", [b"\xff", b"\x80", b"\xc4\xe3\xba\xc3", "é".encode("latin-1"), b"\xed\xa0\x80"])
def test_a_damaged_byte_of_utf8_is_named_by_line_and_offset(tmp_path, end, damage):
    """And such text is not taken for GB18030, though Chinese in UTF-8 often is rubbish in GB18030."""
    for rows in (CHINESE * 50, [{"a": "café à côté, naïve"}] * 50, [{"a": "Привет мир"}] * 50):
        before = lines_of(rows).replace("\n", end).encode() + b'{"a": "'
        file = write(tmp_path / "x.json", before + damage + b'"}' + end.encode() + lines_of(rows).encode())
        says = (
            f"{file}, line {len(rows) + 1}: byte 0x{damage[0]:02x} at offset {len(before)} is not UTF-8 text: mend it"
        )
        assert refusal(file).startswith(says)


def test_one_zero_byte_does_not_make_it_utf16(tmp_path):
    before = lines_of(CHINESE * 9).encode() + b'{"a": "\0"}\n'
    file = write(tmp_path / "x.json", before)
    assert [row.number for row in read_rows(file) if row.problem] == [28]
    assert f"line 29: byte 0xff at offset {len(before)} is not UTF-8" in refusal(
        write(tmp_path / "y.json", before + b"\xff")
    )


def test_text_that_was_cut_is_named_by_line_and_offset(tmp_path):
    content = lines_of(CHINESE).encode()[:-5]
    file = write(tmp_path / "x.json", content)
    assert refusal(file).startswith(f"{file}, line 3: byte 0xe3 at offset {len(content) - 1} is not UTF-8 text")
    wide = lines_of(CHINESE).encode("utf-16")[:-1]
    file = write(tmp_path / "y.json", wide)
    assert refusal(file).startswith(f"{file}, line 3: byte 0x0a at offset {len(wide) - 1} is not UTF-16 text")


def test_a_damaged_byte_of_gb18030_is_named_by_line_and_offset(tmp_path):
    before = lines_of(CHINESE * 9).encode("gb18030")
    file = write(tmp_path / "x.json", before + b'{"a": "\xff"}')
    assert refusal(file).startswith(f"{file}, line 28: byte 0xff at offset {len(before) + 7} is not GB18030 text")


def test_text_of_two_encodings_is_refused(tmp_path):
    western = lines_of(CHINESE * 20).encode("gbk") + lines_of(CHINESE).encode()
    assert "is not UTF-8 text" in refusal(write(tmp_path / "x.json", western))
    assert "is not UTF-8 text" in refusal(write(tmp_path / "y.json", lines_of(CHINESE * 20).encode() + western))


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Müller fährt über die Brücke, schön für Mädchen", "cp1252"),
        ("für", "cp1252"),
        ("café été créée naïve où l’élève à côté", "cp1252"),
        ("señor niño ¿Qué?", "cp1252"),
        ("Привет мир", "cp1251"),
        ("這是一個繁體中文的句子，我們使用這種文字。衣服的顏色很漂亮", "big5"),
        ("你好嗎", "big5"),
        ("今天天氣", "big5"),
        ("私は学生です。今日は天気がいいですね。", "shift_jis"),
        ("私は学生です。今日は天気がいいですね。日本語の文章を書いています。", "euc_jp"),
    ],
)
def test_other_encodings_do_not_become_chinese(tmp_path, text, encoding):
    file = write(tmp_path / "x.json", json.dumps({"a": text}, ensure_ascii=False).encode(encoding))
    assert refusal(file).startswith(f"{file}, line 1: byte ")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", [lines_of(CHINESE), "a,b\r\n1,2\r\n", '{"a": "b"}', "你好\n世界"])
def test_utf16_without_a_mark_has_its_own_sentence(tmp_path, encoding, text):
    file = write(tmp_path / "x.csv", text.encode(encoding))
    assert refusal(file) == f"{file} is UTF-16 text without a byte order mark, or no text: save it as UTF-8."


def test_a_file_that_changed_is_looked_at_again(tmp_path):
    file = write(tmp_path / "x.json", '{"a": "你好"}')
    assert source_of(file) == ("json", "utf-8")
    write(file, '{"a": "你好，世界"}'.encode("gbk"))
    assert source_of(file) == ("json", "gb18030")


# CSV


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a,b\n1,2\n", {2: ["1", "2"]}),
        ("a;b\r\n1;2,3\r\n", {2: ["1", "2,3"]}),
        ("a\tb\r1\t2;3\r", {2: ["1", "2;3"]}),
        ('"a,b,c";b\n1;2\n', {2: ["1", "2"]}),
        ('"a\nx,y,z";b\n1;2\n', {3: ["1", "2"]}),
        ("sep=;\r\na,b,c;d\r\n1;2\r\n", {3: ["1", "2"]}),
        ('"SEP=\t"\na\tb\n1\t2\n', {3: ["1", "2"]}),
        ("\n\r\na,b\n\n1,2\n \t\n3,4", {5: ["1", "2"], 7: ["3", "4"]}),
        ('a,b\n"x\n\ny","1 ""q"", 2"\nx"y,\n,\n', {2: ["x\n\ny", '1 "q", 2'], 5: ['x"y', ""], 6: ["", ""]}),
        ("a,b\n1,x\u2028y\x0bz\x85\n", {2: ["1", "x\u2028y\x0bz\x85"]}),
        ('text\n\na, b;c\n"d, ""e"""\n""\n', {3: ["a, b;c"], 4: ['d, "e"'], 5: [""]}),
        ('"text"\r\n"a, b"\r\n', {2: ["a, b"]}),
    ],
    ids=range(12),
)
def test_csv_of_all_shapes(tmp_path, text, rows):
    file = write(tmp_path / "x.csv", text)
    assert {row.number: list(row.content.values()) for row in read_rows(file)} == rows
    assert [(row.place, row.problem) for row in read_rows(file)] == [(f"{file}, line {number}", "") for number in rows]


def test_a_tsv_is_split_at_its_tabs(tmp_path):
    assert found(write(tmp_path / "x.tsv", "a\tb,c,d\n1;2\t3,4\n")) == [(2, {"a": "1;2", "b,c,d": "3,4"})]


def test_names_of_columns(tmp_path):
    assert found(write(tmp_path / "a.csv", ", a , b\n0,1, 2 \n")) == [(2, {"column 1": "0", "a": "1", "b": " 2 "})]
    assert found(write(tmp_path / "b.csv", "a,b, \n1,2,\n")) == [(2, {"a": "1", "b": "2", "column 3": ""})]
    file = write(tmp_path / "c.csv", "\na,b, a,c,b\n1,2,3,4,5\n")
    assert refusal(file) == f"{file}, line 2: more than one column is named 'a', 'b': rename or remove one."
    assert found(write(tmp_path / "d.csv", "a,b\n")) == found(write(tmp_path / "e.csv", "sep=;\n")) == []


def test_a_bad_row_of_csv_is_named_by_its_line_and_reading_goes_on(tmp_path):
    rows = ["a,b", '1,"x\ny"', '2,"q"r"s"', "3,4", "5", "6,7,8", '9,"y\n\nz"w', "10,11"]
    file = write(tmp_path / "x.csv", "\n".join(rows))
    fields = "this row has more or fewer fields than the header names"
    quote = "broken CSV: ',' expected after '\"'"
    assert found(file) == [
        (2, {"a": "1", "b": "x\ny"}),
        (4, quote),
        (5, {"a": "3", "b": "4"}),
        (6, f"{fields} (1 instead of 2)"),
        (7, f"{fields} (3 instead of 2)"),
        (8, f"{quote} (lines 8 to 10)"),
        (11, {"a": "10", "b": "11"}),
    ]
    assert [row.excerpt for row in read_rows(file) if row.problem] == ['2,"q"r"s"', "5", "6,7,8", '9,"y']
    file = write(tmp_path / "y.csv", 'text\n"a"b\nc')
    assert found(file) == [(2, "broken CSV: the end of the line expected after '\"'"), (3, {"text": "c"})]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('a,b\n1,"2\n3,4\n', 2),
        ('a,b\n1,"x ""y"" z\n3,4\n', 2),
        ('a,b\n"1\n2","3\n4,5\n', 3),
        ('a,b\n1,""\n"","x"\n"1\n2",\n\n3,"""4""\n', 7),
        ('a,"b\n1,2\n', 1),
    ],
    ids=range(5),
)
def test_a_quote_that_is_never_closed_is_named_by_the_line_that_opens_it(tmp_path, text, line):
    file = write(tmp_path / "x.csv", text)
    assert refusal(file) == f"{file}, line {line}: broken CSV: a quote is opened and never closed."


# Text and Parquet


def test_text_is_a_row_or_a_row_a_paragraph(tmp_path):
    text = "\n　　第一段\r\n　　第二行 \r\n\r\n \r\n第二段\n\n第三段"
    file = write(tmp_path / "x.txt", text)
    whole = "　　第一段\n　　第二行 \n\n \n第二段\n\n第三段"
    assert list(read_rows(file)) == [Row(f"{file}, line 1", 1, {"text": whole})]
    paragraphs = {2: "　　第一段\n　　第二行 ", 6: "第二段", 8: "第三段"}
    expected = [Row(f"{file}, line {number}", number, {"text": part}) for number, part in paragraphs.items()]
    assert list(read_rows(file, "paragraph")) == expected


@pytest.mark.parametrize("text", ["一\n二\n三", "\n\n一\r\n二\r\n三\r\n\r\n", "一\r二\r三\r"])
def test_without_a_blank_line_each_line_is_a_paragraph(tmp_path, text):
    start = 3 if text[0] == "\n" else 1
    expected = [(start + index, {"text": character}) for index, character in enumerate("一二三")]
    assert found(write(tmp_path / "x.txt", text), "paragraph") == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "gb18030"])
def test_a_txt_with_the_same_tabs_in_each_row_is_a_table(tmp_path, encoding):
    """Excel saves such tables as "Unicode text" and as "Text (tab delimited)"."""
    file = write(tmp_path / "x.txt", '问题\t答案\r\n"一\r\n二"\t三\r\n四,五\t\r\n'.encode(encoding))
    assert found(file) == [(2, {"问题": "一\r\n二", "答案": "三"}), (4, {"问题": "四,五", "答案": ""})]
    long = write(tmp_path / "y.txt", f"问题\t答案\n{'这是一段话' * 1000}\t三\n".encode(encoding))
    assert found(long) == [(2, {"问题": "这是一段话" * 1000, "答案": "三"})]


@pytest.mark.parametrize("text", ["一\t二", "\t一\n二", "一\t二\n三\n四\t五", "一\n二\t三"])
def test_text_with_tabs_here_and_there_is_text(tmp_path, text):
    assert found(write(tmp_path / "x.txt", text)) == [(1, {"text": text})]


def test_text_that_begins_with_a_bracket_is_text(tmp_path):
    for text in ("[注] 一", "{二}", "[[1], 2]"):
        assert found(write(tmp_path / "x.txt", text)) == [(1, {"text": text})]


def test_parquet_gives_its_values_as_they_are(tmp_path):
    rows = [
        {
            "a": "你好",
            "n": 7,
            "x": 1.5,
            "d": date(2024, 1, 2),
            "m": [{"role": "user", "content": None}],
            "y": Decimal("1.5"),
        },
        {"a": None, "n": None, "x": None, "d": None, "m": None, "y": None},
    ]
    file = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows * 1500), file)
    read = list(read_rows(file))
    assert [row.content for row in read] == rows * 1500
    assert read[2999][:2] == (f"{file}, row 3000", 3000)
    moved = file.rename(tmp_path / "x.json")
    assert list(read_rows(moved))[0].content == rows[0]
    twice = pyarrow.table([["x"], ["y"]], names=["a", "a"])
    parquet.write_table(twice, file)
    assert refusal(file) == f"{file}: more than one column is named 'a': rename or remove one."
    cut = write(tmp_path / "cut.parquet", moved.read_bytes()[:-9])
    assert refusal(cut).startswith(f"{cut}: broken Parquet after row 0: ")
