"""Models that leave: what transformers, llama.cpp and the official code get is what was trained."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from conftest import encoded
from safetensors.torch import load_file
from shell import ROOT, run_program
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.arguments import LoraArguments, PrefixArguments
from common.data.formats import Columns, FormatReader
from common.encoding import encode_eval
from common.export import compare
from common.export.vocabulary import save_vocabulary
from common.loading import load_model, load_tokenizer
from common.methods.lora import Lora, attach_lora
from common.methods.prefix import PTuning, attach_prefix
from common.models.chatglm2 import ChatGLMConfig, ChatGLMForConditionalGeneration
from common.models.registry import open_model
from common.tokenizers.chatglm2 import ChatGLM2Tokenizer

PROGRAM = str(ROOT / "common" / "export" / "export.py")
SPACES = ("", " ", "  a", "a  b ", "\n", "\n\n a\t", " \n ", "\u3000全角", "a\r\nb")
TEXTS = (
    *SPACES,
    *("philosophy of people", "sop eop", "你好，世界！", "😀👩‍👧 ﬁ ½", "<|user|", "▁▁ x▁", "x" * 300),
    "def f(x):\n    return x",
)


def export(*flags: object) -> int:
    return run_program([PROGRAM, *map(str, flags)])


def small_folder(generation: str, folder: Path, **config) -> Path:
    """A random model with the vocabulary of demo3, and with norms that are not 1."""
    demo = open_model("demo3")
    sizes = {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 16, "ffn_hidden_size": 96}
    config = {"padded_vocab_size": demo.config.padded_vocab_size, "seq_length": 256, "generation": generation} | config
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**sizes | config))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.2)
    model.save_pretrained(folder)
    load_tokenizer("demo3").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """demo3 as GLM of transformers, in float32, in several files."""
    folder = tmp_path_factory.mktemp("exported") / "glm"
    flags = ("--dtype", "float32", "--max_shard_size", "4MB", "--output_dir", folder)
    assert export("--model_name_or_path", "demo3", *flags) == 0
    return folder


# The vocabulary and the chat format


def assert_same_ids(own: ChatGLM2Tokenizer, folder: Path) -> None:
    save_vocabulary(own, folder, 8192)
    theirs = AutoTokenizer.from_pretrained(folder)
    draw = random.Random(0)
    characters = [*"ab 的一\n▁", *map(chr, range(0x20, 0x3000, 7)), *map(chr, range(0x4E00, 0x9FFF, 101)), "😀"]
    texts = [*TEXTS, *("".join(draw.choices(characters, k=draw.randint(1, 30))) for _ in range(2000))]
    texts = [text for text in texts if text]
    assert [theirs.encode(text) for text in texts] == encoded(own, texts)
    for text, ids in zip(texts, encoded(own, texts), strict=True):
        assert theirs.decode(ids) == own.decode(ids), text


def test_the_vocabulary_gives_the_same_tokens(tmp_path):
    assert_same_ids(load_tokenizer("demo3"), tmp_path)


def test_a_table_of_tiktoken_gives_the_same_tokens(tokenizer4, tmp_path):
    assert_same_ids(tokenizer4, tmp_path)


def test_the_real_vocabulary_gives_the_same_tokens(real_tokenizer2, tmp_path):
    assert_same_ids(real_tokenizer2, tmp_path)


def conversation(draw: random.Random, family: str) -> list[dict]:
    """A random one, which ends with a question or a tool's result."""
    rounds, messages = draw.randint(1, 4), []
    if family != "chatglm2" and draw.random() < 0.5:
        tools = [{"name": "天气", "parameters": {"city": {"type": "string", "默认": draw.choice(TEXTS)}}}]
        messages.append({"role": "system", "content": draw.choice(TEXTS)} | draw.choice([{}, {"tools": tools}]))
    for number in range(rounds):
        messages.append({"role": "user", "content": draw.choice(TEXTS)})
        if family != "chatglm2" and draw.random() < 0.3:
            call = {"role": "assistant", "metadata": "天气", "content": "```python\ntool_call(city='北京')\n```"}
            messages += [call, {"role": "observation", "content": draw.choice(TEXTS)}]
        if number < rounds - 1:
            # "\n " begins an answer as a model gives it, with its empty metadata line.
            texts = [text for text in TEXTS if text[:2] != "\n "]
            messages.append({"role": "assistant", "content": draw.choice(texts)})
    return messages


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3", "chatglm4"])
def test_the_template_writes_conversations_as_they_are_trained(family, tokenizer4, tmp_path):
    own = tokenizer4 if family == "chatglm4" else load_tokenizer(small_folder(family, tmp_path / family))
    save_vocabulary(own, tmp_path, 8192)
    theirs, draw = AutoTokenizer.from_pretrained(tmp_path), random.Random(0)
    for _ in range(200):
        messages = conversation(draw, family)
        assert template_ids(theirs, messages) == compare.prompt_of(own, messages), messages


def template_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **given) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **given)


@pytest.mark.parametrize("family", ["chatglm3", "chatglm4"])
def test_tools_and_calls_as_openai_gives_them_are_those_of_the_training(family, tokenizer4, tmp_path):
    """``tools`` beside the messages are a column of that name; a call is written as Python, by GLM-4 as JSON."""
    own = tokenizer4 if family == "chatglm4" else load_tokenizer("demo3")
    save_vocabulary(own, tmp_path, 8192)
    theirs, begin = AutoTokenizer.from_pretrained(tmp_path), "" if family == "chatglm4" else "\n "
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {}}}}}]
    tools += [{"type": "python"}]
    function = {"name": "weather", "arguments": {"city": "北京's", "days": 3, "exact": True}}
    system = {"role": "system", "content": "短"}
    asked = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": f"{begin}好"},
        {"role": "user", "content": "天气"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": "3°"},
    ]
    for messages in (asked, [system, *asked]):
        row = {"messages": [*messages, {"role": "assistant", "content": "x"}], "tools": tools}
        row["messages"] = [m | {"content": "好"} if m["content"] == f"{begin}好" else m for m in row["messages"]]
        turns = FormatReader(Columns(None, None, None, None, None), own, asking=False).read(row)
        expected = encode_eval(own, [turns], 10**6, 10**6)[-1].prompt_ids
        assert template_ids(theirs, messages, tools=tools) == expected


# The model


def test_plain_transformers_computes_the_same(exported, tmp_path):
    """In a process that knows nothing of this repository: tokens, logits and 64 greedy tokens."""
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer; folder, out = sys.argv[1:]\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder); model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "assert not any(name.partition('.')[0] == 'common' for name in sys.modules)\n"
        "ids = tokenizer.apply_chat_template([{'role': 'user', 'content': '类型#裤'}], add_generation_prompt=True,"
        " return_dict=True, return_tensors='pt')\n"
        "answer = model.generate(**ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)\n"
        "torch.save({'answer': answer, 'logits': model(answer).logits, 'stops': model.generation_config.eos_token_id,"
        " 'dtype': model.dtype, 'class': type(model).__name__}, out)\n"
    )
    command = [sys.executable, "-I", "-c", program, str(exported), str(tmp_path / "found")]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    found = torch.load(tmp_path / "found")
    own, tokenizer = load_model("demo3"), load_tokenizer("demo3")
    prompt = compare.prompt_of(tokenizer, [{"role": "user", "content": "类型#裤"}])
    assert found["answer"][0, : len(prompt)].tolist() == prompt and found["answer"].shape[1] == len(prompt) + 64
    with torch.no_grad():
        here = compare.load_glm(exported, torch.float32)(found["answer"]).logits
        assert (own(found["answer"]).logits - here).abs().max() <= 1e-6
        assert (here - found["logits"]).abs().max() <= 1e-4  # of other kernels
    how = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    question = torch.tensor([prompt])
    assert torch.equal(own.generate(question, attention_mask=torch.ones_like(question), **how), found["answer"])
    assert found["stops"] == [2, *(tokenizer.get_command(f"<|{role}|>") for role in ("user", "observation"))]
    assert found["dtype"] == torch.float32 and found["class"] == "GlmForCausalLM"
    assert len(list(exported.glob("model-*-of-*.safetensors"))) > 2 and not list(exported.glob("*.py"))


@pytest.mark.parametrize(("family", "ratio"), [("chatglm2", 4), ("chatglm3", 50)])
def test_the_variants_for_long_texts_compute_the_same(family, ratio, tmp_path, capsys):
    folder = small_folder(family, tmp_path / family, rope_ratio=ratio)
    flags = ("--model_name_or_path", folder, "--output_dir", tmp_path / "out", "--dtype", "float32")
    assert export(*flags) == 0
    assert "logits within 0" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    older = config.get("rope_scaling", {"factor": config["rope_theta"] / 10000})
    assert older["factor"] == ratio and config["partial_rotary_factor"] == 0.5


def test_an_export_that_computes_something_else_is_refused(exported, tmp_path):
    own, other = load_model("demo3"), compare.load_glm(exported, torch.float32)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight[0, 0] += 0.5
    with pytest.raises(compare.UserError, match="the exported model's logits differ by .*: nothing was saved"):
        compare.compare_answers(own, other, [5, 6, 7])
    broken = tmp_path / "broken"
    broken.mkdir()
    save_vocabulary(load_tokenizer("demo3"), broken, 8192)
    (broken / "chat_template.jinja").write_text("[gMASK]<sop>{{ messages[0]['content'] }}")
    with pytest.raises(compare.UserError, match="makes other tokens of"):
        compare.compare_prompts(load_tokenizer("demo3"), "chatglm3", broken)


def test_an_adapter_is_merged_before_it_leaves(tmp_path, capsys):
    model = attach_lora(load_model("demo3"), LoraArguments(lora_dropout=0.0))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    Lora(LoraArguments()).save(model, tmp_path / "adapter")
    assert export("--checkpoint", tmp_path / "adapter", "--dtype", "float32") == 0
    folder = tmp_path / "adapter" / "glm"
    assert f"exported {tmp_path / 'adapter'}: {folder}" in capsys.readouterr().out
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7, 8]])
        difference = (
            (compare.load_glm(folder, torch.float32)(ids).logits - model.eval()(input_ids=ids).logits).abs().max()
        )
    assert difference < 1e-4 and not list(folder.glob("merged*"))


def test_an_export_in_bfloat16_is_taken_for_what_it_is(tmp_path):
    """Rounding decides between tokens that are equally likely, which is no fault."""
    flags = ("--dtype", "bfloat16", "--output_dir", tmp_path / "out")
    assert export("--model_name_or_path", "demo3", *flags) == 0


def test_16_bit_is_the_default_and_no_file_is_executable_code(tmp_path):
    assert export("--model_name_or_path", "demo3", "--output_dir", tmp_path / "out") == 0
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names | {"chat_template.jinja", "model.safetensors"}
    assert {w.dtype for w in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}


# The other formats


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_gguf_file_holds_weights_vocabulary_and_template(dtype, tmp_path):
    flags = ("--format", "gguf", "--dtype", dtype, "--output_dir", tmp_path / "out")
    assert export("--model_name_or_path", "demo3", *flags) == 0
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    own, tokenizer = load_model("demo3"), load_tokenizer("demo3")
    expected = {name: w for name, w in own.state_dict().items() if "inv_freq" not in name}
    assert len(reader.tensors) == len(expected)
    found = {tensor.name: tensor for tensor in reader.tensors}
    layer = "transformer.encoder.layers.1"
    for name, original in {
        "token_embd.weight": "transformer.embedding.word_embeddings.weight",
        "blk.1.attn_qkv.bias": f"{layer}.self_attention.query_key_value.bias",
        "blk.1.ffn_up.weight": f"{layer}.mlp.dense_h_to_4h.weight",
        "output_norm.weight": "transformer.encoder.final_layernorm.weight",
    }.items():
        weight = expected[original]
        kind = getattr(torch, dtype) if weight.ndim > 1 else torch.float32
        assert found[name].data.tobytes() == weight.to(kind).contiguous().view(torch.uint8).numpy().tobytes(), name
        assert list(found[name].shape) == list(weight.shape)[::-1]
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.chat_template"].startswith("[gMASK]<sop>")
    assert len(fields["tokenizer.ggml.tokens"]) == own.config.padded_vocab_size
    assert fields["tokenizer.ggml.tokens"][tokenizer.get_command("sop")] == "<sop>"
    ends = [fields[f"tokenizer.ggml.{end}_token_id"] for end in ("eos", "eot", "eom")]
    assert ends == [2, *(tokenizer.get_command(f"<|{role}|>") for role in ("user", "observation"))]
    assert fields["chatglm.rope.dimension_count"] == own.config.kv_channels // 2


@pytest.mark.parametrize("model", ["demo", "demo3"])
def test_the_original_format_names_the_official_code_and_holds_none(model, tmp_path, capsys):
    flags = ("--format", "original", "--output_dir", tmp_path / "out", "--max_shard_size", "5MB")
    assert export("--model_name_or_path", model, *flags) == 0
    assert "copy configuration_chatglm.py, modeling_chatglm.py" in capsys.readouterr().out
    files = list((tmp_path / "out").iterdir())
    assert not [file for file in files if file.suffix in (".py", ".safetensors")]
    stored = {}
    for file in (tmp_path / "out").glob("*.bin"):
        stored |= torch.load(file, weights_only=True)
    expected = load_model(model).original_state_dict()
    assert (
        stored.keys() == expected.keys() | {"lm_head.weight"} if model == "demo" else stored.keys() == expected.keys()
    )
    assert all(torch.equal(stored[name], weight) for name, weight in expected.items())
    for file in ("config.json", "tokenizer_config.json"):
        assert "chatglm.ChatGLM" in json.dumps(json.loads((tmp_path / "out" / file).read_text())["auto_map"])


# What can't leave


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--model_name_or_path", "demo"), "ChatGLM-6B reads a question in both directions, which no other program"),
        (("--model_name_or_path", "demo", "--format", "gguf"), "ChatGLM-6B reads a question in both directions"),
        (("--checkpoint", "PREFIX"), "holds a prefix, which no other program puts before a text"),
        (("--checkpoint", "PREFIX", "--format", "original"), "holds a prefix, which no other program"),
        ((), r"CHECKPOINT \(--checkpoint\) and MODEL \(--model_name_or_path\) are empty: which model leaves\?"),
        (("--model_name_or_path", "demo3", "--max_shard_size", "many"), "--max_shard_size many: write it like 500MB"),
        (("--model_name_or_path", "nowhere"), "no model folder nowhere"),
        (("--checkpoint", "EMPTY"), "no training in"),
        (("--model_name_or_path", "demo3", "--output_dir", "FULL"), "is not empty: choose another --output_dir"),
        (("--model_name_or_path", "demo3", "--output_dir", "."), "is not empty: choose another --output_dir"),
        (("--model_name_or_path", "demo3", "--output_dir", "FULL/file"), "is a file: choose another --output_dir"),
    ],
)
def test_what_cannot_leave_is_said_in_a_sentence(flags, problem, tmp_path, monkeypatch, capsys):
    for name in ("EMPTY", "FULL"):
        (tmp_path / name).mkdir()
    (tmp_path / "FULL" / "file").write_text("")
    if "PREFIX" in flags:
        attach_prefix(model := load_model("demo3"), 4)
        PTuning(PrefixArguments()).save(model, tmp_path / "PREFIX")
    flags = [str(tmp_path / flag) if flag.partition("/")[0].isupper() else flag for flag in flags]
    monkeypatch.chdir(tmp_path)
    assert export(*flags) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(problem, error), error
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "PREFIX") == ["EMPTY", "FULL"]
