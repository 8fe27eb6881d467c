"""Rows as other tools write them (tests/formats): what is read, what is learned, and what is named as not read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from common.data.formats import Columns, FormatReader
from common.data.rows import RowError
from common.encoding import encode_train
from common.tokenizers.base import with_tools

FORMATS = Path(__file__).parent / "formats"
SYSTEM, USER, ASSISTANT, OBSERVATION = "system", "user", "assistant", "observation"


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
    turns = [[(turn.role, with_tools(turn).content, turn.loss) for turn in row] for row in found]
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


def test_a_table_holds_lists_as_json(fixture, tokenizer_of):
    """As CSV does: each row of each fixture gives the same turns."""
    reader, table = FormatReader(Columns(), tokenizer_of), FormatReader(Columns(), tokenizer_of)
    rows = rows_of(fixture)
    names = {name: "" for row in rows for name in row}
    for row in rows:
        texts = {name: value if isinstance(value, str) else json_text(value) for name, value in row.items()}
        assert table.read(names | texts) == reader.read(row)
