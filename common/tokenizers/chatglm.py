"""The ChatGLM-6B tokenizer, which reads ``ice_text.model``. It gives the original ids."""

import re
from collections.abc import Sequence

import numpy as np

from common.tokenizers.base import GLMTokenizer, Ids

LINE_FEED, TAB = "<n>", "<|tab|>"
SEPARATOR = "\0"  # between texts, which are looked at together
BLANK_PIECE = re.compile(r"<\|blank_([2-9]|[1-7]\d|80)\|>")


def encode_whitespace(text: str) -> str:
    """Replaces line feeds, tabs and runs of 2 to 80 spaces by pieces of the vocabulary."""
    text = text.replace("\n", LINE_FEED).replace("\t", TAB)
    return re.sub(" {2,80}", lambda run: f"<|blank_{len(run[0])}|>", text)


class ChatGLMTokenizer(GLMTokenizer):
    """Prompts end with ``[gMASK] <sop>``.

    As in the original, a text may contain the special tokens ``<sop> <eop> <unk> <pad> [MASK]``; any other, like
    ``[gMASK]``, is read as ordinary text. The vocabulary normalises by NFKC (``，`` becomes ``,``).
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs):
        tokens = {"bos_token": "<sop>", "eos_token": "<eop>", "mask_token": "[MASK]"}
        tokens |= {"pad_token": "<pad>", "unk_token": "<unk>"}
        super().__init__(vocab_file, **tokens | {"clean_up_tokenization_spaces": True} | kwargs)
        self.gmask_token_id = self.pieces.piece_to_id("[gMASK]")
        # A special token includes the white space around it.
        self._special_pattern = re.compile(rf"\s*({'|'.join(map(re.escape, self.all_special_tokens))})\s*")

    def tokenize(self, text: str, **kwargs) -> list[str]:
        return self.tokenize_parts(self._special_pattern.split(text))

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return self.pieces.encode(encode_whitespace(text), out_type=str)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, without added special tokens. Texts without any go into one fast call."""
        joined = SEPARATOR.join(texts)
        encoded = encode_whitespace(joined).split(SEPARATOR)
        if len(encoded) != len(texts):  # there is no text, or one holds the separator
            encoded = [encode_whitespace(text) for text in texts]
        found = self.pieces.encode(encoded, return_type="numpy", num_threads=self.num_threads)
        tokens = [token for token in self.all_special_tokens if token in joined]
        for index, text in enumerate(texts) if tokens else ():
            if any(token in text for token in tokens):
                found[index] = np.array(self.encode(text, add_special_tokens=False), np.int32)
        return found

    def decode_ids(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        hidden = set(self.all_special_ids) if skip_special_tokens else {self.pad_token_id}
        shown = [index for index in token_ids if index not in hidden and index < self.vocab_size]
        text = self.pieces.decode(shown).replace(LINE_FEED, "\n").replace(TAB, "\t")
        text = BLANK_PIECE.sub(lambda blank: " " * int(blank[1]), text)
        return self.clean_up_tokenization(text) if self.clean_up_tokenization_spaces else text

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """``prompt [gMASK] <sop>``, followed by ``answer <eop>`` if an answer is given."""
        token_ids = token_ids_0 + [self.gmask_token_id, self.bos_token_id]
        return token_ids if token_ids_1 is None else token_ids + token_ids_1 + [self.eos_token_id]

    def build_prompt(self, query: str, history: Sequence[Sequence[str]] = ()) -> str:
        """All rounds in the form ``[Round 0]\\n问：…\\n答：…\\n[Round 1]\\n问：…\\n答：``.

        Without history it is the query alone. Then the official training script adds ``[Round 0]``, but the official
        evaluation and chat do not. Here nothing adds it, so that training and chat use the same prompt.
        """
        if not history:
            return query
        rounds = [f"[Round {i}]\n问：{old_query}\n答：{answer}\n" for i, (old_query, answer) in enumerate(history)]
        return "".join(rounds) + f"[Round {len(history)}]\n问：{query}\n答："
