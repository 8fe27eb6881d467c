"""Rows of text -> token ids and labels, exactly as the official training script encodes them."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizer

History = Sequence[Sequence[str]]
"""Earlier rounds of a conversation: [[query, answer], …]."""


class TrainRow(NamedTuple):
    input_ids: list[int]
    labels: list[int]  # -100 where no loss is computed
    truncated: bool


class EvalRow(NamedTuple):
    prompt_ids: list[int]
    reference: str
    truncated: bool


def build_prompt(query: str, history: History = ()) -> str:
    """The query alone, or all rounds in the form ``[Round 0]\\n问：…\\n答：…\\n[Round 1]\\n问：…\\n答：``.

    For an empty history the official training script writes ``[Round 0]`` around the query while its evaluation and
    its chat do not; here the bare query is written everywhere, so that a model is asked as it was trained.
    """
    if not history:
        return query
    rounds = [f"[Round {i}]\n问：{old_query}\n答：{answer}\n" for i, (old_query, answer) in enumerate(history)]
    return "".join(rounds) + f"[Round {len(history)}]\n问：{query}\n答："


def encode_train(
    tokenizer: PreTrainedTokenizer,
    prompts: list[str],
    responses: list[str],
    max_source_length: int,
    max_target_length: int,
) -> list[TrainRow]:
    """Each row becomes ``prompt [gMASK] <sop> response <eop>``, labelled from <sop> on.

    The prompt is cut to ``max_source_length - 1`` tokens and the response to ``max_target_length - 2``. The position
    of [gMASK] learns to predict <sop>, as in the original.
    """
    max_prompt, max_response = max_source_length - 1, max_target_length - 2
    rows = []
    encoded = zip(tokenizer.encode_batch(prompts), tokenizer.encode_batch(responses), strict=True)
    for prompt_ids, response_ids in encoded:
        truncated = len(prompt_ids) > max_prompt or len(response_ids) > max_response
        input_ids = tokenizer.build_inputs_with_special_tokens(prompt_ids[:max_prompt], response_ids[:max_response])
        context_length = input_ids.index(tokenizer.bos_token_id)
        rows.append(TrainRow(input_ids, [-100] * context_length + input_ids[context_length:], truncated))
    return rows


def encode_eval(
    tokenizer: PreTrainedTokenizer,
    prompts: list[str],
    responses: list[str],
    max_source_length: int,
    max_target_length: int,
) -> list[EvalRow]:
    """The prompt of each row, cut to ``max_source_length`` with its special tokens, and the reference answer.

    The reference is the response as it reads after encoding, cut to ``max_target_length - 2`` tokens: what the model
    is scored against is what it could have learned, as in the original.
    """
    max_prompt, max_response = max_source_length - 2, max_target_length - 2
    rows = []
    encoded = zip(tokenizer.encode_batch(prompts), tokenizer.encode_batch(responses), strict=True)
    for prompt_ids, response_ids in encoded:
        truncated = len(prompt_ids) > max_prompt or len(response_ids) > max_response
        reference = tokenizer.decode(response_ids[:max_response], skip_special_tokens=True).strip()
        input_ids = tokenizer.build_inputs_with_special_tokens(prompt_ids[:max_prompt])
        rows.append(EvalRow(input_ids, reference, truncated))
    return rows
