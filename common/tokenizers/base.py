"""The part that the tokenizers of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B share."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizer

Message = Mapping[str, str]
"""One message of a conversation: role, content and metadata (the name of the tool that the assistant calls, or "")."""

EncodedMessage = tuple[list[int], list[int]]
"""The ids of a message: the header, which precedes the text that the model writes, and the body."""


class SentencePieceTokenizer(PreTrainedTokenizer):
    """Reads its vocabulary with sentencepiece. Pads batches on the left, as text generation needs it."""

    padding_side = "left"
    num_threads = -1  # threads of one call to sentencepiece: one per core

    def start_ids(self) -> list[int]:
        """The special tokens that every text begins with."""
        return self.build_inputs_with_special_tokens([])

    def stop_ids(self) -> list[int]:
        """The tokens that end an answer."""
        return [self.eos_token_id]

    def config_fields(self) -> dict:
        """The fields of the original tokenizer_config.json that only this tokenizer has."""
        raise NotImplementedError

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
