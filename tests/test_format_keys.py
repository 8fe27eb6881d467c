"""What the keys of a row and the flags tell of its format, questions without answers, and lists of messages."""

import copy
import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from common.data.formats import Columns, FormatReader
from common.data.rows import RowError
from common.encoding import encode_eval, encode_train
from common.errors import UserError
from common.tokenizers.base import Turn

# What the keys tell


def read(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, asking: bool = False, **columns) -> Any:
    """(name of the format, the turns as role: content)."""
    reader = FormatReader(Columns(**columns), tokenizer, asking)
    found = reader.read(row)
    return reader.name, found if isinstance(found, str) else [f"{turn.role}: {turn.content}" for turn in found]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        *(("content", "summary"), ("prompt", "response"), ("question", "answer"), ("prompt", "completion")),
        *(("input", "output"), ("q", "a"), ("问题", "答案"), ("问题", "回答"), ("问", "答"), ("Question", "Answer ")),
        *(("user", "assistant"), ("human", "bot"), ("输入", "输出"), ("query", "response"), ("指令", "输出")),
        ("context", "target"),  # of the first scripts for ChatGLM-6B
    ],
)
def test_columns_of_question_and_answer_are_known_by_their_names(question, answer, tokenizer3, tokenizer2):
    row = {"id": "7", question: "甲", answer: "乙"}
    for tokenizer in (tokenizer3, tokenizer2):
        reader = FormatReader(Columns(), tokenizer)
        assert reader.read(row) == [Turn("user", "甲"), Turn("assistant", "乙", loss=True)]
        assert (reader.unit, dict(reader.unread)) == ("questions with answers", {"id": 1})


def test_columns_of_well_known_data_sets(tokenizer3):
    """Firefly, Dolly, and medical questions with a department and a title."""
    firefly = {"kind": "丙", "input": "甲", "target": "乙"}
    assert read(firefly, tokenizer3) == ("pairs of input and target", ["user: 甲", "assistant: 乙"])
    dolly = {"instruction": "甲", "context": "丙", "response": "乙", "category": "丁"}
    assert read(dolly, tokenizer3) == ("Alpaca", ["user: 甲\n丙", "assistant: 乙"])
    medical = {"department": "丙", "title": "丁", "ask": "甲", "answer": "乙", "source": "戊"}
    assert read(medical, tokenizer3)[1] == ["user: 甲", "assistant: 乙"]


def test_text_is_known_by_its_name(tokenizer3):
    assert read({"text": "一段话", "url": "x"}, tokenizer3) == ("text", "一段话")
    assert read({"text": ""}, tokenizer3) == ("text", "")
    reader = FormatReader(Columns(), tokenizer3)
    reader.read({"text": "一段话", "url": "x"})
    assert (reader.unit, dict(reader.unread)) == ("texts", {"url": 1})


def test_columns_that_hold_nothing_do_not_count(tokenizer3):
    """A table has all columns in all rows."""
    table = dict.fromkeys(("messages", "text", "prompt", "instruction", "chosen", "rejected", "system", "history"))
    assert read(table | {"question": "甲", "answer": "乙"}, tokenizer3)[1] == ["user: 甲", "assistant: 乙"]
    messages = [{"role": "user", "content": "甲", "tool_calls": None}, {"role": "assistant", "content": "乙"}]
    assert read(table | {"messages": messages}, tokenizer3)[1] == ["user: 甲", "assistant: 乙"]
    assert read(table | {"text": "一段话", "response": None}, tokenizer3) == ("text", "一段话")
    assert read({"text": "甲", "prompt": "甲", "response": ""}, tokenizer3) == ("pairs of prompt and response", [])
    assert read({"instruction": "", "input": "甲", "output": "乙"}, tokenizer3) == (
        "Alpaca",
        ["user: 甲", "assistant: 乙"],
    )


def test_rounds_of_ms_swift(tokenizer3):
    row = {"system": "甲", "conversation": [{"human": "乙", "assistant": "丙"}, {"human": "丁", "assistant": "戊"}]}
    expected = ["system: 甲", "user: 乙", "assistant: 丙", "user: 丁", "assistant: 戊"]
    assert read(row, tokenizer3) == ("ms-swift", expected)


def test_history_may_be_messages(tokenizer3):
    history = [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"}]
    reader = FormatReader(Columns(), tokenizer3)
    turns = reader.read({"prompt": "丙", "response": "丁", "history": history})
    assert [turn.loss for turn in turns] == [False, False, False, True]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "甲", "answer": "乙", "response": "丙"}, "columns 'answer', 'response': .*RESPONSE_COLUMN"),
        ({"question": "甲", "content": "乙", "answer": "丙"}, "columns 'question', 'content': .*PROMPT_COLUMN"),
        ({"title": "甲", "body": "乙"}, "unknown shape of row: its keys are 'title', 'body'; known are messages"),
        ({"text": "甲", "summary": "乙"}, "unknown shape of row: its keys are 'text', 'summary'"),
        ({"summary": "乙"}, "unknown shape"),
        ({}, "the row is empty"),
        ({"question": "甲"}, "no column with the answer; there are 'question' .*RESPONSE_COLUMN"),
        ({"prompt": "甲", "chosen": "乙", "rejected": "丙"}, "preference data"),
        ({"messages": "你好"}, "column 'messages' is not JSON"),
        ({"messages": []}, "must hold a list of messages, and not an empty one"),
        ({"question": "甲", "answer": 5}, "column 'answer' holds int 5, expected a string"),
        ({"prompt": "甲", "response": "乙", "history": "丙"}, "column 'history' is not JSON"),
    ],
)
def test_rows_that_no_format_has_are_refused(row, says, tokenizer3):
    with pytest.raises(RowError, match=says) as error:
        read(row, tokenizer3)
    assert "\n" not in str(error.value)


SHAREGPT = {"conversations": [{"from": "human", "value": "甲"}, {"from": "gpt", "value": "乙"}]}
ROLES = {"conversations": [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"}]}
ALPACA = {"instruction": "甲", "output": "乙"}


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (SHAREGPT, ALPACA, "is Alpaca, but the file began with ShareGPT"),
        (SHAREGPT, ROLES, "is ChatGLM3 conversations, but the file began with ShareGPT"),
        (ALPACA, SHAREGPT, "is a list of messages, but the file began with Alpaca"),
        (ALPACA, {"text": "甲"}, "is text, but the file began with Alpaca"),
        (ALPACA, {"prompt": "甲", "response": "乙"}, "is pairs of prompt and response, but the file began with Alpaca"),
    ],
)
def test_a_file_has_one_format(first, second, says, tokenizer3):
    reader = FormatReader(Columns(), tokenizer3)
    reader.read(first)
    with pytest.raises(RowError, match=f"^{says}"):
        reader.read(second)
    reader.read(first)


def test_fields_that_are_optional_come_and_go(tokenizer3):
    reader = FormatReader(Columns(), tokenizer3)
    extras: list[dict] = [
        {"system": "丙"},
        {"input": "丁"},
        {"history": [["戊", "己"]]},
        {"tools": [{"name": "f"}]},
        {},
    ]
    assert [len(reader.read(ALPACA | extra)) for extra in extras] == [3, 2, 4, 3, 2]


# Flags


def test_flags_win(tokenizer3):
    row = {"instruction": "甲", "input": "乙", "output": "丙", "text": "丁", "question": "戊", "answer": "己"}
    assert read(row, tokenizer3, text="text")[1] == "丁"
    assert read(row, tokenizer3, prompt="question", response="answer")[1] == ["user: 戊", "assistant: 己"]
    expected = ["user: 甲\n乙", "assistant: 丙"]
    assert read(row, tokenizer3, prompt="instruction", response="output") == ("Alpaca", expected)
    assert (
        read(SHAREGPT | {"prompt": "丁", "response": "戊"}, tokenizer3, conversation="conversations")[0] == "ShareGPT"
    )


def test_the_column_without_a_flag_is_told_by_its_name(tokenizer3):
    row = {"titel": "甲", "answer": "乙"}
    assert read(row, tokenizer3, prompt="titel")[1] == ["user: 甲", "assistant: 乙"]
    assert read({"question": "甲", "label": "乙"}, tokenizer3, response="label")[1] == ["user: 甲", "assistant: 乙"]


@pytest.mark.parametrize("flag", ["prompt", "response", "history", "conversation", "text"])
def test_a_column_of_a_flag_that_a_row_lacks(flag, tokenizer3):
    says = f"no column 'other'; there are 'question', 'answer' .set --{flag}_column or {flag.upper()}_COLUMN"
    with pytest.raises(RowError, match=says):
        read({"question": "甲", "answer": "乙"}, tokenizer3, **{flag: "other"})


# Questions to answer


@pytest.mark.parametrize(
    "row",
    [
        *({"content": "甲"}, {"content": "甲", "summary": ""}, {"content": "甲", "summary": None}),
        *({"question": "甲"}, {"instruction": "甲", "input": ""}, {"messages": [{"role": "user", "content": "甲"}]}),
        {"messages": [{"role": "user", "content": "甲"}, {"role": "assistant", "content": ""}]},
        {"messages": [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙", "weight": 0}]},
        {"conversations": [{"from": "human", "value": "甲"}]},
    ],
)
def test_a_question_needs_no_answer(row, tokenizer2, tokenizer3):
    for tokenizer in (tokenizer2, tokenizer3):
        assert FormatReader(Columns(), tokenizer, asking=True).read(row) == [Turn("user", "甲")]
    with_answer = {"content": "甲", "summary": "乙"}
    expected = [Turn("user", "甲"), Turn("assistant", "乙", loss=True)]
    assert FormatReader(Columns(), tokenizer3, asking=True).read(with_answer) == expected


def test_an_empty_question_is_asked_too(tokenizer3):
    reader = FormatReader(Columns(), tokenizer3, asking=True)
    assert reader.read({"content": "", "summary": "乙"}) == [Turn("user", ""), Turn("assistant", "乙", loss=True)]
    assert reader.read({"content": "", "summary": ""}) == [Turn("user", "")]


def test_a_column_of_a_flag_may_be_missing_if_it_is_the_answer(tokenizer3):
    row = {"titel": "甲"}
    assert read(row, tokenizer3, asking=True, prompt="titel", response="text")[1] == ["user: 甲"]
    assert read(row, tokenizer3, asking=True, prompt="titel")[1] == ["user: 甲"]


def test_a_conversation_may_end_with_the_result_of_a_tool(tokenizer3):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    messages = [{"role": "user", "content": "甲"}, call, {"role": "tool", "content": "乙"}]
    turns = FormatReader(Columns(), tokenizer3, asking=True).read({"messages": messages})
    assert [turn.role for turn in turns] == ["user", "assistant", "observation"]
    call, answer = encode_eval(tokenizer3, [turns], 99, 99)
    assert "tool_call()" in call.reference and answer.reference is None  # the answer to the result is asked for too


# Weights, calls, thoughts


def answer(**fields) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"} | fields]}


@pytest.mark.parametrize(
    ("fields", "learned"), [({"weight": 1}, True), ({"weight": None}, True), ({"weight": 1, "loss": True}, True)]
)
def test_a_weight_decides_as_loss_does(fields, learned, tokenizer3):
    assert FormatReader(Columns(), tokenizer3).read(answer(**fields))[1].loss is learned
    assert FormatReader(Columns(), tokenizer3).read(answer(weight=0)) == []  # nothing is learned


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (answer(weight=2), "message 2: weight must be 0 or 1, not 2"),
        (answer(weight="0"), "message 2: weight must be 0 or 1, not '0'"),
        (answer(weight=0.5), "message 2: weight must be 0 or 1, not 0.5"),
        (answer(weight=1, loss=False), "message 2: loss false contradicts weight 1"),
        ({"messages": [{"role": "user", "content": "甲", "weight": 1}]}, "message 1: only .* assistant has a weight"),
        (answer(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "message 2: .*part of type image_url"),
        (answer(tool_calls=[{"function": {"name": "f"}}] * 2), "message 2: tool_calls must hold one call"),
        (answer(function_call={"name": "f"}, tool_calls=[{"function": {"name": "f"}}]), "message 2: .*two calls"),
        (answer(function_call={"arguments": "{}"}), 'message 2: a tool call needs a "name"'),
        (
            {"messages": [{"role": "user", "content": "甲"}, {"role": "tool", "name": "f", "tool_call_id": "1"}]},
            "message 2: a conversation begins|message 2: tool without content",
        ),
        (answer(function_call="f"), "message 2: function_call is not JSON"),
        ({"conversations": [{"question": "甲", "answer": "乙"}]}, "message 1: .*; this one has question, answer"),
        (answer(reasoning_content="丙"), "reasoning_content: this model has no part for thoughts"),
        (answer(reasoning="丙"), "reasoning_content: this model has no part for thoughts"),
    ],
)
def test_messages_with_a_mistake_are_refused(row, says, tokenizer2, tokenizer3):
    for tokenizer in (tokenizer2, tokenizer3):
        with pytest.raises(RowError, match=f"^{says}") as error:
            read(row, tokenizer)
        assert "\n" not in str(error.value)


def test_a_call_of_sharegpt_may_be_a_list_of_one(tokenizer3):
    def turns(value: Any) -> Any:
        messages = [{"from": "human", "value": "甲"}, {"from": "function_call", "value": json.dumps(value)}]
        return read({"conversations": messages}, tokenizer3)[1]

    call = {"name": "f", "arguments": {"x": 1}}
    assert turns(call) == turns([call]) == ["user: 甲", "assistant: ```python\ntool_call(x=1)\n```"]
    with pytest.raises(RowError, match="^message 2: function_call must hold one call"):
        turns([call, call])
    calls = [{"role": "user", "content": "甲"}, *[{"role": "tool_call", "content": json.dumps(call)}] * 2]
    with pytest.raises(RowError, match="^message 3: two calls in a row"):
        read({"messages": calls}, tokenizer3)


def test_roles_in_any_case(tokenizer3):
    messages = [{"from": "Human", "value": "甲"}, {"from": "GPT", "value": "乙"}]
    assert read({"conversations": messages}, tokenizer3)[1] == ["user: 甲", "assistant: 乙"]


def test_thoughts_stand_where_the_template_has_them(thinking_tokenizer):
    turns = FormatReader(Columns(), thinking_tokenizer).read(answer(reasoning_content="丙"))
    [row] = encode_train(thinking_tokenizer, [turns], 99, 99)
    learned = thinking_tokenizer.decode([label for label in row.labels if label != -100])
    assert learned == "\n<think>丙</think>\n乙<|endoftext|>"
    assert encode_eval(thinking_tokenizer, [turns], 99, 99)[0].reference == "<think>丙</think>\n乙"


@pytest.mark.parametrize(
    "fields",
    [{"content": "<think>丙</think>乙", "template": "split"}, {"reasoning_content": "丙", "template": "silent"}],
)
def test_thoughts_that_a_template_leaves_out_are_refused(fields, thinking_tokenizer):
    """As some do in all rounds but the last, or in all."""
    tokenizer = copy.deepcopy(thinking_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{% endfor %}"
    if fields.pop("template") == "silent":
        tokenizer.chat_template += "{# reasoning_content #}"
    turns = FormatReader(Columns(), tokenizer).read(answer(**fields))
    with pytest.raises(UserError, match="leaves out the thoughts of an answer"):
        encode_train(tokenizer, [turns], 99, 99)


@pytest.mark.parametrize(
    ("fields", "learned"),
    [
        ({"content": "乙"}, "\n\n</think>\n\n乙"),
        ({"content": "<think>丙</think>乙"}, "\n丙\n</think>\n\n乙"),
        ({"content": "乙", "reasoning_content": "丙"}, "\n丙\n</think>\n\n乙"),
    ],
)
def test_rows_agree_with_a_prompt_that_begins_the_thoughts(fields, learned, thinking_tokenizer):
    """As of GLM-Z1, whose template writes earlier answers without thoughts and asks for one with them."""
    tokenizer = copy.deepcopy(thinking_tokenizer)
    tokenizer.chat_template = (
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content.split('</think>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
    )
    turns = FormatReader(Columns(), tokenizer).read(answer(**fields))
    chat = [Turn("user", "甲"), Turn("assistant", "<think>丁</think>戊"), *turns]
    [row] = encode_train(tokenizer, [chat], 99, 99)
    asked = "[gMASK]<sop><|user|>\n甲<|assistant|>\n戊<|user|>\n甲<|assistant|>\n<think>"
    assert tokenizer.decode(row.input_ids) == asked + learned + "<|endoftext|>"
    assert tokenizer.decode([label for label in row.labels if label != -100]) == learned + "<|endoftext|>"
    [question] = encode_eval(tokenizer, [chat], 99, 99)
    assert tokenizer.decode(question.prompt_ids) == asked and question.reference == learned.strip()
    assert encode_eval(tokenizer, [chat[:-1]], 99, 99)[0].reference is None
    tokenizer.chat_template = tokenizer.chat_template.replace("\n<think>", "!")
    with pytest.raises(UserError, match="asks for answers in another form than it writes them"):
        encode_train(tokenizer, [chat], 99, 99)


def test_answers_that_are_empty_go_with_their_questions(tokenizer3):
    def message(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    chat = [message("user", "甲"), message("assistant", ""), message("user", "乙"), message("assistant", "丙")]
    reader = FormatReader(Columns(), tokenizer3)
    assert [turn.content for turn in reader.read({"messages": chat})] == ["乙", "丙"]
    assert reader.read({"messages": chat[:2]}) == []
    thought = [chat[0], chat[1], message("assistant", "丁")]  # an empty thought before an answer
    assert [turn.content for turn in reader.read({"messages": thought})] == ["甲", "丁"]
    assert reader.empty_answers == 3
