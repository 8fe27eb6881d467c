"""Rows of a file -> texts or checked conversations. Its keys tell the format of a row, unless flags name columns."""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from operator import attrgetter
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from common.data.messages import (
    check_text,
    is_empty,
    is_round,
    is_sharegpt,
    json_of,
    plain_turns,
    read_messages,
    tools_text,
)
from common.data.rows import RowError, flag_of, missing, named
from common.encoding import has_roles
from common.tokenizers.base import Turn

MESSAGES = ("messages", "conversations", "conversation")
INSTRUCTIONS, INPUTS = ("instruction", "指令"), ("input", "输入", "context")  # an input belongs to its instruction
QUESTIONS = (
    *(*INSTRUCTIONS, "input", "输入", "content", "prompt", "question", "query", "q", "ask", "problem"),
    *("问题", "提问", "问"),
)
ANSWERS = (
    *("output", "summary", "response", "answer", "completion", "a", "target", "solution", "reply"),
    *("输出", "答案", "回答", "答复", "答", "回复", "摘要"),
)
# Where none of those is there, because a column of such a name may hold something else beside a question.
WEAK_QUESTIONS = ("user", "human", "source", "src", "context", "用户")
WEAK_ANSWERS = ("assistant", "bot", "gpt", "tgt", "助手")
SYSTEMS, TOOLS, HISTORIES, TEXTS = ("system", "system_prompt"), ("tools", "functions"), ("history", "历史"), ("text",)
CONVERSATIONS, PAIRS, TEXT_UNIT = "conversations", "questions with answers", "texts"  # units of rows
PREFERENCES = ("chosen", "rejected")
KNOWN = (
    "messages or conversations (a list), instruction and output, query and response, a question and an answer (such "
    "as prompt and response), text"
)


class Columns(NamedTuple):
    """The columns that a user named by flags; None: told by the keys of a row."""

    prompt: str | None = None
    response: str | None = None
    history: str | None = None
    conversation: str | None = None
    text: str | None = None


class Shape(NamedTuple):
    """The columns to read in rows with the same keys, and the columns there that hold something and are not read."""

    format: str
    unit: str
    main: str  # the column that all rows of a file share: of the question, the conversation or the text
    response: str | None = None
    input: str | None = None
    history: str | None = None
    system: str | None = None
    tools: str | None = None
    unread: tuple[str, ...] = ()
    has_more: bool = False  # whether a pair has a system prompt, tools or a history


class FormatReader:
    """Reads the rows of one file. The first row decides the format of all."""

    def __init__(self, columns: Columns, tokenizer: PreTrainedTokenizerBase, asking: bool = False):
        """``asking``: the rows are questions to answer, so that an answer may be missing."""
        self.columns, self.tokenizer, self.asking = columns, tokenizer, asking
        self.name = self.unit = ""
        self.unread: Counter[str] = Counter()  # field that is not read -> number of rows where it is not empty
        self.empty_answers = 0  # turns of the assistant without content that were left out
        self.first: Shape | None = None
        self.shapes: dict[tuple[str | None, ...], Shape] = {}  # keys of a row, None, its empty keys -> shape

    def read(self, row: dict[str, Any]) -> str | list[Turn]:
        """The text or the conversation of a row; "" or [] if it has nothing to learn.

        If ``asking``, a conversation has a learned answer, which is a reference, or ends with a question.

        Raises RowError for a row of an unknown shape, of another format than the first, or with a mistake in a field.
        """
        empty = [name for name, value in row.items() if not value and is_empty(value)]
        key = (*row, None, *empty)
        shape = self.shapes.get(key)
        if shape is None:
            shape = self.shapes[key] = self.find_shape(row, [name for name in row if name not in empty])
        example: str | list[Turn]
        if shape.unit == TEXT_UNIT:
            example = text_of(row, shape.main)
        elif shape.unit == CONVERSATIONS:
            example = self.read_conversation(row, shape)
        else:
            example = self.read_pair(row, shape)
        for name in shape.unread:
            self.unread[name] += 1
        return example

    def read_pair(self, row: dict[str, Any], shape: Shape) -> list[Turn]:
        """The turns of a question, its answer and what was before; without an answer only if ``asking``."""
        query = text_of(row, shape.main)
        response = text_of(row, shape.response) if shape.response else ""
        if shape.input and (given := text_of(row, shape.input)):
            query = f"{query}\n{given}" if query else given
        if not self.asking and not (query and response):
            return []
        turns = [Turn("user", query)]
        if response:
            turns.append(Turn("assistant", response, loss=True))
        if shape.has_more:
            unread: set[str] = set()
            turns = [*given_turns(row, shape), *history_turns(row, shape.history, unread), *turns]
            check_roles(self.tokenizer, turns, self.asking)
            self.unread.update(unread)
        return turns

    def read_conversation(self, row: dict[str, Any], shape: Shape) -> list[Turn]:
        """The turns of a list of messages, after those of the row's system prompt and tools."""
        unread: set[str] = set()
        messages = row[shape.main]
        turns = plain_turns(messages)
        if turns is None:
            messages = json_of(f"column {shape.main!r}", messages)
            turns = read_messages(messages, shape.main, unread)
        if shape.has_more:
            turns = [*given_turns(row, shape), *turns]
        name = name_of_messages(messages, shape.main)
        if not self.name:
            self.name = name
        elif name != self.name:
            raise RowError(f"is {name}, but the file began with {self.name}")
        check_roles(self.tokenizer, turns, self.asking)
        self.unread.update(unread)
        if self.asking:
            return ending_with_question(turns)
        if not all(map(attrgetter("content"), turns)):
            self.empty_answers += sum(map(is_unanswered, turns))
            turns = without_empty_answers(turns)
        return turns if any(map(attrgetter("loss"), turns)) else []

    def find_shape(self, row: dict[str, Any], filled: list[str]) -> Shape:
        """The shape of a row by the flags, or else by its keys; ``filled`` are the keys that hold something."""
        columns = self.columns
        if columns.text:
            shape = Shape("text", TEXT_UNIT, named(row, columns.text, "text"))
        elif columns.conversation:
            shape = Shape("a list of messages", CONVERSATIONS, named(row, columns.conversation, "conversation"))
        elif columns.prompt or columns.response:
            shape = self.pair_shape(row, filled)
        else:
            shape = self.shape_by_keys(row, filled)
        if shape.unit != TEXT_UNIT:
            check_template(self.tokenizer)
            shape = self.with_extras(row, filled, shape)
        self.first = self.first or shape
        if (shape.unit, shape.main) != (self.first.unit, self.first.main):
            raise RowError(f"is {shape.format}, but the file began with {self.name or self.first.format}")
        self.unit = shape.unit
        if shape.unit != CONVERSATIONS:
            self.name = self.first.format
        more = (shape.history, shape.system, shape.tools)
        unread = (name for name in filled if name not in (shape.main, shape.response, shape.input, *more))
        return shape._replace(unread=tuple(unread), has_more=any(more))

    def shape_by_keys(self, row: dict[str, Any], filled: list[str]) -> Shape:
        """The shape that the keys tell. A list of messages wins over a pair, and a pair over a text."""
        if not row:
            raise RowError("the row is empty")
        if len(find(filled, PREFERENCES)) == len(PREFERENCES):
            raise RowError(
                "preference data ('chosen' and 'rejected') can't be trained: keep the better answer, or name the "
                "columns with PROMPT_COLUMN and RESPONSE_COLUMN"
            )
        lists = [name for name in find(filled, MESSAGES) if is_list(row[name])]
        if column := self.only(lists, filled, "conversation"):
            return Shape("a list of messages", CONVERSATIONS, column)
        question, answer = self.find_question(row, filled), self.find_answer(row, filled)
        texts, messages = find(filled, TEXTS), find(row, MESSAGES)
        holds_pair = question in filled or answer in filled
        if question and (answer or self.asking) and (holds_pair or not texts):
            return self.pair_shape(row, filled)
        if texts and answer not in filled:
            return Shape("text", TEXT_UNIT, texts[0])
        if messages and not holds_pair:
            return Shape("a list of messages", CONVERSATIONS, messages[0])
        if question:
            return self.pair_shape(row, filled)  # which says that the answer is missing
        if "text" in row and not holds_pair:
            return Shape("text", TEXT_UNIT, "text")
        raise RowError(
            f"unknown shape of row: its keys are {', '.join(map(repr, row))}; known are {KNOWN}; name other columns "
            "with PROMPT_COLUMN and RESPONSE_COLUMN, CONVERSATION_COLUMN or TEXT_COLUMN"
        )

    def pair_shape(self, row: dict[str, Any], filled: list[str]) -> Shape:
        """The columns of question and answer, each by its flag or by its key; ``asking`` needs no answer."""
        prompt, response = self.columns.prompt, self.columns.response
        question = named(row, prompt, "prompt") if prompt else self.find_question(row, filled)
        if not question:
            raise missing(row, "with the question", "prompt")
        if response:
            answer = response if response in row else None
        else:
            answer = self.find_answer(row, filled)
        if not answer and not self.asking:
            raise missing(row, repr(response) if response else "with the answer", "response")
        return Shape(name_of_pair(question, answer), PAIRS, question, answer)

    def with_extras(self, row: dict[str, Any], filled: list[str], shape: Shape) -> Shape:
        """The shape with the columns that rows may have or lack: system prompt, tools, history and Alpaca's input."""
        free = [name for name in filled if name not in (shape.main, shape.response, self.columns.history)]
        system, tools, history, given = (
            next(iter(find(free, known)), None) for known in (SYSTEMS, TOOLS, HISTORIES, INPUTS)
        )
        shape = shape._replace(system=system, tools=tools)
        if shape.unit == CONVERSATIONS:
            return shape
        if self.columns.history:
            history = named(row, self.columns.history, "history")
        return shape._replace(history=history, input=given if find([shape.main], INSTRUCTIONS) else None)

    def find_question(self, row: dict[str, Any], filled: list[str]) -> str | None:
        found = find(row, QUESTIONS) or find(row, WEAK_QUESTIONS)
        if find(found, INSTRUCTIONS):  # Alpaca: its input belongs to the instruction
            found = [name for name in found if name not in find(found, INPUTS)]
        return self.only(found, filled, "prompt")

    def find_answer(self, row: dict[str, Any], filled: list[str]) -> str | None:
        return self.only(find(row, ANSWERS) or find(row, WEAK_ANSWERS), filled, "response")

    def only(self, found: list[str], filled: list[str], flag: str) -> str | None:
        """The one column of these; of several the one that holds something, or that the first row of the file had."""
        found = [name for name in found if name not in self.columns]
        one = [name for name in found if name in filled]
        if len(one) != 1:
            first = (self.first.main, self.first.response) if self.first else ()
            one = [name for name in found if name in first] or one or found[:1]
        if len(one) > 1:
            raise RowError(f"columns {', '.join(map(repr, one))}: say which to read with {flag_of(flag)}")
        return one[0] if one else None


def find(names: Iterable[str], known: Collection[str]) -> list[str]:
    """Those of the names that are known, in any case."""
    return [name for name in names if name.strip().lower() in known]


def is_list(value: Any) -> bool:
    """Whether a value is a list, or text that may be one in JSON."""
    return isinstance(value, list) or isinstance(value, str) and value.lstrip().startswith("[")


def text_of(row: dict[str, Any], column: str) -> str:
    return check_text(f"column {column!r}", row[column])


def given_turns(row: dict[str, Any], shape: Shape) -> list[Turn]:
    """The system turns of a row: its system prompt, then its tools."""
    text = text_of(row, shape.system) if shape.system else ""
    tools = tools_text(f"column {shape.tools!r}", row[shape.tools]) if shape.tools else ""
    return [turn for turn in (Turn("system", text), Turn("system", "", tools=tools)) if turn != Turn("system", "")]


def history_turns(row: dict[str, Any], column: str | None, unread: set[str]) -> list[Turn]:
    """The earlier rounds: [[question, answer], …] or messages, which CSV holds as JSON; none of them is learned."""
    rounds = json_of(f"column {column!r}", row[column]) or [] if column else []
    if isinstance(rounds, list) and rounds and isinstance(rounds[0], dict):
        return [turn._replace(loss=False) for turn in read_messages(rounds, str(column), unread)]
    if not isinstance(rounds, list) or not all(is_pair(pair) for pair in rounds):
        raise RowError(f"column {column!r} must hold [[question, answer], …], all of them strings")
    texts = [check_text(f"column {column!r}", text) for pair in rounds for text in pair]
    return [Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]


def is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def name_of_pair(question: str, answer: str | None) -> str:
    if find([question], INSTRUCTIONS):
        return "Alpaca"
    if (question, answer) == ("query", "response"):
        return "ms-swift"
    return f"pairs of {question} and {answer}" if answer else f"questions in {question}"


def name_of_messages(messages: list[Any], column: str) -> str:
    if is_round(messages[0]):
        return "ms-swift"
    if is_sharegpt(messages):
        return "ShareGPT"
    return "OpenAI or GLM-4 messages" if column.lower() == "messages" else "ChatGLM3 conversations"


def is_unanswered(turn: Turn) -> bool:
    """Whether it is a turn of the assistant that says nothing and calls nothing."""
    return turn.role == "assistant" and not (turn.content or turn.metadata or turn.reasoning_content)


def ending_with_question(turns: list[Turn]) -> list[Turn]:
    """The turns without an empty answer at the end; without any answer there, if no turn is a reference."""
    has_reference = any(turn.loss and not is_unanswered(turn) for turn in turns)
    while turns[-1].role == "assistant" and (is_unanswered(turns[-1]) or not has_reference):
        turns = turns[:-1]
    return turns


def without_empty_answers(turns: list[Turn]) -> list[Turn]:
    """The turns without the answers that say nothing, and without the questions before those."""
    kept: list[Turn] = []
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        if not is_unanswered(turn):
            kept.append(turn)
        elif kept and kept[-1].role == "user" and not (following and following.role == "assistant"):
            kept.pop()
    return kept


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.is_fast and not tokenizer.chat_template:  # GLM-4; the tokenizers of the older models need none
        raise RowError(f"{tokenizer.name_or_path} has no chat template: use the chat model for conversations")


def check_roles(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], asking: bool) -> None:
    """Raises RowError for what the model does not know.

    ChatGLM-6B and ChatGLM2-6B know two roles, in alternation; only a conversation ``asking`` may end with a question.
    Thoughts need a chat template that writes them.
    """
    if any(map(attrgetter("reasoning_content"), turns)) and not has_thoughts(tokenizer):
        raise RowError(
            "reasoning_content: this model has no part for thoughts: remove the field, or use a model that thinks"
        )
    if has_roles(tokenizer):
        return
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        reason = f"has the role {turn.role}" if turn.role != expected else ""
        if turn.metadata:
            reason = "calls a tool"
        if turn.role == "user" and turn.loss:
            reason = "is a question with loss: true"
        if reason:
            raise RowError(
                f"turn {number + 1} {reason}, but ChatGLM-6B and ChatGLM2-6B know only user and assistant in turn: use "
                "a ChatGLM3 or GLM-4 model for these conversations"
            )
    if len(turns) % 2 and not asking:
        raise RowError("the conversation ends with a question: ChatGLM-6B and ChatGLM2-6B need its answer")


def has_thoughts(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.is_fast and re.search("reasoning_content|<think>", str(tokenizer.chat_template)) is not None


def is_text(row: dict[str, Any], columns: Columns) -> bool:
    """Whether a row is plain text by its keys, or by a flag."""
    if columns.text:
        return True
    try:
        filled = [name for name, value in row.items() if not is_empty(value)]
        return not any(columns) and FormatReader(columns, None).shape_by_keys(row, filled).unit == TEXT_UNIT
    except RowError:
        return False
