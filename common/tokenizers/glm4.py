"""The tokenizer of GLM-4 with the methods of ours."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.tokenizers.base import Conversation, EncodedTurn, Turn


class GLM4Adapter:
    """Wraps the tokenizer that transformers loads, and encodes turns through its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def start_ids(self) -> list[int]:
        """The special tokens that every text begins with."""
        text = self.render([]) if self.tokenizer.chat_template else ""
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
        encoded = []
        before = self.render([])
        for index, turn in enumerate(turns):
            header = ""
            if turn.role == "assistant":
                header = self.render(turns[:index], add_generation_prompt=True).removeprefix(before)
            after = self.render(turns[: index + 1])
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
            before = after
        return encoded

    def render(self, turns: Conversation, add_generation_prompt: bool = False) -> str:
        """The text that the chat template makes of a conversation."""
        batch = [list(map(message_of, turns))]  # an empty conversation is allowed only in a batch
        return self.tokenizer.apply_chat_template(batch, tokenize=False, add_generation_prompt=add_generation_prompt)[0]


def leaves_out_thoughts(turn: Turn, body: str) -> bool:
    """Whether a template writes a turn without its thoughts, which may also stand in the text of an answer."""
    in_text = turn.loss and "</think>" in turn.content
    return turn.reasoning_content.strip() not in body or in_text and "</think>" not in body


def message_of(turn: Turn) -> dict[str, Any]:
    """The turn as chat templates read it; a template tells a missing thought from an empty one."""
    message = turn._asdict()
    if not turn.reasoning_content:
        del message["reasoning_content"]
    return message
