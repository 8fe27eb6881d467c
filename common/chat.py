"""One generation path for every chat: a conversation and a question in, the answer out piece by piece."""

import re
from collections.abc import Iterator
from threading import Thread

from transformers import PreTrainedModel, PreTrainedTokenizer, TextIteratorStreamer

from common.collator import left_pad
from common.encoding import History, build_prompt

# The vocabulary holds half-width punctuation only; between Chinese characters the full-width form is what people read.
FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
CHINESE = "[\u4e00-\u9fff]"


def process_response(text: str) -> str:
    """The answer as the original code shows it: full-width punctuation beside Chinese characters."""
    text = text.strip().replace("[[训练时间]]", "2023年")
    for half, full in FULL_WIDTH.items():
        text = re.sub(rf"(?<={CHINESE}){re.escape(half)}|{re.escape(half)}(?={CHINESE})", full, text)
    return text


def stream_chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizer, query: str, history: History = (), **generation
) -> Iterator[str]:
    """The answer so far, longer with every token. ``generation`` goes to ``model.generate``."""
    prompt_ids = tokenizer.build_inputs_with_special_tokens(tokenizer.encode_batch([build_prompt(query, history)])[0])
    inputs = {name: tensor.to(model.device) for name, tensor in left_pad([prompt_ids], tokenizer.pad_token_id).items()}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    worker = Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, **generation}, daemon=True)
    worker.start()
    answer = ""
    for piece in streamer:
        answer += piece
        yield process_response(answer)
    worker.join()
