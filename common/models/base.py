"""The part that both architectures share: attention with prefix and cache, masks, the pass through the layers, loss.

Shapes: b batch, s new positions, t positions seen so far (prefix + cached + new), h heads, g groups of shared keys and
values (h if every head has its own), d head size, v vocabulary.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional as F
from torch.nn.attention.bias import CausalBias, causal_lower_right
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from common.models.loss import next_token_loss

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary embedding."""

Visible = Tensor | Literal["causal"] | None
"""The keys that each new position may attend to: boolean [b, 1, s, t], True = visible; all up to itself; or all."""

Weights = dict[str, Tensor]


class GLMConfig(PreTrainedConfig):
    model_type = "chatglm"

    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    layernorm_epsilon: float = 1e-5
    use_cache: bool = True
    pre_seq_len: int | None = None
    prefix_projection: bool = False

    def to_diff_dict(self) -> dict:
        """The content of config.json. It has ``torch_dtype``, or the original code would load float32.

        It has no ``auto_map``, so that no program runs code of a checkpoint that we saved.
        """
        fields = super().to_diff_dict()
        fields.pop("auto_map", None)
        return fields | {"_name_or_path": self.name_or_path, "torch_dtype": fields.get("dtype")}


def inverse_frequencies(dim: int, base: float = 10000, device: torch.device | None = None) -> Tensor:
    """Inverse frequencies of a rotary embedding of size ``dim``, in float32: [dim / 2]."""
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Visible, scaling: float
) -> tuple[Tensor, Tensor]:
    """Like ``fused_attention``, and returns the weights [b, h, s, t] too."""
    key, value = (repeat_kv(states, query.shape[1] // key.shape[1]) for states in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if isinstance(visible, str):
        visible = torch.ones_like(scores[0, 0], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return weights @ value, weights


def fused_attention(query: Tensor, key: Tensor, value: Tensor, visible: Visible, scaling: float) -> Tensor:
    """Attention by the fastest kernel. query: [b, h, s, d]; key, value: [b, g, t, d]. Returns [b, h, s, d].

    Only flash attention reads shared keys and values where they are; it knows no mask. The others get a copy per head.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the rotation makes them float32
    heads, groups, length = query.shape[1], key.shape[1], query.shape[2]
    causal, mask = isinstance(visible, str), None if isinstance(visible, str) else visible
    if length == 1:  # the heads of a group become positions of one head
        rows = query.view(query.shape[0], groups, heads // groups, -1)
        return F.scaled_dot_product_attention(rows, key, value, mask, scale=scaling).reshape(query.shape)
    if causal and length < key.shape[2]:  # a prefix or cached keys come first
        causal, mask = False, causal_lower_right(length, key.shape[2])
    shared = groups < heads and can_share(query, key, value, mask)
    if not shared:
        key, value = (repeat_kv(states, heads // groups) for states in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scaling, enable_gqa=shared)


def can_share(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel for this mask reads shared keys and values without copies."""
    if query.device.type == "cpu":
        return True
    masked = mask is not None and not isinstance(mask, CausalBias)
    return not masked and can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, True))


class GLMAttention(nn.Module):
    """Self-attention. An architecture defines ``query_key_value``, ``dense``, and ``heads``."""

    dense: nn.Linear

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.scaling = config.head_dim**-0.5

    def heads(self, hidden_states: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Query [b, h, s, d], key and value [b, g, s, d]; query and key are rotated."""
        raise NotImplementedError

    def forward(
        self, hidden_states: Tensor, visible: Visible, rotary: Rotary, prefix: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = self.heads(hidden_states, rotary)
        if prefix is not None:  # the learned keys and values precede the text and are not rotated
            key = torch.cat((prefix[0], key), dim=2)
            value = torch.cat((prefix[1], value), dim=2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if self.config._attn_implementation == "eager":
            context, weights = eager_attention(query, key, value, visible, self.scaling)
        else:
            context, weights = fused_attention(query, key, value, visible, self.scaling), None
        return self.dense(context.transpose(1, 2).flatten(2)), weights


class GLMPreTrainedModel(PreTrainedModel):
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": GradientCheckpointingLayer, "attentions": GLMAttention}
    # inv_freq is recomputed; a prefix in an old full checkpoint is read when the prefix encoder is attached.
    _keys_to_ignore_on_load_unexpected = [r"rotary_(pos_)?emb\.inv_freq", r"prefix_encoder\."]


class GLMModel(GLMPreTrainedModel):
    """The model below the head. An architecture defines the modules, ``get_position_ids``, and ``rotary``.

    ``rotary(position_ids)``: cosines and sines in float32, in the shape that its attention needs.
    """

    def __init__(self, config: GLMConfig):
        super().__init__(config)
        # P-Tuning v2 sets it. The module maps a batch size to keys and values [layers, 2, b, g, pre_seq_len, d].
        self.prefix_encoder: nn.Module | None = None

    @property
    def stack(self) -> Any:
        """The module that holds ``layers`` and ``final_layernorm``."""
        return self

    def in_context(self, position_ids: Tensor) -> Tensor | None:
        """Which tokens see each other in both directions, boolean [b, s]; None: attention is causal."""
        return None

    def visible_keys(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        past_length: int,
        prefix_length: int,
        packed: bool = False,
    ) -> Visible:
        """Attention is bidirectional in the context and causal after it. No token sees a pad, and all see the prefix.

        attention_mask: [b, past + s], 1 = token; or, as in the original, boolean [b, 1, s, past + s], True = hidden.
        Rows that are padded on the right need none: nothing before a pad sees it. ``packed``: a row begins wherever
        all positions are 0, or the last of them falls, and sees no other.
        """
        batch_size, length = input_ids.shape
        if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.all():
            attention_mask = None
        context = self.in_context(position_ids) if past_length == 0 and length > 1 else None
        if attention_mask is None and context is None and not packed:
            return None if length == 1 else "causal"
        if attention_mask is not None and attention_mask.dim() == 4:
            visible = ~attention_mask.bool()
        else:
            keys = torch.arange(past_length + length, device=input_ids.device)
            visible = keys <= keys[past_length:, None]  # [s, past + s]
            if context is not None:
                visible = visible | context[:, None]  # [b, s, s]
            if packed:
                places = position_ids.reshape(batch_size, -1, length)
                falls = places[:, -1].diff(prepend=places[:, -1, :1]) < 0  # the place in ChatGLM-6B's answer
                row = (places.eq(0).all(1) | falls).cumsum(-1)
                visible = visible & (row[:, None] == row[..., None])
            visible = visible.expand(batch_size, length, -1)[:, None]
            if attention_mask is not None:
                visible = visible & attention_mask.bool()[:, None, None]
        return F.pad(visible, (prefix_length, 0), value=True) if prefix_length else visible

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """input_ids: [b, s]; attention_mask: see ``visible_keys``; position_ids: as ``get_position_ids`` returns them.

        The prefix has no positions. Positions without a mask may be those of packed rows, as in transformers.
        """
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        prefix_length: int = 0 if self.prefix_encoder is None else self.prefix_encoder.pre_seq_len  # type: ignore
        past_length = max(cached - prefix_length, 0)
        packed = position_ids is not None and attention_mask is None and past_length == 0
        if position_ids is None:
            position_ids = self.get_position_ids(input_ids, attention_mask, past_length)
        visible = self.visible_keys(input_ids, position_ids, attention_mask, past_length, prefix_length, packed)

        hidden_states = self.get_input_embeddings()(input_ids)
        rotary = tuple(table.to(hidden_states.dtype) for table in self.rotary(position_ids))
        prefixes = [None] * len(self.stack.layers)
        if self.prefix_encoder is not None and cached == 0:  # later steps read the prefix from the cache
            prefixes = self.prefix_encoder(input_ids.shape[0], hidden_states.dtype)
        for layer, prefix in zip(self.stack.layers, prefixes, strict=True):
            hidden_states = layer(hidden_states, visible, rotary, prefix, past_key_values=past_key_values)
        hidden_states = self.stack.final_layernorm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


class ForNextToken(PreTrainedModel):
    """The forward pass of a model with its head."""

    @staticmethod
    def positions(input_ids: Tensor, config: PreTrainedConfig, attention_mask: Tensor | None = None) -> Tensor:
        """The positions of padded rows, from 0 after the pads on the left: [b, s] -> [b, s]."""
        if attention_mask is None:
            return torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        return (attention_mask.cumsum(-1) - 1).clamp(min=0)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        label_positions: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        loss_only: bool = False,
        loss_in_parts: bool = True,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Next-token logits [b, s, v], and the loss if labels [b, s] are given (-100 = no loss).

        ``next_token_loss`` computes the loss; ``label_positions`` and ``loss_in_parts`` are its ``positions`` and
        ``in_parts``. ``loss_only`` returns no logits, and never computes the logits of positions without a label.
        """
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        outputs = self.base_model(input_ids, use_cache=use_cache, **kwargs)
        hidden_states = outputs.last_hidden_state
        head = self.get_output_embeddings()
        logits = None if loss_only else head(slice_logits_to_keep(hidden_states, logits_to_keep).contiguous())
        loss = None
        if labels is not None:
            loss = next_token_loss(
                head, hidden_states, labels, label_positions, logits, num_items_in_batch, loss_in_parts
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class GLMForConditionalGeneration(ForNextToken, GLMPreTrainedModel, GenerationMixin):
    transformer: GLMModel

    def original_state_dict(self, dtype: torch.dtype = torch.float16, weights: Weights | None = None) -> Weights:
        """The weights as the original stores them: with inverse frequencies, without a prefix."""
        weights = weights or self.state_dict()
        return {name: w.to(dtype) for name, w in weights.items() if "prefix_encoder." not in name}
