"""The tokenizer of GLM-4 with the methods of ours."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.tokenizers.base import Conversation, EncodedTurn, Turn
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


class GLM4Adapter:
    """Wraps the tokenizer that transformers loads, and encodes turns through its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def start_ids(self) -> list[int]:
        """The special tokens that every text begins with."""
        text = self.render([([], False)])[0] if self.tokenizer.chat_template else ""
        return self.tokenizer(text, add_special_tokens=not text)["input_ids"]

    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: the end token, and the roles whose turn follows it."""
        vocabulary = self.tokenizer.get_added_vocab()
        roles = [vocabulary[role] for role in ("<|user|>", "<|observation|>") if role in vocabulary]
        return [self.tokenizer.eos_token_id, *roles]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without added special tokens."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def encode_turns(self, conversations: Sequence[Conversation]) -> list[list[EncodedTurn]]:
        """Every turn with its token ids. Raises UserError if the template rewrites earlier turns."""
        return [self.encode_conversation(conversation) for conversation in conversations]

    def encode_conversation(self, turns: Conversation) -> list[EncodedTurn]:
        """Each turn is the text that the template adds to the text of the turns before it."""
        asked = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        texts = self.render(
            [(turns[:end], False) for end in range(len(turns) + 1)] + [(turns[:end], True) for end in asked]
        )
        headers = dict(zip(asked, texts[len(turns) + 1 :], strict=True))
        encoded = []
        for index, turn in enumerate(turns):
            before, after = texts[index], texts[index + 1]
            header = headers.get(index, before).removeprefix(before)
            if not after.startswith(before):
                raise UserError(
                    f"the chat template of {self.tokenizer.name_or_path} rewrites earlier messages: not supported."
                )
            body = after.removeprefix(before).removeprefix(header)
            if leaves_out_thoughts(turn, body):
                raise UserError(
                    f"the chat template of {self.tokenizer.name_or_path} leaves out the thoughts of an answer: remove "
                    "them, or use another model."
                )
            encoded.append(EncodedTurn(turn, *self.encode_batch([header, body])))
        return encoded

    def render(self, conversations: Sequence[tuple[Conversation, bool]]) -> list[str]:
        """The texts that the chat template makes of conversations, which may be empty; True: an answer follows."""
        common = self.tokenizer.special_tokens_map | {"tools": None, "documents": None}
        values = [
            common | {"messages": list(map(message_of, turns)), "add_generation_prompt": asks}
            for turns, asks in conversations
        ]
        return render(self.tokenizer.get_chat_template(), self.tokenizer.name_or_path, values)


def leaves_out_thoughts(turn: Turn, body: str) -> bool:
    """Whether a template writes a turn without its thoughts, which may also stand in the text of an answer."""
    in_text = turn.loss and "</think>" in turn.content
    return turn.reasoning_content.strip() not in body or in_text and "</think>" not in body


def message_of(turn: Turn) -> dict[str, Any]:
    """The turn as chat templates read it; a template tells a missing thought from an empty one."""
    message = turn._asdict()
    if turn.reasoning_content:
        message["thinking"] = turn.reasoning_content  # the name that older templates read
    else:
        del message["reasoning_content"]
    return message
