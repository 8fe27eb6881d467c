"""Conversations and plain text -> token ids and labels, as the official code of each generation encodes them.

ChatGLM-6B and ChatGLM2-6B read a conversation as one text of numbered rounds, so that every answer that is trained is
a row of its own. ChatGLM3-6B and GLM-4 read it as messages that begin with a role token: one row trains all answers.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from common.errors import UserError
from common.tokenizers.chatglm import ChatGLMTokenizer
from common.tokenizers.chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer

History = Sequence[Sequence[str]]
"""Earlier rounds of a conversation: [[query, answer], …]."""


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str  # system, user, assistant or observation
    content: str
    metadata: str = ""  # of an assistant turn: the name of the tool that it calls
    loss: bool = False  # whether the model learns to write it


Conversation = Sequence[Turn]


class TrainRow(NamedTuple):
    input_ids: list[int]
    labels: list[int]  # -100 where no loss is computed
    truncated: bool = False
    dropped_turns: int = 0


class EvalRow(NamedTuple):
    prompt_ids: list[int]
    reference: str
    truncated: bool = False
    dropped_turns: int = 0


def conversation_of(query: str, response: str, history: History = ()) -> list[Turn]:
    """A question and its answer after earlier rounds, of which only the answer is learned."""
    rounds = [(Turn("user", question), Turn("assistant", answer)) for question, answer in history]
    return [*(turn for both in rounds for turn in both), Turn("user", query), Turn("assistant", response, loss=True)]


def encode_train(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    max_source_length: int,
    max_target_length: int,
) -> list[TrainRow]:
    """The training rows of conversations.

    Numbered rounds: question (with the rounds before it) and answer are limited to their lengths, special tokens
    counted as in the official scripts. Messages: the row is limited to both lengths and one more token. What is too
    long loses its oldest rounds first.
    """
    if type(tokenizer) in ROUND_FORMATS:
        return train_rounds(tokenizer, conversations, max_source_length, max_target_length)
    return train_messages(tokenizer, conversations, max_source_length, max_target_length)


def encode_eval(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    max_source_length: int,
    max_target_length: int,
) -> list[EvalRow]:
    """For every answer that is trained: the prompt and the reference.

    The prompt is limited to ``max_source_length`` tokens; only calls of tools in its last round are never cut.

    The reference is the answer as it reads after encoding, cut to ``max_target_length``: what the model is scored
    against is what it could have learned, as in the original.
    """
    if type(tokenizer) in ROUND_FORMATS:
        return eval_rounds(tokenizer, conversations, max_source_length, max_target_length)
    return eval_messages(tokenizer, conversations, max_source_length, max_target_length)


def has_roles(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model reads messages of roles, a system prompt among them; else numbered rounds."""
    return type(tokenizer) not in ROUND_FORMATS


def check_system(tokenizer: PreTrainedTokenizerBase, system: str) -> None:
    """Raises UserError for a system prompt where the model knows no roles."""
    if system and not has_roles(tokenizer):
        raise UserError("--system_prompt: ChatGLM-6B and ChatGLM2-6B know questions and answers only.")


def encode_chat(tokenizer: PreTrainedTokenizerBase, query: str, history: History = (), system: str = "") -> list[int]:
    """The prompt of a question after earlier rounds, as long as it is. Raises UserError as ``check_system`` does."""
    check_system(tokenizer, system)
    conversation = [Turn("system", system)] if system else []
    conversation += conversation_of(query, "", history)
    return encode_eval(tokenizer, [conversation], sys.maxsize, sys.maxsize)[0].prompt_ids


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], block_size: int) -> list[TrainRow]:
    """Plain text for causal language modelling: blocks of at most ``block_size`` tokens, nothing is lost.

    Every block begins as any text does in this model; the last one of a text ends with the end token.
    """
    start, end = start_of(tokenizer), tokenizer.eos_token_id
    size = block_size - len(start)
    rows = []
    for ids in encode_batch(tokenizer, texts):
        ids = [*ids, end]
        for begin in range(0, len(ids), size):
            block = ids[begin : begin + size]
            rows.append(TrainRow(start + block, [-100] * len(start) + block))
    return rows


def start_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that every text of this model begins with."""
    if isinstance(tokenizer, (ChatGLMTokenizer, ChatGLM2Tokenizer)):
        return tokenizer.build_inputs_with_special_tokens([])
    text = rendered(tokenizer, []) if tokenizer.chat_template else ""
    return tokenizer(text, add_special_tokens=not text)["input_ids"]


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the end token and, where there are roles, those whose turn it is after it."""
    if isinstance(tokenizer, ChatGLM3Tokenizer):
        return [tokenizer.eos_token_id, tokenizer.get_command("<|user|>"), tokenizer.get_command("<|observation|>")]
    if isinstance(tokenizer, (ChatGLMTokenizer, ChatGLM2Tokenizer)):
        return [tokenizer.eos_token_id]
    added = tokenizer.get_added_vocab()
    return [tokenizer.eos_token_id, *(added[role] for role in ("<|user|>", "<|observation|>") if role in added)]


def encode_batch(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text without special tokens added."""
    if isinstance(tokenizer, (ChatGLMTokenizer, ChatGLM2Tokenizer)):
        return tokenizer.encode_batch(texts)
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


# Numbered rounds: ChatGLM-6B and ChatGLM2-6B


class RoundFormat(NamedTuple):
    """How the official training script of a generation counts and labels."""

    prompt_specials: int  # special tokens that count as part of the question's length
    answer_specials: int  # and of the answer's
    unlabelled_specials: int  # those after (or before) the question that are not learned


ROUND_FORMATS = {
    ChatGLMTokenizer: RoundFormat(1, 2, 1),  # question [gMASK] <sop> answer <eop>, labelled from <sop> on
    ChatGLM2Tokenizer: RoundFormat(2, 0, 2),  # [gMASK] sop question answer </s>, labelled from the answer on
}


def answered_rounds(conversations: Iterable[Conversation]) -> Iterator[tuple[list[list[str]], str, str]]:
    """(history, query, answer) of every answer that is trained."""
    for conversation in conversations:
        history: list[list[str]] = []
        for question, answer in zip(conversation[::2], conversation[1::2], strict=True):
            if answer.loss:
                yield list(history), question.content, answer.content
            history.append([question.content, answer.content])


def encode_prompts(
    tokenizer: ChatGLMTokenizer | ChatGLM2Tokenizer, rounds: Sequence[tuple[History, str, str]], limit: int
) -> list[tuple[list[int], int]]:
    """(ids, dropped turns) of every question with the rounds before it; the oldest are dropped where it is too long."""
    all_ids = tokenizer.encode_batch([tokenizer.build_prompt(query, history) for history, query, _ in rounds])
    prompts = []
    for (history, query, _), ids in zip(rounds, all_ids, strict=True):
        dropped = 0
        while len(ids) > limit and dropped < len(history):
            dropped += 1
            ids = tokenizer.encode_batch([tokenizer.build_prompt(query, history[dropped:])])[0]
        prompts.append((ids, 2 * dropped))
    return prompts


def train_rounds(
    tokenizer: ChatGLMTokenizer | ChatGLM2Tokenizer,
    conversations: Sequence[Conversation],
    max_source_length: int,
    max_target_length: int,
) -> list[TrainRow]:
    """A row for every answer that is trained."""
    rounds = list(answered_rounds(conversations))
    row_format = ROUND_FORMATS[type(tokenizer)]
    max_prompt = max_source_length - row_format.prompt_specials
    max_answer = max_target_length - row_format.answer_specials
    prompts = encode_prompts(tokenizer, rounds, max_prompt)
    answers = tokenizer.encode_batch([answer for _, _, answer in rounds])
    rows = []
    for (prompt, dropped), answer in zip(prompts, answers, strict=True):
        truncated = len(prompt) > max_prompt or len(answer) > max_answer
        prompt = prompt[:max_prompt]
        input_ids = tokenizer.build_inputs_with_special_tokens(prompt, answer[:max_answer])
        unlabelled = len(prompt) + row_format.unlabelled_specials
        rows.append(TrainRow(input_ids, [-100] * unlabelled + input_ids[unlabelled:], truncated, dropped))
    return rows


def eval_rounds(
    tokenizer: ChatGLMTokenizer | ChatGLM2Tokenizer,
    conversations: Sequence[Conversation],
    max_source_length: int,
    max_target_length: int,
) -> list[EvalRow]:
    """A prompt for every answer that is trained; both lengths include two special tokens, as in the original."""
    rounds = list(answered_rounds(conversations))
    max_prompt, max_answer = max_source_length - 2, max_target_length - 2
    prompts = encode_prompts(tokenizer, rounds, max_prompt)
    answers = tokenizer.encode_batch([answer for _, _, answer in rounds])
    rows = []
    for (prompt, dropped), answer in zip(prompts, answers, strict=True):
        truncated = len(prompt) > max_prompt or len(answer) > max_answer
        reference = tokenizer.decode(answer[:max_answer], skip_special_tokens=True).strip()
        prompt_ids = tokenizer.build_inputs_with_special_tokens(prompt[:max_prompt])
        rows.append(EvalRow(prompt_ids, reference, truncated, dropped))
    return rows


# Messages: ChatGLM3-6B and GLM-4


class Message(NamedTuple):
    """A turn as tokens. The header (the role token) is given to the model, what follows it writes."""

    turn: Turn
    header: list[int]
    body: list[int]

    @property
    def length(self) -> int:
        return len(self.header) + len(self.body)


def encode_messages(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[list[Message]]:
    """All turns of all conversations as tokens."""
    turns = [turn for conversation in conversations for turn in conversation]
    if isinstance(tokenizer, ChatGLM3Tokenizer):
        metadata_ids = {text: tokenizer.encode_batch([f"{text}\n"])[0] for text in {turn.metadata for turn in turns}}
        contents = tokenizer.encode_batch([turn.content for turn in turns])
        messages = [
            Message(turn, [tokenizer.get_command(f"<|{turn.role}|>")], metadata_ids[turn.metadata] + content)
            for turn, content in zip(turns, contents, strict=True)
        ]
    else:
        messages = [message for conversation in conversations for message in render(tokenizer, conversation)]
    ends = list(accumulate(len(conversation) for conversation in conversations))
    return [messages[end - len(conversation) : end] for conversation, end in zip(conversations, ends, strict=True)]


def render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Iterator[Message]:
    """A conversation through the tokenizer's own chat template: each message is what it adds to those before it."""
    messages: list[dict[str, str]] = []
    before = rendered(tokenizer, messages)
    for turn in conversation:
        header = ""
        if turn.role == "assistant":
            header = rendered(tokenizer, messages, add_generation_prompt=True).removeprefix(before)
        messages.append({"role": turn.role, "metadata": turn.metadata, "content": turn.content})
        after = rendered(tokenizer, messages)
        if not after.startswith(before):
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} changes what was said before: not supported."
            )
        body = after.removeprefix(before).removeprefix(header)
        header_ids, body_ids = (
            tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in (header, body)
        )
        yield Message(turn, header_ids, body_ids)
        before = after


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False
) -> str:
    """What the chat template makes of messages; apply_chat_template would refuse to do it with none."""
    texts, _ = render_jinja_template(
        conversations=[list(messages)],
        chat_template=tokenizer.chat_template,
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )
    return texts[0]


def drop_oldest_rounds(messages: list[Message], excess: int) -> list[Message]:
    """Leaves out rounds from the oldest on until ``excess`` tokens are saved; never the system turns or the last round.

    A round is a user's turn and all that follows it up to the next one.
    """
    system = [message for message in messages if message.turn.role == "system"]
    rest = messages[len(system) :]
    starts = [index for index, message in enumerate(rest) if message.turn.role == "user" and index]
    first = 0
    for start in starts:
        if sum(message.length for message in rest[:first]) >= excess:
            break
        first = start
    return system + rest[first:]


def cut_given(messages: list[Message], excess: int, keep: int) -> list[Message]:
    """Cuts the ends of what is given to the model, the longest message first, until ``excess`` tokens are saved.

    Given are questions, system prompts and results of tools that are not learned; ``keep`` of their tokens stay.
    """
    given = [i for i, (turn, _, _) in enumerate(messages) if turn.role != "assistant" and not turn.loss]
    lengths = {i: len(messages[i].body) for i in given}
    for _ in range(min(excess, sum(lengths.values()) - keep)):
        lengths[max(given, key=lambda i: lengths[i])] -= 1
    return [
        message._replace(body=message.body[: lengths.get(i, len(message.body))]) for i, message in enumerate(messages)
    ]


def fit(messages: list[Message], room: int, keep: int) -> tuple[list[Message], bool]:
    """What of a conversation fits into ``room`` tokens, and whether its last round had to be cut for that.

    Of what is given in the last round ``keep`` tokens stay, even if it is too long then.
    """
    excess = sum(message.length for message in messages) - room
    kept = drop_oldest_rounds(messages, excess) if excess > 0 else messages
    excess = sum(message.length for message in kept) - room
    return (cut_given(kept, excess, keep), True) if excess > 0 else (kept, False)


def train_messages(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    max_source_length: int,
    max_target_length: int,
) -> list[TrainRow]:
    """One row a conversation, ``[gMASK] sop message … message </s>``, at most source + target + 1 tokens.

    A trained turn's role token is no label, but the token after the turn is: it ends it. If the last round alone is
    too long, what is given there is cut, not below ``max_source_length``, and then the end of the row.
    """
    start, end = start_of(tokenizer), tokenizer.eos_token_id
    limit = max_source_length + max_target_length + 1
    rows = []
    for messages in encode_messages(tokenizer, conversations):
        kept, truncated = fit(messages, limit - len(start) - 1, keep=max_source_length)
        input_ids, labels = list(start), [-100] * len(start)
        ends_answer = False  # the next token ends a turn that is learned
        for turn, header, body in kept:
            given = len(header) or 1  # tokens at the start of a turn that the model does not write
            ids = header + body
            input_ids += ids
            labels += [-100] * given + ids[given:] if turn.loss else [-100] * len(ids)
            if ends_answer and ids:
                labels[-len(ids)] = ids[0]
            ends_answer = turn.loss
        input_ids.append(end)
        labels.append(end if ends_answer else -100)
        rows.append(TrainRow(input_ids[:limit], labels[:limit], truncated, len(messages) - len(kept)))
    return rows


def eval_messages(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    max_source_length: int,
    max_target_length: int,
) -> list[EvalRow]:
    """A prompt for every trained turn of the assistant, up to its role token.

    Turns of the assistant in a row (a thought, then a call) are one answer: the model writes them without stopping.
    """
    start = start_of(tokenizer)
    rows = []
    for messages in encode_messages(tokenizer, conversations):
        written = [message.turn.role == "assistant" and message.turn.loss for message in messages]
        for index, (_, header, body) in enumerate(messages):
            if not written[index] or (index and written[index - 1]):
                continue
            end = next((i for i in range(index, len(messages)) if not written[i]), len(messages))
            answer = body + [token for _, head, text in messages[index + 1 : end] for token in head + text]
            before = messages[:index]
            kept, cut = fit(before, max_source_length - len(start) - len(header), keep=0)
            prompt_ids = start + [token for _, head, text in kept for token in head + text] + header
            reference = tokenizer.decode(answer[:max_target_length], skip_special_tokens=True).strip()
            truncated = cut or len(answer) > max_target_length
            rows.append(EvalRow(prompt_ids, reference, truncated, len(before) - len(kept)))
    return rows
