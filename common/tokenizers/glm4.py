"""The tokenizer of GLM-4 with the methods of ours."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.tokenizers.base import Conversation, EncodedTurn, Ids, Turn, with_tools
from common.tokenizers.templates import render

EXPRESSION = re.compile(rb'"Regex"\s*:\s*"((?:[^"\\]|\\.)*)"')
# A repeated group, a reference to one, and long or repeated counts, in a regular expression within JSON.
ENDLESS = re.compile(rb"\)[*+{]|\d\}\{|\{\d*,?\d{4}|\\\\[1-9]")


def check_expressions(file: Path) -> None:
    """Raises UserError for a tokenizer.json that splits texts by an expression which may take for ever."""
    content = file.read_bytes()
    for letter in re.finditer(rb"\\u00[4-7]", content):  # which could hide the name of an entry
        start = content[: letter.start()][-100:]
        if (len(start) - len(start.rstrip(b"\\"))) % 2 == 0:
            raise UserError(f"{file} writes letters as numbers, as no program does: download it again.")
    for expression in EXPRESSION.findall(content):
        if len(expression) > 2000 or ENDLESS.search(expression):
            raise UserError(f"{file} splits texts by {expression[:80]!r}, which may take for ever: download it again.")


Kind = tuple[str, str, str, bool, bool]
"""What decides how a turn is written beside its content: the role before, role, metadata, whether it is learned, and
whether it thinks."""


class Form(NamedTuple):
    """A turn as a template writes it: its header, its body up to the content, and the rest."""

    header: str
    begin: str
    end: str


class GLM4Adapter:
    """Wraps the tokenizer that transformers loads, and encodes turns through its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def start_ids(self) -> list[int]:
        """The special tokens that every text begins with."""
        text = self.render([([], False)])[0] if self.tokenizer.chat_template else ""
        return self.tokenizer(text, add_special_tokens=not text)["input_ids"]

    def end_ids(self) -> list[int]:
        """What follows the last message of a training row."""
        return [self.tokenizer.eos_token_id]

    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: the end token, and the roles whose turn follows it."""
        vocabulary = self.tokenizer.get_added_vocab()
        roles = [vocabulary[role] for role in ("<|user|>", "<|observation|>") if role in vocabulary]
        return [self.tokenizer.eos_token_id, *roles]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, without added special tokens. Equal texts are encoded once."""
        different = list(dict.fromkeys(texts))
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # a tokenizer.json may ask for both
        backend.no_padding()
        found = backend.encode_batch_fast(different, add_special_tokens=False)
        ids = {text: np.array(each.ids, np.int32) for text, each in zip(different, found, strict=True)}
        return [ids[text] for text in texts]

    def encode_turns(self, conversations: Sequence[Conversation]) -> list[list[EncodedTurn]]:
        """Every turn with its token ids. Raises UserError if the template rewrites earlier turns.

        The template writes each conversation once. What it wrote is told apart by the form of turns of the same kind,
        if they give the same text; else it writes the conversation again up to each turn.
        """
        conversations = [list(map(as_written, turns)) for turns in conversations]
        start, *wholes = self.render([([], False), *((turns, False) for turns in conversations)])
        forms: dict[Kind, Form] = {}
        texts: list[tuple[str, str]] = []
        for turns, whole in zip(conversations, wholes, strict=True):
            found = texts_by_form(turns, forms)
            if found is None or start + "".join([header + body for header, body in found]) != whole:
                found = self.texts_of(turns)
                forms |= forms_of(turns, found)
            texts += found
        ids = iter(self.encode_batch([text for both in texts for text in both]))
        return [[EncodedTurn(turn, next(ids), next(ids)) for turn in turns] for turns in conversations]

    def texts_of(self, turns: Conversation) -> list[tuple[str, str]]:
        """(header, body) of each turn: the text that the template adds to the text of the turns before it.

        Where it asks for thoughts and writes none, a learned answer has its own, or none, before its text.
        """
        asked = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        texts = self.render(
            [(turns[:end], False) for end in range(len(turns) + 1)] + [(turns[:end], True) for end in asked]
        )
        headers = dict(zip(asked, texts[len(turns) + 1 :], strict=True))
        found = []
        for index, turn in enumerate(turns):
            before, after = texts[index], texts[index + 1]
            header = headers.get(index, before).removeprefix(before)
            if not after.startswith(before):
                raise UserError(
                    f"the chat template of {self.tokenizer.name_or_path} rewrites earlier messages: not supported."
                )
            text = after.removeprefix(before)
            if text and not text.startswith(header):
                found.append((header, self.thoughts_and_answer(header, turn)) if turn.loss else ("", text))
                continue
            body = text.removeprefix(header)
            if leaves_out_thoughts(turn, body):
                raise UserError(
                    f"the chat template of {self.tokenizer.name_or_path} leaves out the thoughts of an answer: remove "
                    "them, or use another model."
                )
            found.append((header, body))
        return found

    def thoughts_and_answer(self, header: str, turn: Turn) -> str:
        """The body of a learned answer after a header that begins its thoughts. Raises UserError for another header."""
        if not header.rstrip().endswith("<think>"):
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} asks for answers in another form than it writes "
                "them: not supported."
            )
        if not (turn.content or turn.reasoning_content):
            return ""
        before, _, answer = turn.content.rpartition("</think>")
        thoughts = turn.reasoning_content or before.partition("<think>")[2] or before
        return "\n" * (not header.endswith("\n")) + f"{thoughts.strip()}\n</think>\n\n{answer.strip()}"

    def render(self, conversations: Sequence[tuple[Conversation, bool]]) -> list[str]:
        """The texts that the chat template makes of conversations, which may be empty; True: an answer follows."""
        common = self.tokenizer.special_tokens_map | {"tools": None, "documents": None}
        values = [
            common | {"messages": list(map(message_of, turns)), "add_generation_prompt": asks}
            for turns, asks in conversations
        ]
        return render(self.tokenizer.get_chat_template(), self.tokenizer.name_or_path, values)


def as_written(turn: Turn) -> Turn:
    """The turn with its tools in its text, and with the arguments of a call as JSON."""
    turn = with_tools(turn)
    return turn._replace(content=turn.arguments or turn.content)


def kind_of(turn: Turn, before: str) -> Kind:
    return before, turn.role, turn.metadata, turn.loss, bool(turn.reasoning_content) or "</think>" in turn.content


def texts_by_form(turns: Conversation, forms: Mapping[Kind, Form]) -> list[tuple[str, str]] | None:
    """(header, body) of each turn; None where a form is missing."""
    found, before = [], ""
    for turn in turns:
        form = forms.get(kind_of(turn, before))
        if form is None:
            return None
        found.append((form.header, form.begin + turn.content + form.end))
        before = turn.role
    return found


def forms_of(turns: Conversation, texts: Iterable[tuple[str, str]]) -> dict[Kind, Form]:
    """The forms of turns whose text holds their content just once; thoughts have none, because templates move them."""
    found, before = {}, ""
    for turn, (header, body) in zip(turns, texts, strict=True):
        kind = kind_of(turn, before)
        if turn.content and body.count(turn.content) == 1 and not kind[-1]:
            begin, _, end = body.partition(turn.content)
            found[kind] = Form(header, begin, end)
        before = turn.role
    return found


def leaves_out_thoughts(turn: Turn, body: str) -> bool:
    """Whether a template writes a turn without its thoughts, which may also stand in the text of an answer."""
    in_text = turn.loss and "</think>" in turn.content
    return turn.reasoning_content.strip() not in body or in_text and "</think>" not in body


def message_of(turn: Turn) -> dict[str, Any]:
    """The turn as chat templates read it; a template tells a missing thought from an empty one."""
    message = turn._asdict()
    del message["tools"], message["arguments"]  # they are in the text
    if turn.reasoning_content:
        message["thinking"] = turn.reasoning_content  # the name that older templates read
    else:
        del message["reasoning_content"]
    return message
