"""ChatGLM2-6B and ChatGLM3-6B on transformers 5, with the module and parameter names of the original checkpoints.

Both have one architecture; they differ in tokenizer, prompt and context length.

Shapes: b batch, s new positions, t positions seen so far (prefix + cached + new), h heads, g groups of shared keys and
values, d head size, v vocabulary.
"""

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from common.models.loss import next_token_loss


class ChatGLMConfig(PreTrainedConfig):
    """The fields of the original config.json, under their original names."""

    model_type = "chatglm"
    attribute_map = {
        "vocab_size": "padded_vocab_size",
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "seq_length",
        "num_key_value_heads": "multi_query_group_num",
        "head_dim": "kv_channels",
    }

    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    multi_query_group_num: int = 2
    kv_channels: int = 128
    ffn_hidden_size: int = 13696
    layernorm_epsilon: float = 1e-5
    seq_length: int = 8192
    rope_ratio: float = 1.0
    add_qkv_bias: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    tie_word_embeddings: bool = False
    # The model family, "chatglm2" or "chatglm3": no other field tells them apart. The field is ours.
    generation: str | None = None

    @property
    def prefix_projection_size(self) -> int:
        """Width of the embedding that a prefix with projection begins with: all keys and values of a position."""
        return self.num_layers * 2 * self.multi_query_group_num * self.kv_channels

    def to_diff_dict(self) -> dict:
        """The content of config.json. It has ``torch_dtype``, or the original code would load float32.

        It has all switches of the original, because the defaults of the original code are others. It has no
        ``auto_map``, so that no program runs code of a checkpoint that we saved.
        """
        fields = super().to_diff_dict()
        fields.pop("auto_map", None)
        written_out = {name: self.to_dict()[name] for name in ("padded_vocab_size", "add_qkv_bias", "eos_token_id")}
        named = {"_name_or_path": self.name_or_path, "torch_dtype": fields.get("dtype")}
        return fields | written_out | ORIGINAL_SWITCHES | named


# The original code builds this architecture if config.json has these fields.
ORIGINAL_SWITCHES = {
    "add_bias_linear": False,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_softmax_in_fp32": True,
    "fp32_residual_connection": False,
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
}


def inverse_frequencies(config: ChatGLMConfig, device: torch.device | None = None) -> Tensor:
    """Inverse frequencies of the rotary embedding, which covers half of a head, in float32: [d / 4].

    The variants for long texts use ``rope_ratio``: ChatGLM2 divides the positions by it, ChatGLM3 raises the base.
    """
    dim = config.kv_channels // 2
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    if config.generation == "chatglm2":
        return 1.0 / 10000**exponents / config.rope_ratio
    return 1.0 / (10000 * config.rope_ratio) ** exponents


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring pairs of the first half of each head by their position. x: [b, s, h, d]."""
    rotated, passed = x.chunk(2, dim=-1)
    even, odd = rotated.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, passed), dim=-1)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention that also returns its weights [b, h, s, t]. attention_mask: boolean, True = visible."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SelfAttention(nn.Module):
    """Multi-query attention: the heads of a group share keys and values."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_groups = config.multi_query_group_num
        self.num_key_value_groups = self.num_heads // self.num_groups  # heads per group, as named in transformers
        self.head_dim = config.kv_channels
        self.scaling = config.kv_channels**-0.5
        fused_size = (self.num_heads + 2 * self.num_groups) * config.kv_channels
        self.query_key_value = nn.Linear(config.hidden_size, fused_size, bias=config.add_qkv_bias)
        self.dense = nn.Linear(self.num_heads * config.kv_channels, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        visible: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        prefix: Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[Tensor, Tensor | None]:
        fused = self.query_key_value(hidden_states).unflatten(-1, (-1, self.head_dim))  # [b, s, h + 2 g, d]
        rotated, value = fused.split([self.num_heads + self.num_groups, self.num_groups], dim=2)
        query, key = rotate(rotated, *rotary).split([self.num_heads, self.num_groups], dim=2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [b, h or g, s, d]
        if prefix is not None:  # the learned keys and values precede the text and are not rotated
            key = torch.cat((prefix[0], key), dim=2)
            value = torch.cat((prefix[1], value), dim=2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        context, weights = attend(self, query, key, value, visible, scaling=self.scaling, is_causal=False)
        return self.dense(context.flatten(2)), weights


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up; the input [..., 2 f] is gate and up. Saves only its input: half of what autograd would."""

    @staticmethod
    def forward(ctx, fused: Tensor) -> Tensor:
        ctx.save_for_backward(fused)
        gate, up = fused.chunk(2, dim=-1)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (fused,) = ctx.saved_tensors
        gate, up = fused.chunk(2, dim=-1)
        of_fused = torch.empty_like(fused)
        of_gate, of_up = of_fused.chunk(2, dim=-1)
        torch.ops.aten.silu(gate, out=of_up).mul_(gradient)
        torch.mul(gradient, up, out=of_gate)
        torch.ops.aten.silu_backward(of_gate, gate, grad_input=of_gate)
        return of_fused


class MLP(nn.Module):
    """SwiGLU; one Linear computes gate and up."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dense_4h_to_h(SwiGLU.apply(self.dense_h_to_4h(hidden_states)))


class GLMBlock(GradientCheckpointingLayer):
    """One layer, with a norm before the attention and one before the MLP."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        visible: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        prefix: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attention(normed, visible, rotary, prefix, past_key_values)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Embedding(nn.Module):
    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class Encoder(nn.Module):
    """The layers and the final norm; the name is that of the original."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.layers = nn.ModuleList([GLMBlock(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.final_layernorm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    config: ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": GLMBlock, "attentions": SelfAttention}
    # inv_freq is recomputed; a prefix in an old full checkpoint is read when the prefix encoder is attached.
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq", r"prefix_encoder\."]


class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.embedding = Embedding(config)
        self.encoder = Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        # P-Tuning v2 sets it. The module maps a batch size to keys and values [layers, 2, b, g, pre_seq_len, d].
        self.prefix_encoder: nn.Module | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding.word_embeddings = value

    def visible_keys(
        self, input_ids: Tensor, attention_mask: Tensor | None, past_length: int, prefix_length: int
    ) -> Tensor | None:
        """The keys that each new position may attend to: [b, 1, s, t], True = visible; None = all keys.

        Attention is causal. No position sees a pad, and all see the prefix. attention_mask: [b, past + s], 1 = token.
        """
        batch_size, length = input_ids.shape
        if length == 1 and attention_mask is None:
            return None
        keys = torch.arange(past_length + length, device=input_ids.device)
        visible = (keys <= keys[past_length:, None]).expand(batch_size, 1, length, -1)
        if attention_mask is not None:
            visible = visible & attention_mask.bool()[:, None, None]
        return nn.functional.pad(visible, (prefix_length, 0), value=True) if prefix_length else visible

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
        """input_ids, position_ids: [b, s]; attention_mask: see ``visible_keys``. The prefix has no positions."""
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        prefix_length: int = 0 if self.prefix_encoder is None else self.prefix_encoder.pre_seq_len  # type: ignore
        past_length = max(cached - prefix_length, 0)
        if position_ids is None:
            position_ids = torch.arange(past_length, past_length + input_ids.shape[1], device=input_ids.device)[None]
        visible = self.visible_keys(input_ids, attention_mask, past_length, prefix_length)

        hidden_states = self.embedding.word_embeddings(input_ids)
        angles = position_ids[..., None].float() * inverse_frequencies(self.config, input_ids.device)  # [b, s, d / 4]
        rotary = tuple(table.to(hidden_states.dtype).unsqueeze(2) for table in (angles.cos(), angles.sin()))
        prefixes = [None] * len(self.encoder.layers)
        if self.prefix_encoder is not None and cached == 0:  # later steps read the prefix from the cache
            prefixes = self.prefix_encoder(input_ids.shape[0], hidden_states.dtype)
        for layer, prefix in zip(self.encoder.layers, prefixes, strict=True):
            hidden_states = layer(hidden_states, visible, rotary, prefix, past_key_values=past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.encoder.final_layernorm(hidden_states), past_key_values=past_key_values
        )


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.transformer.output_layer = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        loss_only: bool = False,
        loss_in_parts: bool = True,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Next-token logits [b, s, v], and the loss if labels [b, s] are given (-100 = no loss).

        ``next_token_loss`` computes the loss; ``loss_in_parts`` is its ``in_parts``. ``loss_only`` returns no logits,
        and never computes the logits of positions without a label.
        """
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if not loss_only:
            logits = self.transformer.output_layer(slice_logits_to_keep(hidden_states, logits_to_keep))
        if labels is not None:
            head = self.transformer.output_layer
            loss = next_token_loss(head, hidden_states, labels, logits, num_items_in_batch, loss_in_parts)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def original_state_dict(
        self, dtype: torch.dtype = torch.float16, weights: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The weights as the original stores them: with inverse frequencies, without a prefix."""
        own = {name: w for name, w in (weights or self.state_dict()).items() if "prefix_encoder." not in name}
        weights = {name: w.to(dtype) for name, w in own.items()}
        dim = self.config.kv_channels // 2
        inv_freq = (1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim)).half()  # without rope_ratio
        return weights | {"transformer.rotary_pos_emb.inv_freq": inv_freq}
