"""Answers that grow together: requests join the batch and leave it between two tokens.

A row of the cache is [prefix | pads | tokens]: all rows have the same prefix, and pads stand between it and the tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from common.data.collator import left_pad
from common.models.cache import GrowingLayer


class RunningBatch:
    """The rows that a model answers, each as it would alone."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.prefix_length = 0
        self.cache: Cache | None = None
        self.mask = torch.empty(0, 0, dtype=torch.long, device=model.device)  # [b, t], 1 = token
        self.positions = torch.empty(0, device=model.device)  # of the next tokens: [b, 1], of ChatGLM-6B [b, 2, 1]

    def __len__(self) -> int:
        return len(self.mask)

    @torch.no_grad()
    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads prompts and makes them the last rows. Returns the logits of their next tokens, [len(prompts), v]."""
        inputs = left_pad(prompts, pad_token_id=0)
        ids, mask = (inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        cache = Cache(layer_class_to_replicate=GrowingLayer)
        positions = self.model.positions(ids, self.model.config, mask)
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        following = positions[..., -1:].clone()
        following[:, -1] += 1  # ChatGLM-6B counts the block, and keeps the position in the prompt
        if self.cache is None:
            self.prefix_length = cache.get_seq_length() - ids.shape[1]
            self.cache, self.mask, self.positions = cache, mask, following
            return logits
        length = max(self.mask.shape[1], ids.shape[1])
        for layer, new in zip(self.cache.layers, cache.layers, strict=True):
            layer.keys = torch.cat([self.padded(states, length) for states in (layer.keys, new.keys)])
            layer.values = torch.cat([self.padded(states, length) for states in (layer.values, new.values)])
        self.mask = torch.cat([F.pad(each, (length - each.shape[1], 0)) for each in (self.mask, mask)])
        self.positions = torch.cat([self.positions, following])
        return logits

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Appends a token to each row. Returns the logits of the next ones, [b, v]."""
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        self.mask = F.pad(self.mask, (0, 1), value=1)
        logits = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self.positions[:, -1] += 1
        return logits[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other rows, and pads that no row needs any more."""
        if not rows:
            self.cache, self.mask = None, self.mask[:0]
            return
        assert self.cache is not None
        chosen = torch.tensor(rows, device=self.mask.device)
        mask, self.positions = self.mask[chosen], self.positions[chosen]
        pads = int(mask.any(0).int().argmax())
        first = self.prefix_length
        for layer in self.cache.layers:
            layer.keys, layer.values = (
                torch.cat([states[chosen, :, :first], states[chosen, :, first + pads :]], dim=2)
                for states in (layer.keys, layer.values)
            )
        self.mask = mask[:, pads:]

    def padded(self, states: Tensor, length: int) -> Tensor:
        """Keys or values [b, g, prefix + t, d] with pads for ``length`` tokens."""
        first = self.prefix_length
        pads = length - (states.shape[2] - first)
        return torch.cat([states[:, :, :first], F.pad(states[:, :, first:], (0, 0, pads, 0))], dim=2)
