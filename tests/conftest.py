"""What several test files share: the tiny ChatGLM-6B checkpoint, its golden numbers, and the two vocabularies.

The same of ChatGLM2-6B and ChatGLM3-6B stands in conftest_chatglm2.py.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "tests" / "goldens" / "chatglm-6b"
sys.path.insert(0, str(ROOT))
# Before anything of ours is imported: no test reads or writes the user's own cache.
SESSION_CACHE = tempfile.TemporaryDirectory(prefix="chatglm-tests-")
os.environ["CHATGLM_CACHE"] = SESSION_CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from torch import Tensor

from common.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from common.tokenizers.chatglm import ChatGLMTokenizer

pytest_plugins = ["conftest_chatglm2"]
# The longest tests run first, so that no core is idle at the end; in a file those that share a training stand first.
LONGEST = ("test_scripts.py", "test_engines.py", "test_machines.py", "test_launcher.py")

TINY_WEIGHTS_SHA256 = "976d2252131387032e50b59cb0cf6d9c66d3adbf4610272d8e4e882124160984"
# The config.json and tokenizer_config.json of the original checkpoints, at the size of the tiny one.
TINY_CONFIG = {
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
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
TOKENIZER_CONFIG = {
    "name_or_path": "THUDM/chatglm-6b",
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "end_token": "</s>",
    "gmask_token": "[gMASK]",
    "mask_token": "[MASK]",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "num_image_tokens": 0,
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def draw_tiny_weights() -> dict[str, Tensor]:
    """The weights that the goldens were computed with: draws of one seeded generator, in this order."""
    generator = torch.Generator().manual_seed(1101)

    def draw(std: float, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    def draw_layernorm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + draw(0.1, 64), f"{name}.bias": draw(0.05, 64)}

    def draw_linear(name: str, std: float, out_size: int, in_size: int) -> dict[str, Tensor]:
        return {f"{name}.weight": draw(std, out_size, in_size).half(), f"{name}.bias": draw(0.1, out_size).half()}

    weights = {"transformer.word_embeddings.weight": draw(0.1, 130528, 64).half()}
    for index in range(4):
        layer = f"transformer.layers.{index}"
        weights |= draw_layernorm(f"{layer}.input_layernorm")
        weights |= draw_linear(f"{layer}.attention.query_key_value", 0.25, 192, 64)
        weights |= draw_linear(f"{layer}.attention.dense", 1.2, 64, 64)
        weights |= draw_layernorm(f"{layer}.post_attention_layernorm")
        weights |= draw_linear(f"{layer}.mlp.dense_h_to_4h", 0.2, 256, 64)
        weights |= draw_linear(f"{layer}.mlp.dense_4h_to_h", 0.9, 64, 256)
        weights[f"{layer}.attention.rotary_emb.inv_freq"] = (1.0 / 10000 ** (torch.arange(0, 8, 2) / 8)).half()
    weights |= draw_layernorm("transformer.final_layernorm")
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"]
    return weights


def check_tiny_weights(weights: dict[str, Tensor], sha256: str) -> None:
    """The weights are those that the goldens were made with, bit for bit."""
    digest = hashlib.sha256()
    for tensor in weights.values():
        digest.update(tensor.numpy().tobytes())
    if digest.hexdigest() == sha256:
        return
    capability = torch.backends.cpu.get_cpu_capability()
    assert capability not in ("AVX2", "AVX512"), "the draws do not follow the recipe"
    pytest.skip(f"needs a CPU with AVX2: torch.randn rounds differently here ({capability}), the goldens do not apply")


def write_poison(folder: Path) -> None:
    """Python files under the names of the original's that leave ``executed`` in the folder when they are run."""
    # The path is absolute, because transformers would run a copy of the file in another folder.
    poison = f"open({str(folder / 'executed')!r}, 'w').close()\nraise SystemExit('code of the checkpoint was run')\n"
    for name in ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py"):
        (folder / name).write_text(poison)


def load_arrays(file: Path) -> dict[str, Tensor]:
    with np.load(file) as arrays:
        goldens = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return {name: array.long() if array.dtype == torch.int32 else array for name, array in goldens.items()}


def read_json(name: str) -> dict:
    return json.loads((GOLDENS / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory) -> Path:
    """The tiny checkpoint as the original stores one, with Python files that leave ``executed`` when they are run."""
    folder = tmp_path_factory.mktemp("tiny")
    weights = draw_tiny_weights()
    check_tiny_weights(weights, TINY_WEIGHTS_SHA256)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2))
    write_poison(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_weights) -> ChatGLMForConditionalGeneration:
    """The tiny model in float32 and eval mode, shared: tests that change a model take ``fresh_tiny_model``."""
    return ChatGLMForConditionalGeneration.from_pretrained(tiny_weights, dtype=torch.float32).eval()


@pytest.fixture
def fresh_tiny_model(tiny_weights) -> ChatGLMForConditionalGeneration:
    return ChatGLMForConditionalGeneration.from_pretrained(tiny_weights, dtype=torch.float32).eval()


@pytest.fixture
def small_model() -> ChatGLMForConditionalGeneration:
    """A random model of a few thousand parameters, for what needs no golden."""
    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        inner_hidden_size=64,
        mask_token_id=60,
        gmask_token_id=61,
        bos_token_id=62,
        eos_token_id=63,
    )
    return ChatGLMForConditionalGeneration(config).eval()


@pytest.fixture(scope="session")
def model_goldens() -> dict[str, Tensor]:
    return load_arrays(GOLDENS / "model.npz")


@pytest.fixture(scope="session")
def generation_goldens() -> dict:
    return read_json("generation.json")


@pytest.fixture(scope="session")
def tokenizer_goldens() -> dict:
    return read_json("tokenizer.json")


@pytest.fixture(scope="session")
def metrics_goldens() -> dict:
    return read_json("metrics.json")


@pytest.fixture(scope="session")
def real_rows() -> Callable[..., dict]:
    """Goldens over rows of the real AdvertiseGen, whose text is not ours to ship: name of the file -> its content."""
    folder = os.environ.get("ORIGINAL_GOLDENS")
    if not folder:
        pytest.skip(
            "needs goldens over real AdvertiseGen rows: set ORIGINAL_GOLDENS=/folder/with/chatglm-6b/tokenizer.json"
        )
    return lambda name, model="chatglm-6b": json.loads((Path(folder) / model / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def real_tokenizer(tmp_path_factory) -> ChatGLMTokenizer:
    """The tokenizer with the original vocabulary, which is not ours to ship."""
    vocabulary = os.environ.get("ICE_TEXT_MODEL")
    if not vocabulary:
        pytest.skip("needs the original vocabulary: set ICE_TEXT_MODEL=/path/to/ice_text.model (of THUDM/chatglm-6b)")
    folder = tmp_path_factory.mktemp("real_tokenizer")
    shutil.copyfile(vocabulary, folder / "ice_text.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    return ChatGLMTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    return ROOT / "common" / "demo" / "chatglm"


@pytest.fixture(scope="session")
def demo_tokenizer(demo_folder) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(demo_folder)
