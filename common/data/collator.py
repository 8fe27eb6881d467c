"""Rows of different lengths -> one batch, padded no further than its longest row."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right", length: int = 0) -> Tensor:
    """Rows of ids -> [b, s], int64; s is the length of the longest row, and at least ``length``."""
    missing = [value] * (length - max(map(len, rows)))
    tensors = [torch.tensor([*row, *missing]) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def train_batch(
    rows: Sequence[Mapping[str, Any]], pad_token_id: int, label_pad_token_id: int = -100, length: int = 0
) -> dict[str, Any]:
    """``input_ids`` and ``labels`` as ``pad`` returns them, padded on the right, which needs no attention mask.

    ``label_positions`` [n], int64: the positions in the flattened batch whose next token has a label. ``tokens``: the
    number of tokens without pads. Both are found here, because a GPU would have to stop for the answer. ``origins``:
    (file, line) of the rows that have them.
    """
    labels = pad([row["labels"] for row in rows], label_pad_token_id, length=length)
    labelled = np.pad(labels.numpy()[:, 1:] != -100, ((0, 0), (0, 1)))
    return {
        "input_ids": pad([row["input_ids"] for row in rows], pad_token_id, length=length),
        "labels": labels,
        "label_positions": torch.from_numpy(np.flatnonzero(labelled)),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "origins": [(row["file"], row["line"]) for row in rows if "file" in row],
    }


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Tensor]:
    """A batch of prompts for generation: ``input_ids`` and ``attention_mask`` [b, s], padded on the left."""
    return {
        "input_ids": pad(prompts, pad_token_id, side="left"),
        "attention_mask": pad([[1] * len(prompt) for prompt in prompts], 0, side="left"),
    }
