"""Rows become batches as in the official scripts."""

import pytest
import torch

from common.data.collator import left_pad, train_batch

ROWS = [
    {"input_ids": [5, 6, 1, 2, 7, 9], "labels": [-100, -100, -100, 2, 7, 9]},
    {"input_ids": [5, 1, 2, 9], "labels": [-100, -100, 2, 9]},
]


def test_training_batch_is_padded_on_the_right():
    batch = train_batch(ROWS, pad_token_id=3)
    assert (batch.pop("tokens"), batch.pop("origins")) == (10, [])
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 1, 2, 7, 9], [5, 1, 2, 9, 3, 3]],
        "labels": [[-100, -100, -100, 2, 7, 9], [-100, -100, 2, 9, -100, -100]],
        "label_positions": [2, 3, 4, 7, 8],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


@pytest.mark.parametrize("pad_to, length", [(0, 6), (4, 6), (6, 6), (9, 9)])
def test_training_batch_of_a_fixed_length(pad_to, length):
    """A longer row is not cut."""
    batch = train_batch(ROWS, pad_token_id=3, length=pad_to)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, length)
    assert batch["tokens"] == 10
    assert batch["input_ids"][1].tolist() == [5, 1, 2, 9] + [3] * (length - 4)
    assert batch["labels"][1].tolist() == [-100, -100, 2, 9] + [-100] * (length - 4)


def test_pads_that_count():
    """With ignore_pad_token_for_loss=False the official script pads labels with the pad token."""
    batch = train_batch(ROWS, pad_token_id=3, label_pad_token_id=3)
    assert batch["labels"][1].tolist() == [-100, -100, 2, 9, 3, 3]
    assert batch["label_positions"].tolist() == [2, 3, 4, 7, 8, 9, 10]


def test_prompts_are_padded_on_the_left():
    batch = left_pad([[5, 1, 2], [7, 6, 5, 1, 2]], pad_token_id=3)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[3, 3, 5, 1, 2], [7, 6, 5, 1, 2]],
        "attention_mask": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
    }


@torch.no_grad()
def test_padding_does_not_change_the_loss(small_model):
    """The loss is the same whether rows are padded to the longest one or far beyond."""
    config = small_model.config
    rows = [[5, 6, config.gmask_token_id, config.bos_token_id, 7, 8, 9, config.eos_token_id]]
    rows.append([5, config.gmask_token_id, config.bos_token_id, 4, config.eos_token_id])
    rows = [{"input_ids": ids, "labels": [-100] * (len(ids) - 3) + ids[-3:]} for ids in rows]
    short, long = (train_batch(rows, 3, length=length) for length in (0, 20))
    torch.testing.assert_close(small_model(**long).loss, small_model(**short).loss)
