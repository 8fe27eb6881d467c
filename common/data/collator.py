"""Rows of different lengths -> one batch, padded no further than its longest row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Rows of ids -> [b, s], int64."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side=side)


@dataclass
class TrainCollator:
    """``input_ids`` and ``labels`` padded on the right, with their ``attention_mask``; all [b, s], int64."""

    pad_token_id: int
    label_pad_token_id: int = -100
    pad_to: int = 0  # at least this length: 0 pads to the longest row

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        input_ids = pad([row["input_ids"] for row in rows], self.pad_token_id)
        labels = pad([row["labels"] for row in rows], self.label_pad_token_id)
        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        missing = max(self.pad_to - input_ids.shape[1], 0)
        input_ids = torch.nn.functional.pad(input_ids, (0, missing), value=self.pad_token_id)
        labels = torch.nn.functional.pad(labels, (0, missing), value=self.label_pad_token_id)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths).long(),
        }


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Tensor]:
    """A batch of prompts for generation: ``input_ids`` and ``attention_mask`` [b, s], padded on the left."""
    return {
        "input_ids": pad(prompts, pad_token_id, side="left"),
        "attention_mask": pad([[1] * len(prompt) for prompt in prompts], 0, side="left"),
    }
