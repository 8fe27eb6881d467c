"""Conversations and texts become ids, labels and batches as in the official scripts of each model family."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import encoded, load_arrays, load_real_tokenizer, whole
from tiny_models import CHATGLM2, CHATGLM3

from common.data.collator import left_pad, train_batch
from common.data.messages import read_messages
from common.encoding import conversation_of, encode_chat, encode_eval, encode_texts, encode_train, stop_ids
from common.tokenizers.base import Turn
from common.tokenizers.chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer

CONTENT = "类型#裙*材质#棉*颜色#白色*风格#简约*裙长#连衣裙"
SUMMARY = "这条白色的连衣裙，简约大方，棉的质感柔软舒适。"
PAIR = [conversation_of(CONTENT, SUMMARY)]


def ids_of(tokenizer, text: str) -> list[int]:
    return encoded(tokenizer, [text])[0]


def pairs(contents: Sequence[str], summaries: Sequence[str]) -> list[list[Turn]]:
    return [conversation_of(content, summary) for content, summary in zip(contents, summaries, strict=True)]


# With the original vocabularies: the rows of the official scripts


def original(name: str) -> Path:
    """A file of the goldens over rows of the real AdvertiseGen, whose text is not ours to ship."""
    file = Path(os.environ.get("ORIGINAL_GOLDENS", "")) / name
    if not os.environ.get("ORIGINAL_GOLDENS") or not file.is_file():
        pytest.skip(f"needs goldens over real AdvertiseGen rows: set ORIGINAL_GOLDENS=/folder/with/{name}")
    return file


def original_json(name: str) -> dict:
    return json.loads(original(name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def dev_rows() -> tuple[list[str], list[str]]:
    rows = original_json("chatglm-6b/tokenizer.json")["dev"]
    return [row["content"]["text"] for row in rows], [row["summary"]["text"] for row in rows]


@pytest.fixture(scope="module")
def original2(tmp_path_factory) -> ChatGLM2Tokenizer:
    return load_real_tokenizer(CHATGLM2, tmp_path_factory.mktemp("original2"))


@pytest.fixture(scope="module")
def original3(tmp_path_factory) -> ChatGLM3Tokenizer:
    return load_real_tokenizer(CHATGLM3, tmp_path_factory.mktemp("original3"))


def test_official_training_rows(real_tokenizer, dev_rows, model_goldens):
    """Every row is equal if padded to 64 + 64, as in the official script."""
    rows = encode_train(real_tokenizer, pairs(dev_rows[0][:4], dev_rows[1][:4]), 64, 64)
    batch = train_batch([row.columns for row in rows], real_tokenizer.pad_token_id, length=128)
    assert torch.equal(batch["input_ids"], model_goldens["train_64_64/input_ids"])
    assert torch.equal(batch["labels"], model_goldens["train_64_64/labels"])
    assert rows[0].input_ids == model_goldens["train_single_nopad/input_ids"][0].tolist()


def test_official_evaluation_rows(real_tokenizer, dev_rows, tokenizer_goldens):
    """References are compared as text, because the official ones end with the two special tokens of a prompt."""
    golden = tokenizer_goldens["official_eval"]
    rows = encode_eval(real_tokenizer, pairs(dev_rows[0][:8], dev_rows[1][:8]), 64, 64)
    batch = left_pad([row.prompt_ids for row in rows], real_tokenizer.pad_token_id)
    assert batch["input_ids"].tolist() == golden["input_ids"]
    for row, label_ids in zip(rows, golden["labels"], strict=True):
        assert label_ids[-2:] == [130001, 130004]
        assert row.reference == real_tokenizer.decode(label_ids, skip_special_tokens=True).strip()


def test_official_conversation(real_tokenizer, generation_goldens):
    golden = generation_goldens["prompts"]["history1"]
    query, history = "那它是哪一年创建的", [["你好", "你好，我是人工智能助手。"]]
    assert real_tokenizer.build_prompt(query, history) == golden["text"]
    assert (
        encode_eval(real_tokenizer, [conversation_of(query, "", history)], 64, 64)[0].prompt_ids
        == (golden["input_ids"])
    )


def check_official_rows(rows, case: str, pad_to: int) -> None:
    """The rows equal the first rows of a golden, padded as in the official script of ChatGLM2: with labels of -100."""
    golden = load_arrays(original(f"chatglm2-6b/{case}.npz"))
    batch = train_batch([row.columns for row in rows], pad_token_id=0, length=pad_to)
    assert torch.equal(batch["input_ids"], golden["input_ids"][: len(rows)])
    assert torch.equal(batch["labels"], golden["labels"][: len(rows)])


@pytest.mark.parametrize(
    ("case", "first", "count", "max_source", "max_target"), [("train_b4", 0, 4, 64, 128), ("train_trunc", 7, 2, 20, 10)]
)
def test_official_training_rows_of_chatglm2(original2, dev_rows, case, first, count, max_source, max_target):
    contents, summaries = (texts[first : first + count] for texts in dev_rows)
    rows = encode_train(original2, pairs(contents, summaries), max_source, max_target)
    check_official_rows(rows, case, max_source + max_target + 1)
    assert [row.truncated for row in rows] == ([True] * 2 if case == "train_trunc" else [False, True, False, False])


def test_official_rounds_of_chatglm2(original2, dev_rows):
    """Rows with 0, 1 and 2 earlier rounds. The third is too long; the official script cuts its question."""
    histories = [[], [["你好", "你好！有什么可以帮您？"]], [["1+1=?", "2"], ["Translate: 苹果\n", "apple"]]]
    chats = [conversation_of(dev_rows[0][4 + i], dev_rows[1][4 + i], history) for i, history in enumerate(histories)]
    rows = encode_train(original2, chats, 96, 64)
    check_official_rows(rows[:2], "train_history", 161)
    assert [row.dropped_turns for row in rows] == [0, 0, 2]
    whole = encode_train(original2, chats, 1000, 64)[2]
    golden = load_arrays(original("chatglm2-6b/train_history.npz"))["input_ids"][2].tolist()
    assert whole.input_ids[:96] == golden[:96]


def test_official_evaluation_rows_of_chatglm2(original2, dev_rows):
    """The official references end with the two special tokens of a prompt."""
    golden = original_json("chatglm2-6b/index.json")["eval_preprocess"]
    rows = encode_eval(original2, pairs(dev_rows[0][10:14], dev_rows[1][10:14]), 64, 64)
    batch = left_pad([row.prompt_ids for row in rows], original2.pad_token_id)
    assert batch["input_ids"].tolist() == golden["input_ids"]
    assert [row.reference for row in rows] == [original2.decode(ids).strip() for ids in golden["labels"]]


def official_messages(case: dict) -> list[list[Turn]]:
    return [read_messages(messages, "conversations", set()) for messages in case["conversations"]]


@pytest.mark.parametrize(("case", "rows"), [("train_b4", slice(0, 4)), ("train_multiturn", slice(1, 3))])
def test_official_training_rows_of_chatglm3(original3, case, rows):
    """All rows that fit the lengths, with and without system prompt, call and observation."""
    golden = original_json("chatglm3-6b/index.json")["process_batch"][case]
    lengths = golden["max_input_length"], golden["max_output_length"]
    found = encode_train(original3, official_messages(golden)[rows], *lengths)
    assert [row.input_ids for row in found] == golden["input_ids"][rows]
    assert [row.labels for row in found] == golden["labels"][rows]


@pytest.mark.parametrize(("case", "kept"), [("train_b4", [0, 2, 3]), ("train_multiturn", [0, 2, 3, 4])])
def test_official_evaluation_rows_of_chatglm3(original3, case, kept):
    """The official script drops rows whose prompt is too long, and its references keep the end token."""
    golden = original_json("chatglm3-6b/index.json")
    conversations, golden = official_messages(golden["process_batch"][case]), golden["process_batch_eval"][case]
    rows = encode_eval(original3, conversations, golden["max_input_length"], golden["max_output_length"])
    assert len(rows) == len(kept) + 1
    assert [rows[index].prompt_ids for index in kept] == golden["input_ids"]
    references = [original3.decode(ids, skip_special_tokens=True).strip() for ids in golden["output_ids"]]
    assert [rows[index].reference for index in kept] == references


# ChatGLM-6B, with any vocabulary


def test_prompt_without_history_is_the_query(demo_tokenizer):
    build_prompt = demo_tokenizer.build_prompt
    assert build_prompt("你好") == build_prompt("你好", []) == "你好"


def test_prompt_with_history(demo_tokenizer):
    history = [["你好", "您好"], ["几点", "三点"]]
    assert demo_tokenizer.build_prompt("谢谢", history) == (
        "[Round 0]\n问：你好\n答：您好\n[Round 1]\n问：几点\n答：三点\n[Round 2]\n问：谢谢\n答："
    )


def test_training_row(demo_tokenizer):
    """Every token after [gMASK] has a label; <sop> is the first."""
    row = encode_train(demo_tokenizer, PAIR, 64, 64)[0]
    prompt, answer = ids_of(demo_tokenizer, CONTENT), ids_of(demo_tokenizer, SUMMARY)
    sop, eop, gmask = demo_tokenizer.bos_token_id, demo_tokenizer.eos_token_id, demo_tokenizer.gmask_token_id
    assert row.input_ids == [*prompt, gmask, sop, *answer, eop]
    assert row.labels == [-100] * (len(prompt) + 1) + [sop, *answer, eop]
    assert not row.truncated


@pytest.mark.parametrize("max_source, max_target", [(8, 64), (64, 6), (8, 6)])
def test_cut_training_row(demo_tokenizer, max_source, max_target):
    """The prompt is cut before [gMASK] and the answer before <eop>, so both tokens stay."""
    row = encode_train(demo_tokenizer, PAIR, max_source, max_target)[0]
    prompt = ids_of(demo_tokenizer, CONTENT)[: max_source - 1]
    answer = ids_of(demo_tokenizer, SUMMARY)[: max_target - 2]
    assert row.input_ids == demo_tokenizer.build_inputs_with_special_tokens(prompt, answer)
    assert sum(label != -100 for label in row.labels) == len(answer) + 2
    assert row.truncated


def test_a_row_that_just_fits_is_not_truncated(demo_tokenizer):
    prompt, answer = len(ids_of(demo_tokenizer, CONTENT)), len(ids_of(demo_tokenizer, SUMMARY))
    fits = [(prompt + 1, answer + 2, False), (prompt, answer + 2, True), (prompt + 1, answer + 1, True)]
    for max_source, max_target, truncated in fits:
        assert encode_train(demo_tokenizer, PAIR, max_source, max_target)[0].truncated is truncated
    fits = [(prompt + 2, answer + 2, False), (prompt + 1, answer + 2, True), (prompt + 2, answer + 1, True)]
    for max_source, max_target, truncated in fits:
        assert encode_eval(demo_tokenizer, PAIR, max_source, max_target)[0].truncated is truncated


def test_evaluation_row(demo_tokenizer):
    row = encode_eval(demo_tokenizer, [conversation_of(CONTENT, f" {SUMMARY}\n")], 64, 64)[0]
    assert row.prompt_ids == demo_tokenizer.encode(CONTENT)
    assert row.reference == demo_tokenizer.decode(ids_of(demo_tokenizer, SUMMARY)) and not row.truncated


def test_cut_evaluation_row(demo_tokenizer):
    """Here max_source_length includes the two special tokens, so no prompt is longer."""
    row = encode_eval(demo_tokenizer, PAIR, 10, 8)[0]
    kept = ids_of(demo_tokenizer, CONTENT)[:8]
    assert row.prompt_ids == [*kept, demo_tokenizer.gmask_token_id, demo_tokenizer.bos_token_id]
    assert row.reference == demo_tokenizer.decode(ids_of(demo_tokenizer, SUMMARY)[:6]) and row.truncated


def test_rows_keep_their_order(demo_tokenizer):
    contents, summaries = [f"类型#裙{i}" for i in range(5)], [f"好看{i}" for i in range(5)]
    rows = encode_train(demo_tokenizer, pairs(contents, summaries), 64, 64)
    alone = [encode_train(demo_tokenizer, [pair], 64, 64)[0] for pair in pairs(contents, summaries)]
    assert [row[:4] for row in whole(rows)] == [row[:4] for row in whole(alone)]
    assert [row.origin.conversation for row in rows] == list(range(5))


def test_a_typed_mask_token_does_not_move_the_labels(demo_tokenizer):
    """[MASK] in the data once broke training: the labels must start after our own [gMASK]."""
    row = encode_train(demo_tokenizer, [conversation_of("位于[MASK]的[gMASK]", "好看")], 64, 64)[0]
    gmask_index = row.input_ids.index(demo_tokenizer.gmask_token_id)
    assert row.labels[: gmask_index + 1] == [-100] * (gmask_index + 1)
    assert row.labels[gmask_index + 1 :] == row.input_ids[gmask_index + 1 :]


# Numbered rounds: ChatGLM-6B and ChatGLM2-6B

THREE_ROUNDS = [
    Turn("user", "你好"),
    Turn("assistant", "hello", loss=True),
    Turn("user", "今天天气怎么样"),
    Turn("assistant", "你好天气"),
    Turn("user", "world"),
    Turn("assistant", "白色", loss=True),
]


@pytest.fixture(params=["chatglm", "chatglm2"])
def rounds_tokenizer(request, demo_tokenizer, tokenizer2):
    return demo_tokenizer if request.param == "chatglm" else tokenizer2


def test_training_row_of_chatglm2(tokenizer2):
    """The answer and its end token have labels."""
    row = encode_train(tokenizer2, [conversation_of("你好", "hello")], 64, 64)[0]
    prompt, answer = ids_of(tokenizer2, "[Round 1]\n\n问：你好\n\n答："), ids_of(tokenizer2, "hello")
    end = tokenizer2.eos_token_id
    assert row.input_ids == [tokenizer2.get_command("[gMASK]"), tokenizer2.get_command("sop"), *prompt, *answer, end]
    assert row.labels == [-100] * (len(prompt) + 2) + [*answer, end]


def test_a_row_of_chatglm2_that_just_fits_is_not_truncated(tokenizer2):
    """The length of the question includes the special tokens; that of the answer excludes the end token."""
    pair = [conversation_of("你好", "hello world")]
    prompt, answer = (len(ids_of(tokenizer2, text)) for text in ("[Round 1]\n\n问：你好\n\n答：", "hello world"))
    fits = [(prompt + 2, answer, False), (prompt + 1, answer, True), (prompt + 2, answer - 1, True)]
    for max_source, max_target, truncated in fits:
        row = encode_train(tokenizer2, pair, max_source, max_target)[0]
        assert row.truncated is truncated
        assert len(row.input_ids) == max_source + max_target + 1
        assert sum(label != -100 for label in row.labels) == max_target + 1


def test_every_trained_answer_is_a_row_of_rounds(rounds_tokenizer):
    """The untrained answer in between is part of the history."""
    train = encode_train(rounds_tokenizer, [THREE_ROUNDS, THREE_ROUNDS[:2]], 200, 64)
    contents = [turn.content for turn in THREE_ROUNDS]
    first = conversation_of(*contents[:2])
    last = conversation_of(*contents[4:], history=[contents[:2], contents[2:4]])
    alone = encode_train(rounds_tokenizer, [first, last, first], 200, 64)
    assert [row[:4] for row in whole(train)] == [row[:4] for row in whole(alone)]
    assert [row.origin.conversation for row in train] == [0, 0, 1]
    rows = encode_eval(rounds_tokenizer, [THREE_ROUNDS], 200, 64)
    assert [row.reference for row in rows] == ["hello", "白色"]
    assert rows[1].prompt_ids == encode_chat(rounds_tokenizer, "world", [contents[:2], contents[2:4]])


def test_too_long_rounds_lose_the_oldest_first(rounds_tokenizer):
    """They lose exactly as many as needed; the last question is cut only if it alone is too long."""
    texts = [turn.content for turn in THREE_ROUNDS]
    history, query, answer = [texts[:2], texts[2:4]], texts[4], texts[5]
    chat = [conversation_of(query, answer, history)]
    lengths = [
        len(ids_of(rounds_tokenizer, rounds_tokenizer.build_prompt(query, history[dropped:]))) for dropped in range(3)
    ]
    assert lengths[0] > lengths[1] > lengths[2]
    for encode in (encode_train, encode_eval):
        specials = 1 if encode is encode_train and rounds_tokenizer.eos_token == "<eop>" else 2
        for dropped, length in enumerate(lengths):
            short = encode(rounds_tokenizer, [conversation_of(query, answer, history[dropped:])], 200, 64)[0]
            found = encode(rounds_tokenizer, chat, length + specials, 64)[0]
            assert whole([found]) == whole([short._replace(dropped_turns=2 * dropped, origin=found.origin)])
        cut = encode(rounds_tokenizer, chat, lengths[2] + specials - 1, 64)[0]
        assert (cut.truncated, cut.dropped_turns) == (True, 4)


# Of all three


def test_role_tokens_end_an_answer_where_there_are_roles(demo_tokenizer, tokenizer2, tokenizer3):
    assert stop_ids(demo_tokenizer) == [demo_tokenizer.eos_token_id]
    assert stop_ids(tokenizer2) == [2]
    assert stop_ids(tokenizer3) == [2, tokenizer3.get_command("<|user|>"), tokenizer3.get_command("<|observation|>")]


def test_a_subclass_of_a_tokenizer_encodes_like_its_base(demo_tokenizer, tokenizer2, tokenizer3):
    for tokenizer in (demo_tokenizer, tokenizer2, tokenizer3):
        subclass = type("Subclass", (type(tokenizer),), {})(tokenizer.vocab_file)
        for encode in (encode_train, encode_eval):
            assert whole(encode(subclass, [THREE_ROUNDS], 64, 64)) == whole(encode(tokenizer, [THREE_ROUNDS], 64, 64))
        assert whole(encode_texts(subclass, ["hello"], 64)) == whole(encode_texts(tokenizer, ["hello"], 64))
        assert stop_ids(subclass) == stop_ids(tokenizer)


# Plain text


@pytest.mark.parametrize("block_size", [3, 8, 11, 1000])
def test_blocks_of_text_lose_nothing(demo_tokenizer, tokenizer2, tokenizer3, block_size):
    texts = ["你好，今天天气怎么样？" * 3, "hello", "类型#裙*颜色#白色\n" * 4]
    for tokenizer in (demo_tokenizer, tokenizer2, tokenizer3):
        start = tokenizer.build_inputs_with_special_tokens([])
        rows = encode_texts(tokenizer, texts, block_size)
        assert all(len(row.input_ids) <= block_size and row.input_ids[:2] == start for row in rows)
        assert all(row.labels == [-100, -100, *row.input_ids[2:]] for row in rows)
        together = [token for row in rows for token in row.input_ids[2:]]
        assert together == [token for text in texts for token in [*ids_of(tokenizer, text), tokenizer.eos_token_id]]
        assert len(rows) == sum(-(-(len(ids_of(tokenizer, text)) + 1) // (block_size - 2)) for text in texts)
