"""The tiny checkpoints that the golden numbers were computed with, one per model family."""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from common.arguments import PrefixArguments
from common.loading import load_model
from common.methods.prefix import PTuning
from common.models import chatglm, chatglm2
from common.tokenizers.base import GLMTokenizer
from common.tokenizers.chatglm import ChatGLMTokenizer
from common.tokenizers.chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from common.tokenizers.chatglm4 import CHARACTERS, EXPRESSION, ChatGLM4Tokenizer


class Draws:
    """Random tensors from one seeded generator, in the order of the calls."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, std: float, *shape: int, mean: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * std + mean

    def half(self, std: float, *shape: int, mean: float = 0.0) -> Tensor:
        return self.normal(std, *shape, mean=mean).half()


def inverse_frequencies() -> Tensor:
    return (1.0 / 10000 ** (torch.arange(0, 8, 2) / 8)).half()


def draw_chatglm(seed: int) -> dict[str, Tensor]:
    draws = Draws(seed)

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": draws.normal(0.1, 64, mean=1), f"{name}.bias": draws.normal(0.05, 64)}

    def linear(name: str, std: float, out_size: int, in_size: int) -> dict[str, Tensor]:
        return {f"{name}.weight": draws.half(std, out_size, in_size), f"{name}.bias": draws.half(0.1, out_size)}

    weights = {"transformer.word_embeddings.weight": draws.half(0.1, 130528, 64)}
    for index in range(4):
        layer = f"transformer.layers.{index}"
        weights |= norm(f"{layer}.input_layernorm")
        weights |= linear(f"{layer}.attention.query_key_value", 0.25, 192, 64)
        weights |= linear(f"{layer}.attention.dense", 1.2, 64, 64)
        weights |= norm(f"{layer}.post_attention_layernorm")
        weights |= linear(f"{layer}.mlp.dense_h_to_4h", 0.2, 256, 64)
        weights |= linear(f"{layer}.mlp.dense_4h_to_h", 0.9, 64, 256)
        weights[f"{layer}.attention.rotary_emb.inv_freq"] = inverse_frequencies()
    weights |= norm("transformer.final_layernorm")
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"]
    return weights


def draw_chatglm2(seed: int) -> dict[str, Tensor]:
    draws = Draws(seed)
    weights = {"transformer.embedding.word_embeddings.weight": draws.half(0.15, 65024, 64)}
    for index in range(4):
        layer = f"transformer.encoder.layers.{index}"
        weights[f"{layer}.input_layernorm.weight"] = draws.half(0.2, 64, mean=1)
        weights[f"{layer}.self_attention.query_key_value.weight"] = draws.half(0.15, 128, 64)
        weights[f"{layer}.self_attention.query_key_value.bias"] = draws.half(1.0, 128)
        weights[f"{layer}.self_attention.dense.weight"] = draws.half(0.15, 64, 64)
        weights[f"{layer}.post_attention_layernorm.weight"] = draws.half(0.2, 64, mean=1)
        weights[f"{layer}.mlp.dense_h_to_4h.weight"] = draws.half(0.15, 344, 64)
        weights[f"{layer}.mlp.dense_4h_to_h.weight"] = draws.half(0.15, 64, 172)
    weights["transformer.encoder.final_layernorm.weight"] = draws.half(0.2, 64, mean=1)
    weights["transformer.output_layer.weight"] = draws.half(0.15, 65024, 64)
    weights["transformer.rotary_pos_emb.inv_freq"] = inverse_frequencies()
    return weights


AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
}
# The config.json and tokenizer_config.json of the original checkpoints, at the size of the tiny ones.
TOKENIZER_CONFIG = {
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}
CHATGLM_TOKENIZER_CONFIG = TOKENIZER_CONFIG | {
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "end_token": "</s>",
    "gmask_token": "[gMASK]",
    "mask_token": "[MASK]",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "num_image_tokens": 0,
}
CHATGLM_CONFIG = {
    "architectures": ["ChatGLMModel"],
    "auto_map": AUTO_MAP,
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "pad_token_id": 3,
    "hidden_size": 64,
    "inner_hidden_size": 256,
    "layernorm_epsilon": 1e-05,
    "max_sequence_length": 2048,
    "model_type": "chatglm",
    "num_attention_heads": 4,
    "num_layers": 4,
    "position_encoding_2d": True,
    "torch_dtype": "float16",
    "transformers_version": "4.23.1",
    "use_cache": True,
    "vocab_size": 130528,
}
CHATGLM2_CONFIG = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": AUTO_MAP | {"AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 172,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 64,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 4,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "use_cache": True,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


class Spec(NamedTuple):
    """A model family and its tiny checkpoint."""

    name: str
    model_class: Any
    tokenizer_class: type[GLMTokenizer]
    vocabulary_variable: str  # the environment variable with the path of the original vocabulary
    config: dict
    tokenizer_config: dict
    draw_weights: Callable[[int], dict[str, Tensor]]
    seed: int
    sha256: str  # of the weights
    first_shard: tuple[str, ...]  # parts of the names of its tensors; without any there is one file
    stop_ids: list[int]  # the tokens that ended the answers of the goldens

    @property
    def goldens(self) -> Path:
        return Path(__file__).parent / "goldens" / self.name


CHATGLM = Spec(
    "chatglm-6b",
    chatglm.ChatGLMForConditionalGeneration,
    ChatGLMTokenizer,
    "ICE_TEXT_MODEL",
    CHATGLM_CONFIG,
    CHATGLM_TOKENIZER_CONFIG,
    draw_chatglm,
    1101,
    "976d2252131387032e50b59cb0cf6d9c66d3adbf4610272d8e4e882124160984",
    (),
    [130005],
)
CHATGLM2 = Spec(
    "chatglm2-6b",
    chatglm2.ChatGLMForConditionalGeneration,
    ChatGLM2Tokenizer,
    "TOKENIZER_MODEL",
    CHATGLM2_CONFIG | {"seq_length": 32768, "transformers_version": "4.27.1"},
    TOKENIZER_CONFIG,
    draw_chatglm2,
    212,
    "72b513ec89f4d46cca51f1d2604dda03006593ef382ab09de1c6ab018244bb24",
    ("embedding", "rotary_pos_emb", "layers.0", "layers.1"),
    [2],
)
CHATGLM3 = CHATGLM2._replace(
    name="chatglm3-6b",
    tokenizer_class=ChatGLM3Tokenizer,
    config=CHATGLM2_CONFIG | {"seq_length": 8192, "transformers_version": "4.30.2"},
    seed=313,
    sha256="5834b526e83ad0e0c07b68f91cba49511036767d0e9a6c7ac60259d109a55745",
    stop_ids=[2, 64795, 64797],
)


# GLM-4 in its first format

CHATGLM4_TEXTS = ("你好，今天天气怎么样？今天天气很好。", "hello world, it's 12345 days; def f(x):\n    return x")


def write_table(file: Path, size: int = 1000) -> Path:
    """A small table of tiktoken: base64 and number of each token, the bytes first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(EXPRESSION), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    rows = (Path(__file__).parents[1] / "AdvertiseGen" / "dev.json").read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator([*CHATGLM4_TEXTS * 9, *rows], trainer)
    byte = {chr(character): byte for byte, character in CHARACTERS.items()}
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    lines = [f"{base64.b64encode(bytes(map(byte.get, t))).decode()} {number}\n" for number, t in enumerate(tokens)]
    file.write_text("".join(lines))
    return file


# The fields of glm-4-9b-chat's config.json that its sizes have nothing to do with.
CHATGLM4_CONFIG = CHATGLM2_CONFIG | {
    "architectures": ["ChatGLMModel"],
    "layernorm_epsilon": 1.5625e-07,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "rope_ratio": 500,
    "seq_length": 256,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.30.2",
}


def write_chatglm4(folder: Path) -> Path:
    """A random small model as the first checkpoints of GLM-4 are stored, its tokens of few bytes."""
    tokenizer = ChatGLM4Tokenizer(str(write_table(folder / "tokenizer.model")))
    special = tokenizer.special_token_ids
    tokens = {"pad_token_id": special["<|endoftext|>"], "eos_token_id": tokenizer.stop_ids()}
    config = CHATGLM4_CONFIG | tokens | {"padded_vocab_size": -(-tokenizer.vocab_size // 64) * 64}
    torch.manual_seed(4)
    model = chatglm2.ChatGLMForConditionalGeneration(chatglm2.ChatGLMConfig(**config))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.15)
    save_file(model.original_state_dict(torch.bfloat16), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    auto_map = {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]}
    added = {str(number): {"content": token, "special": True} for token, number in special.items()}
    fields = {"tokenizer_class": "ChatGLM4Tokenizer", "auto_map": auto_map, "added_tokens_decoder": added}
    fields |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "padding_side": "left"}
    fields |= {"additional_special_tokens": list(special), "remove_space": False, "do_lower_case": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2))
    return folder


def check_sha256(weights: dict[str, Tensor], sha256: str) -> None:
    """Asserts that the weights equal those of the goldens bit for bit; skips on a CPU that rounds otherwise."""
    digest = hashlib.sha256()
    for tensor in weights.values():
        digest.update(tensor.numpy().tobytes())
    if digest.hexdigest() == sha256:
        return
    capability = torch.backends.cpu.get_cpu_capability()
    assert capability not in ("AVX2", "AVX512"), "the draws do not follow the recipe"
    pytest.skip(f"needs a CPU with AVX2: torch.randn rounds differently here ({capability}), the goldens do not apply")


def write_checkpoint(spec: Spec, folder: Path) -> None:
    """Writes the tiny checkpoint as the original stores one: a single file, or two shards with an index."""
    weights = spec.draw_weights(spec.seed)
    check_sha256(weights, spec.sha256)
    if spec.first_shard:
        shards: dict[str, dict[str, Tensor]] = {}
        for name, tensor in weights.items():
            number = 1 if any(part in name for part in spec.first_shard) else 2
            shards.setdefault(f"pytorch_model-0000{number}-of-00002.bin", {})[name] = tensor
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
            "weight_map": {name: file for file, tensors in shards.items() for name in tensors},
        }
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        shards = {"pytorch_model.bin": weights}
    for file, tensors in shards.items():
        torch.save(tensors, folder / file)
    (folder / "config.json").write_text(json.dumps({"_name_or_path": f"THUDM/{spec.name}"} | spec.config, indent=2))
    write_tokenizer_config(spec, folder)


def write_tokenizer_config(spec: Spec, folder: Path, **fields: str) -> None:
    """Writes the tokenizer_config.json of the original, with further fields."""
    fields["name_or_path"] = f"THUDM/{spec.name}"
    (folder / "tokenizer_config.json").write_text(json.dumps(spec.tokenizer_config | fields, indent=2))


def save_prefix(folder: Path, seed: int, length: int = 16) -> Path:
    """A prefix with which the demo gives long answers that differ from those of its base."""
    model = load_model("demo", pre_seq_len=length)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.base_model.prefix_encoder.embedding.weight, std=10)
    PTuning(PrefixArguments()).save(model, folder)
    return folder
