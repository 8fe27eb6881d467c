"""ChatGLM-6B on transformers 5, with the module and parameter names of the original checkpoints.

GLM: General Language Model Pretraining with Autoregressive Blank Infilling, https://arxiv.org/abs/2103.10360

Shapes: b batch, s new positions, h heads, d head size.
"""

import math

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from common.models import base
from common.models.base import GLMAttention, GLMConfig, GLMForConditionalGeneration, GLMModel, Rotary, Weights

# The original code never passes the number of layers to its blocks. So every checkpoint, of any depth, was trained with
# the residual scale of 28 layers.
RESIDUAL_SCALE = math.sqrt(2 * 28)


class ChatGLMConfig(GLMConfig):
    """The fields of the original config.json, under their original names."""

    attribute_map = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "num_key_value_heads": "num_attention_heads",
    }

    vocab_size: int = 130528
    inner_hidden_size: int = 16384
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    pad_token_id: int | None = 3
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    bos_token_id: int = 130004
    eos_token_id: int | None = 130005
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first half of each head by the position and the second by the block position. x: [b, h, s, d]."""
    x = x.unflatten(-1, (2, -1))
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).flatten(-2)


def positions(input_ids: Tensor, config: ChatGLMConfig, attention_mask: Tensor | None = None) -> Tensor:
    """Position and block position of every token, as the original counts them. [b, s] -> [b, 2, s].

    Before <sop> the position is 0, 1, 2, … after the left pads, and the block position is 0. From the first <sop> on
    the position is that of the mask token ([gMASK], else [MASK]), and the block position is 1, 2, 3, ….
    """
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    is_sop = input_ids.eq(config.bos_token_id)
    context = torch.where(is_sop.any(-1), is_sop.int().argmax(-1), input_ids.shape[1])[:, None]
    pads = torch.zeros_like(context)
    if attention_mask is not None and attention_mask.dim() == 2:
        pads = attention_mask.int().argmax(-1, keepdim=True)
    is_gmask, is_mask = input_ids.eq(config.gmask_token_id), input_ids.eq(config.mask_token_id)
    wanted = torch.where(is_gmask.any(-1, keepdim=True), is_gmask, is_mask)
    mask_position = wanted.int().argmax(-1, keepdim=True)
    generated = columns >= context
    position = (torch.where(generated, mask_position, columns) - pads).clamp(min=0)
    block = torch.where(generated, columns - context + 1, 0)
    return torch.stack((position, block), dim=1)


class SelfAttention(GLMAttention):
    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def heads(self, hidden_states: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        fused = self.query_key_value(hidden_states).unflatten(-1, (self.config.num_attention_heads, -1))
        query, key, value = fused.transpose(1, 2).chunk(3, dim=-1)  # a head stores its query, key and value together
        return rotate(query, *rotary), rotate(key, *rotary), value


class MLP(nn.Module):
    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))


class GLMBlock(GradientCheckpointingLayer):
    """One layer. The residual connection starts after the norm, not before it."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden_states: Tensor, *inputs, past_key_values: Cache | None = None) -> Tensor:
        """inputs: the other inputs of the attention."""
        normed = self.input_layernorm(hidden_states)
        hidden_states = normed * RESIDUAL_SCALE + self.attention(normed, *inputs, past_key_values)[0]
        normed = self.post_attention_layernorm(hidden_states)
        return normed * RESIDUAL_SCALE + self.mlp(normed)


class ChatGLMModel(GLMModel):
    config: ChatGLMConfig
    _input_embed_layer = "word_embeddings"

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([GLMBlock(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.post_init()

    def in_context(self, position_ids: Tensor) -> Tensor:
        """The tokens before <sop>, whose block position is 0."""
        return position_ids[:, 1] == 0

    def get_position_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None, past_length: int = 0) -> Tensor:
        return positions(input_ids, self.config, attention_mask)

    def rotary(self, position_ids: Tensor) -> Rotary:
        """position_ids: [b, 2, s]. Returns two tensors [b, 1, s, 2, d / 2] that broadcast over heads.

        The original rounds the inverse frequencies to float16 even in a float32 run, and the weights were trained with
        the rounded ones. Exact frequencies would change a cosine by 0.3 at position 2,000.
        """
        inv_freq = base.inverse_frequencies(self.config.head_dim // 2, device=position_ids.device).half().float()
        angles = position_ids[..., None].float() * inv_freq  # [b, 2, s, d / 4]
        angles = torch.cat((angles, angles), dim=-1).transpose(1, 2).unsqueeze(1)
        return angles.cos(), angles.sin()


class ChatGLMForConditionalGeneration(GLMForConditionalGeneration):
    config: ChatGLMConfig
    positions = staticmethod(positions)
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Ties the output layer to the embedding even if a checkpoint stores another one, as the original does."""
        if missing_keys is not None:
            missing_keys.add("lm_head.weight")
        super().tie_weights(missing_keys, recompute_mapping)

    def original_state_dict(self, dtype: torch.dtype = torch.float16, weights: Weights | None = None) -> Weights:
        """Norms are in float32. Every layer has inverse frequencies, and the tied head is stored too."""
        weights = weights or self.state_dict()
        norms = {name: w.float() for name, w in weights.items() if "layernorm" in name}
        weights = super().original_state_dict(dtype, weights) | norms
        inv_freq = base.inverse_frequencies(self.config.head_dim // 2).half()
        for layer in range(self.config.num_layers):
            weights[f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"] = inv_freq.clone()
        return weights | {"lm_head.weight": weights["transformer.word_embeddings.weight"]}

    # generate() counts positions in one dimension. These three methods keep the two dimensions of GLM: [b, 2, s].

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict) -> Tensor:
        return self.transformer.get_position_ids(inputs_tensor, model_kwargs.get("attention_mask"))

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict, **kwargs) -> dict:
        prompt_position = model_kwargs["position_ids"][:, :1, -1:]
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        model_kwargs["position_ids"][:, :1, -1:] = prompt_position  # only the block position advances
        return model_kwargs

    def _expand_inputs_for_generation(self, expand_size: int = 1, **model_kwargs) -> tuple[Tensor, dict]:
        position_ids = model_kwargs.pop("position_ids").repeat_interleave(expand_size, dim=0)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size, **model_kwargs)
        return input_ids, model_kwargs | {"position_ids": position_ids}
