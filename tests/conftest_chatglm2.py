"""What the tests of ChatGLM2-6B and ChatGLM3-6B share. A test that asks for ``generation`` runs once for each."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import sentencepiece
import torch
from conftest import ROOT, check_tiny_weights, load_arrays, write_poison
from torch import Tensor

from common.models.chatglm2 import ChatGLMConfig, ChatGLMForConditionalGeneration
from common.tokenizers.chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer


class Generation(NamedTuple):
    """What differs between the two."""

    name: str
    tokenizer_class: type[ChatGLM2Tokenizer]
    seed: int
    sha256: str
    seq_length: int
    transformers_version: str
    eos_token_id: int | list[int]  # what ended the answers of the goldens

    @property
    def goldens(self) -> Path:
        return ROOT / "tests" / "goldens" / self.name


GENERATIONS = {
    "chatglm2-6b": Generation(
        "chatglm2-6b",
        ChatGLM2Tokenizer,
        212,
        "72b513ec89f4d46cca51f1d2604dda03006593ef382ab09de1c6ab018244bb24",
        32768,
        "4.27.1",
        2,
    ),
    "chatglm3-6b": Generation(
        "chatglm3-6b",
        ChatGLM3Tokenizer,
        313,
        "5834b526e83ad0e0c07b68f91cba49511036767d0e9a6c7ac60259d109a55745",
        8192,
        "4.30.2",
        [2, 64795, 64797],
    ),
}
FIRST_SHARD = ("embedding", "rotary_pos_emb", "layers.0", "layers.1")


def tiny_config(generation: Generation) -> dict:
    """The config.json of the original checkpoint, at the size of the tiny one."""
    classes = {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": "ChatGLMForConditionalGeneration"}
    classes |= dict.fromkeys(("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"), "ChatGLMForConditionalGeneration")
    classes["AutoModelForSequenceClassification"] = "ChatGLMForSequenceClassification"
    return {
        "_name_or_path": f"THUDM/{generation.name}",
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {name: path if "." in path else f"modeling_chatglm.{path}" for name, path in classes.items()},
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
        "seq_length": generation.seq_length,
        "use_cache": True,
        "torch_dtype": "float16",
        "transformers_version": generation.transformers_version,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def tokenizer_config(generation: Generation) -> dict:
    return {
        "name_or_path": f"THUDM/{generation.name}",
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }


def draw_weights(seed: int) -> dict[str, Tensor]:
    """The weights that the goldens were computed with: draws of one seeded generator, in this order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(std: float, *shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).half()

    def draw_norm() -> Tensor:
        return (1 + torch.randn(64, generator=generator) * 0.2).half()

    weights = {"transformer.embedding.word_embeddings.weight": draw(0.15, 65024, 64)}
    for index in range(4):
        layer = f"transformer.encoder.layers.{index}"
        weights[f"{layer}.input_layernorm.weight"] = draw_norm()
        weights[f"{layer}.self_attention.query_key_value.weight"] = draw(0.15, 128, 64)
        weights[f"{layer}.self_attention.query_key_value.bias"] = draw(1.0, 128)
        weights[f"{layer}.self_attention.dense.weight"] = draw(0.15, 64, 64)
        weights[f"{layer}.post_attention_layernorm.weight"] = draw_norm()
        weights[f"{layer}.mlp.dense_h_to_4h.weight"] = draw(0.15, 344, 64)
        weights[f"{layer}.mlp.dense_4h_to_h.weight"] = draw(0.15, 64, 172)
    weights["transformer.encoder.final_layernorm.weight"] = draw_norm()
    weights["transformer.output_layer.weight"] = draw(0.15, 65024, 64)
    weights["transformer.rotary_pos_emb.inv_freq"] = (1.0 / 10000 ** (torch.arange(0, 8, 2) / 8)).half()
    return weights


def write_checkpoint(generation: Generation, folder: Path) -> dict[str, Tensor]:
    """Two shards with an index, as the original stores them; returns the tensors."""
    weights = draw_weights(generation.seed)
    check_tiny_weights(weights, generation.sha256)
    shards: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        number = 1 if any(part in name for part in FIRST_SHARD) else 2
        shards.setdefault(f"pytorch_model-0000{number}-of-00002.bin", {})[name] = tensor
    for file, tensors in shards.items():
        torch.save(tensors, folder / file)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
        "weight_map": {name: file for file, tensors in shards.items() for name in tensors},
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(tiny_config(generation), indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(generation), indent=2))
    write_poison(folder)
    return weights


@pytest.fixture(scope="session", params=GENERATIONS)
def generation(request) -> Generation:
    return GENERATIONS[request.param]


@pytest.fixture(scope="session")
def tiny2_folder(generation, tmp_path_factory) -> Path:
    """The tiny checkpoint as the original stores one, with Python files that leave ``executed`` when they are run."""
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(generation, folder)
    return folder


@pytest.fixture(scope="session")
def tiny2_model(tiny2_folder) -> ChatGLMForConditionalGeneration:
    """The tiny model in float32 and eval mode, shared: tests that change a model take ``fresh_tiny2_model``."""
    return ChatGLMForConditionalGeneration.from_pretrained(tiny2_folder, dtype=torch.float32).eval()


@pytest.fixture
def fresh_tiny2_model(tiny2_folder) -> ChatGLMForConditionalGeneration:
    return ChatGLMForConditionalGeneration.from_pretrained(tiny2_folder, dtype=torch.float32).eval()


@pytest.fixture
def small2_model() -> ChatGLMForConditionalGeneration:
    """A random model of a few thousand parameters, for what needs no golden."""
    torch.manual_seed(0)
    config = ChatGLMConfig(
        padded_vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        multi_query_group_num=2,
        kv_channels=8,
        ffn_hidden_size=48,
        seq_length=64,
    )
    return ChatGLMForConditionalGeneration(config).eval()


@pytest.fixture(scope="session")
def goldens2(generation) -> dict[str, Tensor]:
    return load_arrays(generation.goldens / "model.npz")


@pytest.fixture(scope="session")
def training_goldens2(generation) -> dict:
    """Loss and gradient norms of every training case."""
    return json.loads((generation.goldens / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tokenizer_goldens2(generation) -> dict:
    return json.loads((generation.goldens / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def real_tokenizer2(generation, tmp_path_factory) -> ChatGLM2Tokenizer:
    """The tokenizer with the original vocabulary, which is not ours to ship."""
    vocabulary = os.environ.get("TOKENIZER_MODEL")
    if not vocabulary:
        pytest.skip(
            "needs the original vocabulary: set TOKENIZER_MODEL=/path/to/tokenizer.model (of THUDM/chatglm2-6b)"
        )
    folder = tmp_path_factory.mktemp("real_tokenizer2")
    shutil.copyfile(vocabulary, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(generation)))
    return generation.tokenizer_class.from_pretrained(folder)


@pytest.fixture(scope="session")
def small_vocabulary(tmp_path_factory) -> Path:
    """A ``tokenizer.model`` made as the original is: byte-pair pieces of text as it stands, and the 256 bytes."""
    folder = tmp_path_factory.mktemp("vocabulary")
    corpus = folder / "corpus.txt"
    sentences = [
        "你好，今天天气怎么样？",
        "类型#裙*颜色#白色*风格#简约",
        "问：答：Round 1",
        "hello world <|user|> get_weather",
    ]
    corpus.write_text("\n".join(sentences * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def small_tokenizer(generation, small_vocabulary) -> ChatGLM2Tokenizer:
    return generation.tokenizer_class(str(small_vocabulary))
