"""The endpoint under load, on the demo: one client, then many at once, whose answers must be those of the one.

    python tests/bench/endpoint.py [--clients 32] [--seconds 60]

Greedy answers of at most 64 tokens to the shipped dev rows. Server and clients share this machine.
"""

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

from openai import OpenAI
from rich.table import Table
from shell import ROOT, environment

from common.terminal import console


def ask(client: OpenAI, question: str, **settings):
    settings = {"temperature": 0, "max_tokens": 64} | settings
    return client.chat.completions.create(model="tuned", messages=[{"role": "user", "content": question}], **settings)


def first_text(client: OpenAI, question: str) -> float:
    """Seconds until a stream brings its first text."""
    begun = time.monotonic()
    for chunk in ask(client, question, stream=True, max_tokens=8):
        if chunk.choices and chunk.choices[0].delta.content:
            break
    return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    lines = (ROOT / "AdvertiseGen/dev.json").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["content"] for line in lines[:64]]
    command = [sys.executable, str(ROOT / "common/chat/server.py"), "--model_name_or_path", "demo3"]
    server = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        address = re.search("ready: (http[^,]*)", server.stdout.readline())[1]
        client = OpenAI(base_url=address, api_key="none", max_retries=0)
        firsts = [first_text(client, question) for question in questions[:20]]
        begun = time.monotonic()
        alone = {question: ask(client, question) for question in questions}
        one = sum(reply.usage.completion_tokens for reply in alone.values()) / (time.monotonic() - begun)
        end = time.monotonic() + args.seconds

        def work(number: int) -> tuple[int, int, int]:
            """(answers, tokens, answers that differ) of one client."""
            count = tokens = different = 0
            for question in itertools.islice(itertools.cycle(questions), number, None):
                if time.monotonic() > end:
                    break
                reply = ask(client, question)
                count, tokens = count + 1, tokens + reply.usage.completion_tokens
                different += reply.choices[0].message.content != alone[question].choices[0].message.content
            return count, tokens, different

        begun = time.monotonic()
        with ThreadPoolExecutor(args.clients) as pool:
            answers, tokens, different = map(sum, zip(*pool.map(work, range(args.clients)), strict=True))
        many = tokens / (time.monotonic() - begun)
    finally:
        server.terminate()
    table = Table("", "1 client", f"{args.clients} clients", "ratio")
    table.add_row("tokens a second", f"{one:,.0f}", f"{many:,.0f}", f"{many / one:.1f}x")
    table.add_row("answers; errors would end this program", f"{len(alone)}", f"{answers:,}", "")
    table.add_row("answers that differ from those alone", "", f"{different}", "")
    table.add_row(
        "first text, ms: median, most of 20", f"{statistics.median(firsts) * 1e3:.0f}, {max(firsts) * 1e3:.0f}"
    )
    console().print(table)


if __name__ == "__main__":
    main()
