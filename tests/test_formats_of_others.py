"""Rows as other tools write them (tests/formats): what is read, what is learned, and what is named as not read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.data.formats import Columns, FormatReader
from common.data.rows import RowError
from common.encoding import encode_eval, encode_train
from common.tokenizers.base import Turn

FORMATS = Path(__file__).parent / "formats"
SYSTEM, USER, ASSISTANT, OBSERVATION = "system", "user", "assistant", "observation"
# As GLM-4.5 writes an answer.
THINKING_TEMPLATE = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
    "<think>{{ m.reasoning_content.strip() if m.reasoning_content is string else '' }}</think>\n{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def thinking_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, and a chat template with a part for thoughts."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.chat_template = THINKING_TEMPLATE
    return fast


@pytest.fixture(params=sorted(file.name for file in FORMATS.iterdir()))
def fixture(request) -> Path:
    return FORMATS / request.param


@pytest.fixture
def tokenizer_of(fixture, thinking_tokenizer, tokenizer3) -> PreTrainedTokenizerBase:
    """The tokenizer of ChatGLM3, or one of a model that thinks where there are thoughts."""
    return thinking_tokenizer if fixture.name == "reasoning.jsonl" else tokenizer3


def rows_of(file: Path) -> list[dict[str, Any]]:
    text = file.read_text(encoding="utf-8")
    return json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# What is read: the turns (role, content, learned) of each row, the fields that are not, answers left out

EXPECTED: dict[str, tuple[str, list[list[tuple[str, str, bool]]], dict[str, int], int]] = {
    "advertise_gen.jsonl": (
        "pairs of content and summary",
        [
            [(USER, "类型#伞*颜色#红色", False), (ASSISTANT, "一把红伞，雨天也好看。", True)],
            [(USER, "类型#灯*材质#竹", False), (ASSISTANT, "竹编的灯，光很柔和。", True)],
            [],
        ],
        {"source": 1},
        0,
    ),
    "chatglm_history.jsonl": (
        "pairs of prompt and response",
        [
            [
                (USER, "今天冷吗？", False),
                (ASSISTANT, "不冷，二十度。", False),
                (USER, "有风吗？", False),
                (ASSISTANT, "没有风。", False),
                (USER, "那明天呢？", False),
                (ASSISTANT, "明天有雨，带伞。", True),
            ],
            [(USER, "你好", False), (ASSISTANT, "您好，请讲。", True)],
        ],
        {},
        0,
    ),
    "alpaca.json": (
        "Alpaca",
        [
            [
                (SYSTEM, "你是译员。", False),
                (USER, "译：雪", False),
                (ASSISTANT, "snow", False),
                (USER, "把这句话译成英文。\n春天来了。", False),
                (ASSISTANT, "Spring is here.", True),
            ],
            [(USER, "说一种水果。", False), (ASSISTANT, "梨。", True)],
            [(USER, "续写一句。\n山里", False), (ASSISTANT, "山里有一座老桥。", True)],
        ],
        {"kto_tag": 1, "images": 1},
        0,
    ),
    "sharegpt.json": (
        "ShareGPT",
        [
            [
                (SYSTEM, "你是图书管理员。", False),
                (USER, "有游记吗？", False),
                (ASSISTANT, "有，在二楼。", True),
                (USER, "几点关门？", False),
                (ASSISTANT, "九点。", True),
            ],
            [(SYSTEM, "只说一句。", False), (USER, "借几本？", False), (ASSISTANT, "最多五本。", True)],
            [(USER, "在吗？", False), (ASSISTANT, "在的。", True)],
        ],
        {"id": 3, "conversations.score": 1},
        1,
    ),
    "sharegpt_tools.json": (
        "ShareGPT",
        [
            [
                (
                    SYSTEM,
                    '[{"name": "find_train", "description": "查车次", "parameters": {"type": "object", "properties": '
                    '{"to": {"type": "string"}}}}]',
                    False,
                ),
                (USER, "去苏州的车？", False),
                (ASSISTANT, "```python\ntool_call(to='苏州')\n```", True),
                (OBSERVATION, '{"train": "G71"}', False),
                (ASSISTANT, "G71次。", True),
            ],
            [(USER, "谢谢", False), (ASSISTANT, "不客气。", True)],
        ],
        {},
        0,
    ),
    "openai_messages.jsonl": (
        "OpenAI or GLM-4 messages",
        [
            [
                (SYSTEM, "用短句。", False),
                (USER, "鲸是鱼吗？", False),
                (ASSISTANT, "是的。", False),
                (USER, "真的？", False),
                (ASSISTANT, "不，是哺乳动物。", True),
            ],
            [(USER, "一加一等于几？", False), (ASSISTANT, "二。", True)],
            [(USER, "那写两句原创的", False), (ASSISTANT, "风过稻田，月到门前。", True)],
        ],
        {"messages.name": 1, "messages.refusal": 1},
        1,
    ),
    "openai_tools.jsonl": (
        "OpenAI or GLM-4 messages",
        [
            [
                (
                    SYSTEM,
                    '[{"type": "function", "function": {"name": "count_boxes", "description": "数箱子", "parameters": '
                    '{"type": "object", "properties": {"room": {"type": "string"}, "full": {"type": "boolean"}}}}}]',
                    False,
                ),
                (SYSTEM, "你管一间仓库。", False),
                (USER, "还有几个箱子？", False),
                (ASSISTANT, "```python\ntool_call(room='东库', full=True)\n```", True),
                (OBSERVATION, '{"boxes": 12}', False),
                (ASSISTANT, "十二个。", True),
            ]
        ],
        {"messages.tool_calls.id": 1, "messages.tool_call_id": 1, "parallel_tool_calls": 1},
        0,
    ),
    "openai_functions.jsonl": (
        "OpenAI or GLM-4 messages",
        [
            [
                (
                    SYSTEM,
                    '[{"name": "price", "description": "查价格", "parameters": {"type": "object", "properties": '
                    '{"of": {"type": "string"}}}}]',
                    False,
                ),
                (USER, "米多少钱？", False),
                (ASSISTANT, "```python\ntool_call(of='米')\n```", True),
                (OBSERVATION, '{"yuan": 6}', False),
                (ASSISTANT, "六元一斤。", True),
            ]
        ],
        {"messages.name": 1},
        0,
    ),
    "chatglm3_conversations.json": (
        "ChatGLM3 conversations",
        [
            [
                (SYSTEM, '[{"name": "open_door", "description": "开门", "parameters": {"which": "哪扇"}}]', False),
                (SYSTEM, "你是门卫。", False),
                (USER, "请开南门", False),
                (ASSISTANT, "我来开。", True),
                (ASSISTANT, "```python\ntool_call(which='南门', seconds=30)\n```", True),
                (OBSERVATION, '{"done": "已开"}', False),
                (ASSISTANT, "南门开了。", True),
            ],
            [
                (USER, "北门呢？", False),
                (ASSISTANT, "check('北门')", True),
                (OBSERVATION, "关着", True),
                (ASSISTANT, "关着。", False),
                (USER, "谢谢", False),
                (ASSISTANT, "不谢。", True),
            ],
        ],
        {},
        0,
    ),
    "glm4_messages.jsonl": (
        "OpenAI or GLM-4 messages",
        [
            [
                (
                    SYSTEM,
                    '[{"type": "function", "function": {"name": "get_tide", "description": "查潮水", "parameters": '
                    '{"type": "object", "properties": {"harbor": {"type": "string"}}}}}]',
                    False,
                ),
                (USER, "厦门几点涨潮？", False),
                (ASSISTANT, '{"name": "get_tide", "arguments": {"harbor": "厦门"}}', True),
                (OBSERVATION, '{"high": "6:40"}', False),
                (ASSISTANT, "六点四十。", True),
            ],
            [
                (
                    SYSTEM,
                    "你是渔民。\n"
                    + json.dumps([{"name": "get_wind", "args": {"place": "海面"}}], indent=4, ensure_ascii=False),
                    False,
                ),
                (USER, "能出海吗？", False),
                (ASSISTANT, "能。", True),
            ],
            [(USER, "类型#船", False), (ASSISTANT, "一条结实的船。", True)],
        ],
        {},
        0,
    ),
    "ms_swift.jsonl": (
        "ms-swift",
        [
            [
                (SYSTEM, "你是厨师。", False),
                (USER, "怎么煮粥？", False),
                (ASSISTANT, "小火慢煮。", False),
                (USER, "要多久？", False),
                (ASSISTANT, "半小时。", True),
            ],
            [(USER, "放糖吗？", False), (ASSISTANT, "放一点。", True)],
            [(USER, "放盐吗？", False), (ASSISTANT, "不放。", True)],
        ],
        {"images": 1, "rejected_response": 1},
        0,
    ),
    "reasoning.jsonl": (
        "OpenAI or GLM-4 messages",
        [
            [(USER, "十七是质数吗？", False), (ASSISTANT, "是。", True)],
            [(USER, "九呢？", False), (ASSISTANT, "不是。", True)],
        ],
        {"messages.model": 1},
        0,
    ),
}


def test_each_format_is_read_as_its_tool_means_it(fixture, tokenizer_of):
    reader = FormatReader(Columns(), tokenizer_of)
    found = [reader.read(row) for row in rows_of(fixture)]
    turns = [[(turn.role, turn.content, turn.loss) for turn in row] for row in found]
    assert (reader.name, turns, dict(reader.unread), reader.empty_answers) == EXPECTED[fixture.name]


# Nothing is lost in silence

WITHOUT_ANSWER = {"类型#碗", "可以续借吗？", "写一首歌词的全文"}  # questions that are left out, which is counted
Place = tuple[str | int, ...]


def leaves(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """The path and the value of each leaf of a row that holds something; JSON in a string has leaves too."""
    if isinstance(value, str) and value.startswith(("{", "[")):
        value = json.loads(value)
    if isinstance(value, (dict, list)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, name))
    elif value is not None and value != "":
        yield path, value


def replaced(value: Any, path: Place, leaf: Any) -> Any:
    """The value with another leaf at the path."""
    if not path:
        return leaf
    if isinstance(value, str):
        return json_text(replaced(json.loads(value), path, leaf))
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    items = {name: replaced(item, path[1:], leaf) if name == path[0] else item for name, item in pairs}
    return items if isinstance(value, dict) else list(items.values())


def outcome(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> tuple[str, list[int], set[str]]:
    """The decoded tokens of a row, its labels, and the names of fields that are not read."""
    reader = FormatReader(Columns(), tokenizer)
    turns = reader.read(row)
    text, labels = "", []
    if turns:
        [encoded] = encode_train(tokenizer, [turns], 10**6, 10**6)
        text, labels = tokenizer.decode(encoded.input_ids), encoded.labels
    return text.replace(" ", ""), labels, set(reader.unread)


def test_no_field_is_lost_in_silence(fixture, tokenizer_of):
    """Another value of any leaf is in the tokens, changes the labels, is named as not read, or is refused."""
    lost = []
    for row in rows_of(fixture):
        before = outcome(tokenizer_of, row)
        for path, leaf in leaves(row):
            other = f"{leaf}zq7" if isinstance(leaf, str) else not leaf if isinstance(leaf, bool) else 1 - leaf
            try:
                text, labels, unread = outcome(tokenizer_of, replaced(row, path, other))
            except RowError:
                continue
            name = ".".join(part for part in path if isinstance(part, str))
            is_named = any(f"{name}.".startswith(f"{field}.") for field in unread)
            in_tokens = text.count("zq7") == 1 if isinstance(leaf, str) else text != before[0]
            if not (in_tokens or is_named or labels != before[1]):
                lost.append(leaf)
    assert set(lost) <= WITHOUT_ANSWER


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
    ],
)
def test_columns_of_question_and_answer_are_known_by_their_names(question, answer, tokenizer3, tokenizer2):
    row = {"id": "7", question: "甲", answer: "乙"}
    for tokenizer in (tokenizer3, tokenizer2):
        reader = FormatReader(Columns(), tokenizer)
        assert reader.read(row) == [Turn("user", "甲"), Turn("assistant", "乙", loss=True)]
        assert (reader.unit, dict(reader.unread)) == ("questions with answers", {"id": 1})


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
    assert read({"instruction": "", "input": "甲", "output": "乙"}, tokenizer3) == (
        "Alpaca",
        ["user: 甲", "assistant: 乙"],
    )


def test_a_table_holds_lists_as_json(tokenizer3, thinking_tokenizer, fixture, tokenizer_of):
    """As CSV does: each row of each fixture gives the same turns."""
    reader, table = FormatReader(Columns(), tokenizer_of), FormatReader(Columns(), tokenizer_of)
    rows = rows_of(fixture)
    names = {name: "" for row in rows for name in row}
    for row in rows:
        texts = {name: value if isinstance(value, str) else json_text(value) for name, value in row.items()}
        assert table.read(names | texts) == reader.read(row)


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
    assert len(encode_eval(tokenizer3, [turns], 99, 99)) == 1


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
        (answer(function_call="f"), "message 2: function_call is not JSON"),
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
        messages = [{"from": "human", "value": "甲"}, {"from": "function_call", "value": json_text(value)}]
        return read({"conversations": messages}, tokenizer3)[1]

    call = {"name": "f", "arguments": {"x": 1}}
    assert turns(call) == turns([call]) == ["user: 甲", "assistant: ```python\ntool_call(x=1)\n```"]
    with pytest.raises(RowError, match="^message 2: function_call must hold one call"):
        turns([call, call])


def test_roles_in_any_case(tokenizer3):
    messages = [{"from": "Human", "value": "甲"}, {"from": "GPT", "value": "乙"}]
    assert read({"conversations": messages}, tokenizer3)[1] == ["user: 甲", "assistant: 乙"]


def test_thoughts_stand_where_the_template_has_them(thinking_tokenizer):
    turns = FormatReader(Columns(), thinking_tokenizer).read(answer(reasoning_content="丙"))
    [row] = encode_train(thinking_tokenizer, [turns], 99, 99)
    learned = thinking_tokenizer.decode([label for label in row.labels if label != -100])
    assert learned == "\n<think>丙</think>\n乙<|endoftext|>"
    assert encode_eval(thinking_tokenizer, [turns], 99, 99)[0].reference == "<think>丙</think>\n乙"


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
