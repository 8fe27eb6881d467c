"""Compares llama-server's tokens, prompts, answers and logits with those of the model here; see gguf.sh.

LLAMA_CPP=/path/of/its/source bash tests/bench/gguf.sh [--texts 2000] [--rows 20]
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import httpx2 as httpx
import torch

from common.encoding import encode_chat, stop_ids
from common.loading import load_model, load_tokenizer
from common.locking import free_port

TOKENS = 64
SYSTEM = "回答要短。"


def texts_of(count: int) -> list[str]:
    """The shipped rows, and random characters."""
    rows = [json.loads(line) for line in open(ROOT / "AdvertiseGen/dev.json", encoding="utf-8")]
    draw = random.Random(0)
    characters = [*" \nab的一", *map(chr, range(0x21, 0x3000, 5)), *map(chr, range(0x4E00, 0x9FFF, 37)), "😀"]
    shipped = [row[name] for row in rows for name in ("content", "summary")]
    return [*shipped, *("".join(draw.choices(characters, k=draw.randint(1, 30))) for _ in range(count))][:count]


@torch.no_grad()
def answer(model, prompt: list[int], stops: list[int]) -> tuple[list[int], torch.Tensor]:
    """The greedy tokens without the stop, and the log-probabilities of each, [tokens, v]."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, eos_token_id=stops
    )[0, len(prompt) :]
    logits = model(torch.tensor([prompt + found.tolist()])).logits[0, len(prompt) - 1 : -1]
    tokens = found.tolist()
    return (tokens[:-1] if tokens[-1] in stops else tokens), logits.float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama_cpp", required=True, help="the source of llama.cpp, built in its folder build")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=20)
    args = parser.parse_args()
    server = built(args.llama_cpp)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "common/export/export.py", "--model_name_or_path", args.model]
        subprocess.run(
            [*command, "--format", "gguf", "--dtype", args.dtype, "--output_dir", f"{folder}/gguf"], check=True
        )
        port = free_port()
        command = [server, "-m", f"{folder}/gguf/model.gguf", "--port", str(port), "--jinja", "-np", "1", "-fa", "off"]
        command += ["-ctk", "f32", "-ctv", "f32"]  # keys and values in float32, as here
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                compare(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600), args)
            finally:
                process.terminate()


def built(source: str) -> Path:
    """llama-server, built from the source of llama.cpp if it is not there yet."""
    build = Path(source) / "build"
    if not (build / "bin/llama-server").exists():
        if not (Path(source) / "CMakeLists.txt").exists():
            sys.exit(f"LLAMA_CPP={source}: give the folder with the source of llama.cpp.")
        flags = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF"]
        subprocess.run(["cmake", "-S", source, "-B", build, *flags], check=True)
        subprocess.run(["cmake", "--build", build, "--target", "llama-server", "--parallel"], check=True)
    return build / "bin/llama-server"


def compare(client: httpx.Client, args: argparse.Namespace) -> None:
    tokenizer, model = load_tokenizer(args.model), load_model(args.model)
    stops, vocabulary = stop_ids(tokenizer), model.config.padded_vocab_size

    def ask(path: str, **content: Any) -> Any:
        reply = client.post(path, json=content)
        reply.raise_for_status()
        return reply.json()

    for _ in range(600):
        try:
            if client.get("/health").status_code == 200:
                break
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    texts = [text for text in texts_of(args.texts) if text]
    own = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    same = sum(ask("/tokenize", content=text)["tokens"] == ids for text, ids in zip(texts, own, strict=True))
    print(f"texts with equal tokens: {same} of {len(texts)}")
    rows = [json.loads(line) for line in open(ROOT / "AdvertiseGen/dev.json", encoding="utf-8")][: args.rows]
    has_system = len(stops) > 1
    prompts = answers = served = 0
    largest = 0.0
    for number, row in enumerate(rows):
        system = SYSTEM if has_system and number % 2 else ""
        history = [("你好", "您好！")] if number % 3 == 0 else []
        messages = [{"role": "system", "content": system}] if system else []
        for question, reply in history:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        messages.append({"role": "user", "content": row["content"]})
        prompt = encode_chat(tokenizer, row["content"], history, system)
        text = ask("/apply-template", messages=messages)["prompt"]
        prompts += ask("/tokenize", content=text, parse_special=True, add_special=False)["tokens"] == prompt
        tokens, expected = answer(model, prompt, stops)
        how = {"n_predict": TOKENS, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        found = ask("/completion", prompt=prompt, n_probs=vocabulary, **how)
        answers += [token for token in found["tokens"] if token not in stops] == tokens
        place = -1
        for probabilities in found["completion_probabilities"][: len(tokens)]:
            place = tokens.index(probabilities["id"], place + 1)  # a token that is part of a character has none
            for each in probabilities["top_logprobs"]:
                if expected[place, each["id"]] > -30:  # of less likely tokens the server's float32 knows little
                    largest = max(largest, abs(each["logprob"] - expected[place, each["id"]].item()))
        said = ask("/v1/chat/completions", messages=messages, max_tokens=TOKENS, temperature=0)["choices"][0]
        content, whole = said["message"]["content"], tokenizer.decode(tokens, skip_special_tokens=True)
        served += content.strip() == whole.strip()
    print(f"prompts with equal tokens: {prompts} of {len(rows)}")
    print(f"greedy answers of at most {TOKENS} tokens that are equal: {answers} of {len(rows)}")
    print(f"largest difference of a log-probability: {largest:.1e}")
    print(f"equal answers of /v1/chat/completions: {served} of {len(rows)}")


if __name__ == "__main__":
    main()
