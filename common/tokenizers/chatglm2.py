"""The tokenizers of ChatGLM2-6B and ChatGLM3-6B, which read ``tokenizer.model``. They give the original ids."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby, pairwise
from typing import ClassVar

import numpy as np
from transformers import BatchEncoding

from common.tokenizers.base import Conversation, EncodedTurn, GLMTokenizer, Ids, Turn, with_tools

ROLES = ("system", "user", "assistant", "observation")


class ChatGLM2Tokenizer(GLMTokenizer):
    """Texts begin with ``[gMASK] sop``.

    Text contains no special tokens: all that a user types is ordinary text.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    model_family = "chatglm2"
    special_tokens: tuple[str, ...] = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
    start_tokens = ("[gMASK]", "sop")
    named_tokens: ClassVar = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}

    def __init__(self, vocab_file: str, **kwargs):
        # Like the original, ignore the special tokens of tokenizer_config.json.
        super().__init__(vocab_file, **{"clean_up_tokenization_spaces": False} | kwargs | self.named_tokens)
        self.prefix_ids = [self.special_token_ids[token] for token in self.start_tokens]

    def get_command(self, token: str) -> int:
        """The id of a special token."""
        return self.special_token_ids[token]

    def tokenize(self, text: str, **kwargs) -> list[str]:
        return self._tokenize(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, without added special tokens, from one call to sentencepiece."""
        return self.pieces.encode(list(texts), return_type="numpy", num_threads=self.num_threads)

    def decode_ids(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return self.pieces.decode([index for index in token_ids if self.is_text(index)])

    def is_text(self, index: int) -> bool:
        """Whether an id means text: not for a special token, <unk> (the pad), <s> or </s>, nor out of range."""
        return self.pieces.bos_id() < index < self.pieces.get_piece_size() and index != self.pieces.eos_id()

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """``[gMASK] sop prompt``, followed by ``answer </s>`` if an answer is given."""
        token_ids = self.prefix_ids + token_ids_0
        return token_ids if token_ids_1 is None else token_ids + token_ids_1 + [self.eos_token_id]

    def build_prompt(self, query: str, history: Sequence[Sequence[str]] = ()) -> str:
        """All rounds in the form ``[Round 1]\\n\\n问：…\\n\\n答：…\\n\\n[Round 2]\\n\\n问：…\\n\\n答：``."""
        rounds = enumerate([*history, (query, "")], 1)
        return "\n\n".join(f"[Round {i}]\n\n问：{question}\n\n答：{answer}" for i, (question, answer) in rounds)

    def _pad(self, encoded_inputs, *args, **kwargs) -> dict:
        """Also pads ``position_ids``: a pad has position 0, as in the original."""
        length = len(encoded_inputs["input_ids"])
        position_ids = encoded_inputs.pop("position_ids", list(range(length)))
        encoded_inputs = super()._pad(encoded_inputs, *args, **kwargs)
        pads = [0] * (len(encoded_inputs["input_ids"]) - length)
        on_the_left = (kwargs.get("padding_side") or self.padding_side) == "left"
        return {**encoded_inputs, "position_ids": pads + position_ids if on_the_left else position_ids + pads}

    def config_fields(self) -> dict:
        return {"generation": self.model_family}  # the field that distinguishes ChatGLM2 from ChatGLM3


class ChatGLM3Tokenizer(ChatGLM2Tokenizer):
    """The same vocabulary and one token per role, which begins a message.

    ``encode_special_tokens=True`` recognises role tokens in text too. Never use it for text that a user typed.
    """

    model_family = "chatglm3"
    special_tokens = ChatGLM2Tokenizer.special_tokens + tuple(f"<|{role}|>" for role in ROLES)

    def __init__(self, vocab_file: str, encode_special_tokens: bool = False, **kwargs):
        self.encode_special_tokens = encode_special_tokens
        super().__init__(vocab_file, **kwargs)

    def tokenize(self, text: str, **kwargs) -> list[str]:
        roles = rf"(<\|(?:{'|'.join(ROLES)})\|>)"
        return self.tokenize_parts(re.split(roles, text) if self.encode_special_tokens else [text])

    def decode_ids(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """Shows the special tokens unless ``skip_special_tokens``; ChatGLM2 never shows them."""
        if skip_special_tokens:
            return super().decode_ids(token_ids, skip_special_tokens)
        shown = [index for index in token_ids if self.is_text(index) or index in self.special_token_ids.values()]
        runs = [(is_text, list(run)) for is_text, run in groupby(shown, self.is_text)]
        parts = [self.pieces.decode(r) if text else "".join(self.convert_ids_to_tokens(r)) for text, r in runs]
        return " ".join(parts)

    def stop_ids(self) -> list[int]:
        """The end token, and the roles whose turn follows an answer."""
        return [self.eos_token_id, self.get_command("<|user|>"), self.get_command("<|observation|>")]

    def messages_of(self, turn: Turn) -> list[Turn]:
        """The messages that a turn is written as."""
        return [with_tools(turn)]

    def texts_of(self, turn: Turn) -> tuple[str, ...]:
        """The texts of a message that are encoded each for itself."""
        return f"{turn.metadata}\n", turn.content

    def encode_turns(self, conversations: Sequence[Conversation]) -> list[list[EncodedTurn]]:
        """Every message with its token ids: the header is the role token, the body metadata line and content."""
        conversations = [[each for turn in turns for each in self.messages_of(turn)] for turns in conversations]
        turns = [turn for conversation in conversations for turn in conversation]
        roles = {role: np.array([self.get_command(f"<|{role}|>")], np.int32) for role in ROLES}
        texts = [text for turn in turns for text in self.texts_of(turn)]
        different = list(dict.fromkeys(texts))  # a system prompt may come with each conversation
        ids = dict(zip(different, self.encode_batch(different), strict=True))
        pieces = [ids[text] for text in texts]
        joined = np.concatenate([np.empty(0, np.int32), *pieces])  # all at once, which is faster than one by one
        step = len(texts) // len(turns) if turns else 1
        ends = list(accumulate(map(len, pieces)))[step - 1 :: step]
        bodies = (joined[begin:end] for begin, end in pairwise([0, *ends]))
        return [
            [EncodedTurn(turn, roles[turn.role], next(bodies)) for turn in conversation]
            for conversation in conversations
        ]

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """The ids of a message: role token, metadata line (the name of the called tool, or empty), content."""
        [[encoded]] = self.encode_turns([[Turn(role, message, metadata)]])
        return encoded.ids

    def build_chat_input(self, query: str, history: Sequence[Mapping] = (), role: str = "user") -> BatchEncoding:
        """The ids [1, s] of a conversation: the history, the new message and the role token of the assistant."""
        input_ids = list(self.prefix_ids)
        for message in (*history, {"role": role, "content": query}):
            content = message["content"]
            if message["role"] == "system" and "tools" in message:
                content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
            input_ids += self.build_single_message(message["role"], message.get("metadata", ""), content)
        return self.pad({"input_ids": [[*input_ids, self.get_command("<|assistant|>")]]}, return_tensors="pt")
