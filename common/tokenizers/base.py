"""The part that the tokenizers of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B share."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from transformers import PreTrainedTokenizer


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str  # system, user, assistant or observation
    content: str
    metadata: str = ""  # in a turn of the assistant: the name of the tool that it calls
    loss: bool = False  # whether the model learns to write this turn
    reasoning_content: str = ""  # in a turn of the assistant: its thoughts, for a chat template that writes them


Conversation = Sequence[Turn]
Ids = NDArray[np.int32]
"""Token ids, one dimension."""


class EncodedTurn(NamedTuple):
    """A turn and its token ids. A prompt ends with the answer's header (the role token); the model writes the body."""

    turn: Turn
    header: Ids
    body: Ids

    @property
    def ids(self) -> list[int]:
        return [*self.header.tolist(), *self.body.tolist()]


class SentencePieceTokenizer(PreTrainedTokenizer):
    """Reads its vocabulary with sentencepiece. Pads batches on the left, as text generation needs it."""

    padding_side = "left"
    num_threads = -1  # threads of one call to sentencepiece: one per core
    special_tokens: tuple[str, ...] = ()  # tokens that the vocabulary lacks; their ids follow those of its pieces

    def __init__(self, vocab_file: str, **kwargs):
        self.vocab_file = vocab_file
        self.sp_model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        pieces = self.sp_model.get_piece_size()
        self.special_token_ids = {token: pieces + index for index, token in enumerate(self.special_tokens)}
        # transformers passes other tokens of tokenizer_config.json here, and would recognise them in text.
        kwargs.pop("model_specific_special_tokens", None)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return self.sp_model.get_piece_size() + len(self.special_tokens)

    def get_vocab(self) -> dict[str, int]:
        pieces = self.sp_model.id_to_piece(list(range(self.sp_model.get_piece_size())))
        return {token: index for index, token in enumerate([*pieces, *self.special_tokens])}

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return self.sp_model.encode(text, out_type=str)

    def tokenize_parts(self, parts: Sequence[str]) -> list[str]:
        """The tokens of text, special token, text, …, text."""
        return [token for i, part in enumerate(parts) for token in ([part] if i % 2 else self._tokenize(part))]

    def _convert_token_to_id(self, token: str) -> int:
        return self.special_token_ids[token] if token in self.special_token_ids else self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        pieces = self.sp_model.get_piece_size()
        if index < pieces:
            return self.sp_model.id_to_piece(index)
        # The embedding has more rows than there are tokens, and an untrained model may generate any of them.
        return self.special_tokens[index - pieces] if index < self.vocab_size else f"<unused_{index}>"

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs) -> str:
        return self.decode_ids([token_ids] if isinstance(token_ids, int) else token_ids, skip_special_tokens)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.decode(self.convert_tokens_to_ids(tokens), skip_special_tokens=True)

    def start_ids(self) -> list[int]:
        """The special tokens that every text begins with."""
        return self.build_inputs_with_special_tokens([])

    def stop_ids(self) -> list[int]:
        """The tokens that end an answer."""
        return [self.eos_token_id]

    def config_fields(self) -> dict:
        """The fields of the original tokenizer_config.json that only this tokenizer has."""
        return self.special_tokens_map

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> tuple[str, str]:
        """Writes the vocabulary and tokenizer_config.json, with the original fields that have an effect."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        vocab_file = folder / self.vocab_files_names["vocab_file"]
        if vocab_file.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, vocab_file)
        fields = {"tokenizer_class": "ChatGLMTokenizer", "padding_side": self.padding_side, **self.config_fields()}
        config_file = folder / "tokenizer_config.json"
        config_file.write_text(json.dumps(fields, ensure_ascii=False, indent=2), encoding="utf-8")
        return str(vocab_file), str(config_file)
