"""The shipped general questions, by which an evaluation tells what a model forgets."""

import json
from collections import Counter

from conftest import ROOT

from common.data.survey import scripts_of
from common.encoding import conversation_of, encode_train

ROWS = [json.loads(line) for line in (ROOT / "common/data/probe.jsonl").read_text(encoding="utf-8").splitlines()]


def test_forty_questions_with_answers_in_two_languages():
    assert [set(row) for row in ROWS] == [{"prompt", "response"}] * 40
    assert len({row["prompt"] for row in ROWS}) == 40
    chinese = ["Chinese" in scripts_of(Counter(row["prompt"])) for row in ROWS]
    assert chinese == [True] * 24 + [False] * 16


def check_lengths(tokenizer):
    rows = encode_train(tokenizer, [conversation_of(row["prompt"], row["response"]) for row in ROWS], 64, 64)
    assert len(rows) == 40 and not any(row.truncated for row in rows)


def test_they_fit_the_usual_lengths_of_chatglm(real_tokenizer):
    check_lengths(real_tokenizer)


def test_they_fit_the_usual_lengths_of_chatglm2_and_3(real_tokenizer2):
    check_lengths(real_tokenizer2)
