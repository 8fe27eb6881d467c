"""What is shipped: the sample data, which its program makes again, and the demo base, which describes plainly."""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import torch

from AdvertiseGen import generate
from common.loading import load_model
from common.predict import generate_answers

ROOT = Path(__file__).resolve().parents[1]


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "AdvertiseGen" / name).read_text(encoding="utf-8").splitlines()]


def test_the_program_makes_the_shipped_data_again(tmp_path):
    subprocess.run([sys.executable, ROOT / "AdvertiseGen" / "generate.py", "--output_dir", tmp_path], check=True)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (ROOT / "AdvertiseGen" / file.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_no_dev_row_can_be_answered_from_memory():
    train, dev = read_lines("train.json"), read_lines("dev.json")
    assert (len(train), len(dev)) == (2000, 200)
    assert not {row["content"] for row in train} & {row["content"] for row in dev}
    assert not {row["summary"] for row in train} & {row["summary"] for row in dev}


def test_the_demo_is_small_and_stored_as_the_original(demo_folder):
    assert sum(file.stat().st_size for file in demo_folder.iterdir()) < 10e6
    weights = torch.load(demo_folder / "pytorch_model.bin", weights_only=True)
    for name, tensor in weights.items():
        assert tensor.dtype == (torch.float32 if "layernorm" in name else torch.float16), name
    assert torch.equal(weights["lm_head.weight"], weights["transformer.word_embeddings.weight"])
    assert "transformer.layers.0.attention.rotary_emb.inv_freq" in weights


def test_the_demo_describes_plainly(demo_tokenizer):
    contents = [row["content"] for row in read_lines("dev.json")][:50]
    expected = [generate.plain_description(generate.parse_content(content)) for content in contents]
    prompts = [demo_tokenizer.encode(content) for content in contents]
    answers = generate_answers(load_model("demo"), demo_tokenizer, prompts, 50, max_new_tokens=64, do_sample=False)
    right = [answer == unicodedata.normalize("NFKC", plain) for answer, plain in zip(answers, expected, strict=True)]
    assert sum(right) >= 45
