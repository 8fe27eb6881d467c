"""Rows of text -> token ids and labels, exactly as the official training script encodes them."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizer

History = Sequence[Sequence[str]]
"""Earlier rounds of a conversation: [[query, answer], …]."""


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
) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of each row: ``prompt [gMASK] <sop> response <eop>``, labelled from <sop> on.

    The prompt is cut to ``max_source_length - 1`` tokens and the response to ``max_target_length - 2``. Labels are
    -100 where no loss is computed; the position of [gMASK] learns to predict <sop>, as in the original.
    """
    rows = []
    encoded = zip(tokenizer.encode_batch(prompts), tokenizer.encode_batch(responses), strict=True)
    for prompt_ids, response_ids in encoded:
        prompt_ids, response_ids = prompt_ids[: max_source_length - 1], response_ids[: max_target_length - 2]
        input_ids = tokenizer.build_inputs_with_special_tokens(prompt_ids, response_ids)
        context_length = input_ids.index(tokenizer.bos_token_id)
        rows.append((input_ids, [-100] * context_length + input_ids[context_length:]))
    return rows


def encode_eval(
    tokenizer: PreTrainedTokenizer,
    prompts: list[str],
    responses: list[str],
    max_source_length: int,
    max_target_length: int,
) -> list[tuple[list[int], str]]:
    """(prompt ids, reference) of each row: the prompt with its special tokens cut to ``max_source_length``.

    The reference is the response as it reads after encoding, cut to ``max_target_length - 2`` tokens: what the model
    is scored against is what it could have learned, as in the original.
    """
    rows = []
    encoded = zip(tokenizer.encode_batch(prompts), tokenizer.encode_batch(responses), strict=True)
    for prompt_ids, response_ids in encoded:
        input_ids = tokenizer.build_inputs_with_special_tokens(prompt_ids[: max_source_length - 2])
        reference = tokenizer.decode(response_ids[: max_target_length - 2], skip_special_tokens=True).strip()
        rows.append((input_ids, reference))
    return rows
