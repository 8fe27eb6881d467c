"""What was written beside what it was made from: prompts, logits and greedy answers must be the same."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GlmForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from common.data.messages import read_messages
from common.encoding import encode_prompt
from common.errors import UserError

Messages = list[dict[str, Any]]

TOKENS = 64  # of a greedy answer
ROUNDS: Messages = [
    {"role": "user", "content": "  People of philosophy\n\n"},
    {"role": "assistant", "content": " 两个空格 😀"},
    {"role": "user", "content": "再说一遍"},
]
WITH_SYSTEM: Messages = [{"role": "system", "content": "回答要短。"}, {"role": "user", "content": ""}]
WITH_TOOLS: Messages = [
    {"role": "system", "content": "用工具。", "tools": [{"name": "天气", "parameters": {}}]},
    {"role": "user", "content": "北京天气"},
    {"role": "assistant", "content": "```python\ntool_call(city='北京')\n```", "metadata": "天气"},
    {"role": "observation", "content": '{"temperature": 3}'},
]


def prompt_of(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """The prompt here, of messages as a file of training rows has them."""
    return encode_prompt(tokenizer, read_messages(messages, "conversations", set()))


def compare_prompts(tokenizer: PreTrainedTokenizerBase, family: str, folder: Path) -> None:
    """Raises UserError if the tokenizer in a folder makes other tokens of a conversation."""
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for messages in (ROUNDS, WITH_SYSTEM, WITH_TOOLS) if family != "chatglm2" else (ROUNDS,):
        own = prompt_of(tokenizer, messages)
        written = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if own != written:
            raise UserError(f"the exported tokenizer makes other tokens of {messages}: nothing was saved.")


def load_glm(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """As any program loads it that has transformers only."""
    return GlmForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def compare_answers(own: PreTrainedModel, written: PreTrainedModel, prompt: list[int]) -> float:
    """The largest difference of their logits. Raises UserError if it is large, or if they write different answers."""
    question = torch.tensor([prompt])
    how: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    answers = [m.generate(input_ids=question, attention_mask=question.ne(-1), **how) for m in (own, written)]
    before, after = (model(answers[0]).logits.float() for model in (own, written))
    difference = (before - after).abs().max().item()
    tolerance = 16 * torch.finfo(own.dtype).eps * before.abs().max().item()
    if difference > tolerance:
        raise UserError(f"the exported model's logits differ by {difference:.2g}: nothing was saved.")
    if (places := (answers[0] != answers[1]).nonzero()).numel():
        place = int(places[0, 1])  # in 16 bit two tokens may be equally likely but for the rounding
        one, other = (before[0, place - 1, answer[0, place]].item() for answer in answers)
        if abs(one - other) > tolerance:
            raise UserError("the exported model writes another greedy answer: nothing was saved.")
    return difference
