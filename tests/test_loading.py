"""Which model a folder holds, and what is refused."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import write_poison
from hub_server import running_hub
from huggingface_hub import constants
from safetensors.torch import save_file

from common.errors import UserError
from common.loading import load_model, load_tokenizer
from common.models import chatglm, chatglm2
from common.models.registry import make_config, open_model, read_config, spec_of
from common.tokenizers.chatglm import ChatGLMTokenizer
from common.tokenizers.chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from common.tokenizers.chatglm4 import ChatGLM4Tokenizer

ROOT = Path(__file__).resolve().parents[1]
FIRST = {"model_type": "chatglm", "vocab_size": 130528, "inner_hidden_size": 64, "position_encoding_2d": True}
SECOND = {"model_type": "chatglm", "padded_vocab_size": 65024, "multi_query_group_num": 2}


def write_config(folder: Path, config: dict, **files: dict) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def chatglm3_folder(tmp_path_factory, small_vocabulary) -> Path:
    """A small random ChatGLM3 as the original stores one, with Python files that leave ``executed`` when they run."""
    folder = tmp_path_factory.mktemp("models") / "chatglm3-6b"
    torch.manual_seed(0)
    config = chatglm2.ChatGLMConfig(
        padded_vocab_size=416,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        kv_channels=8,
        ffn_hidden_size=48,
        seq_length=64,
    )
    model = chatglm2.ChatGLMForConditionalGeneration(config)
    config.save_pretrained(folder)
    torch.save(model.original_state_dict(), folder / "pytorch_model.bin")
    shutil.copy(small_vocabulary, folder / "tokenizer.model")
    write_poison(folder)
    return folder


def changed(folder: Path, to: Path, **config) -> Path:
    """A copy with other fields in its config.json."""
    shutil.copytree(folder, to)
    content = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(content | config))
    return to


# Which generation a folder holds

GLM4_SIZE = {"padded_vocab_size": 151552}


@pytest.mark.parametrize(
    ("config", "key", "model_class", "tokenizer_class"),
    [
        (FIRST, "chatglm", chatglm.ChatGLMForConditionalGeneration, ChatGLMTokenizer),
        (SECOND | {"generation": "chatglm2"}, "chatglm2", chatglm2.ChatGLMForConditionalGeneration, ChatGLM2Tokenizer),
        (SECOND | {"generation": "chatglm3"}, "chatglm3", chatglm2.ChatGLMForConditionalGeneration, ChatGLM3Tokenizer),
        (SECOND | {"generation": "chatglm4"}, "chatglm4", chatglm2.ChatGLMForConditionalGeneration, ChatGLM4Tokenizer),
        (SECOND | GLM4_SIZE, "chatglm4", chatglm2.ChatGLMForConditionalGeneration, ChatGLM4Tokenizer),
    ],
)
def test_config_tells_the_generation(config, key, model_class, tokenizer_class, tmp_path):
    spec = spec_of(tmp_path, config)
    assert (spec.key, spec.model, spec.tokenizer) == (key, model_class, tokenizer_class)
    assert type(make_config(spec, config)) is model_class.config_class


def test_config_json_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FIRST), encoding="utf-8-sig")
    assert read_config(tmp_path) == FIRST


@pytest.mark.parametrize("kind", ["glm", "glm4"])
def test_glm4_is_told_by_its_model_type(kind, tmp_path):
    assert spec_of(tmp_path, {"model_type": kind, "vocab_size": 151552}).key == "glm"


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("hint", ["generation", "_name_or_path", "tokenizer_config", "name_or_path", "folder", "code"])
def test_chatglm2_and_chatglm3_are_told_apart_by_any_hint(hint, number, tmp_path):
    folder, config, files = tmp_path / "checkpoint", dict(SECOND), {}
    if hint == "generation":
        config["generation"] = f"chatglm{number}"
    if hint == "_name_or_path":
        config["_name_or_path"] = f"THUDM/ChatGLM{number}-6B-32k"
    if hint == "tokenizer_config":
        files["tokenizer_config"] = {"generation": f"chatglm{number}"}
    if hint == "name_or_path":
        files["tokenizer_config"] = {"name_or_path": f"/models/chatglm{number}-6b"}
    if hint == "folder":
        folder = tmp_path / f"my-chatglm{number}-6b"
    write_config(folder, config, **files)
    if hint == "code":
        source = 'roles = ["<|user|>", "<|assistant|>"]' if number == 3 else "def build_prompt(self, query): pass"
        (folder / "tokenization_chatglm.py").write_text(f"{source}\nraise SystemExit\n")
    assert spec_of(folder, read_config(folder)).key == f"chatglm{number}"


def test_what_a_user_writes_into_the_config_decides(tmp_path):
    """Before any name: a folder may be called as it likes."""
    folder = write_config(tmp_path / "chatglm2-6b", SECOND | {"generation": "chatglm3", "_name_or_path": "chatglm2-6b"})
    assert spec_of(folder, read_config(folder)).key == "chatglm3"


@pytest.mark.parametrize("number", [2, 3])
def test_a_hub_id_tells_the_generation(number, tmp_path):
    """The hub's cache names the folder of a model by its commit, and Python files are not downloaded."""
    folder = tmp_path / f"models--someone--ChatGLM{number}-6B-law" / "snapshots" / ("0123456789" * 4)
    folder.mkdir(parents=True)
    assert spec_of(folder, SECOND | {"_name_or_path": "/data/output"}).key == f"chatglm{number}"


def test_codegeex2_is_read_as_chatglm2(tmp_path):
    assert spec_of(tmp_path / "codegeex2-6b", SECOND).key == "chatglm2"


def test_nothing_of_a_checkpoint_is_executed(chatglm3_folder):
    assert isinstance(load_tokenizer(chatglm3_folder), ChatGLM3Tokenizer)
    model = load_model(chatglm3_folder)
    assert isinstance(model, chatglm2.ChatGLMForConditionalGeneration)
    assert model.config.generation == "chatglm3"
    assert not (chatglm3_folder / "executed").exists()


# Trains with every method; prints how often the config.json of the model was opened each time, and torch's compiler.
COUNTING = """
import os, runpy, sys
from pathlib import Path
opened = []
def hook(event, args):
    if event == "open" and isinstance(args[0], (str, os.PathLike)) and Path(args[0]).name == "config.json":
        opened.append(Path(args[0]).resolve())
sys.addaudithook(hook)
root, file, output, *flags = sys.argv[1:]
for method, *own in (("ptuning", "--pre_seq_len", "4"), ("lora",), ("full",)):
    opened.clear()
    sys.argv = [f"{root}/{method}/main.py", "--output_dir", f"{output}/{method}", *own, *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")
    print(method, opened.count(Path(file)), file=sys.stderr)
print("compiler", int("torch._inductor.compile_fx" in sys.modules), file=sys.stderr)
"""


def test_a_start_opens_config_json_once_and_loads_no_compiler(demo_folder, tmp_path):
    flags = ["--do_train", "--train_file", f"{ROOT}/AdvertiseGen/train.json", "--model_name_or_path", str(demo_folder)]
    flags += ["--prompt_column", "content", "--response_column", "summary", "--max_train_samples", "2", "--use_cpu"]
    flags += ["--max_source_length", "16", "--max_target_length", "16", "--max_steps", "1", "--report_to", "none"]
    command = [sys.executable, "-c", COUNTING, str(ROOT), str(demo_folder / "config.json"), str(tmp_path), *flags]
    done = subprocess.run([*command, "--save_strategy", "no"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    counts = re.findall(r"^(ptuning|lora|full|compiler) (\d+)$", done.stderr, re.MULTILINE)
    assert counts == [("ptuning", "1"), ("lora", "1"), ("full", "1"), ("compiler", "0")]


def test_a_short_name_is_downloaded_after_a_look_at_its_config(chatglm3_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HUB", "modelscope")
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path))
    files = {file.name: file.read_bytes() for file in chatglm3_folder.iterdir()}
    with running_hub() as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.address)
        hub.repositories["ZhipuAI/chatglm3-6b"] = files
        assert open_model("chatglm3-6b").spec.key == "chatglm3"
        assert load_model("THUDM/chatglm3-6b").name_or_path == "THUDM/chatglm3-6b"
        assert open_model("chatglm3-6b").name == "THUDM/chatglm3-6b"
        hub.repositories["me/llama"] = files | {"config.json": b'{"model_type": "llama"}'}
        hub.forget()
        with pytest.raises(UserError, match="type 'llama'"):
            open_model("me/llama")
        assert not any(path.endswith(".bin") for path in hub.asked())


# What is refused


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (SECOND, r'may be a ChatGLM2 or a ChatGLM3.*"generation": "chatglm3"'),
        (FIRST | {"vocab_size": 150528}, "old vocabulary of 150,528 words: use a checkpoint with 130,528"),
        ({"model_type": "chatglm"}, "a model of type 'chatglm'"),
        (
            {"model_type": "llama", "vocab_size": 32000},
            "a model of type 'llama': supported are ChatGLM-6B, ChatGLM2-6B",
        ),
        ({}, "a model of type None"),
        (FIRST | {"eva_config": {}, "qformer_config": {}, "image_length": 32}, "a model that sees pictures"),
        (FIRST | {"auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGenerationWithImage"}}, "pictures"),
        (SECOND | GLM4_SIZE | {"vision_config": {"image_size": 1120}}, "a model that sees pictures"),
        ({"model_type": "glm", "num_hidden_layers": 28, "vision_config": {}, "boi_token_id": 1}, "pictures: supported"),
        ({"architectures": ["CogVLMForCausalLM"], "num_hidden_layers": 32}, "a model that sees pictures"),
        ({"model_type": "glm4v", "text_config": {}}, "a model of type 'glm4v'"),
        (
            {"model_type": "glm", "architectures": ["GLMModel"], "num_layers": 48},
            r"of type 'glm' \(GLMModel\): supported",
        ),
        (SECOND | {"architectures": ["ChatGLMForSequenceClassification"]}, "a ChatGLMForSequenceClassification, which"),
    ],
)
def test_unsupported_models_are_named(config, says, tmp_path):
    with pytest.raises(UserError, match=says) as error:
        spec_of(tmp_path / "model", config)
    assert str(tmp_path / "model") in str(error.value)
    assert "\n" not in str(error.value)


def test_vocabulary_of_another_generation_is_refused(chatglm3_folder, demo_folder, tmp_path):
    mixed = changed(chatglm3_folder, tmp_path / "chatglm3-6b")
    (mixed / "tokenizer.model").unlink()
    shutil.copy(demo_folder / "ice_text.model", mixed)
    says = r"a ChatGLM3-6B without its vocabulary: tokenizer.model is missing \(ice_text.model belongs to another"
    with pytest.raises(UserError, match=says):
        open_model(mixed)


def test_vocabulary_larger_than_the_model_is_refused(chatglm3_folder, tmp_path):
    mixed = changed(chatglm3_folder, tmp_path / "chatglm3-6b", padded_vocab_size=64)
    with pytest.raises(
        UserError, match=r"mixes files of different models: tokenizer.model has \d+ tokens and the model 64"
    ):
        load_tokenizer(mixed)


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00."])
def test_vocabulary_that_is_none_is_refused(content, chatglm3_folder, tmp_path):
    broken = changed(chatglm3_folder, tmp_path / "chatglm3-6b")
    (broken / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.model is no vocabulary of ChatGLM3-6B: copy or download it again"):
        load_tokenizer(broken)


def test_weights_of_another_size_are_refused(chatglm3_folder, tmp_path):
    broken = changed(chatglm3_folder, tmp_path / "chatglm3-6b", hidden_size=64)
    with pytest.raises(UserError, match="the weights in .* have other shapes than its config.json says"):
        load_model(broken)


def test_a_missing_shard_is_named(chatglm3_folder, tmp_path):
    broken = changed(chatglm3_folder, tmp_path / "chatglm3-6b")
    index = {"weight_map": {"a": "pytorch_model.bin", "b": "pytorch_model-00002-of-00002.bin"}}
    (broken / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="pytorch_model-00002-of-00002.bin is missing, though the index of"):
        open_model(broken)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1827781090\n"
PAGE = b"\n<!DOCTYPE html>\n<html><title>Sign in</title></html>"


@pytest.mark.parametrize(
    ("content", "kind", "remedy"),
    [
        (POINTER, "a Git LFS pointer", "run git lfs pull, or bash common/download.sh chatglm3-6b"),
        (PAGE, "an HTML page", "download it again, or bash common/download.sh chatglm3-6b"),
        ("访问受限".encode(), "text", "download it again"),
    ],
    ids=["pointer", "page", "text"],
)
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("pytorch_model.bin", "weights"),
        ("model.safetensors", "weights"),
        ("tokenizer.model", "vocabulary"),
        ("config.json", "settings of the model"),
        ("pytorch_model.bin.index.json", "index of the weights"),
        ("tokenizer_config.json", "settings"),
    ],
)
def test_text_in_place_of_a_file_is_named(name, part, content, kind, remedy, chatglm3_folder, tmp_path):
    """It is left by git without LFS, or saved from a page that asks to sign in."""
    broken = changed(chatglm3_folder, tmp_path / "chatglm3-6b")
    (broken / name).write_bytes(content)
    of_json = kind == "text" and name.endswith(".json")  # which is text itself
    says = r"is no JSON object|is broken" if of_json else f"{name} is {kind}, not the {part}: {remedy}"
    with pytest.raises(UserError, match=says) as error:
        open_model(broken)
    assert str(broken / name) in str(error.value)


def test_a_file_or_a_link_to_nothing_is_no_model(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match="model.gguf is a file: MODEL .* is the folder that holds a model"):
        open_model(tmp_path / "model.gguf")
    (tmp_path / "link").symlink_to("/nowhere")
    with pytest.raises(UserError, match="link is a link to /nowhere, which is no folder"):
        open_model(tmp_path / "link")


def test_a_link_to_nothing_is_named(chatglm3_folder, tmp_path):
    broken = changed(chatglm3_folder, tmp_path / "chatglm3-6b")
    (broken / "pytorch_model.bin").unlink()
    (broken / "pytorch_model.bin").symlink_to("/nowhere/weights")
    with pytest.raises(UserError, match="pytorch_model.bin is missing; the link leads to /nowhere/weights"):
        open_model(broken)


@pytest.mark.parametrize(
    "name", ["consolidated.00.pth", "weights.bin", "ggml-model.gguf", "model.safetensors.incomplete"]
)
def test_weights_of_another_kind_are_named(name, chatglm3_folder, tmp_path):
    broken = changed(chatglm3_folder, tmp_path / "chatglm3-6b")
    (broken / "pytorch_model.bin").rename(broken / name)
    with pytest.raises(
        UserError, match=rf"has no weights: .* \({name} is in a format or under a name that is not read"
    ):
        open_model(broken)


def write_shards(folder: Path, suffix: str = ".bin") -> None:
    """Replaces the one weight file by two, without an index."""
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    for number in (1, 2):
        shard = {name: weights[name].contiguous() for name in list(weights)[number - 1 :: 2]}
        if suffix == ".bin":
            torch.save(shard, folder / f"pytorch_model-0000{number}-of-00002.bin")
        else:
            save_file(shard, folder / f"model-0000{number}-of-00002.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_shards_without_their_index_are_read(suffix, chatglm3_folder, tmp_path):
    folder = changed(chatglm3_folder, tmp_path / "chatglm3-6b")
    write_shards(folder, suffix)
    expected = load_model(chatglm3_folder).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(folder).state_dict().items())
    next(folder.glob("*-00001-of-*")).unlink()
    with pytest.raises(UserError, match=r"-00001-of-00002\.\w+ is missing, though other shards are there"):
        open_model(folder)


def test_pickles_of_old_torch_are_read(chatglm3_folder, tmp_path):
    folder = changed(chatglm3_folder, tmp_path / "chatglm3-6b")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert load_model(folder).num_parameters() == load_model(chatglm3_folder).num_parameters()


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(weights)
    torch.save(weights, folder / "pytorch_model.bin")


def test_a_left_over_quantization_config_is_ignored_and_said(chatglm3_folder, tmp_path, capsys):
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = changed(chatglm3_folder, tmp_path / "chatglm3-6b", quantization_config=settings)
    expected = load_model(chatglm3_folder).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(folder).state_dict().items())
    assert f"note: the quantization_config of {folder} is ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "ending"),
    [("gptq", "qweight"), ("awq", "qzeros"), ("bitsandbytes", "weight.absmax"), ("fp8", "weight_scale_inv")],
)
def test_weights_that_another_library_quantized_are_refused(kind, ending, chatglm3_folder, tmp_path):
    folder = changed(chatglm3_folder, tmp_path / "chatglm3-6b", quantization_config={"quant_method": kind})
    name = f"transformer.encoder.layers.0.self_attention.dense.{ending}"
    rewrite_weights(folder, lambda weights: weights.update({name: torch.zeros(2, dtype=torch.int32)}))
    with pytest.raises(UserError, match=rf"weights quantized by {kind} \({name}\).*take the model with 16-bit weights"):
        open_model(folder)


def test_superfluous_weights_are_named(chatglm3_folder, tmp_path, capfd):
    """In one line, without the table of transformers."""
    folder = changed(chatglm3_folder, tmp_path / "chatglm3-6b", num_layers=1)
    load_model(folder)
    said = capfd.readouterr().err
    assert re.search(
        r"note: 7 weights in .* are not read.*: transformer.encoder.layers.1.input_layernorm.weight, ", said
    )
    assert "REPORT" not in said


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("generation_config.json", "{", "generation_config.json is no JSON object: copy or download it again"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is no JSON object"),
        ("pytorch_model.bin.index.json", '{"weight_map": ["a"]}', "index.json is broken"),
        (
            "config.json",
            '{"model_type": "chatglm", "padded_vocab_size": 9, "num_layers": "6"}',
            "num_layers is '6', not",
        ),
    ],
)
def test_broken_settings_are_named(file, content, says, chatglm3_folder, tmp_path):
    broken = changed(chatglm3_folder, tmp_path / "chatglm3-6b")
    (broken / file).write_text(content)
    with pytest.raises(UserError, match=says):
        open_model(broken)
