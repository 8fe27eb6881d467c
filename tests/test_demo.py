"""The programs write the shipped sample data again, and the shipped demo bases describe plainly."""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

from AdvertiseGen import conversations, generate
from common.encoding import encode_chat, stop_ids
from common.loading import load_model, load_tokenizer
from common.models.registry import DEMOS, open_model
from common.training.evaluation import generate_answers

ROOT = Path(__file__).resolve().parents[1]


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "AdvertiseGen" / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("program", "files"),
    [
        ("generate.py", {"train.json", "dev.json"}),
        ("conversations.py", {"train_chat.json", "dev_chat.json", "train_tools.json", "dev_tools.json"}),
    ],
)
def test_the_program_makes_the_shipped_data_again(program, files, tmp_path):
    subprocess.run([sys.executable, ROOT / "AdvertiseGen" / program, "--output_dir", tmp_path], check=True)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (ROOT / "AdvertiseGen" / file.name).read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == files


def test_no_dev_row_can_be_answered_from_memory():
    train, dev = read_lines("train.json"), read_lines("dev.json")
    assert (len(train), len(dev)) == (2000, 200)
    assert not {row["content"] for row in train} & {row["content"] for row in dev}
    assert not {row["summary"] for row in train} & {row["summary"] for row in dev}


def test_no_dev_conversation_can_be_answered_from_memory():
    """The files share no call with its result and, among rows without a call, no question."""
    train, dev = read_lines("train_tools.json"), read_lines("dev_tools.json")
    assert (len(train), len(dev)) == (600, 60)
    assert not set().union(*map(conversations.facts_of, train)) & set().union(*map(conversations.facts_of, dev))
    train, dev = read_lines("train_chat.json"), read_lines("dev_chat.json")
    assert (len(train), len(dev)) == (600, 60)
    openings = [{(row["history"] or [[row["prompt"]]])[0][0][-20:] for row in rows} for rows in (train, dev)]
    assert not openings[0] & openings[1]


def test_the_demo_is_small_and_stored_as_the_original(demo_folder):
    assert sum(file.stat().st_size for file in demo_folder.iterdir()) < 10e6
    weights = torch.load(demo_folder / "pytorch_model.bin", weights_only=True)
    for name, tensor in weights.items():
        assert tensor.dtype == (torch.float32 if "layernorm" in name else torch.float16), name
    assert torch.equal(weights["lm_head.weight"], weights["transformer.word_embeddings.weight"])
    assert "transformer.layers.0.attention.rotary_emb.inv_freq" in weights


def test_the_chatglm3_demo_is_small_and_stored_as_the_original():
    folder = DEMOS["demo3"]
    assert open_model(folder).spec.key == "chatglm3"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert {"transformer.output_layer.weight", "transformer.rotary_pos_emb.inv_freq"} <= set(weights)


@pytest.mark.parametrize("demo", DEMOS)
def test_the_demo_describes_plainly(demo):
    tokenizer = load_tokenizer(demo)
    contents = [row["content"] for row in read_lines("dev.json")][:50]
    expected = [generate.plain_description(generate.parse_content(content)) for content in contents]
    if demo == "demo":  # its vocabulary has half-width punctuation only
        expected = [unicodedata.normalize("NFKC", plain) for plain in expected]
    prompts = [encode_chat(tokenizer, content) for content in contents]
    generation = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": stop_ids(tokenizer)}
    answers = generate_answers(load_model(demo), tokenizer, prompts, 50, **generation)
    assert sum(answer == plain for answer, plain in zip(answers, expected, strict=True)) >= 45
