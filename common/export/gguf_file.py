"""A whole ChatGLM2-6B or ChatGLM3-6B as one GGUF file, which llama.cpp and Ollama run.

The file is written weight by weight. llama.cpp's own converter takes no folder of these models.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType, TokenType

from common.export.glm import renamed, rope_of
from common.export.vocabulary import TEMPLATES, special_tokens
from common.export.weights import Weights
from common.models.chatglm2 import ChatGLMConfig
from common.tokenizers.chatglm2 import ChatGLM2Tokenizer

NAMES = {  # of the original modules: those of GGUF
    "transformer.embedding.word_embeddings": "token_embd",
    "transformer.encoder.layers": "blk",
    "transformer.encoder.final_layernorm": "output_norm",
    "transformer.output_layer": "output",
    "input_layernorm": "attn_norm",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
KINDS = {
    torch.float32: (LlamaFileType.ALL_F32, GGMLQuantizationType.F32),
    torch.float16: (LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
    torch.bfloat16: (LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.BF16),
}


def write_gguf(
    file: Path,
    name: str,
    weights: Callable[[], Weights],
    tokenizer: ChatGLM2Tokenizer,
    config: ChatGLMConfig,
    dtype: torch.dtype,
    stops: list[int],
) -> None:
    """``name``: of the model; ``weights``: gives them from the first on; ``stops``: the tokens that end an answer."""
    writer = GGUFWriter(file, "chatglm")
    writer.add_name(name)
    write_config(writer, config)
    writer.add_file_type(KINDS[dtype][0])
    write_vocabulary(writer, tokenizer, config.padded_vocab_size, stops)
    for weight_name, weight in weights():
        kind = KINDS[dtype if weight.ndim > 1 else torch.float32][1]  # llama.cpp takes vectors in float32 only
        size = weight.numel() * (4 if kind == GGMLQuantizationType.F32 else 2)
        writer.add_tensor_info(renamed(weight_name, NAMES), weight.shape, torch.empty(0).numpy().dtype, size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, weight in weights():
        weight = weight.to(dtype if weight.ndim > 1 else torch.float32).contiguous()
        writer.write_tensor_data(weight.view(torch.uint8).numpy())
    writer.close()


def write_config(writer: GGUFWriter, config: ChatGLMConfig) -> None:
    writer.add_context_length(config.seq_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.multi_query_group_num)
    writer.add_key_length(config.kv_channels)
    writer.add_value_length(config.kv_channels)
    writer.add_layer_norm_rms_eps(config.layernorm_epsilon)
    writer.add_rope_dimension_count(config.kv_channels // 2)
    rope = rope_of(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def write_vocabulary(writer: GGUFWriter, tokenizer: ChatGLM2Tokenizer, rows: int, stops: list[int]) -> None:
    """``rows``: those of the embedding, which has more than there are tokens."""
    pieces = tokenizer.pieces
    count = pieces.get_piece_size()
    tokens = [pieces.id_to_piece(index) for index in range(count)] + list(special_tokens(tokenizer))
    kinds = [kind_of(pieces, index) for index in range(count)] + [TokenType.CONTROL] * len(tokenizer.special_tokens)
    unused = rows - len(tokens)
    writer.add_tokenizer_model("llama")  # sentencepiece, with bytes for what it lacks
    writer.add_token_list(tokens + [f"[PAD{len(tokens) + index}]" for index in range(unused)])
    writer.add_token_scores([pieces.get_score(index) for index in range(count)] + [0.0] * (rows - count))
    writer.add_token_types(kinds + [TokenType.UNUSED] * unused)
    writer.add_add_bos_token(False)  # the template writes [gMASK]<sop>
    writer.add_add_space_prefix(True)
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(stops[0])
    writer.add_unk_token_id(pieces.unk_id())
    writer.add_pad_token_id(pieces.unk_id())
    for stop, add in zip(stops[1:], (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(stop)
    writer.add_chat_template(TEMPLATES[tokenizer.model_family])


def kind_of(pieces, index: int) -> TokenType:
    if pieces.is_unknown(index):
        return TokenType.UNKNOWN
    if pieces.is_control(index):
        return TokenType.CONTROL
    return TokenType.BYTE if pieces.is_byte(index) else TokenType.NORMAL
