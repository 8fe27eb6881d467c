"""The tokenizers of ChatGLM2-6B and ChatGLM3-6B: read ``tokenizer.model`` with sentencepiece, identical id for id."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from itertools import groupby

import sentencepiece
from transformers import BatchEncoding, PreTrainedTokenizer

ROLES = ("system", "user", "assistant", "observation")


class ChatGLM2Tokenizer(PreTrainedTokenizer):
    """Rows begin with ``[gMASK] sop``; batches are padded on the left, as generation needs it.

    The special tokens follow the pieces of the vocabulary. In text none is recognised: whatever a user types is
    ordinary text.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"
    generation = "chatglm2"
    special_tokens: tuple[str, ...] = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
    num_threads = -1  # of sentencepiece in one call: as many as there are cores

    def __init__(self, vocab_file: str, **kwargs):
        self.vocab_file = vocab_file
        self.sp_model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        pieces = self.sp_model.get_piece_size()
        self.special_token_ids = {token: pieces + index for index, token in enumerate(self.special_tokens)}
        self.prefix_ids = [self.special_token_ids["[gMASK]"], self.special_token_ids["sop"]]
        for name in ("model_specific_special_tokens", "bos_token", "eos_token", "unk_token", "pad_token"):
            kwargs.pop(name, None)  # whatever a tokenizer_config.json says: the original knows only these
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return self.sp_model.get_piece_size() + len(self.special_tokens)

    def get_vocab(self) -> dict[str, int]:
        pieces = {self.sp_model.id_to_piece(index): index for index in range(self.sp_model.get_piece_size())}
        return pieces | self.special_token_ids

    def get_command(self, token: str) -> int:
        """The id of a special token."""
        return self.special_token_ids[token]

    def tokenize(self, text: str, **kwargs) -> list[str]:
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.special_token_ids[token] if token in self.special_token_ids else self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        pieces = self.sp_model.get_piece_size()
        if index < pieces:
            return self.sp_model.id_to_piece(index)
        # The embedding has more rows than there are tokens: an untrained model may generate any of them.
        return self.special_tokens[index - pieces] if index < self.vocab_size else f"<unused_{index}>"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp_model.decode([token for token in tokens if token not in self.special_token_ids])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text without special tokens added, all texts in one call to sentencepiece."""
        return self.sp_model.encode(list(texts), num_threads=self.num_threads)

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs) -> str:
        token_ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return self.sp_model.decode([index for index in token_ids if self.is_text(index)])

    def is_text(self, index: int) -> bool:
        """Whether an id stands for text: no special token, nor <unk> (the pad), <s> or </s>, nor no id at all."""
        return self.sp_model.bos_id() < index < self.sp_model.get_piece_size() and index != self.sp_model.eos_id()

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """``[gMASK] sop context``, followed by ``answer </s>`` where there is an answer."""
        token_ids = self.prefix_ids + token_ids_0
        return token_ids if token_ids_1 is None else token_ids + token_ids_1 + [self.eos_token_id]

    def build_prompt(self, query: str, history: Sequence[Sequence[str]] = ()) -> str:
        """All rounds and the question: ``[Round 1]\\n\\n问：…\\n\\n答：…\\n\\n[Round 2]\\n\\n问：…\\n\\n答：``."""
        rounds = [*history, (query, "")]
        texts = [f"[Round {i}]\n\n问：{question}\n\n答：{answer}" for i, (question, answer) in enumerate(rounds, 1)]
        return "\n\n".join(texts)

    def _pad(self, encoded_inputs, *args, **kwargs) -> dict:
        """Also pads ``position_ids``, with 0 where there is a pad, as the original does."""
        length = len(encoded_inputs["input_ids"])
        position_ids = encoded_inputs.pop("position_ids", list(range(length)))
        encoded_inputs = super()._pad(encoded_inputs, *args, **kwargs)
        pads = [0] * (len(encoded_inputs["input_ids"]) - length)
        on_the_left = (kwargs.get("padding_side") or self.padding_side) == "left"
        return {**encoded_inputs, "position_ids": pads + position_ids if on_the_left else position_ids + pads}

    def save_pretrained(self, save_directory: str, **kwargs) -> tuple[str, str]:
        """Writes ``tokenizer.model`` and the fields of the original tokenizer_config.json that carry a meaning."""
        os.makedirs(save_directory, exist_ok=True)
        vocab_file = os.path.join(save_directory, self.vocab_files_names["vocab_file"])
        if os.path.abspath(vocab_file) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, vocab_file)
        fields = {"tokenizer_class": "ChatGLMTokenizer", "generation": self.generation, "padding_side": "left"}
        config_file = os.path.join(save_directory, "tokenizer_config.json")
        with open(config_file, "w", encoding="utf-8") as file:
            json.dump(fields, file, ensure_ascii=False, indent=2)
        return vocab_file, config_file


class ChatGLM3Tokenizer(ChatGLM2Tokenizer):
    """The same vocabulary with a token for each role, which begins a message.

    ``encode_special_tokens=True`` recognises the role tokens in text too: only for text that no user typed.
    """

    generation = "chatglm3"
    special_tokens = ChatGLM2Tokenizer.special_tokens + tuple(f"<|{role}|>" for role in ROLES)

    def __init__(self, vocab_file: str, encode_special_tokens: bool = False, **kwargs):
        self.encode_special_tokens = encode_special_tokens
        self._role_pattern = re.compile("|".join(re.escape(f"<|{role}|>") for role in ROLES))
        super().__init__(vocab_file, **kwargs)

    def tokenize(self, text: str, **kwargs) -> list[str]:
        if not self.encode_special_tokens:
            return super().tokenize(text)
        tokens, end = [], 0
        for found in self._role_pattern.finditer(text):
            tokens += [*super().tokenize(text[end : found.start()]), found[0]]
            end = found.end()
        return tokens + super().tokenize(text[end:])

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs) -> str:
        """Unlike that of ChatGLM2 it shows the special tokens, unless told to skip them."""
        if skip_special_tokens:
            return super()._decode(token_ids)
        token_ids = [token_ids] if isinstance(token_ids, int) else token_ids
        pieces = self.sp_model.get_piece_size()
        shown = [index for index in token_ids if self.is_text(index) or pieces <= index < self.vocab_size]
        parts = []
        for is_text, run in groupby(shown, self.is_text):
            ids = list(run)
            parts.append(self.sp_model.decode(ids) if is_text else "".join(self.convert_ids_to_tokens(ids)))
        return " ".join(parts)

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """A message: its role token, the metadata line (the name of a tool that is called, or nothing), the content."""
        header, content = self.encode_batch([f"{metadata}\n", message])
        return [self.get_command(f"<|{role}|>"), *header, *content]

    def build_chat_input(self, query: str, history: Sequence[dict] = (), role: str = "user") -> BatchEncoding:
        """The ids [1, s] of a conversation, the new message and the token that asks the assistant to go on."""
        input_ids = list(self.prefix_ids)
        for message in history:
            content = message["content"]
            if message["role"] == "system" and "tools" in message:
                content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
            input_ids += self.build_single_message(message["role"], message.get("metadata", ""), content)
        input_ids += self.build_single_message(role, "", query)
        input_ids.append(self.get_command("<|assistant|>"))
        return self.pad({"input_ids": [input_ids]}, return_tensors="pt")
