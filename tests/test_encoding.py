"""Rows of text -> ids and labels -> batches: as the official scripts encode them."""

import pytest
import torch

from common.collator import TrainCollator, left_pad
from common.encoding import build_prompt, encode_eval, encode_train

CONTENT = "类型#裙*材质#棉*颜色#白色*风格#简约*裙长#连衣裙"
SUMMARY = "这条白色的连衣裙，简约大方，棉的质感柔软舒适。"


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


# With the original vocabulary: the rows of the official scripts


@pytest.fixture(scope="module")
def dev_rows(real_rows) -> tuple[list[str], list[str]]:
    rows = real_rows("tokenizer.json")["dev"][:8]
    return [row["content"]["text"] for row in rows], [row["summary"]["text"] for row in rows]


def test_official_training_rows(real_tokenizer, dev_rows, model_goldens):
    """Padded to 64 + 64 as the official script pads, every row is equal."""
    rows = encode_train(real_tokenizer, dev_rows[0][:4], dev_rows[1][:4], 64, 64)
    collate = TrainCollator(real_tokenizer.pad_token_id, pad_to=128)
    batch = collate([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    assert torch.equal(batch["input_ids"], model_goldens["train_64_64/input_ids"])
    assert torch.equal(batch["labels"], model_goldens["train_64_64/labels"])
    assert rows[0].input_ids == model_goldens["train_single_nopad/input_ids"][0].tolist()


def test_official_evaluation_rows(real_tokenizer, dev_rows, tokenizer_goldens):
    """The references are compared as text; the official ones still carry the two special tokens of a prompt."""
    golden = tokenizer_goldens["official_eval"]
    rows = encode_eval(real_tokenizer, *dev_rows, 64, 64)
    batch = left_pad([row.prompt_ids for row in rows], real_tokenizer.pad_token_id)
    assert batch["input_ids"].tolist() == golden["input_ids"]
    for row, label_ids in zip(rows, golden["labels"], strict=True):
        assert label_ids[-2:] == [130001, 130004]
        assert row.reference == real_tokenizer.decode(label_ids, skip_special_tokens=True).strip()


def test_official_conversation(real_tokenizer, generation_goldens):
    golden = generation_goldens["prompts"]["history1"]
    prompt = build_prompt("那它是哪一年创建的", [["你好", "你好，我是人工智能助手。"]])
    assert prompt == golden["text"]
    assert encode_eval(real_tokenizer, [prompt], [""], 64, 64)[0].prompt_ids == golden["input_ids"]


# With any vocabulary


def test_prompt_without_history_is_the_query():
    assert build_prompt("你好") == build_prompt("你好", []) == "你好"


def test_prompt_with_history():
    history = [["你好", "您好"], ["几点", "三点"]]
    assert build_prompt("谢谢", history) == (
        "[Round 0]\n问：你好\n答：您好\n[Round 1]\n问：几点\n答：三点\n[Round 2]\n问：谢谢\n答："
    )


def test_training_row(demo_tokenizer):
    """Labelled is everything after [gMASK], which itself learns to predict <sop>."""
    row = encode_train(demo_tokenizer, [CONTENT], [SUMMARY], 64, 64)[0]
    prompt, answer = ids_of(demo_tokenizer, CONTENT), ids_of(demo_tokenizer, SUMMARY)
    sop, eop, gmask = demo_tokenizer.bos_token_id, demo_tokenizer.eos_token_id, demo_tokenizer.gmask_token_id
    assert row.input_ids == [*prompt, gmask, sop, *answer, eop]
    assert row.labels == [-100] * (len(prompt) + 1) + [sop, *answer, eop]
    assert not row.truncated


@pytest.mark.parametrize("max_source, max_target", [(8, 64), (64, 6), (8, 6)])
def test_cut_training_row(demo_tokenizer, max_source, max_target):
    """The prompt loses its end before [gMASK], the answer before <eop>: both markers stay."""
    row = encode_train(demo_tokenizer, [CONTENT], [SUMMARY], max_source, max_target)[0]
    prompt = ids_of(demo_tokenizer, CONTENT)[: max_source - 1]
    answer = ids_of(demo_tokenizer, SUMMARY)[: max_target - 2]
    assert row.input_ids == demo_tokenizer.build_inputs_with_special_tokens(prompt, answer)
    assert sum(label != -100 for label in row.labels) == len(answer) + 2
    assert row.truncated


def test_cut_is_told_from_a_row_that_just_fits(demo_tokenizer):
    prompt, answer = len(ids_of(demo_tokenizer, CONTENT)), len(ids_of(demo_tokenizer, SUMMARY))
    fits = [(prompt + 1, answer + 2, False), (prompt, answer + 2, True), (prompt + 1, answer + 1, True)]
    for max_source, max_target, truncated in fits:
        assert encode_train(demo_tokenizer, [CONTENT], [SUMMARY], max_source, max_target)[0].truncated is truncated
    fits = [(prompt + 2, answer + 2, False), (prompt + 1, answer + 2, True), (prompt + 2, answer + 1, True)]
    for max_source, max_target, truncated in fits:
        assert encode_eval(demo_tokenizer, [CONTENT], [SUMMARY], max_source, max_target)[0].truncated is truncated


def test_evaluation_row(demo_tokenizer):
    row = encode_eval(demo_tokenizer, [CONTENT], [f" {SUMMARY}\n"], 64, 64)[0]
    assert row.prompt_ids == demo_tokenizer.encode(CONTENT)
    assert row.reference == demo_tokenizer.decode(ids_of(demo_tokenizer, SUMMARY)) and not row.truncated


def test_cut_evaluation_row(demo_tokenizer):
    """The two special tokens are part of max_source_length here, so that a prompt never gets longer."""
    row = encode_eval(demo_tokenizer, [CONTENT], [SUMMARY], 10, 8)[0]
    kept = ids_of(demo_tokenizer, CONTENT)[:8]
    assert row.prompt_ids == [*kept, demo_tokenizer.gmask_token_id, demo_tokenizer.bos_token_id]
    assert row.reference == demo_tokenizer.decode(ids_of(demo_tokenizer, SUMMARY)[:6]) and row.truncated


def test_rows_keep_their_order(demo_tokenizer):
    contents, summaries = [f"类型#裙{i}" for i in range(5)], [f"好看{i}" for i in range(5)]
    rows = encode_train(demo_tokenizer, contents, summaries, 64, 64)
    assert rows == [encode_train(demo_tokenizer, [c], [s], 64, 64)[0] for c, s in zip(contents, summaries, strict=True)]


def test_a_typed_mask_token_does_not_move_the_labels(demo_tokenizer):
    """[MASK] in the data once broke training: the label must start after our own [gMASK] <sop>."""
    row = encode_train(demo_tokenizer, ["位于[MASK]的[gMASK]"], ["好看"], 64, 64)[0]
    gmask_index = row.input_ids.index(demo_tokenizer.gmask_token_id)
    assert row.labels[: gmask_index + 1] == [-100] * (gmask_index + 1)
    assert row.labels[gmask_index + 1 :] == row.input_ids[gmask_index + 1 :]


# Batches

ROWS = [
    {"input_ids": [5, 6, 1, 2, 7, 9], "labels": [-100, -100, -100, 2, 7, 9]},
    {"input_ids": [5, 1, 2, 9], "labels": [-100, -100, 2, 9]},
]


def test_training_batch_is_padded_on_the_right():
    batch = TrainCollator(pad_token_id=3)(ROWS)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 1, 2, 7, 9], [5, 1, 2, 9, 3, 3]],
        "labels": [[-100, -100, -100, 2, 7, 9], [-100, -100, 2, 9, -100, -100]],
        "attention_mask": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


@pytest.mark.parametrize("pad_to, length", [(0, 6), (4, 6), (6, 6), (9, 9)])
def test_training_batch_of_a_fixed_length(pad_to, length):
    """A row that is longer is not cut."""
    batch = TrainCollator(pad_token_id=3, pad_to=pad_to)(ROWS)
    assert {value.shape for value in batch.values()} == {(2, length)}
    assert batch["attention_mask"].sum(-1).tolist() == [6, 4]
    assert batch["input_ids"][1].tolist() == [5, 1, 2, 9] + [3] * (length - 4)
    assert batch["labels"][1].tolist() == [-100, -100, 2, 9] + [-100] * (length - 4)


def test_pads_that_count():
    """ignore_pad_token_for_loss=False of the official script: labels are padded with the pad token."""
    batch = TrainCollator(pad_token_id=3, label_pad_token_id=3)(ROWS)
    assert batch["labels"][1].tolist() == [-100, -100, 2, 9, 3, 3]


def test_prompts_are_padded_on_the_left():
    batch = left_pad([[5, 1, 2], [7, 6, 5, 1, 2]], pad_token_id=3)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[3, 3, 5, 1, 2], [7, 6, 5, 1, 2]],
        "attention_mask": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
    }


@torch.no_grad()
def test_padding_does_not_change_the_loss(small_model):
    """Padded to the longest row or much further: the loss of the labelled tokens is the same."""
    config = small_model.config
    rows = [[5, 6, config.gmask_token_id, config.bos_token_id, 7, 8, 9, config.eos_token_id]]
    rows.append([5, config.gmask_token_id, config.bos_token_id, 4, config.eos_token_id])
    rows = [{"input_ids": ids, "labels": [-100] * (len(ids) - 3) + ids[-3:]} for ids in rows]
    short, long = (TrainCollator(3, pad_to=pad_to)(rows) for pad_to in (0, 20))
    torch.testing.assert_close(small_model(**long).loss, small_model(**short).loss)
