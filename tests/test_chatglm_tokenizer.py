"""The ChatGLM-6B tokenizer: the ids of the original, and properties that hold with any vocabulary."""

import json
import shutil

import pytest
from conftest import encoded

from common.tokenizers.chatglm import ChatGLMTokenizer

# With the original vocabulary


@pytest.fixture(scope="module", params=["loaded", "saved and loaded again"])
def tokenizer(request, real_tokenizer, tmp_path_factory):
    if request.param == "loaded":
        return real_tokenizer
    folder = tmp_path_factory.mktemp("saved")
    real_tokenizer.save_pretrained(folder)
    return ChatGLMTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def texts(tokenizer_goldens) -> list[dict]:
    """140 difficult texts."""
    assert len(tokenizer_goldens["tricky"]) == 140
    return tokenizer_goldens["tricky"]


def test_ids_of_texts(tokenizer, texts):
    assert [row["text"] for row in texts if tokenizer.encode(row["text"], add_special_tokens=False) != row["ids"]] == []
    assert [row["text"] for row in texts if encoded(tokenizer, [row["text"]]) != [row["ids"]]] == []
    assert encoded(tokenizer, [row["text"] for row in texts]) == [row["ids"] for row in texts]


def test_ids_of_real_rows(tokenizer, real_rows):
    """The columns of 120 rows of the real AdvertiseGen."""
    rows = [column for row in real_rows("tokenizer.json")["dev"] for column in row.values() if isinstance(column, dict)]
    assert len(rows) == 240
    assert encoded(tokenizer, [row["text"] for row in rows]) == [row["ids"] for row in rows]
    for row in rows:
        assert tokenizer.encode(row["text"]) == row["ids_special"]
        assert tokenizer.decode(row["ids"]) == row["decode"]


def test_special_tokens_are_added(tokenizer, texts):
    assert [row["text"] for row in texts if tokenizer.encode(row["text"]) != row["ids"] + [130001, 130004]] == []


def test_tokens_of_texts(tokenizer, texts):
    assert [row["text"] for row in texts if tokenizer.tokenize(row["text"]) != row["tokens"]] == []


def test_decoded_texts(tokenizer, texts):
    """Added special tokens leave no trace in the text; typed ones stay."""
    for row in texts:
        with_specials = row["ids"] + [130001, 130004]
        assert tokenizer.decode(row["ids"]) == row["decode"], row["text"]
        skipped = row.get("decode_special_skip", row["decode"])
        assert tokenizer.decode(with_specials, skip_special_tokens=True) == skipped, row["text"]
        kept = row.get("decode_special_noskip", row["decode"])
        assert tokenizer.decode(with_specials) == kept, row["text"]


def test_decoded_random_ids(tokenizer, tokenizer_goldens):
    for row in tokenizer_goldens["random_ids"]:
        assert tokenizer.decode(row["ids"]) == row["decode"], row["ids"]
        assert tokenizer.decode(row["ids"], skip_special_tokens=True) == row["decode_skip"], row["ids"]


def test_calls_with_padding_and_truncation(tokenizer, tokenizer_goldens):
    for call in tokenizer_goldens["calls"]:
        assert tokenizer(call["texts"], **call["kwargs"])["input_ids"] == call["input_ids"], call["texts"]


def test_sizes_and_special_ids(tokenizer, tokenizer_goldens):
    meta = tokenizer_goldens["meta"]
    assert tokenizer.vocab_size == meta["vocab_size"] and len(tokenizer) == meta["len"]
    assert tokenizer.all_special_tokens == meta["all_special_tokens"]
    assert tokenizer.all_special_ids == meta["all_special_ids"]
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in meta["ids"]} == meta["ids"]
    added = [tokenizer.num_special_tokens_to_add(pair) for pair in (False, True)]
    assert added == meta["num_special_tokens_to_add"]
    assert tokenizer.padding_side == meta["padding_side"]
    assert tokenizer.build_inputs_with_special_tokens([10]) == meta["build_single"]
    assert tokenizer.build_inputs_with_special_tokens([10], [20]) == meta["build_pair"]


# With any vocabulary

WHITE_SPACE = [
    "第一行\n第二行",
    "\n",
    "\n\n空行\n\n",
    "名称\t数量\n裙\t1",
    "a b",
    "def f(x):\n    return x + 1\n\tpass",
    *(f"a{' ' * length}b" for length in (2, 3, 79, 80, 81, 82, 160, 200)),
]
UNCOMMON = ["你好世界", "😀👍🏽", "Ünïcödé", "𠮷野家", "نص", "[gMASK]", "a[gMASK]b", "[sMASK]", "<ENC>", "</s>", "<s>x"]


@pytest.mark.parametrize("text", WHITE_SPACE + UNCOMMON)
def test_round_trip(demo_tokenizer, text):
    assert demo_tokenizer.decode(demo_tokenizer.encode(text)) == text
    assert demo_tokenizer.decode(demo_tokenizer.encode(text), skip_special_tokens=True) == text


def test_white_space_has_pieces_of_its_own(demo_tokenizer):
    tokens = demo_tokenizer.tokenize("a\n\tb" + " " * 80 + "c   d")
    white_space = [token for token in tokens if token == "<n>" or token.startswith("<|")]
    assert white_space == ["<n>", "<|tab|>", "<|blank_80|>", "<|blank_3|>"]


@pytest.mark.parametrize("token", ["[gMASK]", "[sMASK]", "<ENC>", "<dBLOCK>", "</s>", "<s>"])
def test_tokens_that_somebody_types_stay_text(demo_tokenizer, token):
    """Otherwise a message could end the answer or move the mask."""
    typed = demo_tokenizer.encode(f"请解释{token}的意思", add_special_tokens=False)
    assert demo_tokenizer.convert_tokens_to_ids(token) not in typed
    assert not set(typed) & set(demo_tokenizer.all_special_ids)


@pytest.mark.parametrize("token", ["<sop>", "<eop>", "<unk>", "<pad>", "[MASK]"])
def test_tokens_recognised_in_text(demo_tokenizer, token):
    """As in the original, they include the white space around them."""
    tokens = demo_tokenizer.tokenize(f"你好 \n {token}  世界")
    assert tokens == [*demo_tokenizer.tokenize("你好"), token, *demo_tokenizer.tokenize("世界")]


def test_ids_beyond_the_vocabulary_decode_to_nothing(demo_tokenizer):
    """The embedding has more rows than the vocabulary has pieces, and an untrained model generates such ids."""
    ids = demo_tokenizer.encode("你好世界", add_special_tokens=False)
    unknown = [demo_tokenizer.vocab_size, demo_tokenizer.vocab_size + 80]
    assert demo_tokenizer.decode([*ids, *unknown, *ids]) == demo_tokenizer.decode(ids + ids)
    assert demo_tokenizer.decode(unknown) == demo_tokenizer.decode(unknown[0]) == ""
    assert len(demo_tokenizer.convert_ids_to_tokens(unknown)) == 2


def test_encode_batch_equals_encode(demo_tokenizer):
    """Both in one fast call and one by one, which texts with special tokens need."""
    plain = WHITE_SPACE + UNCOMMON + ["", " "]
    for batch in (plain, [*plain, "a [MASK] b", "x<eop>y"]):
        singles = [demo_tokenizer.encode(text, add_special_tokens=False) for text in batch]
        assert encoded(demo_tokenizer, batch) == singles
    assert encoded(demo_tokenizer, []) == []


def test_special_tokens_around_rows(demo_tokenizer):
    names = ["[gMASK]", "<sop>", "<eop>"]
    gmask, sop, eop = (demo_tokenizer.convert_tokens_to_ids(name) for name in names)
    prompt, answer = (demo_tokenizer.encode(text, add_special_tokens=False) for text in ("类型#裙", "好看"))
    assert demo_tokenizer.encode("类型#裙") == [*prompt, gmask, sop]
    assert demo_tokenizer.build_inputs_with_special_tokens(prompt, answer) == [*prompt, gmask, sop, *answer, eop]
    assert demo_tokenizer.gmask_token_id == gmask
    assert (demo_tokenizer.bos_token_id, demo_tokenizer.eos_token_id) == (sop, eop)


def test_batches_are_padded_on_the_left(demo_tokenizer):
    batch = demo_tokenizer(["好", "类型#裙*颜色#白色*风格#简约"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    short = demo_tokenizer.encode("好")
    pads = batch["input_ids"].shape[1] - len(short)
    assert pads > 0
    assert batch["input_ids"][0].tolist() == [demo_tokenizer.pad_token_id] * pads + short
    assert batch["attention_mask"].tolist() == [[0] * pads + [1] * len(short), [1] * (pads + len(short))]


def test_save_and_load(demo_tokenizer, tmp_path):
    """Into a new folder, and into the folder that the tokenizer was loaded from."""
    folder = tmp_path / "new"
    demo_tokenizer.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["ice_text.model", "tokenizer_config.json"]
    loaded = ChatGLMTokenizer.from_pretrained(folder)
    loaded.save_pretrained(folder)
    again = ChatGLMTokenizer.from_pretrained(folder)
    for text in WHITE_SPACE + UNCOMMON:
        assert loaded.encode(text) == again.encode(text) == demo_tokenizer.encode(text)
    assert again.all_special_ids == demo_tokenizer.all_special_ids and again.padding_side == "left"


def test_nothing_of_the_checkpoint_folder_is_executed(demo_tokenizer, tiny_weights, tmp_path):
    """The original's tokenizer_config.json names Python code and more special tokens: neither has an effect."""
    for name in ("tokenizer_config.json", "config.json", "tokenization_chatglm.py", "configuration_chatglm.py"):
        shutil.copyfile(tiny_weights / name, tmp_path / name)
    shutil.copyfile(demo_tokenizer.vocab_file, tmp_path / "ice_text.model")
    assert "auto_map" in json.loads((tmp_path / "tokenizer_config.json").read_text())
    loaded = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert loaded.encode("a[gMASK]</s>b") == demo_tokenizer.encode("a[gMASK]</s>b")
    assert not (tiny_weights / "executed").exists()
