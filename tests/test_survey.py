"""The data report: its numbers, on rows made by hand, and what it prints."""

import re
from collections import Counter
from io import StringIO

import numpy as np
import pyarrow
import pytest
from datasets import Dataset
from rich.cells import cell_len
from rich.console import Console

from common.data.survey import RowFacts, overlap, scripts_of, survey
from common.encoding import conversation_of, encode_train
from common.training.data_report import print_survey, warn_of_overlap
from common.training.first_row import cells_of, print_first_row, token_table

TYPES = {"file": "int32", "line": "int64", "row": "uint64", "question": "uint64", "asked": "int32", "answered": "int32"}
BIG = 2**64 - 1  # the largest hash


def rows_of(asked, answered, **columns) -> Dataset:
    """Tokenized rows with these lengths, each a conversation of its own unless columns say otherwise."""
    numbers = range(1, len(asked) + 1)
    own = {"file": [0] * len(asked), "line": numbers, "row": numbers, "question": numbers}
    values = {**own, "asked": asked, "answered": answered, **columns}
    arrays = {name: pyarrow.array(values[name], kind) for name, kind in TYPES.items()}
    ids = pyarrow.array([[1]] * len(asked))
    return Dataset(pyarrow.table({"input_ids": ids, "labels": ids, **arrays}))


def test_lengths_and_their_percentiles():
    found = survey(rows_of(range(1, 101), [7] * 100), 64, 64, joint=False)
    assert (found.rows, found.conversations, found.tokens) == (100, 100, 5050 + 700)
    assert (found.asked, found.answered) == ([50, 90, 95, 99, 100], [7] * 5)
    assert found.both == [57, 97, 102, 106, 107]
    assert (found.cut, found.lost) == (36, sum(range(1, 37)))  # 65 to 100


def test_the_two_rules_of_a_cut():
    rows = rows_of([10, 11, 10, 11, 4], [10, 10, 11, 11, 17])
    apart, joint = (survey(rows, 10, 10, joint) for joint in (False, True))
    assert (apart.cut, apart.lost) == (4, 1 + 1 + 2 + 7)
    assert (joint.cut, joint.lost) == (1, 1)  # 10 + 10 + 1 tokens fit


@pytest.mark.parametrize("seed", range(40))
def test_the_smallest_lengths_that_cut_under_one_percent(seed):
    draw = np.random.default_rng(seed)
    count, longest = draw.choice([1, 40, 100, 101, 350, 600]), draw.choice([6, 30, 300])
    asked, answered = draw.integers(1, longest, count), draw.integers(1, longest, count)
    if seed % 3 == 0:
        answered = longest - asked  # where the question is long, the answer is short
    rows = rows_of(asked, answered)
    source, target = survey(rows, 3, 3, joint=False).smallest
    assert survey(rows, source, target, joint=False).cut < count / 100
    limits = [(each, other) for each in {3, *asked} for other in {3, *answered} if min(each, other) >= 3]
    enough = [sum(pair) for pair in limits if np.sum((asked > pair[0]) | (answered > pair[1])) < count / 100]
    assert source + target == min(enough)
    assert survey(rows, 3, 3, joint=True).smallest == (source, target)  # an evaluation has two limits in any case


def test_answers_of_one_conversation_are_no_duplicates():
    """Line 1 gives three rows, line 2 repeats it, line 3 is another one."""
    lines = [1, 1, 1, 2, 2, 2, 3]
    rows = rows_of(range(10, 17), range(10, 17), line=lines, row=[BIG] * 6 + [5], question=[1, 2, 3, 1, 2, 3, 4])
    found = survey(rows, 64, 64, joint=False)
    assert (found.rows, found.conversations, found.superfluous) == (7, 3, 1)
    two_files = rows_of([10, 10], [10, 10], file=[0, 1], line=[1, 1], row=[BIG, BIG])
    assert survey(two_files, 64, 64, joint=False).superfluous == 1


def test_the_commonest_question_and_its_first_row():
    found = survey(rows_of(range(1, 9), [5] * 8, question=[3, BIG, 7, BIG, 7, BIG, 9, 3]), 64, 64, joint=False)
    assert (found.commonest, found.first_with_it) == (3, RowFacts(1, 0, 2, 2, 5))
    equal = survey(rows_of(range(1, 5), [5] * 4, question=[9, 2, 9, 2]), 64, 64, joint=False)
    assert (equal.commonest, equal.first_with_it.number) == (2, 0)


def test_the_strangest_rows_are_the_farthest_from_the_median_each_conversation_once():
    asked = [50] * 20 + [1, 25, 100, 150, 800, 790, 49]
    lines = [*range(1, 25), 25, 25, 26]
    found = survey(rows_of(asked, asked, line=lines), 64, 64, joint=False)
    assert [(row.line, row.asked) for row in found.strangest] == [(21, 1), (25, 800), (24, 150), (22, 25), (23, 100)]
    assert survey(rows_of([5] * 9, [5] * 9), 64, 64, joint=False).strangest == []


def test_plain_text_is_never_cut_and_asks_nothing():
    found = survey(
        rows_of([0] * 6, [128, 128, 30, 128, 9, 8], line=[1, 1, 1, 2, 3, 4], question=[0] * 6), 64, 64, False
    )
    assert (found.is_text, found.cut, found.lost, found.commonest) == (True, 0, 0, 0)
    assert found.conversations == 4


def test_a_selection_of_rows_and_no_rows():
    rows = rows_of(range(1, 101), [7] * 100)
    assert survey(rows.select(range(99, 49, -1)), 200, 200, joint=False).asked[-1] == 100
    assert survey(rows.take(10), 200, 200, joint=False).tokens == 55 + 70
    empty = survey(rows.take(0), 200, 200, joint=True)
    assert (empty.rows, empty.tokens, empty.commonest, empty.first_with_it, empty.strangest) == (0, 0, 0, None, [])


def test_overlap_of_train_and_validation():
    train = rows_of([5] * 4, [5] * 4, row=[1, 2, 3, BIG], question=[11, 12, 13, 14])
    validation = rows_of([5] * 5, [5] * 5, row=[BIG, 8, 9, 3, 7], question=[14, 12, 99, 13, 98])
    assert overlap(train, validation) == (2, 3)
    assert overlap(train, validation.select([2, 4])) == (0, 0)
    text = rows_of([0, 0], [5, 5], row=[1, 2], question=[0, 0])
    assert overlap(text, rows_of([0, 0], [5, 5], row=[2, 3], question=[0, 0])) == (1, 0)


@pytest.mark.parametrize(
    ("text", "scripts"),
    [
        ("类型#裙，好看！", {"Chinese": 5}),
        ("GPU 显存", {"Latin": 3, "Chinese": 2}),
        ("What's up? 12 %", {"Latin": 7}),
        ("à Zürich", {"Latin": 7}),
        ("東京タワーはどこ", {"Japanese kana": 5, "Chinese": 2}),
        ("안녕하세요 hi", {"Korean": 5, "Latin": 2}),
        ("Привет", {"Cyrillic": 6}),
        ("α و ש ก अ", dict.fromkeys(["Greek", "Arabic", "Hebrew", "Devanagari", "Thai"], 1)),
        ("𠮷野", {"Chinese": 2}),
        ("12 😀 — …", {}),
    ],
)
def test_letters_of_each_script_are_counted(text, scripts):
    assert list(scripts_of(Counter(text)).items()) == list(scripts.items())


def printed(rows: Dataset, capsys, joint: bool = False, full: bool = False) -> tuple[list[str], list[str]]:
    """What the report of a training split prints with limits of 20 + 20 tokens, and its warnings."""
    found = survey(rows, 20, 20, joint)
    print_survey("train", found, ["first.json", "second.csv"], {"Chinese": 90, "Latin": 3}, full)
    said = capsys.readouterr()
    return [" ".join(line.strip(" │┃").split()) for line in said.out.splitlines()], said.err.splitlines()


def test_the_short_report_is_a_table_of_lengths_and_the_cut(capsys):
    lines, warnings = printed(rows_of(range(1, 31), [7] * 30), capsys)
    assert lines[0] == "train: 30 rows, 675 tokens 50% 90% 95% 99% longest limit"
    assert "question 15 27 29 30 30 20" in lines
    assert "answer 7 7 7 7 7 20" in lines
    assert lines[-1] == "cut: 10 rows (33.3%); 55 tokens (8.1%) are lost"
    lengths = "MAX_SOURCE_LENGTH=30 MAX_TARGET_LENGTH=7 (--max_source_length 30 --max_target_length 7)"
    assert warnings == [f"warning: 33.3% of the train rows are cut: {lengths} cut under 1%."]


def test_shared_room_has_one_limit(capsys):
    lines, warnings = printed(rows_of(range(1, 31), [7] * 30), capsys, joint=True)
    assert "both 22 34 36 37 37 20 + 20 + 1" in lines and not warnings


def test_a_cut_of_few_rows_is_no_warning(capsys):
    lines, warnings = printed(rows_of([10] * 95 + [21] * 5, [7] * 100), capsys)
    assert lines[-1] == "cut: 5 rows (5.0%); 5 tokens (0.3%) are lost" and not warnings


def test_the_full_report_shows_repetitions_scripts_and_strange_rows(capsys):
    columns = {"file": [0] * 20 + [1] * 20, "row": [*range(30), *range(10)]}
    lines, warnings = printed(
        rows_of([9] * 39 + [1], [9] * 40, question=[*range(34), *[77] * 6], **columns), capsys, full=True
    )
    assert "conversations or texts that occur again: 10" in lines
    assert "rows with the commonest question: 6, the first in second.csv, line or row 35" in lines
    assert "letters: 96.8% Chinese, 3.2% Latin" in lines
    assert lines[-2] == "second.csv │ 40 │ 1 │ 9"
    assert warnings[0].startswith(
        "warning: 6 of 40 train rows ask the same question, the first in second.csv, line or row 35"
    )


def test_plain_text_has_no_limits(capsys):
    lines, warnings = printed(rows_of([0] * 40, [128] * 40, question=[0] * 40), capsys, full=True)
    assert "text 128 128 128 128 128" in lines
    assert not warnings and not any("question" in line and "cut" in line for line in lines)


def test_overlap_is_a_warning(capsys):
    warn_of_overlap(50, 0, 0)
    assert not capsys.readouterr().err
    warn_of_overlap(50, 2, 3)
    assert capsys.readouterr().err.startswith(
        "warning: of 50 validation rows 2 are training rows too, and 3 have a question"
    )


@pytest.mark.parametrize("width", [60, 160])
def test_the_tokens_of_the_first_row_are_a_table_as_wide_as_the_terminal(demo_tokenizer, width):
    row = encode_train(demo_tokenizer, [conversation_of("类型#裙*颜色#白色", "这条裙子\n很好看。" * 20)], 64, 200)[0]
    cells = list(cells_of(list(zip(row.input_ids, row.labels, strict=True)), demo_tokenizer))
    assert [cell[1] for cell in cells] == [str(index) for index in row.input_ids]
    assert [cell[2] for cell in cells] == ["-" if label == -100 else "learned" for label in row.labels]
    (file := StringIO()).isatty = lambda: False
    Console(file=file, width=width, highlight=False, markup=False, soft_wrap=True).print(token_table(cells, width))
    lines = file.getvalue().splitlines()
    across = lines[0].split().count("token")
    assert across > 1 and lines[0].split() == ["token", "id", "loss"] * across
    columns = [[line.split()[3 * at : 3 * at + 3] for line in lines[1:]] for at in range(across)]
    assert [tuple(cell) for column in columns for cell in column if cell] == cells
    assert max(cell_len(line) for line in lines) <= width


def test_the_first_row_shows_what_is_given_and_what_is_learned(demo_tokenizer, capsys):
    row = encode_train(demo_tokenizer, [conversation_of("类型#裙*颜色#白色", "这条裙子\n很好看。" * 200)], 64, 2000)[0]
    print_first_row({"input_ids": row.input_ids, "labels": row.labels}, demo_tokenizer, tokens=False)
    given, learned = capsys.readouterr().out.splitlines()
    count = sum(label == -100 for label in row.labels)
    assert given.startswith(f"first row, {count} tokens given: 类型#裙*颜色#白色")
    assert learned.startswith(f"first row, {len(row.labels) - count:,} tokens learned: 这条裙子\\n很好看。这条")
    assert re.search(r" … \([\d,]+ more characters\)$", learned)


def test_bytes_of_one_character_are_one_token_in_the_table(demo_tokenizer):
    ids = demo_tokenizer.encode("好𪚥", add_special_tokens=False)
    cells = list(cells_of([(index, index) for index in ids], demo_tokenizer))
    assert len(ids) > len(cells) and cells[-1] == ("𪚥", " ".join(map(str, ids[-4:])), "learned")
    broken = list(cells_of([(index, -100) for index in [*ids[-3:], ids[0]]], demo_tokenizer))
    assert broken[0][0] == "\ufffd" and broken[0][2] == "-"
