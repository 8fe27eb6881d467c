"""A whole ChatGLM2-6B, ChatGLM3-6B or GLM-4 as GlmForCausalLM of transformers, which computes the same."""

from typing import Any

import torch
from transformers import GlmConfig

from common.export.weights import Weights, converted
from common.models.chatglm2 import ChatGLMConfig

NAMES = {  # of the original modules: those of GLM
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.layers": "model.layers",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
FUSED = "self_attention.query_key_value"


def renamed(name: str, names: dict[str, str]) -> str:
    for original, other in names.items():
        name = name.replace(original, other)
    return name


def glm_weights(weights: Weights, config: ChatGLMConfig, dtype: torch.dtype) -> Weights:
    """The weights of GlmForCausalLM, which computes query, key and value by one layer each."""
    width, groups = config.kv_channels, config.multi_query_group_num
    sizes = [config.num_attention_heads * width, groups * width, groups * width]
    for name, weight in weights:
        name = renamed(name, NAMES)
        if FUSED not in name:
            yield name, converted(weight, dtype)
            continue
        for letter, part in zip("qkv", weight.split(sizes), strict=True):
            yield name.replace(FUSED, f"self_attn.{letter}_proj"), converted(part, dtype)


def rope_of(config: ChatGLMConfig) -> dict[str, Any]:
    """The rotary embedding, which covers half of a head; see ``chatglm2.inverse_frequencies``."""
    if config.generation == "chatglm2" and config.rope_ratio != 1:  # it divides the positions
        return {"rope_type": "linear", "rope_theta": 10000.0, "factor": float(config.rope_ratio)}
    return {"rope_type": "default", "rope_theta": 10000.0 * config.rope_ratio}


def glm_config(config: ChatGLMConfig, dtype: torch.dtype, stops: list[int]) -> GlmConfig:
    """``stops``: the tokens that end an answer."""
    rope = rope_of(config)
    return GlmConfig(
        architectures=["GlmForCausalLM"],
        dtype=dtype,
        vocab_size=config.padded_vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.multi_query_group_num,
        head_dim=config.kv_channels,
        max_position_embeddings=config.seq_length,
        rms_norm_eps=config.layernorm_epsilon,
        attention_bias=config.add_qkv_bias,
        rope_parameters=rope | {"partial_rotary_factor": 0.5},
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=stops,
        tie_word_embeddings=False,
    )


def older_fields(config: ChatGLMConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What transformers 4 reads in config.json; transformers 5 reads it too."""
    rope = rope_of(config)
    scaling = {} if rope["rope_type"] == "default" else {"rope_scaling": rope}
    kind = str(dtype).removeprefix("torch.")
    return {"rope_theta": rope["rope_theta"], "partial_rotary_factor": 0.5, "torch_dtype": kind} | scaling
