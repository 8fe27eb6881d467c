"""The tokenizer of GLM-4 in its first format, which reads ``tokenizer.model``: a table of tiktoken. It gives the
original ids.
"""

import base64
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import regex
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from common.tokenizers.base import Ids, Turn, added_tokens
from common.tokenizers.chatglm2 import ROLES, ChatGLM3Tokenizer
from common.tokenizers.tools import tools_prompt

# Cuts a text into words; tokens never reach over their ends.
EXPRESSION = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LONGEST = 2**10  # bytes of a token
MOST_KNOWN = 2**22  # characters of words whose ids are kept
# tokenizer.json writes bytes as characters that can be seen: those of Latin-1, or the ones from 256 on.
SEEN = (*range(33, 127), *range(161, 173), *range(174, 256))
CHARACTERS = {byte: byte for byte in SEEN} | dict(zip(sorted({*range(256)} - {*SEEN}), range(256, 512), strict=False))


def read_table(file: str) -> list[bytes]:
    """The tokens of a tiktoken table by their numbers. Raises ValueError for a table that is none."""
    lines = [line.split() for line in Path(file).read_bytes().splitlines()]
    numbers = {base64.b64decode(token, validate=True): int(number) for token, number in lines}
    tokens = sorted(numbers, key=numbers.__getitem__)
    if list(map(numbers.__getitem__, tokens)) != list(range(len(lines))):
        raise ValueError("its tokens are not numbered from 0, or one is there twice")
    if max(map(len, tokens)) > LONGEST or not {bytes([byte]) for byte in range(256)} <= numbers.keys():
        raise ValueError("a token is too long, or that of a byte is missing")
    return tokens


def merges_of(vocabulary: dict[str, int]) -> Iterator[tuple[str, str]]:
    """The pairs that make each token, first those of the tokens with low numbers, as tiktoken merges."""
    for token in vocabulary:
        pairs = [
            (start, end)
            for cut in range(1, len(token))
            if (start := token[:cut]) in vocabulary and (end := token[cut:]) in vocabulary
        ]
        yield from sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))


def bpe_of(vocabulary: dict[str, int]) -> models.BPE:
    """Without a cache, because ``encode_batch`` keeps what it found."""
    return models.BPE(vocabulary, list(merges_of(vocabulary)), ignore_merges=True, cache_capacity=0)


class TokenTable:
    """A tiktoken table, with the names of sentencepiece for what the tokenizers ask a vocabulary.

    A character of a token's name is a byte of it: Latin-1, which takes the least time.
    """

    def __init__(self, file: str):
        self.tokens = read_table(file)
        self.names = [token.decode("latin-1") for token in self.tokens]
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.bpe = bpe_of(self.numbers)

    def merged(self, word: str) -> list[int]:
        return [token.id for token in self.bpe.tokenize(word.encode().decode("latin-1"))]

    def get_piece_size(self) -> int:
        return len(self.names)

    def id_to_piece(self, index: Any) -> Any:
        """The piece of a number, or the pieces of a list of numbers."""
        return [self.names[each] for each in index] if isinstance(index, list) else self.names[index]

    def piece_to_id(self, piece: str) -> int:
        return self.numbers[piece]


class ChatGLM4Tokenizer(ChatGLM3Tokenizer):
    """Texts begin with ``[gMASK]<sop>``; the pad is the end token, as in the original."""

    model_family = "chatglm4"
    original_class = "ChatGLM4Tokenizer"
    special_tokens = (
        *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *(f"<|{role}|>" for role in ROLES)),
        *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    )
    start_tokens = ("[gMASK]", "<sop>")
    named_tokens: ClassVar = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}

    def read_vocabulary(self, file: str) -> TokenTable:
        return TokenTable(file)

    def __init__(self, vocab_file: str, **kwargs):
        super().__init__(vocab_file, **kwargs)
        self.words = regex.compile(EXPRESSION)
        self.known: dict[str, list[int]] = {}  # ids of words that were seen: merging takes most of the time
        self.room = MOST_KNOWN

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return self.pieces.id_to_piece(self.encode_batch([text])[0].tolist())

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, without added special tokens. Every word is merged once."""
        if self.room < 0:
            self.known, self.room = {}, MOST_KNOWN
        known, words = self.known, [self.words.findall(text) for text in texts]
        new = {word for found in words for word in found if word not in known}
        self.room -= sum(map(len, new))
        known.update((word, self.pieces.merged(word)) for word in new)
        return [np.array(list(chain.from_iterable(map(known.__getitem__, found))), np.int32) for found in words]

    def is_text(self, index: int) -> bool:
        return index < self.pieces.get_piece_size()

    def decode_ids(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """Bytes that are no character give the replacement character."""
        shown = [i for i in token_ids if self.is_text(i) or i < self.vocab_size and not skip_special_tokens]
        tokens = (self.pieces.tokens[i] if self.is_text(i) else self._convert_id_to_token(i).encode() for i in shown)
        return b"".join(tokens).decode(errors="replace")

    def end_ids(self) -> list[int]:
        """The user's turn follows, as in the official script."""
        return [self.get_command("<|user|>")]

    def messages_of(self, turn: Turn) -> list[Turn]:
        """The tools are a system message of their own. Given messages without text are left out, as in the original."""
        found = [turn._replace(content=tools_prompt(json.loads(turn.tools)))] if turn.tools else []
        if turn.content or turn.role == "assistant":
            found.append(turn._replace(content=turn.arguments or turn.content))
        return found

    def texts_of(self, turn: Turn) -> tuple[str, ...]:
        return (f"{turn.metadata}\n{turn.content}",)

    def config_fields(self) -> dict:
        """With these the newer of the two original codes knows its special tokens."""
        return (
            super().config_fields() | self.named_tokens | {"added_tokens_decoder": added_tokens(self.special_token_ids)}
        )


def as_fast(tokenizer: ChatGLM4Tokenizer) -> Tokenizer:
    """The same as a tokenizer.json has it, with the special tokens that other programs look for in text."""
    fast = Tokenizer(bpe_of({name.translate(CHARACTERS): i for name, i in tokenizer.pieces.numbers.items()}))
    split = pre_tokenizers.Split(Regex(EXPRESSION), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Sequence([split, as_bytes]), decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(token, normalized=False) for token in tokenizer.special_tokens])
    return fast
