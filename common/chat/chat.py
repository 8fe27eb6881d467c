"""The parts that all chats share: flags, model, and an answer that grows token by token."""

import argparse
import re
from bisect import bisect_left
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList, TextIteratorStreamer

from common.devices import check_bits, note_cpu, this_device
from common.encoding import History, check_system, encode_chat, stop_ids
from common.errors import UserError
from common.loading import find_trained, load_model, load_tokenizer
from common.models.precision import compute_dtype
from common.models.registry import open_model
from common.tokenizers.chatglm import ChatGLMTokenizer
from common.trained import find_training, recorded

# The vocabulary of ChatGLM-6B has half-width punctuation only; beside Chinese characters people read the full width.
FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
BESIDE_CHINESE = re.compile("(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")
MAX_NEW_TOKENS = 512
LONGEST_TOKEN = 128  # characters; the longest one is a run of blanks


class QuestionError(UserError):
    """A question that can't be answered. A page says it in its own words: ``key`` of a label, and its ``values``."""

    def __init__(self, text: str, key: str, **values: int | str):
        super().__init__(text)
        self.key, self.values = key, values


def chat_parser(description: str, checkpoint: str = "--checkpoint") -> argparse.ArgumentParser:
    """The flags that all chats share; ``checkpoint`` is a flag or a position."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(checkpoint, help="folder of a training, or of several: the newest one; default: a base model")
    parser.add_argument("--model_name_or_path", help="base model: demo, demo3, a folder, or a hub id")
    bits = "bits of the base model; 0: not quantized; default: as it was trained"
    parser.add_argument("--quantization_bit", type=int, choices=(0, 4, 8), help=bits)
    parser.add_argument("--system_prompt", default="", help="instructions before the conversation (ChatGLM3, GLM-4)")
    half = f"default: {MAX_NEW_TOKENS}, or half of the model's context if that is less"
    parser.add_argument("--max_new_tokens", type=int, help=f"tokens of the longest answer; {half}")
    parser.add_argument("--top_p", type=float, default=0.7, help="share of probability to sample from (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.95, help="0: always the likeliest token (%(default)s)")
    return parser


def load_chat(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """Model, tokenizer, and the flag that ``find_trained`` returns. Completes ``args``: folder, bits, longest answer.

    Raises UserError for flags that can't work.
    """
    generation_settings(args.max_new_tokens or MAX_NEW_TOKENS, args.temperature, args.top_p)
    base, trained = args.model_name_or_path or "demo", dict[str, Any]()
    if args.checkpoint:
        args.checkpoint = find_training(args.checkpoint)
        base, trained = find_trained(str(args.checkpoint), args.model_name_or_path)
        if args.quantization_bit is None:
            args.quantization_bit = recorded(args.checkpoint).get("quantization_bit")
    folder, device = open_model(base), this_device()
    check_bits(args.quantization_bit or folder.bits, device)
    tokenizer = load_tokenizer(folder)
    check_system(tokenizer, args.system_prompt)
    if device.type == "cpu":
        note_cpu(folder.name, folder.config.hidden_size)
    model = load_model(folder, compute_dtype(device), args.quantization_bit or None, device=device, **trained)
    if args.max_new_tokens is None:
        args.max_new_tokens = min(MAX_NEW_TOKENS, model.config.max_position_embeddings // 2)
    return model, tokenizer, trained


def process_response(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The answer as the original code shows it: ChatGLM-6B gets full-width punctuation beside Chinese characters."""
    text = text.strip().replace("[[训练时间]]", "2023年")
    if isinstance(tokenizer, ChatGLMTokenizer):
        text = BESIDE_CHINESE.sub(lambda half: FULL_WIDTH[half[0]], text)
    return text


def generation_settings(max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
    """The arguments of ``model.generate``; temperature 0: greedy search. Raises UserError for a value out of range."""
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise UserError("--temperature must be at least 0, --top_p above 0 and at most 1, --max_new_tokens at least 1.")
    if temperature == 0:
        return {"max_new_tokens": max_new_tokens, "do_sample": False}
    return {"max_new_tokens": max_new_tokens, "do_sample": True, "top_p": top_p, "temperature": temperature}


def count_forgotten(tokenizer: PreTrainedTokenizerBase, query: str, history: History, system: str, room: int) -> int:
    """The number of oldest rounds to leave out, so that the prompt has at most ``room`` tokens.

    Raises QuestionError if the question alone has more, by its characters before it is tokenized, or is no text.
    """
    advice = f"beside --max_new_tokens the model's context has room for {max(0, room)} tokens. Shorten one of them."
    if (length := len(query) + len(system)) > LONGEST_TOKEN * max(1, room):
        text = f"the question is too long: it has {length:,} characters, and {advice}"
        raise QuestionError(text, "too_long", length=length, unit="characters", room=max(0, room))
    if re.search("[\ud800-\udfff]", query + system):  # as Python reads bytes of another encoding
        raise QuestionError("the question is no text in UTF-8: write it again.", "no_text")

    def fits(forgotten: int) -> bool:
        return len(encode_chat(tokenizer, query, history[forgotten:], system)) <= room

    forgotten = bisect_left(range(len(history) + 1), True, key=fits)
    if forgotten > len(history):
        length = len(encode_chat(tokenizer, query, system=system))
        text = f"the question is too long: it has {length} tokens, and {advice}"
        raise QuestionError(text, "too_long", length=length, unit="tokens", room=max(0, room))
    return forgotten


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def stream_chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    query: str,
    history: History = (),
    system: str = "",
    **generation,
) -> Iterator[str]:
    """Yields the answer so far, longer with every token. ``generation`` goes to ``model.generate``.

    A thread generates; it ends when this iterator ends, and its errors are raised here.
    """
    input_ids = torch.tensor([encode_chat(tokenizer, query, history, system)], device=model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    unwanted = Event()
    stopping = StoppingCriteriaList([lambda ids, scores, **_: torch.tensor([unwanted.is_set()], device=ids.device)])
    generation = {"eos_token_id": stop_ids(tokenizer), "attention_mask": torch.ones_like(input_ids)} | generation
    with ThreadPoolExecutor(1) as thread:
        answer = ""
        written = thread.submit(model.generate, input_ids, streamer=streamer, stopping_criteria=stopping, **generation)
        written.add_done_callback(lambda _: streamer.end())  # after an error too, so that the loop below ends
        try:
            for piece in streamer:
                answer += piece
                yield process_response(answer, tokenizer)
        finally:
            unwanted.set()
        written.result()
