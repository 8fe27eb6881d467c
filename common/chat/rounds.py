"""The conversation of a page: what each column shows, what the browser keeps, and what is exported."""

import html
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from common.chat.labels import said

BASE = "/base"  # the base as a speaker; no folder has this name
KEPT = 100_000  # characters of the newest rounds that the browser keeps over a reload
WAITING = '<span class="waiting"></span>'


@dataclass
class Answer:
    """One answer; ``text`` is None until it begins, ``forgotten`` the oldest rounds that its prompt left out."""

    speaker: str
    forgotten: int = 0
    text: str | None = None
    speed: float = 0.0  # tokens a second; 0: unknown


class Round(NamedTuple):
    """A question, and its answer in every column."""

    query: str
    answers: list[Answer]


Conversation = list[Round]
Pairs = list[list[str]]  # questions with their answers
ROUNDS = TypeAdapter(list[Round])


def answered(conversation: Conversation, column: int) -> Pairs:
    """The rounds of a column that have an answer."""
    return [[query, text] for query, answers in conversation if (text := answers[column].text)]


def title(speaker: str, language: str) -> str:
    return said("base", language) if speaker == BASE else speaker


def messages(conversation: Conversation, column: int, language: str, waiting: bool = False) -> list[dict[str, Any]]:
    """A column as Gradio's Chatbot takes it. Questions are shown as they were typed, answers as Markdown.

    ``waiting``: the last answer is on its way, and dots stand for it until it begins.
    """
    shown: list[tuple[str, str]] = []
    for number, (query, answers) in enumerate(conversation, 1):
        answer = answers[column]
        shown.append(("user", re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", query)))
        if answer.forgotten:
            shown.append(("assistant", small(said("forgotten", language, rounds=answer.forgotten))))
        if answer.text is None and waiting and number == len(conversation):
            shown.append(("assistant", WAITING))
        elif answer.text:
            shown.append(("assistant", answer.text))
        elif answer.text is not None:
            shown.append(("assistant", small(said("empty", language))))
        if answer.speed:
            speed = said("speed", language, speed=answer.speed)
            shown.append(("assistant", small(f"{title(answer.speaker, language)} · {speed}")))
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in shown]


def small(text: str) -> str:
    """A note beside the answers, as the page's style knows it."""
    return f"<small class='note'>{html.escape(text)}</small>"


def to_browser(conversation: Conversation) -> Any:
    """The newest rounds as JSON."""
    kept: list[Any] = []
    size = 0
    for value in reversed(ROUNDS.dump_python(conversation)):
        size += len(str(value))
        if size > KEPT:
            break
        kept.insert(0, value)
    return kept


def from_browser(value: Any, columns: int) -> Conversation:
    """What ``to_browser`` made; [] for any other value, and for a conversation in another number of columns."""
    try:
        conversation = ROUNDS.validate_python(value)
    except ValidationError:
        return []
    return conversation if all(len(answers) == columns for _, answers in conversation) else []


def training_row(pairs: Sequence[Sequence[str]], system: str) -> str:
    """A conversation as one row of JSON lines, which ``train_chat.sh`` reads."""
    turns = [("system", system)] if system else []
    turns += [turn for query, answer in pairs for turn in (("user", query), ("assistant", answer))]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    return json.dumps(row, ensure_ascii=False) + "\n"


def markdown(conversation: Conversation, heading: str, language: str) -> str:
    """A conversation with the answers of all columns."""

    def parts() -> Iterator[str]:
        yield f"# {heading}"
        for query, answers in conversation:
            yield "\n".join(f"> {line}" for line in query.splitlines())
            for answer in answers:
                if answer.text:
                    yield f"**{title(answer.speaker, language)}**"
                    yield answer.text

    return "\n\n".join(parts()) + "\n"
