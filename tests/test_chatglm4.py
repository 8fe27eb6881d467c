"""GLM-4 in its first format: the ids of tiktoken, the numbers of transformers' own GLM, the whole way of a model."""

import base64
import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
import tiktoken
import torch
from conftest import ROOT, encoded
from shell import run_program
from transformers import GlmForCausalLM
from transformers.cache_utils import DynamicCache

from common.data.formats import Columns, FormatReader
from common.encoding import conversation_of, encode_chat, encode_eval, encode_texts, encode_train, stop_ids
from common.errors import UserError
from common.export import glm
from common.export.weights import stored_weights
from common.loading import load_model, load_tokenizer
from common.methods.prefix import attach_prefix
from common.models.registry import open_model
from common.tokenizers.base import Turn
from common.tokenizers.chatglm4 import EXPRESSION, ChatGLM4Tokenizer

SPECIAL = (
    "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|> "
    "<|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|>"
).split()


def tiktoken_of(tokenizer: ChatGLM4Tokenizer) -> tiktoken.Encoding:
    """As the original code makes it, from the file."""
    lines = (line.split() for line in Path(tokenizer.vocab_file).read_text().splitlines())
    ranks = {base64.b64decode(token): int(number) for token, number in lines}
    special = {token: len(ranks) + index for index, token in enumerate(SPECIAL)}
    return tiktoken.Encoding("original", pat_str=EXPRESSION, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module")
def original(tokenizer4) -> tiktoken.Encoding:
    return tiktoken_of(tokenizer4)


def random_texts(count: int) -> list[str]:
    """Of all characters that are assigned, blanks and runs of letters among them."""
    draw = random.Random(0)
    known = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cs", "Cn", "Co")]
    often = [*"abc '12\n\r\t\u3000，。你好今天", "'S", "'ll", "  ", "\n\n", "aaaaaaa", "12345", *SPECIAL]
    return [
        "".join(draw.choice(often if draw.random() < 0.7 else known) for _ in range(draw.randint(1, 40)))
        for _ in range(count)
    ]


# The tokenizer


def assert_as_original(tokenizer: ChatGLM4Tokenizer, original: tiktoken.Encoding, texts: list[str]) -> None:
    """The same ids and, also of broken characters, the same texts."""
    expected = [original.encode_ordinary(text) for text in texts]
    assert encoded(tokenizer, texts) == expected
    assert [tokenizer.decode(ids) for ids in expected] == texts
    draw = random.Random(1)
    for ids in expected:
        broken = draw.choices(ids or [0], k=8)  # bytes of different characters
        assert tokenizer.decode(broken) == original.decode(broken, errors="replace")


def test_ids_and_texts_are_those_of_tiktoken(tokenizer4, original):
    rows = (ROOT / "AdvertiseGen" / "train.json").read_text(encoding="utf-8").splitlines()
    assert tokenizer4.pieces.get_piece_size() == 1000
    assert_as_original(tokenizer4, original, [*random_texts(10_000), *rows])


def test_real_rows_and_difficult_texts_have_the_ids_of_tiktoken(tokenizer4, original, real_rows):
    goldens = real_rows("tokenizer.json", "chatglm3-6b")
    texts = [row["text"] for name in ("items", "tricky") for row in goldens.get(name, [])]
    assert len(texts) >= 400
    assert_as_original(tokenizer4, original, texts)


def test_special_tokens_follow_the_table(tokenizer4):
    size = tokenizer4.pieces.get_piece_size()
    assert [tokenizer4.get_command(token) for token in SPECIAL] == list(range(size, size + 14))
    assert tokenizer4.vocab_size == len(tokenizer4) == len(tokenizer4.get_vocab()) == size + 14
    assert tokenizer4.start_ids() == [size + 2, size + 4]
    assert stop_ids(tokenizer4) == [size, size + 7, size + 9]
    assert tokenizer4.pad_token_id == tokenizer4.eos_token_id == size and tokenizer4.padding_side == "left"


@pytest.mark.parametrize("text", SPECIAL)
def test_tokens_that_somebody_types_stay_text(tokenizer4, original, text):
    typed = f"请解释{text}的意思"
    assert tokenizer4.encode(typed, add_special_tokens=False) == original.encode(typed, disallowed_special=())
    assert tokenizer4.decode(tokenizer4.encode(typed), skip_special_tokens=True) == typed
    assert tokenizer4.decode(tokenizer4.encode(typed)) == f"[gMASK]<sop>{typed}"


def test_batches_are_padded_on_the_left(tokenizer4):
    batch = tokenizer4(["你好", "今天天气怎么样？你好"], padding=True)
    pads = batch["attention_mask"][0].count(0)
    assert pads > 0 and batch["input_ids"][0][:pads] == [tokenizer4.pad_token_id] * pads
    assert batch["position_ids"][0] == [0] * pads + list(range(len(batch["input_ids"][0]) - pads))


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer4):
    ids = tokenizer4.encode("你好", add_special_tokens=False)
    assert tokenizer4.decode([*ids, tokenizer4.vocab_size + 3]) == "你好"
    assert tokenizer4.decode([*ids, tokenizer4.eos_token_id], skip_special_tokens=True) == "你好"


def test_save_and_load(tokenizer4, tmp_path):
    tokenizer4.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    again = ChatGLM4Tokenizer.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)
    texts = random_texts(50)
    assert encoded(again, texts) == encoded(tokenizer4, texts)
    assert again.get_vocab() == tokenizer4.get_vocab() and again.special_tokens_map == tokenizer4.special_tokens_map
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "ChatGLM4Tokenizer"


def test_words_that_are_no_longer_known_are_merged_again(tokenizer4, monkeypatch):
    texts = random_texts(50)
    expected = encoded(tokenizer4, texts)
    for room in (-1, 3):
        monkeypatch.setattr(tokenizer4, "room", room)
        assert encoded(tokenizer4, texts) == expected and tokenizer4.room >= 0 or room == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(" 300\n", " 7\n"),
        lambda text: "".join(text.splitlines(keepends=True)[1:]),
        lambda text: text + "###\n",
        lambda text: text + base64.b64encode(b"x" * 5000).decode() + " 600\n",
        lambda text: "你好\n",
        lambda text: "",
    ],
)
def test_a_broken_table_is_one_sentence(damage, chatglm4_folder, tmp_path):
    folder = shutil.copytree(chatglm4_folder, tmp_path / "glm")
    table = folder / "tokenizer.model"
    table.write_text(damage(table.read_text()))
    with pytest.raises(UserError, match="tokenizer.model is no vocabulary of GLM-4: copy or download it again"):
        load_tokenizer(folder)


# The chat format

TOOL = {"name": "查", "description": "d", "parameters": {"type": "object", "properties": {"color": {"type": "string"}}}}
TOOLS_TEXT = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，你的任务是针对用户的问题和要求"
    "提供适当的答复和支持。\n\n# 可用工具\n\n## 查\n\n"
    + json.dumps(TOOL, indent=4, ensure_ascii=False)
    + "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
)


def turns_of(tokenizer, **row) -> list[Turn]:
    return FormatReader(Columns(), tokenizer).read(row)


def labelled(tokenizer, row) -> str:
    """The text of the labels, a dot for each token without one."""
    return "".join(tokenizer.decode([label]) if label != -100 else "·" for label in row.labels)


def test_rows_of_the_official_demo_are_trained_as_by_its_script(tokenizer4):
    """Tools stand in the system message; answers and calls are learned, and so is the role token that ends them."""
    messages = [
        {"role": "system", "content": "", "tools": [{"type": "function", "function": TOOL}]},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": '{"b"}'},
        {"role": "observation", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f", "loss": False},
        {"role": "user", "content": "g"},
        {"role": "assistant", "content": "h"},
    ]
    row = encode_train(tokenizer4, [turns_of(tokenizer4, messages=messages)], 10**4, 10**4)[0]
    before = f"[gMASK]<sop><|system|>\n{TOOLS_TEXT}<|user|>\na<|assistant|>"
    assert tokenizer4.decode(row.input_ids) == (
        before
        + '\n{"b"}<|observation|>\nc<|assistant|>\nd<|user|>\ne<|assistant|>\nf<|user|>\ng<|assistant|>\nh<|user|>'
    )
    learned = labelled(tokenizer4, row).lstrip("·")
    assert learned == '\n{"b"}<|observation|>' + "·" * 3 + "\nd<|user|>" + "·" * 9 + "\nh<|user|>"


def test_system_prompt_and_tools_are_two_messages(tokenizer4):
    """Whether they stand in a message or in columns; the tools that are GLM-4's own have descriptions of its makers."""
    tools = [TOOL, {"type": "python"}, {"type": "simple_browser"}, {"type": "cogview"}]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    system = {"role": "system", "content": "s", "tools": tools}
    prompts = [
        encode_eval(tokenizer4, [turns_of(tokenizer4, **row)], 10**4, 10**4)[0].prompt_ids
        for row in ({"messages": [system, *messages]}, {"messages": messages, "tools": tools, "system": "s"})
    ]
    first, second = map(tokenizer4.decode, prompts)
    assert first.startswith(f"[gMASK]<sop><|system|>\n{TOOLS_TEXT}\n\n## python\n\n当你向 `python` 发送")
    assert "\n\n## simple_browser\n\n你可以使用" in first and "\n\n## cogview\n\n如果用户" in first
    assert first.endswith("<|system|>\ns<|user|>\na<|assistant|>")
    start, described, given = first.partition("<|user|>")[0].split("<|system|>")
    assert second == f"{start}<|system|>{given}<|system|>{described}<|user|>\na<|assistant|>"


def test_calls_are_written_as_json(tokenizer4):
    """A call of OpenAI's format has the tool's name on the role's line, and its arguments below."""
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "北京", "days": null}'}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3°"},
        {"role": "assistant", "content": "b"},
    ]
    row = encode_train(tokenizer4, [turns_of(tokenizer4, messages=messages)], 100, 100)[0]
    expected = '<|assistant|>weather\n{"city": "北京"}<|observation|>\n3°<|assistant|>\nb<|user|>'
    assert tokenizer4.decode(row.input_ids) == f"[gMASK]<sop><|user|>\na{expected}"


def test_chats_and_texts(tokenizer4):
    ids = encode_chat(tokenizer4, "v", [["u", "a"]], "s")
    assert tokenizer4.decode(ids) == "[gMASK]<sop><|system|>\ns<|user|>\nu<|assistant|>\na<|user|>\nv<|assistant|>"
    [row] = encode_texts(tokenizer4, ["abc"], 100)
    assert tokenizer4.decode(row.input_ids) == "[gMASK]<sop>abc<|endoftext|>"
    assert encode_eval(tokenizer4, [conversation_of("v", "b")], 100, 100)[0].reference == "b"


# The model


@pytest.fixture(scope="module")
def own(chatglm4_folder):
    return load_model(chatglm4_folder)


@pytest.fixture(scope="module")
def theirs(chatglm4_folder, tmp_path_factory):
    """The GlmForCausalLM of transformers with the converted weights."""
    folder, config = open_model(chatglm4_folder), open_model(chatglm4_folder).config
    converted = glm.glm_config(config, torch.float32, config.eos_token_id)
    model = GlmForCausalLM(converted).eval()
    model.load_state_dict(dict(glm.glm_weights(stored_weights(folder), config, torch.float32)))
    return model


def assert_close(first: torch.Tensor, second: torch.Tensor) -> None:
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_logits_loss_and_gradients_are_those_of_transformers(own, theirs):
    ids = torch.randint(400, (3, 24), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(ids % 3 == 0, -100)
    mine, expected = own(ids, labels=labels), theirs(ids, labels=labels)
    assert_close(mine.logits, expected.logits)
    assert_close(mine.loss, expected.loss)
    for model, output in ((own, mine), (theirs, expected)):
        model.zero_grad()
        output.loss.backward()
    gradients = ((name, weight.grad) for name, weight in own.named_parameters())
    found = dict(glm.glm_weights(gradients, own.config, torch.float32))
    assert found.keys() == {name for name, _ in theirs.named_parameters()}
    for name, weight in theirs.named_parameters():
        assert_close(found[name], weight.grad)


def test_padded_logits_and_greedy_answers_are_those_of_transformers(own, theirs, tokenizer4):
    batch = tokenizer4(["你好", "hello world 今天天气怎么样？"], padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    with torch.no_grad():
        expected = theirs(batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"]).logits
        assert_close(own(**batch).logits[mask.bool()], expected[mask.bool()])
    how = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    for ids, seen in ((batch["input_ids"], mask), (batch["input_ids"][1:], mask[1:])):
        answers = [model.generate(ids, attention_mask=seen, **how) for model in (own, theirs)]
        assert torch.equal(*answers)


def test_a_prefix_is_a_cache_that_holds_it(own, theirs):
    """The keys and values of the prefix have no position: the text begins at 0 after them."""
    prefixed = load_model(own.name_or_path)
    attach_prefix(prefixed, 5)
    torch.nn.init.normal_(prefixed.transformer.prefix_encoder.embedding.weight, std=0.5)
    prefixed.eval()
    ids = torch.randint(400, (2, 12), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache()
    with torch.no_grad():
        for layer, (key, value) in enumerate(prefixed.transformer.prefix_encoder(2, torch.float32)):
            cache.update(key, value, layer)
        places = torch.arange(12).expand(2, 12)
        expected = theirs(ids, past_key_values=cache, position_ids=places, attention_mask=torch.ones(2, 17)).logits
        assert_close(prefixed(ids).logits, expected)


def test_a_saved_checkpoint_has_the_weights_and_fields_of_the_original(own, chatglm4_folder, tmp_path):
    own.save_pretrained(tmp_path)
    load_tokenizer(chatglm4_folder).save_pretrained(tmp_path)
    saved, first = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, chatglm4_folder))
    without = {"architectures", "auto_map", "attention_dropout", "hidden_dropout", "bias_dropout_fusion"}
    changed = {name for name, value in first.items() if saved.get(name) != value} - without
    assert changed == {"torch_dtype", "transformers_version"} and saved["bos_token_id"] is None
    again = load_model(tmp_path)
    assert type(again) is type(own) and again.config.generation == "chatglm4"
    assert all(torch.equal(weight, own.state_dict()[name]) for name, weight in again.state_dict().items())


# The whole way


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "今天天气很好。"}]
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    file.write_text((json.dumps({"messages": messages}) + "\n") * 4)
    return file


def start(method: str, model: Path, data: Path, output: Path, *flags: str) -> int:
    argv = [str(ROOT / method / "main.py"), "--model_name_or_path", str(model), "--output_dir", str(output)]
    argv += ["--train_file", str(data), "--test_file", str(data), "--validation_file", str(data), "--use_cpu"]
    argv += ["--max_source_length", "32", "--max_target_length", "32", "--max_new_tokens", "4", "--report_to", "none"]
    argv += ["--do_train", "--do_eval", "--do_predict", "--max_steps", "3", "--learning_rate", "1e-2"]
    return run_program([*argv, "--per_device_train_batch_size", "2", *flags])


METHODS = {
    "ptuning": (["--pre_seq_len", "4", "--quantization_bit", "8"], "pytorch_model.bin"),
    "lora": ([], "adapter_model.safetensors"),
    "full": (["--activation_checkpointing"], "model.safetensors"),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_evaluates_and_answers(method, chatglm4_folder, data, tmp_path, capsys):
    flags, saved = METHODS[method]
    out = tmp_path / "out"
    assert start(method, chatglm4_folder, data, out, *flags) == 0
    assert (out / saved).is_file() and not (chatglm4_folder / "executed").exists()
    answers = (out / "generated_predictions.txt").read_text().splitlines()
    assert [json.loads(line)["labels"] for line in answers] == ["今天天气很好。"] * 4
    assert json.loads((out / "eval_results.json").read_text())["eval_loss"] > 0
    assert run_program([str(ROOT / "common" / "inference_hf.py"), str(out), "--prompt", "你好"]) == 0
    if method == "lora":
        merged = ["--lora_checkpoint", str(out), "--dtype", "float32"]
        assert run_program([str(ROOT / "common" / "merge.py"), *merged]) == 0
        assert load_model(out / "merged").config.rope_ratio == 500
    export = [str(ROOT / "common" / "export" / "export.py"), "--checkpoint", str(out), "--dtype", "float32"]
    if method == "ptuning":
        assert run_program(export) == 2
        return
    assert run_program(export) == 0
    model = GlmForCausalLM.from_pretrained(out / "glm")
    assert model.config.rope_parameters["rope_theta"] == 10000 * 500 and model.config.bos_token_id is None
    assert run_program([*export, "--format", "original"]) == 0
    fields = json.loads((out / "original" / "tokenizer_config.json").read_text())
    assert fields["auto_map"]["AutoTokenizer"][0] == "tokenization_chatglm.ChatGLM4Tokenizer"
    assert fields["chat_template"].startswith("{%- set own") and "<|user|>" in json.dumps(
        fields["added_tokens_decoder"]
    )
    capsys.readouterr()
    assert run_program([*export, "--format", "gguf", "--output_dir", str(tmp_path / "gguf")]) == 2
    assert "of a GLM-4 no GGUF file is written here: take FORMAT=glm" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(chatglm4_folder, small_vocabulary, tmp_path):
    """Both have a file of that name: each says so in one sentence."""
    mixed = shutil.copytree(chatglm4_folder, tmp_path / "glm-4-9b")
    shutil.copyfile(small_vocabulary, mixed / "tokenizer.model")
    with pytest.raises(UserError, match="tokenizer.model is no vocabulary of GLM-4: copy or download it again"):
        load_tokenizer(mixed)
    config = json.loads((mixed / "config.json").read_text()) | {"generation": "chatglm3"}
    (mixed / "config.json").write_text(json.dumps(config))
    (mixed / "tokenizer_config.json").unlink()
    shutil.copyfile(chatglm4_folder / "tokenizer.model", mixed / "tokenizer.model")
    with pytest.raises(UserError, match="tokenizer.model is text, not the vocabulary"):
        load_tokenizer(mixed)


def test_a_cut_table_is_refused(chatglm4_folder, tmp_path):
    """It would give the special tokens other numbers than the model knows."""
    folder = shutil.copytree(chatglm4_folder, tmp_path / "cut")
    lines = (folder / "tokenizer.model").read_bytes().splitlines(keepends=True)
    (folder / "tokenizer.model").write_bytes(b"".join(lines[:-100]))
    with pytest.raises(UserError, match="900 tokens, and eos_token_id in config.json counts on another number"):
        load_tokenizer(folder)
