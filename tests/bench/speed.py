"""Speed of training, evaluation and preprocessing on the CPU, beside the way in which the official scripts do the same.

    python tests/bench/speed.py                                      a small random model and the shipped rows
    python tests/bench/speed.py --kind chatglm3-lora --shape large --vocabulary tokenizer.model --data DEV.json

The baseline runs in the same process on the same weights and rows, in the official manner: rows padded to 128
positions, logits of every position, gradient checkpointing; evaluation row by row. CPU seconds are taken with one
thread, wall time with all. A report of the official code itself stands in RESULTS.md.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizer

from common.arguments import DataArguments, LoraArguments
from common.data.collator import train_batch
from common.data.dataset import prepare_dataset
from common.data.examples import Reading, Split, read_examples
from common.encoding import encode_eval, encode_train
from common.loading import load_tokenizer
from common.methods.lora import attach_lora
from common.methods.prefix import attach_prefix
from common.models import chatglm, chatglm2
from common.terminal import console
from common.tokenizers.chatglm import ChatGLMTokenizer
from common.tokenizers.chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from common.training.evaluation import generate_answers

ROOT = Path(__file__).resolve().parents[2]
BATCH, LENGTH, PREFIX = 4, 64, 128
TOKENIZERS = {"chatglm": ChatGLMTokenizer, "chatglm2": ChatGLM2Tokenizer, "chatglm3": ChatGLM3Tokenizer}
# The vocabularies are of the original's size: shape -> (hidden, layers, heads, inner).
SHAPES = {
    "chatglm": {"small": (64, 4, 4, 256), "large": (512, 8, 8, 2048)},
    "chatglm2": {"small": (64, 4, 4, 172), "large": (512, 8, 8, 1408)},
}


def make_model(generation: str, shape: str, tokenizer: PreTrainedTokenizer) -> PreTrainedModel:
    """Random weights. No end token: every row generates to the end, so that all ways do the same work."""
    torch.manual_seed(0)
    if generation == "chatglm":
        hidden, layers, heads, inner = SHAPES["chatglm"][shape]
        return chatglm.ChatGLMForConditionalGeneration(
            chatglm.ChatGLMConfig(
                hidden_size=hidden,
                num_layers=layers,
                num_attention_heads=heads,
                inner_hidden_size=inner,
                bos_token_id=tokenizer.bos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                mask_token_id=tokenizer.mask_token_id,
                gmask_token_id=tokenizer.gmask_token_id,
                eos_token_id=None,
            )
        )
    hidden, layers, heads, inner = SHAPES["chatglm2"][shape]
    return chatglm2.ChatGLMForConditionalGeneration(
        chatglm2.ChatGLMConfig(
            hidden_size=hidden,
            num_layers=layers,
            num_attention_heads=heads,
            kv_channels=hidden // heads,
            ffn_hidden_size=inner,
            eos_token_id=None,
        )
    )


def attach(method: str, model: PreTrainedModel) -> PreTrainedModel:
    if method == "full":
        return model
    if method == "lora":
        return attach_lora(model, LoraArguments())
    attach_prefix(model, PREFIX)
    return model


def training_step(model, collate, rows, loss_only: bool) -> Callable[[int], None]:
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)

    def step(index: int) -> None:
        batch = collate([rows[(index * BATCH + i) % len(rows)].columns for i in range(BATCH)])
        model(**batch, loss_only=loss_only).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(step: Callable[[int], None], repeats: int, threads: int) -> tuple[float, float]:
    """CPU seconds and wall seconds of one call; several calls come after one that is not counted."""
    torch.set_num_threads(threads)
    if repeats > 1:
        step(0)
    cpu, wall = time.process_time(), time.perf_counter()
    for index in range(1, repeats + 1):
        step(index)
    return (time.process_time() - cpu) / repeats, (time.perf_counter() - wall) / repeats


def report(title: str, unit: str, ways: dict[str, tuple[Callable[[int], None], int]], repeats: int) -> None:
    """``ways``: name -> (what is measured, rows of one call)."""
    table = Table(title=title, title_justify="left")
    for column in ("", f"CPU s/{unit}, 1 thread", "ratio", f"samples/s, {CORES} threads", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    baseline = None
    for name, (step, rows) in ways.items():
        cpu = measure(step, repeats, 1)[0] / (rows if unit == "row" else 1)
        wall = measure(step, repeats, CORES)[1] / rows
        baseline = baseline or (cpu, wall)
        table.add_row(name, f"{cpu:.3f}", f"{baseline[0] / cpu:.2f}x", f"{1 / wall:.2f}", f"{baseline[1] / wall:.2f}x")
    console().print(table)


def bench_training(title: str, model, tokenizer, examples, repeats: int) -> None:
    rows = encode_train(tokenizer, examples, LENGTH, LENGTH)
    pad = tokenizer.pad_token_id
    padded, dynamic = (partial(train_batch, pad_token_id=pad, length=length) for length in (2 * LENGTH, 0))
    model.train()

    def checkpointed(step: Callable[[int], None]) -> Callable[[int], None]:
        def with_checkpointing(index: int) -> None:
            model.activation_checkpointing_enable()
            model.enable_input_require_grads()
            step(index)
            model.activation_checkpointing_disable()

        return with_checkpointing

    ways = {
        "the official way": checkpointed(training_step(model, padded, rows, loss_only=False)),
        "+ pad to the longest row": checkpointed(training_step(model, dynamic, rows, loss_only=False)),
        "+ logits of labels only": checkpointed(training_step(model, dynamic, rows, loss_only=True)),
        "+ no checkpointing (ours)": training_step(model, dynamic, rows, loss_only=True),
    }
    report(f"{title}, batches of {BATCH} rows", "step", {name: (step, BATCH) for name, step in ways.items()}, repeats)


def bench_evaluation(model, tokenizer, examples) -> None:
    prompts = [row.prompt_ids for row in encode_eval(tokenizer, examples, LENGTH, LENGTH)]
    model.eval()

    def answer(size: int, count: int) -> tuple[Callable[[int], None], int]:
        generation = {"max_new_tokens": LENGTH, "do_sample": False}
        rows = prompts[:count]
        return lambda index: generate_answers(model, tokenizer, rows, size, f"batches of {size}", **generation), count

    ways = {"one row at a time": answer(1, 16), "batches of 16": answer(16, 64), "batches of 64": answer(64, 128)}
    report(f"evaluation, {LENGTH} new tokens", "row", ways, 1)


def bench_preprocessing(generation: str, tokenizer, data: Path, counts: list[int]) -> None:
    """The whole way from a file to the cached data set, on one core; ChatGLM3 reads conversations, others pairs."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    pairs = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    table = Table(title=f"{generation}: rows a CPU second on one core, from the file to the data set")
    for column in ("rows", "rows/s", "the tokenizer alone"):
        table.add_column(column, justify="right")
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["CHATGLM_CACHE"] = folder
            file = Path(folder) / "rows.json"
            with file.open("w", encoding="utf-8") as lines:
                for row in islice(cycle(pairs), count):
                    if generation == "chatglm3":
                        turns = zip(("user", "assistant"), (row["content"], row["summary"]), strict=True)
                        row = {"conversations": [{"role": role, "content": text} for role, text in turns]}
                    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            args = DataArguments(train_file=str(file), max_source_length=LENGTH, max_target_length=LENGTH)
            start = time.process_time()
            prepare_dataset(args, str(file), tokenizer, "train")
            whole = time.process_time() - start
            start = time.process_time()
            for begin in range(0, count, 1000):
                rows = [pairs[index % len(pairs)] for index in range(begin, min(begin + 1000, count))]
                tokenizer.encode_batch([row[name] for row in rows for name in ("content", "summary")])
            alone = time.process_time() - start
        table.add_row(f"{count:,}", f"{count / whole:,.0f}", f"{count / alone:,.0f}")
    os.sched_setaffinity(0, cores)
    console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kind", choices=[f"{name}-{how}" for name in TOKENIZERS for how in ("prefix", "lora", "full")]
    )
    parser.add_argument("--shape", choices=["small", "large"], default="small")
    parser.add_argument("--vocabulary", help="ice_text.model or tokenizer.model; default: a demo's")
    parser.add_argument("--data", type=Path, default=ROOT / "AdvertiseGen" / "dev.json")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 20_000], help="of the preprocessing")
    parser.add_argument("--only", choices=["training", "evaluation", "preprocessing"])
    parser.set_defaults(kind="chatglm-prefix")
    args = parser.parse_args()
    generation, method = args.kind.split("-")
    demo = "demo" if generation == "chatglm" else "demo3"
    tokenizer = TOKENIZERS[generation](args.vocabulary) if args.vocabulary else load_tokenizer(demo)
    columns = DataArguments(
        prompt_column="content", response_column="summary", max_source_length=LENGTH, max_target_length=LENGTH
    )
    if args.only in (None, "preprocessing"):
        bench_preprocessing(generation, tokenizer, args.data, args.rows)
    if args.only == "preprocessing":
        return
    rows = Split("train", columns, tokenizer, str(args.data), [args.data], None)
    examples = [example.content for example in read_examples(rows, Reading())]
    model = attach(method, make_model(generation, args.shape, tokenizer))
    console().print(f"{args.kind}: {model.num_parameters() / 1e6:.1f} million parameters, float32, {args.data}")
    if args.only != "evaluation":
        bench_training(args.kind, model, tokenizer, examples, args.steps)
    if args.only != "training":
        bench_evaluation(model, tokenizer, examples)


CORES = torch.get_num_threads()

if __name__ == "__main__":
    main()
