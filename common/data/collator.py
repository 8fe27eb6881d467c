"""Rows of different lengths -> one batch, padded no further than its longest row; or packed, several in one."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
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


def share(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows shared out to as few packed rows as hold them, of like lengths. ``room``: the longest; a row may be longer.

    Returns the indices of the rows of each.
    """
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for count in range(min(len(lengths), max(1, -(-sum(lengths) // room))), len(lengths) + 1):
        packed: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for index in longest_first:
            emptiest = filled.index(min(filled))
            packed[emptiest].append(index)
            filled[emptiest] += lengths[index]
        if max(filled) <= room:
            break
    return packed


def packed_batch(
    rows: Sequence[Mapping[str, Any]], positions: Callable[[Tensor], Tensor], room: int, **padding: int
) -> dict[str, Any]:
    """As ``train_batch``, with the rows that ``share`` puts together in one, each after the end of another.

    ``position_ids``: those that ``positions`` gives each row alone, [b, s] or [b, 2, s], int64. They tell a model where
    a row begins, so that none sees another. A pad is a row of its own. The first token of a row is never predicted.
    ``padding``: of ``train_batch``.
    """
    shared = share([len(row["input_ids"]) for row in rows], room)
    ids = [list(chain.from_iterable(rows[index]["input_ids"] for index in indices)) for indices in shared]
    labels = [list(chain.from_iterable((-100, *rows[index]["labels"][1:]) for index in indices)) for indices in shared]
    batch = train_batch([{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)], **padding)
    of_rows = positions(pad([row["input_ids"] for row in rows], padding["pad_token_id"]))
    places = [
        torch.cat([of_rows[index, ..., : len(rows[index]["input_ids"])] for index in indices], dim=-1)
        for indices in shared
    ]
    slots = batch["input_ids"].shape[1]
    return batch | {
        "position_ids": torch.stack([F.pad(each, (0, slots - each.shape[-1])) for each in places]),
        "origins": [(row["file"], row["line"]) for row in rows],
    }


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Tensor]:
    """A batch of prompts for generation: ``input_ids`` and ``attention_mask`` [b, s], padded on the left."""
    return {
        "input_ids": pad(prompts, pad_token_id, side="left"),
        "attention_mask": pad([[1] * len(prompt) for prompt in prompts], 0, side="left"),
    }
