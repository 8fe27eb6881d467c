"""Runs the items of a GPU's day, each in a process of its own with a limit, and prints tables: see gpu.sh."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from rich.console import Console
from rich.table import Table

from common.launch.environment import missing_packages

TINY, CUDA = os.environ.get("SHAPE") == "tiny", os.environ.get("DEVICE", "cuda") == "cuda"
DEVICE = "cuda" if CUDA else "cpu"
OUT = Path(os.environ.get("OUT", "gpu.jsonl")).resolve()
BEGIN = float(os.environ.get("BENCH_BEGIN") or time.time())  # of the whole day, for all processes
MINUTES = float(os.environ.get("MINUTES", "9"))
END = float(os.environ.get("ITEM_END") or BEGIN + 60 * MINUTES)
Step = TypeVar("Step")


def say(**values: Any) -> None:
    """Writes a JSON line to the file OUT and to the terminal."""
    line = {"item": os.environ.get("ITEM", ""), **values, "at": round(time.time() - BEGIN)}
    text = json.dumps(line, ensure_ascii=False)
    with OUT.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    os.write(int(os.environ.get("TERMINAL", "1")), f"{text}\n".encode())


def read_lines() -> list[dict[str, Any]]:
    """All lines so far."""
    return [json.loads(line) for line in OUT.read_text(encoding="utf-8").splitlines()]


def steps_in_time(steps: Iterable[Step], reserve: float) -> Iterator[Step]:
    """The steps, until fewer than ``reserve`` seconds of the item's time remain; the others are said to be left out."""
    rest = iter(steps)
    for step in rest:
        if time.time() + reserve > END:
            say(left_out=[str(step), *map(str, rest)])
            return
        yield step


class Item(NamedTuple):
    """``limit``: seconds, of 9 minutes in all; more minutes stretch it."""

    name: str
    command: list[str]
    limit: float
    variables: dict[str, str] = {}

    def __str__(self) -> str:
        return self.name


def own(name: str, limit: float, **variables: str) -> Item:
    """An item of gpu_items.py."""
    return Item(name, [sys.executable, str(ROOT / "tests/bench/gpu_items.py"), *name.split()], limit, variables)


def program(name: str, script: str, *flags: str, limit: float = 60, **variables: str) -> Item:
    """A short run of a script of the README on the demo."""
    return Item(name, ["bash", str(ROOT / script), *flags], limit, variables)


# With their limits, by the seconds that an H100 took.
MODELS = {("chatglm3", 16): 110, ("chatglm3", 4): 90, ("chatglm", 4): 105, ("chatglm3", 8): 65}
LAST = ("chatglm", 16)  # where the time allows it
SHORT = "--max_steps 10 --logging_steps 1 --save_strategy no --disable_tqdm true --report_to none".split()
ANSWERS = ["--max_predict_samples", "8"]
CHAT = "--prompt 类型#裙*颜色#红色 --temperature 0 --max_new_tokens 24".split()
# The items of a stage run at the same time. What is timed has a stage of its own.
STAGES = [
    [
        own("kernels", 60),
        *(own(f"parity {demo}", 60, OMP_NUM_THREADS="2") for demo in ("demo", "demo3")),
        own("goldens", 60),
        *(own(f"plan {kind} {bits}", 60, OMP_NUM_THREADS="1") for kind, bits in [*MODELS, LAST]),
    ],
    *([own(f"measure {kind} {bits}", limit)] for (kind, bits), limit in MODELS.items()),
    [
        program("ptuning/train.sh", "ptuning/train.sh", *SHORT, *ANSWERS),
        program("lora/train.sh", "lora/train.sh", *SHORT, *ANSWERS),
        program("full/train.sh", "full/train.sh", *SHORT, EVALUATE="false"),
        program("zero-2", "full/train.sh", *SHORT, "--deepspeed", str(ROOT / "full/ds_zero_2.json"), EVALUATE="false"),
        program(
            *("fsdp2", "full/train.sh", *SHORT, "--fsdp", "true", "--fsdp_config", str(ROOT / "full/fsdp2.json")),
            EVALUATE="false",
        ),
        Item("chat", [sys.executable, str(ROOT / "common/inference_hf.py"), "demo3", *CHAT], 60),
    ],
    [own("out-of-memory", 60)],
    [own("measure {} {}".format(*LAST), 95)],
    [own("cudnn", 130, TORCH_CUDNN_SDPA_DEPRIORITIZED="0")],
]
NEED_A_CARD = {"cudnn", "fsdp2"}
START = 25.0  # seconds under which no item is begun


class Running(NamedTuple):
    item: Item
    process: subprocess.Popen
    log: Path
    started: float
    end: float


def start(item: Item, folder: Path, end: float) -> Running:
    """Starts an item. It writes its own lines; what it prints else goes into a file."""
    now, log = time.time(), folder / f"{item.name.replace('/', '-')}.log"
    end = min(end, now + item.limit * MINUTES / 9)
    environ = os.environ | {"BENCH_BEGIN": str(BEGIN), "ITEM_END": str(end), "ITEM": item.name, "OUT": str(OUT)}
    environ |= {"OUTPUT_DIR": str(log.with_suffix("")), "VIRTUAL_ENV": sys.prefix}
    environ |= {"NUM_GPUS": "1" if CUDA else "0", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with log.open("w") as file:
        process = subprocess.Popen(
            item.command, env=environ | item.variables, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            cwd=ROOT, start_new_session=True, pass_fds=[int(os.environ["TERMINAL"])],
        )  # fmt: skip
    return Running(item, process, log, now, end)


def finish(running: Running) -> None:
    """Kills an item that still runs, and writes down how it ended."""
    item, process, log, started, _ = running
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        problem = f"killed after {time.time() - started:.0f} s"
    else:
        problem = f"exit code {process.returncode}" if process.returncode else ""
    found: dict[str, Any] = {"seconds": round(time.time() - started, 1)}
    state, scores = (log.with_suffix("") / name for name in ("trainer_state.json", "predict_results.json"))
    if state.exists():
        losses = [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
        found["losses"] = losses[:1] + losses[-1:]
    if scores.exists():
        found["rouge-l"] = round(json.loads(scores.read_text())["predict_rouge-l"], 2)
    if item.name == "chat" and not problem:
        found["answer"] = log.read_text().strip().splitlines()[-1][:80]
    if problem:
        found |= {"failed": problem, "log": log.read_text(errors="replace").strip().splitlines()[-4:]}
    os.environ["ITEM"] = item.name
    say(ended=not problem, **found)


def run_stage(items: list[Item], folder: Path) -> None:
    for item in items:
        os.environ["ITEM"] = item.name
        if time.time() + START > END:
            say(left_out=[item.name])
        elif item.name in NEED_A_CARD and not CUDA:
            say(left_out=[item.name], reason="it needs a card")
    begun = [item for item in items if time.time() + START <= END and (CUDA or item.name not in NEED_A_CARD)]
    running = [start(item, folder, END) for item in begun]
    while running:
        for one in running[:]:
            if one.process.poll() is not None or time.time() > one.end:
                running.remove(one)
                finish(one)
        time.sleep(0.1)


def machine() -> dict[str, Any]:
    """The card, the Python and the libraries."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,power.limit", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True).stdout.strip() if CUDA else "none: a CPU"
    wheels = (
        [file.name for file in sorted(Path(os.environ["WHEELS"]).glob("*.whl"))] if os.environ.get("WHEELS") else []
    )
    missing = missing_packages([ROOT / "requirements.txt"])
    shape = "tiny" if TINY else "6b"
    return {"card": card, "shape": shape, "python": sys.version.split()[0], "wheels": wheels, "missing": missing}


def gigabytes(line: dict[str, Any]) -> dict[str, str]:
    unit, name = (1e6, "MB") if TINY else (1e9, "GB")
    return {f"{key}, {name}": f"{line[key] / unit:.2f}" for key in ("predicted", "measured", "reserved") if key in line}


def settings_table(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measured settings beside their plans."""
    planned = {(line["item"][5:], line["setting"]): line["predicted"] for line in lines if "predicted" in line}
    rows = []
    for line in lines:
        if line["item"].startswith("measure") and "setting" in line:
            key = line["item"].removeprefix("measure "), line["setting"]
            whole = {"predicted": planned[key]} | line if key in planned else line
            row = {"model": key[0], "setting": key[1]} | gigabytes(whole)
            if {"predicted", "measured"} <= whole.keys():
                row["ratio"] = f"{whole['predicted'] / whole['measured']:.3f}"
            rows.append(row | {name: line[name] for name in line if name not in ("measured", "reserved", "item", "at")})
    return rows


def goals(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals beside the figures of this day."""
    found = {(line["item"].removeprefix("measure "), line.get("setting")): line for line in lines}

    def figure(model: str, setting: str, key: str) -> Any:
        return found.get((model, setting), {}).get(key)

    rows = []
    for model in ("chatglm 4", "chatglm3 4"):
        for ways in ("", ", checkpointing"):
            peak = figure(model, f"ptuning, 1 x (64 + 64){ways}", "measured")
            rows.append((f"{model} bit, P-Tuning v2, 1 x (64 + 64){ways}, GB", "<= 5.2", peak and round(peak / 1e9, 3)))
    full = "lora, 1 x (2048 + 2048)"
    goal = ">= 16,100 on an H100 (NeMo's published rate, carried over to 6.24 billion parameters)"
    rows.append(("chatglm3, LoRA, bf16, full rows of 4,096, tokens/s", goal, figure("chatglm3 16", full, "tokens_s")))
    goal = ">= 0.406 (NeMo's, published); ours: 0.45"
    rows.append(("the same, MFU", goal, figure("chatglm3 16", full, "mfu")))
    for method, published in (("ptuning", 5.81), ("lora", 21.67)):
        for model in ("chatglm 16", "chatglm3 16"):
            goal = f"{published} on an A100 (LLaMA-Factory, published)"
            rows.append(
                (
                    f"{model} bit, {method}, 4 x (64 + 64), samples/s",
                    goal,
                    figure(model, f"{method}, 4 x (64 + 64)", "rows_s"),
                )
            )
    return [
        {"goal": name, "wanted": wanted, "here": "not measured" if here is None or TINY else here}
        for name, wanted, here in rows
    ]


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """``rows``: column -> value; a row may lack columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*("" if row.get(name) is None else str(row[name]) for name in columns))
    if rows:
        Console(width=None if sys.stdout.isatty() else 180).print(table)


def print_tables(lines: list[dict[str, Any]]) -> None:
    def rows_of(key: str) -> list[dict[str, Any]]:
        return [{name: value for name, value in line.items() if name != "at"} for line in lines if key in line]

    print_table("kernels of attention", rows_of("kernels"))
    print_table("cuDNN's attention, preferred and not", rows_of("cudnn"))
    print_table("beside a CPU", rows_of("equal_answers"))
    print_table("beside the original code", rows_of("largest_logit_error"))
    print_table("memory and speed; MFU = 4 x parameters x tokens/s / peak", settings_table(lines))
    print_table("with and without", rows_of("toggle"))
    print_table("memory that runs out", [*rows_of("halved"), *rows_of("sentence")])
    print_table("items", rows_of("ended"))
    print_table("left out", rows_of("left_out"))
    print_table("goals" + ", which are about 6B shapes on a GPU" * TINY, goals(lines))


def main() -> None:
    only = sys.argv[1:]
    OUT.write_text("", encoding="utf-8")
    os.environ["TERMINAL"] = str(os.dup(1))
    os.environ["ITEM"] = "machine"
    say(**machine())
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            run_stage([item for item in stage if not only or any(word in item.name for word in only)], Path(folder))
    print_tables(read_lines())
    print(f"JSON lines: {OUT}")


if __name__ == "__main__":
    main()
