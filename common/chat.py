"""One generation path for every chat: a conversation and a question in, the answer out piece by piece."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

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
