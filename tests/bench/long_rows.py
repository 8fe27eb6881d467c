"""Long rows on the CPU: time per token and memory of a training step by P-Tuning v2 and LoRA, as Markdown.

    python tests/bench/long_rows.py                   rows of 512 to 16,384 tokens, minutes of one core
    python tests/bench/long_rows.py --longest 4096    shorter ones only

A step is one row with labels on its last quarter, forward and backward passes with gradient checkpointing, and AdamW;
float32, one thread. Its memory is the highest sum of what PyTorch's allocator hands out beside the weights. An exponent
tells how the step grows from the length before: 1 in line with the tokens, 2 with their square.
"""

import argparse
import math
from collections.abc import Callable
from itertools import takewhile

import torch
from memory import allocator_peak
from speed import attach, measure
from torch.profiler import ProfilerActivity, profile

from common.data.collator import train_batch
from common.methods.prefix import PTuning
from common.models.chatglm2 import ChatGLMConfig, ChatGLMForConditionalGeneration
from common.models.quantization import checkpointing_of

LENGTHS = [512, 1024, 2048, 4096, 8192, 16384]
TIMED = 4096  # tokens that are timed, or one step if that is longer
METHODS = {"prefix": PTuning.name, "lora": "LoRA"}
# ChatGLM3-6B-128k but for its width, depth and vocabulary, whose head would take most of the time.
CONFIG = ChatGLMConfig(
    hidden_size=256,
    num_layers=4,
    num_attention_heads=4,
    kv_channels=64,
    ffn_hidden_size=856,
    padded_vocab_size=8192,
    seq_length=131072,
    rope_ratio=500,
    generation="chatglm3",
)


def training_step(method: str, tokens: int) -> Callable[[int], None]:
    torch.manual_seed(0)
    model = attach(method, ChatGLMForConditionalGeneration(CONFIG)).train()
    model.activation_checkpointing_enable(checkpointing_of(None))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    ids = torch.randint(CONFIG.padded_vocab_size, (tokens,)).tolist()
    question = tokens - tokens // 4
    batch = train_batch([{"input_ids": ids, "labels": [-100] * question + ids[question:]}], pad_token_id=0)

    def step(_: int) -> None:
        model(**batch, loss_only=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def costs(method: str, tokens: int) -> tuple[float, int]:
    """(CPU seconds, bytes) of a step."""
    step = training_step(method, tokens)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        seconds, _ = measure(step, max(1, TIMED // tokens), threads=1)
    return seconds, allocator_peak(recorded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="tokens of the longest row")
    longest = parser.parse_args().longest
    columns = ("CPU s per 1,000 tokens", "exponent", "memory, MB", "exponent")
    print("| tokens |", " | ".join(f"{name}: {column}" for name in METHODS.values() for column in columns), "|")
    print("|" + "---:|" * (1 + len(METHODS) * len(columns)))
    before: dict[str, tuple[float, int]] = {}
    for tokens in takewhile(lambda tokens: tokens <= longest, LENGTHS):
        cells = [f"{tokens:,}"]
        for method in METHODS:
            now = costs(method, tokens)
            growth = [f"{math.log2(new / old):.2f}" for new, old in zip(now, before.get(method, ()), strict=False)]
            time, memory = growth or ("", "")
            cells += [f"{now[0] / tokens * 1000:.3f}", time, f"{now[1] / 1e6:,.0f}", memory]
            before[method] = now
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
