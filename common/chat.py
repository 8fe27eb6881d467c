"""One generation path for every chat: a conversation and a question in, the answer out piece by piece."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from common.collator import left_pad
from common.encoding import History, encode_chat, stop_ids
from common.errors import UserError
from common.tokenizers.chatglm import ChatGLMTokenizer

# The vocabulary of ChatGLM-6B holds half-width punctuation only; people read the full-width form between Chinese words.
FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
CHINESE = "[\u4e00-\u9fff]"


def process_response(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The answer as the original code shows it: of ChatGLM-6B, full-width punctuation beside Chinese characters."""
    text = text.strip().replace("[[训练时间]]", "2023年")
    if not isinstance(tokenizer, ChatGLMTokenizer):
        return text
    for half, full in FULL_WIDTH.items():
        text = re.sub(rf"(?<={CHINESE}){re.escape(half)}|{re.escape(half)}(?={CHINESE})", full, text)
    return text


def generation_settings(max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
    """What ``model.generate`` is told; temperature 0 always takes the likeliest token.

    Raises UserError for values that are no sampling.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise UserError("--temperature must be at least 0, --top_p above 0 and at most 1, --max_new_tokens at least 1.")
    if temperature == 0:
        return {"max_new_tokens": max_new_tokens, "do_sample": False}
    return {"max_new_tokens": max_new_tokens, "do_sample": True, "top_p": top_p, "temperature": temperature}


class StopOnEvent(StoppingCriteria):
    """Ends a generation when an event is set: nobody listens to it any more."""

    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def stream_chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, query: str, history: History = (), **generation
) -> Iterator[str]:
    """The answer so far, longer with every token. ``generation`` goes to ``model.generate``.

    Generates in a thread, which ends when this iterator does; an error there is raised here.
    """
    prompt_ids = encode_chat(tokenizer, query, history)
    inputs = {name: tensor.to(model.device) for name, tensor in left_pad([prompt_ids], tokenizer.pad_token_id).items()}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    unwanted = Event()
    generation = {"eos_token_id": stop_ids(tokenizer)} | generation
    stopping = StoppingCriteriaList([StopOnEvent(unwanted)])
    with ThreadPoolExecutor(1) as thread:
        answer = ""
        written = thread.submit(
            model.generate,
            **inputs,
            streamer=streamer,
            stopping_criteria=stopping,
            **generation,
        )
        written.add_done_callback(lambda _: streamer.end())  # after an error too: nobody waits for ever
        try:
            for piece in streamer:
                answer += piece
                yield process_response(answer, tokenizer)
        finally:
            unwanted.set()
        written.result()
