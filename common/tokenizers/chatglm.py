"""The ChatGLM-6B tokenizer: reads ``ice_text.model`` with sentencepiece, identical to the original id for id."""

import json
import os
import re
import shutil
from collections.abc import Sequence

import sentencepiece
from transformers import PreTrainedTokenizer

LINE_FEED, TAB = "<n>", "<|tab|>"
BLANK_PIECE = re.compile(r"<\|blank_([2-9]|[1-7]\d|80)\|>")


def encode_whitespace(text: str) -> str:
    """Line feeds, tabs and runs of 2 to 80 spaces become pieces of the vocabulary."""
    text = text.replace("\n", LINE_FEED).replace("\t", TAB)
    return re.sub(" {2,80}", lambda run: f"<|blank_{len(run[0])}|>", text)


def decode_whitespace(text: str) -> str:
    text = text.replace(LINE_FEED, "\n").replace(TAB, "\t")
    return BLANK_PIECE.sub(lambda blank: " " * int(blank[1]), text)


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Rows end in ``[gMASK] <sop>``; batches are padded on the left, as generation needs it.

    In text only ``<sop> <eop> <unk> <pad> [MASK]`` are recognised as special tokens, as in the original:
    a ``[gMASK]`` that somebody types is ordinary text. The vocabulary normalises by NFKC (``，`` becomes ``,``).
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"
    num_threads = -1  # of sentencepiece in one call: as many as there are cores

    def __init__(
        self,
        vocab_file: str,
        bos_token="<sop>",
        eos_token="<eop>",
        mask_token="[MASK]",
        pad_token="<pad>",
        unk_token="<unk>",
        **kwargs,
    ):
        self.vocab_file = vocab_file
        self.sp_model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        self.gmask_token_id = self.sp_model.piece_to_id("[gMASK]")
        # transformers collects [gMASK] and </s> of tokenizer_config.json here and would recognise them in text.
        kwargs.pop("model_specific_special_tokens", None)
        kwargs.setdefault("clean_up_tokenization_spaces", True)
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            mask_token=mask_token,
            pad_token=pad_token,
            unk_token=unk_token,
            **kwargs,
        )
        # White space beside a special token belongs to it.
        self._special_pattern = re.compile(rf"\s*({'|'.join(map(re.escape, self.all_special_tokens))})\s*")

    @property
    def vocab_size(self) -> int:
        return self.sp_model.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        return {self.sp_model.id_to_piece(index): index for index in range(self.vocab_size)}

    def tokenize(self, text: str, **kwargs) -> list[str]:
        parts = self._special_pattern.split(text)  # text, special token, text, …, text
        return [token for i, part in enumerate(parts) for token in ([part] if i % 2 else self._tokenize(part))]

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return self.sp_model.encode(encode_whitespace(text), out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        # The embedding has more rows than the vocabulary has pieces: an untrained model may generate any of them.
        return self.sp_model.id_to_piece(index) if index < self.vocab_size else f"<unused_{index}>"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return decode_whitespace(self.sp_model.decode(tokens))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text without special tokens added, all texts in one call to sentencepiece."""
        if any(self._special_pattern.search(text) for text in texts):
            return [self.encode(text, add_special_tokens=False) for text in texts]
        return self.sp_model.encode([encode_whitespace(text) for text in texts], num_threads=self.num_threads)

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs) -> str:
        token_ids = [token_ids] if isinstance(token_ids, int) else token_ids
        hidden = set(self.all_special_ids) if skip_special_tokens else {self.pad_token_id}
        shown = [index for index in token_ids if index not in hidden and index < self.vocab_size]
        text = decode_whitespace(self.sp_model.decode(shown))
        return self.clean_up_tokenization(text) if self.clean_up_tokenization_spaces else text

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """``context [gMASK] <sop>``, followed by ``answer <eop>`` where there is an answer."""
        token_ids = token_ids_0 + [self.gmask_token_id, self.bos_token_id]
        return token_ids if token_ids_1 is None else token_ids + token_ids_1 + [self.eos_token_id]

    def build_prompt(self, query: str, history: Sequence[Sequence[str]] = ()) -> str:
        """The query alone, or all rounds in the form ``[Round 0]\\n问：…\\n答：…\\n[Round 1]\\n问：…\\n答：``.

        For an empty history the official training script writes ``[Round 0]`` around the query while its evaluation
        and its chat do not; here the bare query is written everywhere, so that a model is asked as it was trained.
        """
        if not history:
            return query
        rounds = [f"[Round {i}]\n问：{old_query}\n答：{answer}\n" for i, (old_query, answer) in enumerate(history)]
        return "".join(rounds) + f"[Round {len(history)}]\n问：{query}\n答："

    def save_pretrained(self, save_directory: str, **kwargs) -> tuple[str, str]:
        """Writes ``ice_text.model`` and the fields of the original tokenizer_config.json that carry a meaning."""
        os.makedirs(save_directory, exist_ok=True)
        vocab_file = os.path.join(save_directory, self.vocab_files_names["vocab_file"])
        if os.path.abspath(vocab_file) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, vocab_file)
        fields = {"tokenizer_class": type(self).__name__, "padding_side": self.padding_side, **self.special_tokens_map}
        config_file = os.path.join(save_directory, "tokenizer_config.json")
        with open(config_file, "w", encoding="utf-8") as file:
            json.dump(fields, file, ensure_ascii=False, indent=2)
        return vocab_file, config_file
