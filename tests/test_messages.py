"""Conversations of ChatGLM3-6B become ids and labels: roles, tools, every trained answer."""

from collections.abc import Sequence

import pytest
from conftest import whole

from common.encoding import conversation_of, encode_eval, encode_train
from common.tokenizers.base import Turn

MESSAGES = [
    Turn("system", "你好"),
    Turn("user", "今天天气怎么样"),
    Turn("assistant", "get_weather", metadata="天气", loss=True),
    Turn("observation", "白色"),
    Turn("assistant", "hello", loss=True),
    Turn("user", "world"),
    Turn("assistant", "简约", loss=True),
]


def message_ids(tokenizer, turns: Sequence[Turn]) -> list[list[int]]:
    return [message.ids for message in tokenizer.encode_turns([turns])[0]]


def learn(*losses: bool) -> list[Turn]:
    return [turn._replace(loss=loss) for turn, loss in zip(MESSAGES, losses, strict=True)]


def expected_row(tokenizer, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
    """The text of a trained turn and the token after it have labels; its role token has none."""
    input_ids, labels, ends_learned = list(tokenizer.prefix_ids), [-100, -100], False
    for turn, (role, *text) in zip(turns, message_ids(tokenizer, turns), strict=True):
        input_ids += [role, *text]
        labels.append(role if ends_learned else -100)
        labels += text if turn.loss else [-100] * len(text)
        ends_learned = turn.loss
    end = tokenizer.eos_token_id
    return [*input_ids, end], [*labels, end if ends_learned else -100]


def test_labels_of_messages(tokenizer3):
    """A role token has a label only if it ends a trained answer."""
    row = encode_train(tokenizer3, [MESSAGES], 200, 64)[0]
    system, user, call, result, answer, question, last = message_ids(tokenizer3, MESSAGES)
    end = tokenizer3.eos_token_id
    assert row.input_ids == [
        *tokenizer3.prefix_ids, *system, *user, *call, *result, *answer, *question, *last, end
    ]  # fmt: skip
    assert row.labels == [
        *[-100] * (2 + len(system) + len(user)),
        *[-100, *call[1:], tokenizer3.get_command("<|observation|>")],
        *[-100] * (len(result) - 1),
        *[-100, *answer[1:], tokenizer3.get_command("<|user|>")],
        *[-100] * (len(question) - 1),
        *[-100, *last[1:], end],
    ]
    assert (row.input_ids, row.labels) == expected_row(tokenizer3, MESSAGES)


@pytest.mark.parametrize(
    "losses",
    [
        (False, False, True, True, True, False, True),  # a trained observation
        (False, True, False, False, False, False, False),  # only a question
        (True, False, True, False, False, True, True),
        (False, False, False, False, True, False, False),
    ],
)
def test_every_turn_decides_about_its_own_loss(tokenizer3, losses):
    row = encode_train(tokenizer3, [learn(*losses)], 200, 64)[0]
    assert (row.input_ids, row.labels) == expected_row(tokenizer3, learn(*losses))


def test_of_a_pair_with_history_only_the_last_answer_is_trained(tokenizer3):
    row = encode_train(tokenizer3, [conversation_of("world", "简约", [["你好", "hello"]])], 200, 64)[0]
    answer = message_ids(tokenizer3, [Turn("assistant", "简约")])[0]
    assert [label for label in row.labels if label != -100] == [*answer[1:], tokenizer3.eos_token_id]
    assert tokenizer3.decode(row.input_ids, skip_special_tokens=True).count("hello") == 1


def test_questions_of_messages(tokenizer3):
    """One per trained answer, up to its role token; the reference of a call begins with the name of the tool."""
    rows = encode_eval(tokenizer3, [learn(False, False, True, True, False, False, True)], 200, 64)
    system, user, call, result, answer, question, last = message_ids(tokenizer3, MESSAGES)
    assert [row.prompt_ids for row in rows] == [
        [*tokenizer3.prefix_ids, *system, *user, call[0]],
        [*tokenizer3.prefix_ids, *system, *user, *call, *result, *answer, *question, last[0]],
    ]
    assert [row.reference for row in rows] == ["天气\n get_weather", "简约"]


def test_too_long_messages_lose_the_oldest_rounds_first(tokenizer3):
    """A round ends before the next question. The system prompt and the last round stay."""
    chat = [MESSAGES[0], *MESSAGES[1:5], Turn("user", "颜色"), Turn("assistant", "白色", loss=True), *MESSAGES[5:]]
    shorter = [[chat[0], *chat[first:]] for first in (1, 5, 7)]
    lengths = [len(encode_train(tokenizer3, [turns], 500, 500)[0].input_ids) for turns in shorter]
    for turns, length in zip(shorter, lengths, strict=True):
        expected = encode_train(tokenizer3, [turns], 500, 500)[0]
        found = encode_train(tokenizer3, [chat], 10, length - 11)[0]
        assert whole([found]) == whole([expected._replace(dropped_turns=len(chat) - len(turns), origin=found.origin)])
    assert encode_train(tokenizer3, [chat], 10, lengths[0] - 12)[0].dropped_turns == 4  # one token too many
    assert encode_train(tokenizer3, [chat], 10, lengths[1] - 12)[0].dropped_turns == 6
    cut = encode_train(tokenizer3, [chat], 3, lengths[2] - 5)[0]
    assert (cut.truncated, cut.dropped_turns, len(cut.input_ids)) == (True, 6, lengths[2] - 1)
    questions = encode_eval(tokenizer3, [chat], 500, 64)
    for index, turns in ((-1, shorter[2]), (-2, [chat[0], *chat[5:7]])):
        expected = encode_eval(tokenizer3, [turns], 500, 64)[-1]
        found = encode_eval(tokenizer3, [chat], len(expected.prompt_ids), 64)[index]
        assert len(found.prompt_ids) < len(questions[index].prompt_ids)
        assert (found.prompt_ids, found.truncated) == (expected.prompt_ids, False)
        assert found.dropped_turns == (6 if index == -1 else 4)


def test_a_last_round_that_is_too_long_loses_the_end_of_its_question_first(tokenizer3):
    """So the answer keeps its labels; its end is cut only if the shortened question is not enough."""
    chat = [Turn("user", "你好" * 10), Turn("assistant", "天气" * 5, loss=True)]
    question, answer = message_ids(tokenizer3, chat)
    whole = 2 + len(question) + len(answer) + 1
    row = encode_train(tokenizer3, [chat], 8, whole - 9 - 4)[0]
    assert row.input_ids == [*tokenizer3.prefix_ids, *question[:-4], *answer, tokenizer3.eos_token_id]
    assert row.labels[-len(answer) :] == [*answer[1:], tokenizer3.eos_token_id]
    assert row.truncated
    row = encode_train(tokenizer3, [chat], 8, 6)[0]
    assert row.input_ids == [*tokenizer3.prefix_ids, *question[:9], *answer[:4]]
    assert [label for label in row.labels if label != -100] == answer[1:4]
    for length in (10, 6):
        prompt = encode_eval(tokenizer3, [chat], length, 64)[0]
        assert prompt.prompt_ids == [*tokenizer3.prefix_ids, *question[: length - 3], answer[0]]
        assert prompt.truncated


@pytest.mark.parametrize("long_turn", [0, 3])
def test_a_prompt_never_exceeds_its_length(tokenizer3, long_turn):
    """Even if the long part is the system prompt or a tool result."""
    chat = [turn._replace(content=turn.content * (60 if i == long_turn else 1)) for i, turn in enumerate(MESSAGES)]
    for row in encode_eval(tokenizer3, [chat], 64, 64):
        assert len(row.prompt_ids) <= 64
        assert row.prompt_ids[-1] == tokenizer3.get_command("<|assistant|>")
