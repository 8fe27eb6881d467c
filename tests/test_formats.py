"""Conversations of every official form: how they are read, what is learned of them, and what is wrong with bad ones."""

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
from test_data import counts, prepare, write_lines

from common.arguments import DataArguments
from common.data.formats import Columns, FormatReader
from common.data.rows import RowError
from common.encoding import encode_eval, encode_train
from common.errors import UserError
from common.tokenizers.base import Turn
from common.tokenizers.chatglm2 import ChatGLM3Tokenizer

ROOT = Path(__file__).resolve().parents[1]
BAD_INPUTS = ROOT / "tests" / "bad_inputs"
TOOLS = [{"name": "get_weather", "description": "查天气", "parameters": {"city": "城市"}}]
CALL = Turn(
    "assistant",
    "```python\ntool_call(city='北京', days=2)\n```",
    metadata="get_weather",
    loss=True,
    arguments='{"city": "北京", "days": 2}',
)
TOOL_TURN = {
    "role": "tool",
    "name": "get_weather",
    "parameters": {"city": "北京", "days": 2},
    "observation": {"temp": 21},
}
CHAT = [{"role": "user", "content": "北京天气怎么样"}, TOOL_TURN, {"role": "assistant", "content": "21度。"}]
OPENAI_CHAT = [
    CHAT[0],
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "北京", "days": 2}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": '{"temp": 21}'},
    CHAT[2],
]


def read(messages: object, column: str = "conversations", **row) -> list[Turn]:
    tokenizer = ChatGLM3Tokenizer.from_pretrained(ROOT / "common" / "demo" / "chatglm3")
    turns = FormatReader(Columns(conversation=column), tokenizer).read({column: messages, **row})
    assert isinstance(turns, list)
    return turns


def chat(**kwargs) -> DataArguments:
    return DataArguments(conversation_column="messages", **{"max_source_length": 64, "max_target_length": 64} | kwargs)


# What is read


def test_what_is_learned_by_default():
    """What the assistant says and calls, and an observation that stands by itself, as in the official script."""
    messages = [
        {"role": "system", "content": "甲"},
        {"role": "user", "content": "乙"},
        {"role": "assistant", "metadata": "f", "content": "丙"},
        {"role": "observation", "content": "丁"},
        {"role": "assistant", "content": "戊"},
    ]
    assert read(messages) == [
        Turn("system", "甲"),
        Turn("user", "乙"),
        Turn("assistant", "丙", "f", True),
        Turn("observation", "丁", "", True),
        Turn("assistant", "戊", "", True),
    ]


def test_loss_of_a_turn_decides_otherwise():
    messages = [
        {"role": "user", "content": "甲", "loss": True},
        {"role": "assistant", "content": "乙", "loss": False},
        {"role": "observation", "content": "丙", "loss": False},
        TOOL_TURN | {"loss": False},
        {"role": "assistant", "content": "丁"},
    ]
    assert [turn.loss for turn in read(messages)] == [True, False, False, False, False, True]


def test_a_tool_turn_is_a_call_and_what_it_returned():
    """The call is learned, in the words of ChatGLM3; what the tool returned is not."""
    expected = [
        Turn("user", "北京天气怎么样"),
        CALL,
        Turn("observation", '{"temp": 21}'),
        Turn("assistant", "21度。", loss=True),
    ]
    assert read(CHAT) == expected
    assert read([CHAT[0], TOOL_TURN | {"observation": "晴"}, CHAT[2]])[2] == Turn("observation", "晴")


@pytest.mark.parametrize("written", [TOOLS, json.dumps(TOOLS)])
def test_tools_are_the_first_system_prompt(written):
    """As JSON whose Chinese stays readable; a system prompt of the conversation follows."""
    system = {"role": "system", "content": "你是客服。"}
    turns = read([system, *CHAT], tools=written)
    assert turns[0] == Turn("system", "", tools=json.dumps(TOOLS, ensure_ascii=False))
    assert "查天气" in turns[0].tools
    assert turns[1] == Turn("system", "你是客服。")
    assert turns[2:] == read(CHAT)
    assert read(CHAT, tools=[]) == read(CHAT, tools=None) == read(CHAT)


def test_messages_of_openai_give_the_same_row(tokenizer3):
    rows = encode_train(tokenizer3, [read(CHAT, tools=TOOLS), read(OPENAI_CHAT, tools=TOOLS)], 500, 500)
    assert rows[0].columns == rows[1].columns
    assert "get_weather" in tokenizer3.decode(rows[0].input_ids)


def test_fields_that_are_null_are_as_good_as_absent():
    """Where conversations are a column of a table, every message has the fields of all others."""
    fields = {name: None for message in OPENAI_CHAT for name in message} | {"loss": None, "metadata": None}
    fields |= dict.fromkeys(("name", "parameters", "observation"))
    assert read([fields | message for message in OPENAI_CHAT], tools=None) == read(OPENAI_CHAT)
    assert read([fields | message for message in CHAT]) == read(CHAT)


def test_text_beside_a_call_is_a_turn_of_its_own():
    both = OPENAI_CHAT[1] | {"content": "稍等。"}
    assert read([CHAT[0], both])[1:] == [Turn("assistant", "稍等。", loss=True), CALL]


def test_a_table_holds_conversations_as_json(tmp_path, tokenizer3):
    lines = write_lines(tmp_path / "chats.json", [{"messages": CHAT, "tools": TOOLS}, {"messages": CHAT, "tools": []}])
    table = tmp_path / "chats.csv"
    with open(table, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [["messages", "tools"], [json.dumps(CHAT), json.dumps(TOOLS)], [json.dumps(CHAT), ""]]
        )
    expected = prepare(chat(), lines, tokenizer3).rows.remove_columns("line")
    found = prepare(chat(), table, tokenizer3).rows.remove_columns("line")  # there is a header in the table
    assert found[:] == expected[:]
    assert len(found["input_ids"][0]) > len(found["input_ids"][1])


def test_the_shipped_tool_conversations_are_learned_from_the_call_to_the_answer(tokenizer3):
    args = DataArguments(conversation_column="conversations", max_source_length=500, max_target_length=500)
    prepared = prepare(args, ROOT / "AdvertiseGen" / "dev_tools.json", tokenizer3, "validation")
    assert [len(prepared.rows), *counts(prepared, "dropped", "truncated", "shortened")] == [60, 0, 0, 0]
    assert sum("query_" in reference for reference in prepared.questions["reference"]) > 20
    for row in prepared.rows:
        learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert tokenizer3.get_command("<|assistant|>") not in learned
        assert learned[-1] == tokenizer3.eos_token_id


# What becomes of conversations that do not fit


def test_too_long_conversations_are_counted(tmp_path, tokenizer3):
    """Whole, without its oldest round, cut, and so long that nothing of the answer is left."""
    question, answer = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "hello"}
    whole = [question, answer]
    rounds = whole * 9
    cut = [{"role": "user", "content": "你好" * 60}, answer]
    lost = [question, {"role": "assistant", "content": "你好" * 60, "loss": False}, answer]
    unlearned = [question, answer | {"loss": False}]
    file = write_lines(tmp_path / "chats.json", [{"messages": row} for row in (whole, rounds, cut, unlearned, lost)])
    prepared = prepare(chat(max_source_length=20, max_target_length=30), file, tokenizer3)
    assert len(prepared.rows) == 3
    assert counts(prepared, "rows", "truncated", "shortened", "unlabelled") == [3, 2, 1, 1]
    assert counts(prepared, "dropped", "first_dropped") == [1, f"{file}, line 4"]
    assert all(len(ids) <= 51 for ids in prepared.rows["input_ids"])


def test_validation_rows_without_a_label_are_counted_too(tmp_path, tokenizer3):
    """They can be answered, but have no loss."""
    long = {"role": "assistant", "content": "你好" * 60, "loss": False}
    chats = [[CHAT[0], long, CHAT[2]], [CHAT[0], CHAT[2]]]
    file = write_lines(tmp_path / "chats.json", [{"messages": messages} for messages in chats])
    prepared = prepare(chat(max_source_length=20, max_target_length=30), file, tokenizer3, "validation")
    assert (len(prepared.rows), len(prepared.questions), prepared.summary["unlabelled"]) == (1, 2, 1)


def test_nothing_that_fits_is_an_error(tmp_path, tokenizer3):
    long = {"role": "assistant", "content": "你好" * 60, "loss": False}
    file = write_lines(tmp_path / "chats.json", [{"messages": [CHAT[0], long, CHAT[2]]}])
    with pytest.raises(UserError, match=r"nothing of the answers fits 20 \+ 30 tokens"):
        prepare(chat(max_source_length=20, max_target_length=30), file, tokenizer3)


def test_a_tool_without_parameters_is_called_without_arguments():
    messages = [CHAT[0], {"role": "tool", "name": "now", "observation": "12:00"}, CHAT[2]]
    turns = read(messages)
    assert turns[1] == Turn("assistant", "```python\ntool_call()\n```", "now", True, arguments="{}")
    assert turns[2] == Turn("observation", "12:00")


def test_parameter_names_that_python_does_not_know_survive():
    parameters = {"x": 1, "a-b": "好", "from": "北京"}
    messages = [CHAT[0], {"role": "tool", "name": "f", "parameters": parameters, "observation": 1}, CHAT[2]]
    call = read(messages)[1].content
    assert eval(call.splitlines()[1], {"tool_call": dict}) == parameters


def test_a_thought_and_its_call_are_one_answer(tokenizer3):
    """The model writes both without stopping: it is asked once, and both are the reference."""
    turns = [Turn("user", "hi"), Turn("assistant", "ok", loss=True), Turn("assistant", "go", "f", loss=True)]
    rows = encode_eval(tokenizer3, [turns], 64, 64)
    assert len(rows) == 1
    assert rows[0].reference.split() == ["ok", "f", "go"]


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "assistant", "text": "您好"}, "assistant without content"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 2}, "must hold one call"),
        ({"role": "assistant", "tool_calls": 5}, "must hold one call"),
        ({"role": "tool"}, 'a tool call needs a "name"'),
        ({"role": "observation"}, "observation without content"),
    ],
)
def test_messages_that_say_nothing_clear_are_refused(message, says):
    with pytest.raises(RowError, match=f"^message 2: .*{says}"):
        read([CHAT[0], message])


# What is refused


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("unknown_role.json", r"line 2: message 2: unknown role 'robot'; there are system, user"),
        ("two_systems.json", r"line 2: message 2: a system message comes first and only once"),
        ("late_system.json", r"line 2: message 2: a system message comes first and only once"),
        ("empty_conversation.json", r"line 2: column 'messages' must hold a list of messages, and not an empty one"),
        ("assistant_first.json", r"line 2: message 1: a conversation begins with the user, not with assistant"),
        ("loss_text.json", r"line 2: message 2: loss must be true or false, not 'false'"),
        ("broken_tools.json", r"line 2: column 'tools' is not JSON"),
        ("no_list.json", r"line 2: column 'messages' must hold a list of messages"),
        ("only_system.json", r"line 2: column 'messages' holds a system message and nothing else"),
        ("text_message.json", r"line 2: message 2: "),
        ("content_list.json", r"line 2: message 1: content holds list \['你好'\], expected a string"),
        ("broken_arguments.json", r"line 2: message 2: the parameters of f is not JSON"),
        ("function_text.json", r'line 2: message 2: tool_calls must hold \[\{"function": \{"name"'),
        ("half_character.json", r"line 2: message 2: .*half a character"),
    ],
)
def test_bad_conversations_are_named_with_row_and_message(file, says, tokenizer3):
    with pytest.raises(UserError, match=f"^{BAD_INPUTS / file}, {says}") as error:
        prepare(chat(), BAD_INPUTS / file, tokenizer3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "system", "content": "甲"}, *CHAT[:1], *CHAT[2:]], "turn 1 has the role system"),
        (CHAT, "turn 2 calls a tool"),
        ([*CHAT[:1], {"role": "observation", "content": "甲"}, *CHAT[2:]], "turn 2 has the role observation"),
        ([*CHAT[:1], *CHAT[:1], *CHAT[2:]], "turn 2 has the role user"),
        ([*CHAT[:1], *CHAT[2:], *CHAT[:1]], "ends with a question"),
    ],
)
def test_roles_that_a_generation_does_not_know_are_refused(messages, says, tmp_path, tokenizer2, demo_tokenizer):
    file = write_lines(tmp_path / "chats.json", [{"messages": [CHAT[0], CHAT[2]]}, {"messages": messages}])
    for tokenizer in (tokenizer2, demo_tokenizer):
        with pytest.raises(UserError, match=f"^{file}, line 2: .*{says}.*ChatGLM-6B and ChatGLM2-6B") as error:
            prepare(chat(), file, tokenizer)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("surrogate_in", ["history", "tools"])
def test_half_a_character_is_refused_wherever_it_stands(surrogate_in, tmp_path, tokenizer3):
    """json.dumps of a text that was cut in the middle of an emoji; sentencepiece can't read it."""
    half = "\ud83d"
    file = tmp_path / "rows.json"
    if surrogate_in == "history":
        args = DataArguments(history_column="history")
        row: dict = {"prompt": "甲", "response": "乙", "history": [["丙", half]]}
    else:
        args, row = chat(), {"messages": [CHAT[0], CHAT[2]], "tools": [{"name": half}]}
    file.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(UserError, match="line 1: .*half a character"):
        prepare(args, file, tokenizer3)


@pytest.mark.parametrize("file", ["loss_text.json", "two_questions.json"])
def test_the_program_ends_with_one_sentence_and_code_2(file, tmp_path, monkeypatch, capsys):
    program = str(ROOT / "lora" / "main.py")
    flags = ["--do_train", "--dry_run", "--use_cpu", "--model_name_or_path", "demo"]
    flags += ["--conversation_column", "messages", "--train_file", str(BAD_INPUTS / file)]
    monkeypatch.setattr(sys, "argv", [program, *flags, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(program, run_name="__main__")
    assert leaving.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"{BAD_INPUTS / file}, line 2" in errors[0]
