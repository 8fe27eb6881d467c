"""The ChatGLM2-6B and ChatGLM3-6B tokenizers: the original ids, and properties that hold with any vocabulary."""

import json
import shutil

import pytest
import sentencepiece
from conftest import encoded
from tiny_models import CHATGLM2, CHATGLM3, write_tokenizer_config

from common.tokenizers.chatglm2 import ROLES, ChatGLM2Tokenizer, ChatGLM3Tokenizer

only_chatglm2 = pytest.mark.parametrize("spec", [CHATGLM2], ids=["chatglm2-6b"], indirect=True)
only_chatglm3 = pytest.mark.parametrize("spec", [CHATGLM3], ids=["chatglm3-6b"], indirect=True)
ROLE_TOKENS = [f"<|{role}|>" for role in ROLES]
TYPED = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<s>", "</s>", "<unk>", *ROLE_TOKENS]


def lists_of(batch) -> dict:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}


# With the original vocabulary


@pytest.fixture(scope="module", params=["loaded", "saved and loaded again"])
def tokenizer(request, spec, real_tokenizer2, tmp_path_factory):
    if request.param == "loaded":
        return real_tokenizer2
    folder = tmp_path_factory.mktemp("saved")
    real_tokenizer2.save_pretrained(folder)
    return spec.tokenizer_class.from_pretrained(folder)


@pytest.fixture(scope="module")
def real_items(spec, real_rows) -> list[dict]:
    """The columns of 200 rows of the real AdvertiseGen."""
    items = real_rows("tokenizer.json", spec.name)["items"]
    assert len(items) == 400
    return items


def test_ids_of_real_rows(tokenizer, real_items):
    assert encoded(tokenizer, [item["text"] for item in real_items]) == [item["sp"] for item in real_items]
    for item in real_items:
        assert tokenizer.encode(item["text"]) == item["encode"]
        assert tokenizer.encode(item["text"], add_special_tokens=False) == item["encode_nospecial"]
        assert lists_of(tokenizer(item["text"])) == item["call"]


def test_decoded_real_rows(tokenizer, real_items):
    """Our skip_special_tokens=True skips special tokens; the original ChatGLM3 ignores it."""
    for item in real_items:
        assert tokenizer.decode(item["encode"]) == item["decode"]
        assert tokenizer.decode(item["encode_nospecial"]) == item["decode_nospecial"]
        assert tokenizer.decode(item["encode"], skip_special_tokens=True) == item["decode_nospecial"]


def test_prompts_of_real_rows(tokenizer, real_items):
    for item in real_items:
        if "build_prompt" in item:
            assert tokenizer.build_prompt(item["text"]) == item["build_prompt"]
            assert tokenizer.encode(item["build_prompt"]) == item["build_prompt_ids"]
        else:
            assert tokenizer.build_single_message("user", "", item["text"]) == item["user_msg"]
            assert tokenizer.build_chat_input(item["text"])["input_ids"].tolist() == [item["chat_input"]]


def test_difficult_texts_are_as_sentencepiece_has_them(tokenizer, tokenizer_goldens):
    """For any text the ids are those of sentencepiece itself."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=tokenizer.vocab_file)
    texts = [row["text"] for row in tokenizer_goldens["tricky"]] + TYPED
    assert encoded(tokenizer, texts) == [pieces.encode(text) for text in texts]
    for text in texts:
        ids = pieces.encode(text)
        assert tokenizer.encode(text) == [64790, 64792, *ids]
        assert tokenizer.tokenize(text) == [pieces.id_to_piece(index) for index in ids]
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == pieces.decode(ids), text
        assert tokenizer.decode(ids) == pieces.decode(ids), text


def test_sizes_and_special_ids(tokenizer, tokenizer_goldens2):
    golden = tokenizer_goldens2
    assert tokenizer.vocab_size == golden["vocab_size"] == len(tokenizer.get_vocab())
    assert {token: tokenizer.get_command(token) for token in golden["special"]} == golden["special"]
    assert tokenizer.convert_tokens_to_ids(list(golden["special"])) == list(golden["special"].values())
    assert tokenizer.convert_ids_to_tokens(list(golden["special"].values())) == list(golden["special"])
    special_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert special_ids == (golden["pad"], golden["eos"], golden["bos"])
    assert (tokenizer.unk_token, tokenizer.padding_side) == (golden["unk"], golden["padding_side"])


def test_padded_batches(tokenizer, tokenizer_goldens2):
    assert len(tokenizer_goldens2["calls"]) == 4
    for call in tokenizer_goldens2["calls"]:
        batch = tokenizer(call["texts"], **call["kwargs"])
        assert lists_of(batch) == lists_of(call), call["kwargs"]


@only_chatglm2
def test_prompts_with_history(tokenizer, tokenizer_goldens2):
    for golden in tokenizer_goldens2["history_prompts"]:
        assert tokenizer.build_prompt(golden["query"], golden["history"]) == golden["prompt"]
        assert tokenizer.encode(golden["prompt"]) == golden["ids"]


@only_chatglm2
def test_pair(tokenizer, tokenizer_goldens2):
    assert tokenizer.encode(*tokenizer_goldens2["pair"]["texts"]) == tokenizer_goldens2["pair"]["ids"]


@only_chatglm3
def test_messages(tokenizer, tokenizer_goldens2):
    for golden in tokenizer_goldens2["single_messages"]:
        message = [golden[name] for name in ("role", "metadata", "message")]
        assert tokenizer.build_single_message(*message) == golden["ids"], message


@only_chatglm3
def test_conversations(tokenizer, tokenizer_goldens2):
    """With tools in the system message, calls, and results."""
    for golden in tokenizer_goldens2["chat_inputs"]:
        batch = tokenizer.build_chat_input(golden["query"], golden["history"], golden["role"])
        assert batch["input_ids"].tolist() == [golden["ids"]]
        assert batch["attention_mask"].tolist() == [[1] * len(golden["ids"])]
        assert batch["position_ids"].tolist() == [list(range(len(golden["ids"])))]


@only_chatglm3
def test_encode_special_tokens(real_tokenizer2, tokenizer_goldens2):
    """Role tokens in the text become one token each; [gMASK] and the others stay text."""
    tokenizer = ChatGLM3Tokenizer(real_tokenizer2.vocab_file, encode_special_tokens=True)
    goldens = tokenizer_goldens2["encode_special_tokens_true"]
    assert [golden["text"] for golden in goldens if tokenizer.encode(golden["text"]) != golden["encode"]] == []


# With any vocabulary

TEXTS = [
    "你好",
    "你好世界",
    "a b  c",
    "第一行\n\n第二行\t",
    "😀 Ünïcödé 𠮷野家",
    " leading",
    "trailing ",
    "\n",
    "",
    *TYPED,
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(small_tokenizer, text):
    ids = small_tokenizer.encode(text, add_special_tokens=False)
    assert small_tokenizer.decode(ids) == text
    assert small_tokenizer.decode(small_tokenizer.encode(text), skip_special_tokens=True) == text
    assert encoded(small_tokenizer, [text, "x"])[0] == ids


@pytest.mark.parametrize("text", TYPED)
def test_tokens_that_somebody_types_stay_text(small_tokenizer, text):
    """Otherwise a message could end the answer or speak for the assistant."""
    pieces = small_tokenizer.pieces.get_piece_size()
    for typed in (text, f"请解释{text}的意思", f"{text}\n 你好"):
        ids = small_tokenizer.encode(typed, add_special_tokens=False)
        assert max(ids) < pieces and not set(ids) & {0, 1, 2}


def test_special_tokens_follow_the_pieces(small_tokenizer, spec):
    pieces = small_tokenizer.pieces.get_piece_size()
    tokens = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *(ROLE_TOKENS if spec.name == "chatglm3-6b" else [])]
    assert [small_tokenizer.get_command(token) for token in tokens] == list(range(pieces, pieces + len(tokens)))
    assert small_tokenizer.vocab_size == pieces + len(tokens)


def test_special_tokens_around_rows(small_tokenizer):
    start = [small_tokenizer.get_command("[gMASK]"), small_tokenizer.get_command("sop")]
    prompt, answer = encoded(small_tokenizer, ["你好", "天气"])
    assert small_tokenizer.encode("你好") == [*start, *prompt]
    assert small_tokenizer.encode("你好", "天气") == [*start, *prompt, *answer, small_tokenizer.eos_token_id]
    assert small_tokenizer.encode("你好", truncation=True, max_length=3) == [*start, prompt[0]]


def test_batches_are_padded_on_the_left(small_tokenizer):
    batch = small_tokenizer(["你好", "今天天气怎么样？你好，今天天气怎么样？"], padding=True, return_tensors="pt")
    short = small_tokenizer.encode("你好")
    pads = batch["input_ids"].shape[1] - len(short)
    assert pads > 0
    assert batch["input_ids"][0].tolist() == [0] * pads + short
    assert batch["attention_mask"][0].tolist() == [0] * pads + [1] * len(short)
    assert batch["position_ids"][0].tolist() == [0] * pads + list(range(len(short)))
    assert batch["position_ids"][1].tolist() == list(range(pads + len(short)))


def test_special_tokens_when_decoded(small_tokenizer, spec):
    """ChatGLM2 never shows them; ChatGLM3 shows them unless skip_special_tokens."""
    ids = small_tokenizer.encode("你好")
    shown = {"chatglm2-6b": "你好", "chatglm3-6b": "[gMASK]sop 你好"}
    assert small_tokenizer.decode(ids) == shown[spec.name]
    assert small_tokenizer.decode(ids, skip_special_tokens=True) == "你好"


@pytest.mark.parametrize("skip", [False, True])
def test_the_end_of_an_answer_decodes_to_nothing(small_tokenizer, skip):
    """In a batch pads follow the end token; the pad is the unknown token."""
    ids = small_tokenizer.encode("你好", add_special_tokens=False)
    end = [small_tokenizer.eos_token_id, *[small_tokenizer.pad_token_id] * 3]
    assert small_tokenizer.decode(ids + end, skip_special_tokens=skip) == "你好"


def test_ids_beyond_the_vocabulary_decode_to_nothing(small_tokenizer):
    """The embedding has more rows than there are tokens, and an untrained model generates such ids."""
    ids = small_tokenizer.encode("你好", add_special_tokens=False)
    unknown = [small_tokenizer.vocab_size, small_tokenizer.vocab_size + 80]
    for skip in (False, True):
        assert small_tokenizer.decode([*ids, *unknown], skip_special_tokens=skip) == "你好"
        assert small_tokenizer.decode(unknown[0], skip_special_tokens=skip) == ""
    assert len(small_tokenizer.convert_ids_to_tokens(unknown)) == 2


@only_chatglm2
def test_rounds_of_a_prompt(small_tokenizer):
    assert small_tokenizer.build_prompt("甲") == "[Round 1]\n\n问：甲\n\n答："
    expected = "[Round 1]\n\n问：甲\n\n答：乙\n\n[Round 2]\n\n问：丙\n\n答："
    assert small_tokenizer.build_prompt("丙", [["甲", "乙"]]) == expected


@only_chatglm3
def test_a_conversation_is_its_messages(small_tokenizer):
    """The system message contains the tools as indented JSON, after a line feed."""
    tools = [{"name": "天气"}]
    history = [
        {"role": "system", "content": "你好", "tools": tools},
        {"role": "assistant", "metadata": "get_weather", "content": "x"},
    ]
    system, user, assistant = (small_tokenizer.get_command(f"<|{role}|>") for role in ("system", "user", "assistant"))
    texts = ["\n", "你好\n" + json.dumps(tools, indent=4, ensure_ascii=False), "get_weather\n", "x", "天气"]
    empty, instructions, name, call, query = encoded(small_tokenizer, texts)
    expected = [*small_tokenizer.encode(""), system, *empty, *instructions]
    expected += [assistant, *name, *call, user, *empty, *query, assistant]
    assert small_tokenizer.build_chat_input("天气", history)["input_ids"].tolist() == [expected]


@only_chatglm3
def test_role_tokens_are_recognised_only_when_asked_for(small_tokenizer):
    text = "你好<|user|> hello<|assistant|><|system|>\n"
    asked = ChatGLM3Tokenizer(small_tokenizer.vocab_file, encode_special_tokens=True)
    greeting, hello, line = encoded(small_tokenizer, ["你好", " hello", "\n"])
    user, assistant, system = (small_tokenizer.get_command(f"<|{role}|>") for role in ("user", "assistant", "system"))
    expected = [*greeting, user, *hello, assistant, system, *line]
    assert asked.encode(text, add_special_tokens=False) == expected
    assert encoded(small_tokenizer, [text]) == encoded(asked, [text])
    assert encoded(asked, [text]) != [expected]  # messages are encoded so


def test_save_and_load(small_tokenizer, tmp_path):
    """Into a new folder, and into the folder that the tokenizer was loaded from."""
    folder = tmp_path / "new"
    small_tokenizer.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    loaded = type(small_tokenizer).from_pretrained(folder)
    loaded.save_pretrained(folder)
    again = type(small_tokenizer).from_pretrained(folder)
    for text in TEXTS:
        assert loaded.encode(text) == again.encode(text) == small_tokenizer.encode(text)
    assert again.special_token_ids == small_tokenizer.special_token_ids and again.padding_side == "left"
    assert again.all_special_ids == small_tokenizer.all_special_ids


def test_nothing_of_the_checkpoint_folder_is_executed(small_tokenizer, spec, tiny2_folder, tmp_path):
    """A tokenizer_config.json that names Python code and other special tokens: neither has an effect."""
    for name in ("config.json", "tokenization_chatglm.py", "configuration_chatglm.py"):
        shutil.copyfile(tiny2_folder / name, tmp_path / name)
    shutil.copyfile(small_tokenizer.vocab_file, tmp_path / "tokenizer.model")
    others = {"pad_token": "<pad>", "eos_token": "<|user|>", "unk_token": "<other>"}
    write_tokenizer_config(spec, tmp_path, **others)
    loaded = spec.tokenizer_class.from_pretrained(tmp_path)
    assert loaded.encode("a[gMASK]</s>b") == small_tokenizer.encode("a[gMASK]</s>b")
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 2)
    assert not (tiny2_folder / "executed").exists()


def test_both_read_one_vocabulary(small_vocabulary):
    """Both tokenizers give the same ids."""
    first, second = ChatGLM2Tokenizer(str(small_vocabulary)), ChatGLM3Tokenizer(str(small_vocabulary))
    assert first.get_vocab().items() <= second.get_vocab().items()
    assert [first.encode(text) for text in TEXTS] == [second.encode(text) for text in TEXTS]
