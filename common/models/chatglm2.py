"""ChatGLM2-6B, ChatGLM3-6B and GLM-4 in its first format on transformers 5, with the names of the original weights.

They have one architecture; they differ in sizes, tokenizer, prompt and context length.

Shapes: b batch, s new positions, h heads, g groups of shared keys and values, d head size.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from common.models import base
from common.models.base import GLMAttention, GLMConfig, GLMForConditionalGeneration, GLMModel, Rotary, Weights


class ChatGLMConfig(GLMConfig):
    """The fields of the original config.json, under their original names."""

    attribute_map = {
        "vocab_size": "padded_vocab_size",
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "seq_length",
        "num_key_value_heads": "multi_query_group_num",
        "head_dim": "kv_channels",
    }

    padded_vocab_size: int = 65024
    multi_query_group_num: int = 2
    kv_channels: int = 128
    ffn_hidden_size: int = 13696
    seq_length: int = 8192
    rope_ratio: float = 1.0
    add_qkv_bias: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    # The model family, "chatglm2", "chatglm3" or "chatglm4": no other field distinguishes the first two. It is ours.
    generation: str | None = None

    def to_diff_dict(self) -> dict:
        """It has all switches of the original, because the defaults of the original code are others."""
        written_out = {name: self.to_dict()[name] for name in ("padded_vocab_size", "add_qkv_bias", "eos_token_id")}
        if self.generation == "chatglm4":
            written_out["num_hidden_layers"] = self.num_layers
        return super().to_diff_dict() | written_out | ORIGINAL_SWITCHES


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

    The variants for long texts use ``rope_ratio``: ChatGLM2 divides the positions by it, the others raise the base.
    """
    dim = config.kv_channels // 2
    if config.generation == "chatglm2":
        return base.inverse_frequencies(dim, device=device) / config.rope_ratio
    return base.inverse_frequencies(dim, 10000 * config.rope_ratio, device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring pairs of the first half of each head by their position. x: [b, s, h, d]."""
    rotated, passed = x.chunk(2, dim=-1)
    even, odd = rotated.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, passed), dim=-1)


class SelfAttention(GLMAttention):
    """Multi-query attention: the heads of a group share keys and values."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        all_heads = config.num_attention_heads * config.kv_channels
        fused_size = all_heads + 2 * config.multi_query_group_num * config.kv_channels
        self.query_key_value = nn.Linear(config.hidden_size, fused_size, bias=config.add_qkv_bias)
        self.dense = nn.Linear(all_heads, config.hidden_size, bias=False)

    def heads(self, hidden_states: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        heads, groups = self.config.num_attention_heads, self.config.multi_query_group_num
        fused = self.query_key_value(hidden_states).unflatten(-1, (-1, self.config.kv_channels))  # [b, s, h + 2 g, d]
        rotated, value = fused.split([heads + groups, groups], dim=2)
        query, key = rotate(rotated, *rotary).split([heads, groups], dim=2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


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

    def forward(self, hidden_states: Tensor, *inputs, past_key_values: Cache | None = None) -> Tensor:
        """inputs: the other inputs of the attention."""
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attention(normed, *inputs, past_key_values)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ChatGLMModel(GLMModel):
    config: ChatGLMConfig

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        # The dictionaries give the parameters their original names.
        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(config.padded_vocab_size, config.hidden_size)})
        layers = nn.ModuleList([GLMBlock(config, layer_idx) for layer_idx in range(config.num_layers)])
        norm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.encoder = nn.ModuleDict({"layers": layers, "final_layernorm": norm})
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding["word_embeddings"]

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding["word_embeddings"] = value

    @property
    def stack(self) -> nn.Module:
        return self.encoder

    def get_position_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None, past_length: int = 0) -> Tensor:
        """The same for all rows: [b, s] -> [1, s]."""
        return torch.arange(past_length, past_length + input_ids.shape[1], device=input_ids.device)[None]

    def rotary(self, position_ids: Tensor) -> Rotary:
        """position_ids: [b, s]. Returns two tensors [b, s, 1, d / 4] that broadcast over heads."""
        angles = position_ids[..., None].float() * inverse_frequencies(self.config, position_ids.device)
        return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)


class ChatGLMForConditionalGeneration(GLMForConditionalGeneration):
    config: ChatGLMConfig

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.transformer.output_layer = new_embeddings

    def original_state_dict(self, dtype: torch.dtype = torch.float16, weights: Weights | None = None) -> Weights:
        """The inverse frequencies are those without ``rope_ratio``."""
        inv_freq = base.inverse_frequencies(self.config.kv_channels // 2).half()
        return super().original_state_dict(dtype, weights) | {"transformer.rotary_pos_emb.inv_freq": inv_freq}
