"""Predicted memory beside measured: small models of every kind by method, bits, batch, lengths, checkpointing.

    python tests/bench/memory.py                          the grid, in this process
    python tests/bench/memory.py --only chatglm3-lora     settings with this in their names
    python tests/bench/memory.py --table                  predicted for the 6B models on a GPU, by method and bits; and
                                                          their longest rows

Each setting is a few steps of main.py on random weights. On a CPU the measure is the highest sum of what PyTorch's own
allocator handed out, weights included, as its profiler records it; on a GPU torch.cuda.max_memory_allocated.
"""

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

import torch
from rich.table import Table
from shell import flags_of
from torch.profiler import ProfilerActivity, profile
from transformers import Glm4Config, GlmConfig, PreTrainedModel

from common.arguments import FullArguments, LoraArguments, PrefixArguments
from common.finetune import run
from common.flags import parse_arguments
from common.launch.engines import start_engine
from common.memory.fit import Case, Forecast, forecast, needed
from common.memory.footprint import CUDA_CONTEXT
from common.methods.full import Full
from common.methods.lora import Lora
from common.methods.prefix import PTuning
from common.models.chatglm2 import ChatGLMConfig
from common.models.registry import DEMOS, SPECS, ModelFolder
from common.terminal import console
from common.training.checks import check, complete
from common.training.choices import choose

os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # the profiler sees the thread that it was started in

ALLOWED = 0.1  # of the measured, by which a prediction may be off
SHAPES = {  # hidden size, layers, heads, inner size, vocabulary
    "chatglm": (256, 6, 4, 1024, 20480),
    "chatglm2": (256, 6, 4, 704, 32768),
    "chatglm3": (256, 8, 4, 704, 65024),
}
EDGE = {"head_dim": 128, "vocab_size": 59264, "tie_word_embeddings": True, "partial_rotary_factor": 1.0}
RELATIVES = {  # name: key in SPECS, config with the published sizes
    "glm-4-9b-chat": ("chatglm4", ChatGLMConfig(num_layers=40, padded_vocab_size=151552, generation="chatglm4")),
    "GLM-4-9B-0414": ("glm", Glm4Config()),
    "glm-edge-4b-chat": (
        "glm",
        GlmConfig(
            **{"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 40, "num_attention_heads": 24},
            **{"num_key_value_heads": 6, **EDGE, "pad_token_id": 59246},
        ),
    ),
    "glm-edge-1.5b-chat": (
        "glm",
        GlmConfig(
            **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
            **{"num_key_value_heads": 4, **EDGE, "pad_token_id": 59246},
        ),
    ),
}
CARDS = (8, 24, 80)  # GB
STEP = 64  # tokens, in which the longest rows are counted
METHODS = {"ptuning": (PTuning, PrefixArguments), "lora": (Lora, LoraArguments), "full": (Full, FullArguments)}
FLAGS = {"ptuning": ["--pre_seq_len", "64"], "lora": [], "full": []}


@dataclass(frozen=True)
class Setting:
    kind: str
    method: str
    bits: int | None = None
    rows: int = 4
    source: int = 64
    target: int = 64
    checkpointing: bool = False
    accumulation: int = 1

    def __str__(self) -> str:
        bits = f"{self.bits} bit" if self.bits else "32 bit"
        extra = ", checkpointing" * self.checkpointing + f", {self.accumulation} batches a step" * (
            self.accumulation > 1
        )
        return f"{self.kind}-{self.method}, {bits}, {self.rows} x ({self.source} + {self.target}){extra}"


GRID = [
    *(Setting(name, method) for name in SHAPES for method in FLAGS),
    *(Setting(name, method, bits) for name in SHAPES for method in ("ptuning", "lora") for bits in (4, 8)),
    Setting("chatglm", "ptuning", 4, 1, checkpointing=True, accumulation=4),
    Setting("chatglm", "lora", None, 4, 128, 256, checkpointing=True),
    Setting("chatglm", "full", None, 8, 64, 64, checkpointing=True),
    Setting("chatglm2", "ptuning", 4, 2, 128, 128, checkpointing=True),
    Setting("chatglm2", "lora", 8, 4, 128, 128, checkpointing=True),
    Setting("chatglm2", "full", None, 2, 32, 32, accumulation=2),
    Setting("chatglm3", "ptuning", None, 8, 64, 64, checkpointing=True),
    Setting("chatglm3", "lora", None, 8, 128, 256, checkpointing=True),
    Setting("chatglm3", "lora", 4, 2, 32, 256),
    Setting("chatglm3", "full", None, 4, 64, 192, checkpointing=True),
    Setting("chatglm3", "lora", None, 16, 32, 32),
]


def make_model(kind: str, folder: Path, shape: tuple[int, ...] | None = None, device: str = "cpu") -> Path:
    """Random weights in float16 with the vocabulary of the demos; ``shape``: as in SHAPES."""
    hidden, layers, heads, inner, vocabulary = shape or SHAPES[kind]
    demo, spec = DEMOS["demo" if kind == "chatglm" else "demo3"], SPECS[kind]
    sizes = {"hidden_size": hidden, "num_layers": layers, "num_attention_heads": heads}
    if kind == "chatglm":
        sizes |= {"inner_hidden_size": inner, "vocab_size": vocabulary}
    else:
        sizes |= {"ffn_hidden_size": inner, "kv_channels": hidden // heads, "padded_vocab_size": vocabulary}
        sizes |= {"generation": kind}
    stored = json.loads((demo / "config.json").read_text())
    torch.manual_seed(0)
    with torch.device("meta"):
        model: PreTrainedModel = spec.model(spec.config(**(stored | sizes))).half()
    model.to_empty(device=device)
    model.tie_weights()
    for name, weight in model.named_parameters():
        weight.data.normal_(1.0 if "norm" in name else 0.0, 0.02)
    model.save_pretrained(folder)
    del model
    for name in (spec.vocabulary, "tokenizer_config.json"):
        shutil.copy(demo / name, folder)
    if kind == "chatglm2":
        (folder / "tokenizer_config.json").write_text('{"generation": "chatglm2"}')
    return folder


def write_rows(file: Path, count: int) -> Path:
    """Rows that fill the lengths: prediction is about the longest."""
    row = {"content": "类型#裙*颜色#红色*" * 200, "summary": "这条红色的裙子非常好看，" * 200}
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for _ in range(count)), encoding="utf-8")
    return file


def training_flags(setting: Setting, model: Path, data: Path, output: Path) -> list[str]:
    flags = ["--do_train", "--model_name_or_path", str(model), "--train_file", str(data), "--output_dir", str(output)]
    flags += ["--prompt_column", "content", "--response_column", "summary", "--max_steps", "2", "--report_to", "none"]
    flags += ["--max_source_length", str(setting.source), "--max_target_length", str(setting.target)]
    flags += ["--per_device_train_batch_size", str(setting.rows), "--save_strategy", "no", "--disable_tqdm", "true"]
    flags += ["--gradient_accumulation_steps", str(setting.accumulation)]
    flags += ["--activation_checkpointing", str(setting.checkpointing)]
    flags += ["--quantization_bit", str(setting.bits)] if setting.bits else []
    return [*flags, *FLAGS[setting.method]]


def train(setting: Setting, folder: Path, model: Path) -> int:
    """Trains as main.py does. Returns the predicted peak in bytes."""
    make, arguments = METHODS[setting.method]
    data = write_rows(folder / "rows.json", 2 * setting.rows * setting.accumulation)
    argv = training_flags(setting, model, data, folder / "out")
    model_args, method_args, data_args, args = parse_arguments(arguments, argv)
    run(make(method_args), model_args, data_args, args)
    return json.loads((folder / "out" / "train_results.json").read_text())["predicted_memory"]


def allocator_peak(recorded: profile) -> int:
    """The highest sum of what the CPU's allocator had handed out and not got back."""
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def measure(setting: Setting, model: Path) -> tuple[int, int]:
    """(predicted, measured) bytes of a training in this process."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            return train(setting, Path(folder), model), torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
            predicted = train(setting, Path(folder), model)
        return predicted, allocator_peak(recorded)


def planned(method_name: str, argv: list[str]) -> Forecast:
    """The forecast of --plan for the flags of a method's main.py."""
    make, arguments = METHODS[method_name]
    model_args, method_args, data_args, args = parse_arguments(arguments, [*argv, "--plan"])
    start_engine(args)
    method = make(method_args)
    choose(data_args, args)
    folder = check(method, model_args, data_args, args)
    complete(method, model_args, args, folder)
    return forecast(folder, method, model_args, data_args, args)


def print_table() -> None:
    """The three 6B models by method and bits, with the lengths of each train.sh and checkpointing, as Markdown."""
    models = [f"{kind}-6b" for kind in SHAPES]
    chosen = {"GRADIENT_CHECKPOINTING": "true", "EVAL_BATCH_SIZE": "8"}
    print("| method | weights | lengths, batch |", " | ".join(models), "|")
    print("|---|---|---|" + "---:|" * len(models))
    for method in METHODS:
        chosen |= (
            {"BATCH_SIZE": "1", "GRAD_ACCUM": "16"} if method == "ptuning" else {"BATCH_SIZE": "4", "GRAD_ACCUM": "1"}
        )
        for bits in ("4", "8", "") if method != "full" else ("",):
            cells = []
            for model in models:
                flags = flags_of(f"{method}/train.sh", "--plan", MODEL=model, QUANTIZATION_BIT=bits, **chosen)
                case, plan, _ = planned(method, flags)
                cells.append(f"{plan.total / 1e9:.1f} GB")
            setup = case.setup
            shape = f"{setup.source_length} + {setup.target_length - 1}, {setup.batch_size}"
            weights = f"{bits} bit" if bits else "32 bit" if method == "full" else "16 bit"
            print("|", " | ".join([case.method.name, weights, shape, *cells]), "|", flush=True)


def print_relatives() -> None:
    """The models of GLM-4, in GB, as the three 6B models: training alone; with the scoring of 8 rows at once."""
    columns = [("ptuning", "4"), ("lora", "4"), ("lora", "")]
    print("| |", " | ".join(f"{method}, {bits or 16} bit" for method, bits in columns), "|")
    print("|---|" + "---:|" * len(columns))
    for name, (key, config) in RELATIVES.items():
        folder, cells = ModelFolder(name, Path(name), SPECS[key], config, bits=None, weights=()), []
        for method, bits in columns:
            rows = {"BATCH_SIZE": "1", "GRAD_ACCUM": "16"} if method == "ptuning" else {"BATCH_SIZE": "4"}
            chosen = rows | {"GRADIENT_CHECKPOINTING": "true", "EVAL_BATCH_SIZE": "8", "QUANTIZATION_BIT": bits}
            case = planned(method, flags_of(f"{method}/train.sh", "--plan", MODEL="chatglm3-6b", **chosen)).case
            case = case._replace(folder=folder, known=[])
            alone = case.changed(evaluation_batch_size=0, generation_batch_size=0)
            cells.append(", ".join(f"{plan.total / 1e9:.1f}" for plan in (alone.plan(), case.plan())))
        print("|", " | ".join([name, *cells]), "|", flush=True)


def longest_row(case: Case, room: float) -> int:
    """Tokens of the longest row that fits into ``room`` bytes, the last quarter of it with labels.

    Memory grows nearly in line with the tokens, so that the line through the last two plans leads to the next.
    """

    def spare(tokens: int) -> float:
        row = case.changed(source_length=tokens - tokens // 4, target_length=tokens // 4)
        return room - needed(row.plan(), row.setup)

    before, tokens = 64 * STEP, 128 * STEP
    earlier, now = spare(before), spare(tokens)
    while steps := int(now * (tokens - before) / (earlier - now) // STEP):
        before, earlier = tokens, now
        tokens += steps * STEP
        now = spare(tokens)
    return tokens


def print_longest_rows() -> None:
    """By card: of batches of one row in 4 bit, 16 in a step, with checkpointing. ChatGLM2 and 3 have one shape."""
    chosen = {"QUANTIZATION_BIT": "4", "BATCH_SIZE": "1", "GRAD_ACCUM": "16", "GRADIENT_CHECKPOINTING": "true"}
    print("| tokens of the longest row |", " | ".join(f"{size} GB" for size in CARDS), "|")
    print("|---|" + "---:|" * len(CARDS))
    for model, names in {"chatglm-6b": "chatglm-6b", "chatglm3-6b": "chatglm2-6b, chatglm3-6b"}.items():
        for method in ("lora", "ptuning"):
            case = planned(method, flags_of(f"{method}/train.sh", "--plan", MODEL=model, **chosen)).case
            training = case.changed(evaluation_batch_size=0, generation_batch_size=0)
            rows = [f"{longest_row(training, size * 1e9 - CUDA_CONTEXT):,}" for size in CARDS]
            print("|", " | ".join([f"{names}, {case.method.name}", *rows]), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of the settings to measure")
    parser.add_argument("--table", action="store_true", help="predict for the 6B models, and measure nothing")
    args = parser.parse_args()
    if args.table:
        os.environ["DEVICE_MEMORY"] = "80"
        print_table()
        print()
        print_relatives()
        print()
        print_longest_rows()
        return
    table = Table(title="peak memory in MB", title_justify="left")
    for column in ("setting", "predicted", "measured", "ratio"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        models = {kind: make_model(kind, Path(name) / kind) for kind in SHAPES}
        for setting in GRID:
            if args.only not in str(setting):
                continue
            predicted, measured = measure(setting, models[setting.kind])
            ratio = predicted / measured
            worst = max(worst, abs(ratio - 1))
            row = [str(setting), f"{predicted / 1e6:,.1f}", f"{measured / 1e6:,.1f}", f"{ratio:.3f}"]
            table.add_row(*row)
            print(*row, sep="  ", file=sys.stderr, flush=True)
    console().print(table)
    console().print(f"{len(table.rows)} settings, the worst is off by {worst:.1%}")
    sys.exit(worst > ALLOWED)


if __name__ == "__main__":
    main()
