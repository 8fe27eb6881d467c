"""Encode conversations and plain text as token ids and labels, as the official code of each model family does.

ChatGLM-6B and ChatGLM2-6B read a conversation as one text of numbered rounds; every trained answer is one row.
ChatGLM3-6B and GLM-4 read messages that begin with a role token; one row trains all its answers.
"""

import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from common.errors import UserError
from common.tokenizers.base import Conversation, EncodedTurn, GLMTokenizer, Ids, Turn
from common.tokenizers.chatglm import ChatGLMTokenizer
from common.tokenizers.chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from common.tokenizers.glm4 import GLM4Adapter

History = Sequence[Sequence[str]]
"""The earlier rounds of a conversation: [[query, answer], …]."""

Conversations = Sequence[Conversation]


class Origin(NamedTuple):
    """The conversation that a row comes from, and its length in tokens before anything is cut."""

    conversation: int  # index in the given list
    asked: int  # tokens that the model does not learn to write
    answered: int


class TrainRow(NamedTuple):
    """A row in pieces, which a table joins to columns all at once."""

    pieces: list[Ids]
    learned: list[bool]  # whether the tokens of each piece have labels
    truncated: bool = False
    dropped_turns: int = 0
    origin: Origin = Origin(0, 0, 0)

    @property
    def input_ids(self) -> list[int]:
        return np.concatenate(self.pieces).tolist()

    @property
    def labels(self) -> list[int]:
        """-100: no loss."""
        mask = np.repeat(self.learned, [len(piece) for piece in self.pieces])
        return np.where(mask, np.concatenate(self.pieces), -100).tolist()

    @property
    def columns(self) -> dict[str, list[int]]:
        """As ``train_batch`` takes them."""
        return {"input_ids": self.input_ids, "labels": self.labels}


class EvalRow(NamedTuple):
    prompt_ids: list[int]
    reference: str | None  # None: the conversation ends with a question
    truncated: bool = False
    dropped_turns: int = 0
    origin: Origin = Origin(0, 0, 0)


Answers = Iterator[tuple[list[Ids], Ids, bool, int, Origin]]
"""(prompt in pieces, answer, truncated, dropped turns, origin): the prompt with its special tokens."""


def conversation_of(query: str, response: str, history: History = ()) -> list[Turn]:
    """The history, a question and its answer. Only this answer is trained."""
    rounds = [(Turn("user", question), Turn("assistant", answer)) for question, answer in history]
    return [*(turn for both in rounds for turn in both), Turn("user", query), Turn("assistant", response, loss=True)]


def encode_train(
    tokenizer: Tokenizer, conversations: Conversations, max_source_length: int, max_target_length: int
) -> list[TrainRow]:
    """The training rows of conversations.

    Numbered rounds: the prompt has at most ``max_source_length`` tokens and the answer ``max_target_length``; special
    tokens count as in the official scripts. Messages: a row has at most the sum of both lengths and one more token. A
    conversation that is too long loses its oldest rounds first.
    """
    encode = train_messages if has_roles(tokenizer) else train_rounds
    return list(encode(tokenizer, conversations, max_source_length, max_target_length))


def encode_eval(
    tokenizer: Tokenizer, conversations: Conversations, max_source_length: int, max_target_length: int
) -> list[EvalRow]:
    """The prompt and the reference of every trained answer, and of a last question without an answer.

    A prompt has at most ``max_source_length`` tokens; only tool calls in its last round are never cut.

    A reference is the decoded answer, cut to ``max_target_length`` tokens: as in the official scripts, the model is
    scored against a text that it can write. In numbered rounds two special tokens count in each length, as there.
    """
    open_ended = [turns[-1].role != "assistant" for turns in conversations]
    answer = Turn("assistant", "", loss=True)
    closed = [[*turns, answer] if is_open else turns for turns, is_open in zip(conversations, open_ended, strict=True)]
    if has_roles(tokenizer):
        answers = answers_to_messages(tokenizer, closed, max_source_length, max_target_length)
    else:
        answers = answers_to_rounds(tokenizer, closed, max_source_length - 2, max_target_length - 2, special=(2, 2))
    rows = []
    for prompt, answer_ids, truncated, dropped, origin in answers:
        text = tokenizer.decode(answer_ids.tolist(), skip_special_tokens=True).strip()
        reference = None if open_ended[origin.conversation] and not text else text
        rows.append(EvalRow(np.concatenate(prompt).tolist(), reference, truncated, dropped, origin))
    return rows


def has_roles(tokenizer: Tokenizer) -> bool:
    """Whether the model reads messages, with a system prompt if wanted; otherwise it reads numbered rounds."""
    return isinstance(tokenizer, ChatGLM3Tokenizer) or not isinstance(tokenizer, GLMTokenizer)


def check_system(tokenizer: Tokenizer, system: str) -> None:
    """Raises UserError for a system prompt if the model has no roles."""
    if system and not has_roles(tokenizer):
        raise UserError("--system_prompt: ChatGLM-6B and ChatGLM2-6B know questions and answers only.")


def encode_chat(tokenizer: Tokenizer, query: str, history: History = (), system: str = "") -> list[int]:
    """The uncut prompt of a question after its history. Raises UserError as ``check_system`` does."""
    check_system(tokenizer, system)
    conversation = [Turn("system", system)] if system else []
    return encode_prompt(tokenizer, [*conversation, *conversation_of(query, "", history)[:-1]])


def encode_prompt(tokenizer: Tokenizer, turns: Conversation) -> list[int]:
    """The uncut prompt of the answer that follows these turns, whatever a training would learn of them."""
    given = [turn._replace(loss=False) for turn in turns]
    return encode_eval(tokenizer, [given], sys.maxsize, sys.maxsize)[0].prompt_ids


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], block_size: int) -> list[TrainRow]:
    """Splits plain text for causal language modelling into blocks of at most ``block_size`` tokens; loses none.

    Every block begins with the start tokens of the model, and the last block of a text ends with the end token.
    """
    adapter = with_methods(tokenizer)
    start = as_ids(adapter.start_ids())
    size = block_size - len(start)
    rows = []
    for index, text in enumerate(adapter.encode_batch(texts)):
        ids = np.append(text, np.int32(tokenizer.eos_token_id))
        for begin in range(0, len(ids), size):
            block = ids[begin : begin + size]
            rows.append(TrainRow([start, block], [False, True], origin=Origin(index, 0, len(block))))
    return rows


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer."""
    return with_methods(tokenizer).stop_ids()


def with_methods(tokenizer: Tokenizer) -> ChatGLMTokenizer | ChatGLM2Tokenizer | GLM4Adapter:
    """The tokenizer itself, or an adapter with the same methods if its class is not ours."""
    return tokenizer if isinstance(tokenizer, GLMTokenizer) else GLM4Adapter(tokenizer)


# Numbered rounds: ChatGLM-6B and ChatGLM2-6B

RoundsTokenizer = ChatGLMTokenizer | ChatGLM2Tokenizer


def answers_to_rounds(
    tokenizer: RoundsTokenizer,
    conversations: Iterable[Conversation],
    max_prompt: int,
    max_answer: int,
    special: tuple[int, int],
) -> Answers:
    """Every trained answer. The lengths count no special tokens; ``special``: those that an origin counts in each.

    A prompt that is too long loses its oldest rounds, and then the end of its text.
    """
    rounds = []
    for index, turns in enumerate(conversations):
        pairs = [(question.content, answer.content) for question, answer in zip(turns[::2], turns[1::2], strict=True)]
        rounds += [(index, pairs[:i], *pairs[i]) for i, answer in enumerate(turns[1::2]) if answer.loss]
    prompts = tokenizer.encode_batch([tokenizer.build_prompt(query, history) for _, history, query, _ in rounds])
    answers = tokenizer.encode_batch([answer for *_, answer in rounds])
    wrapped = tokenizer.build_inputs_with_special_tokens([-1])
    before, after = as_ids(wrapped[: wrapped.index(-1)]), as_ids(wrapped[wrapped.index(-1) + 1 :])
    for (index, history, query, _), prompt, answer_ids in zip(rounds, prompts, answers, strict=True):
        origin = Origin(index, len(prompt) + special[0], len(answer_ids) + special[1])
        dropped = 0
        while len(prompt) > max_prompt and dropped < len(history):
            dropped += 1
            prompt = tokenizer.encode_batch([tokenizer.build_prompt(query, history[dropped:])])[0]
        truncated = len(prompt) > max_prompt or len(answer_ids) > max_answer
        yield [before, prompt[:max_prompt], after], answer_ids[:max_answer], truncated, 2 * dropped, origin


def train_rounds(
    tokenizer: RoundsTokenizer, conversations: Conversations, max_source_length: int, max_target_length: int
) -> Iterator[TrainRow]:
    """One row per trained answer."""
    # Special tokens that the official script counts in the prompt's length and in the answer's. Labels are right of the
    # bar: "prompt [gMASK] | <sop> answer <eop>" and "[gMASK] sop prompt | answer </s>".
    in_prompt, in_answer = (1, 2) if isinstance(tokenizer, ChatGLMTokenizer) else (2, 0)
    limits = max_source_length - in_prompt, max_target_length - in_answer
    end = as_ids([tokenizer.eos_token_id])
    answers = answers_to_rounds(tokenizer, conversations, *limits, special=(in_prompt, in_answer))
    for (before, prompt, after), answer, truncated, dropped, origin in answers:
        pieces = [before, prompt, after[:1], after[1:], answer, end]
        yield TrainRow(pieces, [False, False, False, True, True, True], truncated, dropped, origin)


# Messages: ChatGLM3-6B and GLM-4


def fit(messages: list[EncodedTurn], room: int, keep: int) -> tuple[list[EncodedTurn], bool]:
    """The messages that fit into ``room`` tokens, and whether the last round was cut.

    The oldest rounds go first, but never a system turn or the last round. A round is a turn of the user and all turns
    up to the user's next one. The given messages of the last round keep ``keep`` tokens, even if the result is longer
    than ``room``.
    """
    system = [message for message in messages if message.turn.role == "system"]
    rest = messages[len(system) :]
    for first in sorted({0, *(index for index, message in enumerate(rest) if message.turn.role == "user")}):
        kept = system + rest[first:]
        excess = length_of(kept) - room
        if excess <= 0:
            return kept, False
    return cut_given(kept, excess, keep), True


def cut_given(messages: list[EncodedTurn], excess: int, keep: int) -> list[EncodedTurn]:
    """Cuts the ends of given messages, the longest message first, until ``excess`` tokens are saved.

    Given are questions, system prompts and tool results that are not trained; they keep ``keep`` tokens together.
    """
    lengths = {i: len(body) for i, (turn, _, body) in enumerate(messages) if turn.role != "assistant" and not turn.loss}
    excess = min(excess, sum(lengths.values()) - keep)
    if excess <= 0:
        return messages

    def saved(longest: int) -> int:
        return sum([max(0, length - longest) for length in lengths.values()])

    longest = bisect_left(range(max(lengths.values())), True, key=lambda length: saved(length) <= excess)
    more = excess - saved(longest)  # messages that lose one token more
    for i, length in lengths.items():
        if length >= longest:
            lengths[i], more = longest - (more > 0), more - 1
    return [message._replace(body=message.body[: lengths.get(i)]) for i, message in enumerate(messages)]


def train_messages(
    tokenizer: Tokenizer, conversations: Conversations, max_source_length: int, max_target_length: int
) -> Iterator[TrainRow]:
    """One row per conversation: ``[gMASK] sop message … message </s>``, at most source + target + 1 tokens.

    The role token of a trained turn has no label. The token after the turn has one, because it ends the turn; GLM-4's
    row ends with the role token of the user. If the last round alone is too long, its given messages are cut to
    ``max_source_length`` tokens, then the end of the row.
    """
    adapter = with_methods(tokenizer)
    start, end = as_ids(adapter.start_ids()), as_ids(adapter.end_ids())
    limit = max_source_length + max_target_length + 1
    for index, messages in enumerate(adapter.encode_turns(conversations)):
        answered = length_of([message for message in messages if message.turn.loss])
        asked = length_of(messages) - answered + len(start) + 1
        kept, truncated = messages, False
        if asked + answered > limit:
            kept, truncated = fit(messages, limit - len(start) - 1, keep=max_source_length)
        pieces, learned = [start], [False]
        ends_answer = False  # whether the next token ends a trained turn
        for turn, header, body in kept:
            if not len(header):  # GLM-4's are part of the body, but for answers
                header, body = body[:1], body[1:]
            pieces += (header, body) if len(header) < 2 else (header[:1], header[1:], body)
            learned += (ends_answer, turn.loss) if len(header) < 2 else (ends_answer, False, turn.loss)
            ends_answer = turn.loss
        pieces.append(end)
        learned.append(ends_answer)
        if truncated:
            before = accumulate(map(len, pieces), initial=0)
            pieces = [piece[: max(0, limit - length)] for piece, length in zip(pieces, before, strict=False)]
        yield TrainRow(pieces, learned, truncated, len(messages) - len(kept), Origin(index, asked, answered))


def answers_to_messages(
    tokenizer: Tokenizer, conversations: Conversations, max_source_length: int, max_target_length: int
) -> Answers:
    """Every trained answer, after a prompt up to the role token of the assistant.

    Successive turns of the assistant (a thought, then a call) are one answer: the model writes them without a stop.
    """
    adapter = with_methods(tokenizer)
    start = as_ids(adapter.start_ids())
    for index, messages in enumerate(adapter.encode_turns(conversations)):
        before: list[EncodedTurn] = []
        for is_answer, run in groupby(messages, lambda message: message.turn.role == "assistant" and message.turn.loss):
            turns = list(run)
            if is_answer:
                header = turns[0].header
                answer = np.concatenate(pieces_of(turns)[1:])
                asked = len(start) + length_of(before) + len(header)
                origin = Origin(index, asked, len(answer))
                kept, cut = fit(before, max_source_length - len(start) - len(header), keep=0)
                truncated = cut or len(answer) > max_target_length
                prompt, dropped = [start, *pieces_of(kept), header], len(before) - len(kept)
                yield prompt, answer[:max_target_length], truncated, dropped, origin
            before += turns


def pieces_of(messages: Iterable[EncodedTurn]) -> list[Ids]:
    return [piece for _, header, body in messages for piece in (header, body)]


def length_of(messages: Iterable[EncodedTurn]) -> int:
    """In tokens."""
    return sum([len(header) + len(body) for _, header, body in messages])


def as_ids(ids: Sequence[int]) -> Ids:
    return np.array(ids, np.int32)
