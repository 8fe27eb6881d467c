"""The fixtures of several test files: tiny checkpoints, golden numbers, vocabularies.

A fixture with a 2 in its name is that of ``spec``: a test that uses one runs for ChatGLM2-6B and for ChatGLM3-6B.
"""

import copy
import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Before the first import of common: no test reads or writes the user's own cache.
SESSION_CACHE = tempfile.TemporaryDirectory(prefix="chatglm-tests-")
os.environ["CHATGLM_CACHE"] = SESSION_CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import sentencepiece
import torch
from tiny_models import CHATGLM, CHATGLM2, CHATGLM3, Spec, write_chatglm4, write_checkpoint, write_tokenizer_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.encoding import EvalRow, TrainRow
from common.models import chatglm, chatglm2
from common.tokenizers.base import GLMTokenizer
from common.tokenizers.chatglm import ChatGLMTokenizer
from common.tokenizers.chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from common.tokenizers.chatglm4 import ChatGLM4Tokenizer

gc.freeze()  # or each full collection of the tests looks at all that the libraries have made
GOLDENS = CHATGLM.goldens
# The longest tests run first, so that no core is idle at the end. An idle worker takes tests from the end of another
# one's list, in any order: a file whose tests share a server or a training must not lie there.
LONGEST = ("scripts", "engines", "machines", "launcher", "web_demo", "memory", "preemption")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.name, len(LONGEST)))


def write_poison(folder: Path) -> None:
    """Writes Python files, named as the original's, that leave ``executed`` in the folder when a program runs them."""
    # The path is absolute, because transformers would run a copy of the file in another folder.
    poison = f"open({str(folder / 'executed')!r}, 'w').close()\nraise SystemExit('code of the checkpoint was run')\n"
    for name in ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py"):
        (folder / name).write_text(poison)


def load_arrays(file: Path) -> dict[str, Tensor]:
    with np.load(file) as arrays:
        goldens = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return {name: array.long() if array.dtype == torch.int32 else array for name, array in goldens.items()}


def read_golden(spec: Spec, name: str) -> dict:
    return json.loads((spec.goldens / name).read_text(encoding="utf-8"))


def make_tiny_folder(spec: Spec, folder: Path) -> Path:
    """The tiny checkpoint as the original stores one, with the files of ``write_poison``."""
    write_checkpoint(spec, folder)
    write_poison(folder)
    return folder


def load_tiny_model(spec: Spec, folder: Path) -> PreTrainedModel:
    return spec.model_class.from_pretrained(folder, dtype=torch.float32).eval()


def encoded(tokenizer: GLMTokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode_batch(texts)]


def whole(rows: Iterable[TrainRow | EvalRow]) -> list[tuple]:
    """All that a row says, so that rows can be compared."""
    return [(row.input_ids, row.labels, *row[2:]) if isinstance(row, TrainRow) else tuple(row) for row in rows]


def load_real_tokenizer(spec: Spec, folder: Path) -> GLMTokenizer:
    """The tokenizer with the original vocabulary, which is not ours to ship; skips the test without it."""
    vocabulary = os.environ.get(spec.vocabulary_variable)
    name = spec.tokenizer_class.vocab_files_names["vocab_file"]
    if not vocabulary:
        pytest.skip(f"needs the original vocabulary: set {spec.vocabulary_variable}=/path/to/{name} (of {spec.name})")
    shutil.copyfile(vocabulary, folder / name)
    write_tokenizer_config(spec, folder)
    return spec.tokenizer_class.from_pretrained(folder)


# ChatGLM-6B


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory) -> Path:
    """The folder of the tiny checkpoint."""
    return make_tiny_folder(CHATGLM, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model(tiny_weights) -> PreTrainedModel:
    """The shared tiny model, in float32 and eval mode. A test that changes a model uses ``fresh_tiny_model``."""
    return load_tiny_model(CHATGLM, tiny_weights)


@pytest.fixture
def fresh_tiny_model(tiny_model) -> PreTrainedModel:
    return copy.deepcopy(tiny_model)


@pytest.fixture
def small_model() -> PreTrainedModel:
    """A random model of a few thousand parameters."""
    torch.manual_seed(0)
    config = chatglm.ChatGLMConfig(
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
    return chatglm.ChatGLMForConditionalGeneration(config).eval()


@pytest.fixture(scope="session")
def model_goldens() -> dict[str, Tensor]:
    return load_arrays(GOLDENS / "model.npz")


@pytest.fixture(scope="session")
def generation_goldens() -> dict:
    return read_golden(CHATGLM, "generation.json")


@pytest.fixture(scope="session")
def tokenizer_goldens() -> dict:
    return read_golden(CHATGLM, "tokenizer.json")


@pytest.fixture(scope="session")
def metrics_goldens() -> dict:
    return read_golden(CHATGLM, "metrics.json")


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
    return load_real_tokenizer(CHATGLM, tmp_path_factory.mktemp("real_tokenizer"))


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    return ROOT / "common" / "demo" / "chatglm"


@pytest.fixture(scope="session")
def demo_tokenizer(demo_folder) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(demo_folder)


# ChatGLM2-6B and ChatGLM3-6B


@pytest.fixture(scope="session", params=[CHATGLM2, CHATGLM3], ids=lambda spec: spec.name)
def spec(request) -> Spec:
    return request.param


@pytest.fixture(scope="session")
def tiny2_folder(spec, tmp_path_factory) -> Path:
    """The folder of the tiny checkpoint."""
    return make_tiny_folder(spec, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny2_model(spec, tiny2_folder) -> PreTrainedModel:
    """The shared tiny model, in float32 and eval mode. A test that changes a model uses ``fresh_tiny2_model``."""
    return load_tiny_model(spec, tiny2_folder)


@pytest.fixture
def fresh_tiny2_model(tiny2_model) -> PreTrainedModel:
    return copy.deepcopy(tiny2_model)


@pytest.fixture
def small2_model() -> PreTrainedModel:
    """A random model of a few thousand parameters."""
    torch.manual_seed(0)
    config = chatglm2.ChatGLMConfig(
        padded_vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        multi_query_group_num=2,
        kv_channels=8,
        ffn_hidden_size=48,
        seq_length=64,
    )
    return chatglm2.ChatGLMForConditionalGeneration(config).eval()


@pytest.fixture(scope="session")
def goldens2(spec) -> dict[str, Tensor]:
    return load_arrays(spec.goldens / "model.npz")


@pytest.fixture(scope="session")
def training_goldens2(spec) -> dict:
    """Loss and gradient norms of every training case."""
    return read_golden(spec, "training.json")


@pytest.fixture(scope="session")
def tokenizer_goldens2(spec) -> dict:
    return read_golden(spec, "tokenizer.json")


@pytest.fixture(scope="session")
def real_tokenizer2(spec, tmp_path_factory) -> GLMTokenizer:
    return load_real_tokenizer(spec, tmp_path_factory.mktemp("real_tokenizer2"))


@pytest.fixture(scope="session")
def small_vocabulary(tmp_path_factory) -> Path:
    """A ``tokenizer.model`` made like the original: byte-pair pieces of unnormalised text, and the 256 bytes."""
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
def small_tokenizer(spec, small_vocabulary) -> GLMTokenizer:
    return spec.tokenizer_class(str(small_vocabulary))


@pytest.fixture(scope="session")
def tokenizer2(small_vocabulary) -> ChatGLM2Tokenizer:
    return ChatGLM2Tokenizer(str(small_vocabulary))


@pytest.fixture(scope="session")
def tokenizer3(small_vocabulary) -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer(str(small_vocabulary))


# GLM-4 in its first format


@pytest.fixture(scope="session")
def chatglm4_folder(tmp_path_factory) -> Path:
    """The folder of a small random model, with the files of ``write_poison``."""
    folder = write_chatglm4(tmp_path_factory.mktemp("glm-4-9b-chat"))
    write_poison(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer4(chatglm4_folder) -> ChatGLM4Tokenizer:
    return ChatGLM4Tokenizer.from_pretrained(chatglm4_folder)


# Models that think

# As GLM-4.5 writes an answer.
THINKING_TEMPLATE = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
    "<think>{{ m.reasoning_content.strip() if m.reasoning_content is string else '' }}</think>\n{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def thinking_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, and a chat template with a part for thoughts."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.chat_template = THINKING_TEMPLATE
    return fast


# A browser


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -r tests/requirements.txt")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs a browser: apt install chromium fonts-wqy-microhei")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()
