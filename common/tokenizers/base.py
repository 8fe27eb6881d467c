"""The part that our tokenizers share: those of ChatGLM-6B to GLM-4 in their first format."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    tools: str = ""  # in a system turn: the tools as JSON, which each model reads in another form
    arguments: str = ""  # in a call of a tool: its arguments as JSON, which the content has as Python


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


def with_tools(turn: Turn) -> Turn:
    """The turn with its tools in its text: as JSON, which the tokenizer of ChatGLM3 indents beside other text."""
    if not turn.tools:
        return turn
    indented = json.dumps(json.loads(turn.tools), indent=4, ensure_ascii=False)
    return turn._replace(content=f"{turn.content}\n{indented}" if turn.content else turn.tools, tools="")


def added_tokens(special: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Special tokens as a tokenizer_config.json has them."""
    return {
        str(number): {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
        for token, number in special.items()
    }


class GLMTokenizer(PreTrainedTokenizer):
    """Reads its vocabulary, as most do, with sentencepiece. Pads batches on the left, as text generation needs it."""

    padding_side = "left"
    num_threads = -1  # threads of one call to sentencepiece: one per core
    special_tokens: tuple[str, ...] = ()  # tokens that the vocabulary lacks; their ids follow those of its pieces
    original_class = "ChatGLMTokenizer"

    def __init__(self, vocab_file: str, **kwargs):
        self.vocab_file = vocab_file
        self.pieces = self.read_vocabulary(vocab_file)
        count = self.pieces.get_piece_size()
        self.special_token_ids = {token: count + index for index, token in enumerate(self.special_tokens)}
        # transformers passes other tokens of tokenizer_config.json here, and would recognise them in text.
        for name in ("model_specific_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
            kwargs.pop(name, None)
        super().__init__(**kwargs)

    def read_vocabulary(self, file: str) -> Any:
        return sentencepiece.SentencePieceProcessor(model_file=file)

    @property
    def vocab_size(self) -> int:
        return self.pieces.get_piece_size() + len(self.special_tokens)

    def get_vocab(self) -> dict[str, int]:
        pieces = self.pieces.id_to_piece(list(range(self.pieces.get_piece_size())))
        return {token: index for index, token in enumerate([*pieces, *self.special_tokens])}

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return self.pieces.encode(text, out_type=str)

    def tokenize_parts(self, parts: Sequence[str]) -> list[str]:
        """The tokens of text, special token, text, …, text."""
        return [token for i, part in enumerate(parts) for token in ([part] if i % 2 else self._tokenize(part))]

    def _convert_token_to_id(self, token: str) -> int:
        return self.special_token_ids[token] if token in self.special_token_ids else self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        count = self.pieces.get_piece_size()
        if index < count:
            return self.pieces.id_to_piece(index)
        # The embedding has more rows than there are tokens, and an untrained model may generate any of them.
        return self.special_tokens[index - count] if index < self.vocab_size else f"<unused_{index}>"

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs) -> str:
        return self.decode_ids([token_ids] if isinstance(token_ids, int) else token_ids, skip_special_tokens)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.decode(self.convert_tokens_to_ids(tokens), skip_special_tokens=True)

    def start_ids(self) -> list[int]:
        """The special tokens that every text begins with."""
        return self.build_inputs_with_special_tokens([])

    def end_ids(self) -> list[int]:
        """What follows the last message of a training row."""
        return [self.eos_token_id]

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
        fields = {"tokenizer_class": self.original_class, "padding_side": self.padding_side, **self.config_fields()}
        config_file = folder / "tokenizer_config.json"
        config_file.write_text(json.dumps(fields, ensure_ascii=False, indent=2), encoding="utf-8")
        return str(vocab_file), str(config_file)
