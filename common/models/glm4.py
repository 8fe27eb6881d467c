"""GLM-4 as transformers has it, but for its loss, and with a prefix if one is attached.

The head computes the logits of labelled positions only. A prefix enters each layer in its attention function.
"""

from functools import wraps

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from common.models.base import ForNextToken, Visible, fused_attention

PREFIX_ATTENTION = "prefix"
"""The attention function of models with a prefix, by its name in transformers."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of a layer to its prefix, then to the text. query: [b, h, s, d]; key, value: [b, g, t, d].

    attention_mask: boolean [b, 1, s, t], True = visible; None: causal. Returns [b, s, h, d].
    """
    visible: Visible = attention_mask
    if attention_mask is None and query.shape[2] > 1:
        visible = "causal"
    if module.prefix is not None:
        first: Tensor = module.prefix.to(key.dtype)  # type: ignore[assignment, operator]
        key, value = torch.cat((first[0], key), dim=2), torch.cat((first[1], value), dim=2)
        if attention_mask is not None:
            visible = F.pad(attention_mask, (first.shape[3], 0), value=True)
    return fused_attention(query, key, value, visible, scaling).transpose(1, 2), None


AttentionInterface.register(PREFIX_ATTENTION, attend)
AttentionMaskInterface.register(PREFIX_ATTENTION, sdpa_mask)


class WithPrefix(ForNextToken):
    """A model of transformers whose layers see a prefix; it is not cached, so a cache counts positions of the text."""

    def __init__(self, config: transformers.PreTrainedConfig):
        super().__init__(config)
        self.base_model.prefix_encoder = None
        self.prefix_of: tuple[nn.Module | None, int] = (None, 0)  # encoder and batch size

    @wraps(ForNextToken.forward)  # the Trainer reads the names of its arguments
    def forward(self, input_ids: Tensor, *args, **kwargs):
        encoder = self.base_model.prefix_encoder
        if encoder is not None and self.config._attn_implementation != PREFIX_ATTENTION:
            self.set_attn_implementation(PREFIX_ATTENTION)
        if self.config._attn_implementation == PREFIX_ATTENTION:
            cache = kwargs.get("past_key_values")
            goes_on = cache is not None and cache.get_seq_length() > 0
            if not goes_on or self.prefix_of != (
                encoder,
                len(input_ids),
            ):  # else the layers have it from the last token
                prefixes = [None] * len(self.base_model.layers) if encoder is None else encoder(len(input_ids))
                for layer, prefix in zip(self.base_model.layers, prefixes, strict=True):
                    layer.self_attn.prefix = prefix
                self.prefix_of = encoder, len(input_ids)
        return super().forward(input_ids, *args, **kwargs)


class GlmForCausalLM(WithPrefix, transformers.GlmForCausalLM):
    pass


class Glm4ForCausalLM(WithPrefix, transformers.Glm4ForCausalLM):
    pass
