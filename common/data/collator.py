"""Rows of different lengths -> one batch, padded no further than its longest row."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right", length: int = 0) -> Tensor:
    """Rows of ids -> [b, s], int64; s is the length of the longest row, and at least ``length``."""
    missing = [value] * (length - max(map(len, rows)))
    tensors = [torch.tensor([*row, *missing]) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def train_batch(
    rows: Sequence[Mapping[str, list[int]]], pad_token_id: int, label_pad_token_id: int = -100, length: int = 0
) -> dict[str, Tensor]:
    """``input_ids`` and ``labels`` padded on the right, with their ``attention_mask``; all as ``pad`` returns it."""
    input_ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad(input_ids, pad_token_id, length=length),
        "labels": pad([row["labels"] for row in rows], label_pad_token_id, length=length),
        "attention_mask": pad([[1] * len(ids) for ids in input_ids], 0, length=length),
    }


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Tensor]:
    """A batch of prompts for generation: ``input_ids`` and ``attention_mask`` [b, s], padded on the left."""
    return {
        "input_ids": pad(prompts, pad_token_id, side="left"),
        "attention_mask": pad([[1] * len(prompt) for prompt in prompts], 0, side="left"),
    }
