"""The original programs beside ours: whole programs in turn, the same flags and rows, one thread, CPU seconds.

    V1_PYTHON=… V1_MAIN=… V1_MODEL=… [V2_… V3_…] python tests/bench/official.py [--rounds 3] [NAME...]

Nothing of theirs is here; whoever wants the comparison sets it up once, and names it by variables:
    V1_PYTHON    Python with torch 2.13 and transformers 4.27.1; V2: 4.30.2; V3: 4.40.2, peft 0.10.0, accelerate 0.29.3
    V1_MAIN      ptuning/main.py of ChatGLM-6B, with float() for half(), because a CPU computes in float32; V2: that of
                 ChatGLM2-6B; V3: finetune_demo/finetune_hf.py of ChatGLM3
    V1_MODEL     a folder with their model code, a config.json and weights, as small as one likes
What has no variables is left out, and named. A step: the median over all but the first, of all rounds. Tokens are real
ones, no pads. 1,000 rows encoded: a hundredth of what a program takes longer for 101,000 rows than for 1,000.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from copy import deepcopy
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import yaml
from rich.table import Table

from common.terminal import console

CLOCK = Path(__file__).with_name("official_clock.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "WANDB_DISABLED": "true"}
ONE_THREAD |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
FEW, MANY = 1000, 101_000  # rows to train on
PADS = {"V1": "3", "V2": "0", "V3": "0"}
COMMON = """--train_file {data}/train.json --validation_file {data}/dev.json --test_file {data}/dev.json
--prompt_column content --response_column summary --overwrite_cache --model_name_or_path {model}
--overwrite_output_dir --output_dir {output}
--max_source_length 64 --max_target_length 64 --per_device_eval_batch_size 1 --gradient_accumulation_steps 1
--predict_with_generate --logging_steps 1 --save_steps 1000"""
STEPS = COMMON + " --do_train --per_device_train_batch_size 4 --max_steps 6"
ROWS_ONLY = COMMON + " --do_train --per_device_train_batch_size 1 --max_steps 1 --pre_seq_len 128"
ANSWERS = COMMON + " --do_predict --max_predict_samples 16"
LORA = {
    "data_config": {"train_file": "train.json", "val_file": "dev.json", "num_proc": 1},
    **{"max_input_length": 64, "max_output_length": 64},
    "training_args": {
        **{"max_steps": 6, "learning_rate": 5e-5, "per_device_train_batch_size": 4, "dataloader_num_workers": 0},
        **{"remove_unused_columns": False, "save_strategy": "steps", "save_steps": 100000, "logging_steps": 1},
        **{"per_device_eval_batch_size": 16, "evaluation_strategy": "no", "predict_with_generate": True},
        **{"generation_config": {"max_new_tokens": 64}, "use_cpu": True, "do_eval": True},
    },
    "peft_config": {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 32, "lora_dropout": 0.1},
}


class Row(NamedTuple):
    what: str
    generation: str
    program: str  # ours
    flags: str
    measure: str = "steps"  # or rows, answers, start


ROWS = {
    "ptuning": Row(
        "ChatGLM-6B, P-Tuning v2 128, a step of 4 rows", "V1", "ptuning/main.py", STEPS + " --pre_seq_len 128"
    ),
    "full": Row("ChatGLM-6B, all weights, a step of 4 rows", "V1", "full/main.py", STEPS + " --learning_rate 1e-4"),
    "ptuning2": Row(
        "ChatGLM2-6B, P-Tuning v2 128, a step of 4 rows", "V2", "ptuning/main.py", STEPS + " --pre_seq_len 128"
    ),
    "lora": Row("ChatGLM3-6B, LoRA 8 by lora.yaml, a step of 4 rows", "V3", "common/finetune_hf.py", "lora.yaml"),
    "rows": Row("ChatGLM-6B, 1,000 pairs encoded", "V1", "ptuning/main.py", ROWS_ONLY, "rows"),
    "rows3": Row("ChatGLM3-6B, 1,000 conversations encoded", "V3", "common/finetune_hf.py", "lora.yaml", "rows"),
    "answers": Row(
        "ChatGLM-6B, an answer of 64 tokens, official flags (batch 1)", "V1", "ptuning/main.py", ANSWERS, "answers"
    ),
    "answers3": Row(
        "ChatGLM3-6B, LoRA, an answer of 64 tokens, batch 16", "V3", "common/finetune_hf.py", "answers.yaml", "answers"
    ),
    "help": Row("--help", "V1", "ptuning/main.py", "--help", "start"),
    "wrong": Row("a wrong flag", "V1", "ptuning/main.py", STEPS + " --pre_seq_length 128", "start"),
    "missing": Row("a missing file", "V1", "ptuning/main.py", STEPS.replace("dev.json", "nowhere.json"), "start"),
}


def write_data(folder: Path, count: int = FEW) -> None:
    """The shipped rows, over and over: 50 to answer and ``count`` to train on; the same as conversations."""
    shipped = [json.loads(line) for name in ("train", "dev") for line in open(ROOT / f"AdvertiseGen/{name}.json")]
    rows = list(islice(cycle(shipped), 50 + count))
    (folder / "conversations").mkdir(exist_ok=True)
    for name, part in {"train": rows[50:], "dev": rows[:50]}.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
        talks = [
            {
                "conversations": [
                    {"role": "user", "content": row["content"]},
                    {"role": "assistant", "content": row["summary"]},
                ]
            }
            for row in part
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in talks)
        (folder / "conversations" / f"{name}.json").write_text(text)


def command_of(row: Row, ours: bool, folder: Path) -> list[str]:
    """One of the two programs with its flags."""
    python = sys.executable if ours else os.environ[f"{row.generation}_PYTHON"]
    program = str(ROOT / row.program) if ours else os.environ[f"{row.generation}_MAIN"]
    model, output = os.environ[f"{row.generation}_MODEL"], folder / "out"
    if not row.flags.endswith(".yaml"):
        flags = row.flags.format(data=folder, model=model, output=output).split()
        return [python, program, *flags]
    config = deepcopy(LORA)
    config["training_args"]["output_dir"] = str(output)
    if row.measure == "rows":
        config["training_args"]["max_steps"] = 1
    if row.measure == "answers":
        config["training_args"] |= {"max_steps": 1, "evaluation_strategy": "steps", "eval_steps": 1}
    if ours and row.measure != "answers":
        del config["data_config"]["val_file"]  # we would evaluate; theirs can't do without
        config["training_args"]["do_eval"] = False
    (folder / row.flags).write_text(yaml.safe_dump(config))
    return [python, program, str(folder / "conversations"), model, str(folder / row.flags), *(["no"] if ours else [])]


def run_whole(command: list[str], folder: Path, log: Path, environment: dict[str, str]) -> tuple[int, float, int]:
    """Runs a program in a session of its own. Its exit code, CPU seconds, and the largest process in bytes."""
    with open(log, "wb") as file:
        started = subprocess.Popen(
            command,
            env=os.environ | ONE_THREAD | environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        _, status, usage = os.wait4(started.pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def run(row: Row, ours: bool, folder: Path) -> dict:
    """What the clock noted of one program, and the CPU seconds of all of it."""
    record, log = folder / "record.json", folder / "log"
    record.unlink(missing_ok=True)
    python, *command = command_of(row, ours, folder)
    caches = {"CHATGLM_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf"), "PAD": PADS[row.generation]}
    clock = [] if row.measure == "start" else [str(CLOCK), str(record)]
    for name in ("out", "hf", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)
    _, seconds, memory = run_whole([python, *clock, *command], folder, log, caches)
    found = json.loads(record.read_text()) if record.exists() else {"steps": [], "tokens": [], "answers": []}
    if row.measure != "start" and not found["steps"] and not found["answers"]:
        sys.exit(f"{python} {command[0]} ended early:\n{log.read_text()[-2000:]}")
    return found | {"seconds": seconds, "memory": memory}


def times_of(row: Row, ours: bool, folder: Path) -> tuple[list[float], float, float]:
    """(CPU seconds of each step, answer, start or 1,000 rows; real tokens of a step; peak memory in bytes) of a run."""
    found = run(row, ours, folder)
    if row.measure == "rows":
        write_data(folder, MANY)
        many = run(row, ours, folder)
        write_data(folder)
        return [(many["seconds"] - found["seconds"]) / (MANY - FEW) * 1000], 0, many["memory"]
    if row.measure == "answers":
        answers = found["answers"]
        return [sum(seconds for seconds, _ in answers) / sum(rows for _, rows in answers)], 0, found["memory"]
    if row.measure == "start":
        return [found["seconds"]], 0, found["memory"]
    steps = [after - before for before, after in zip(found["steps"], found["steps"][1:], strict=False)]
    return steps, statistics.mean(found["tokens"][1:]), found["memory"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    chosen = {name: row for name, row in ROWS.items() if name in args.names or not args.names}
    set_up = {name for name, row in chosen.items() if f"{row.generation}_MAIN" in os.environ}
    for name in chosen.keys() - set_up:
        print(f"{name}: left out, because {chosen[name].generation}_MAIN is not set")
    table = Table("CPU seconds, one thread", "official", "this", "ratio", "least", "most", "tokens", "memory")
    with tempfile.TemporaryDirectory(prefix="official") as temporary:
        folder = Path(temporary)
        write_data(folder)
        for name in (name for name in chosen if name in set_up):
            row = chosen[name]
            found: dict[bool, list] = {False: [], True: []}
            for _ in range(args.rounds):
                for ours in found:
                    found[ours].append(times_of(row, ours, folder))
            times = {ours: [time for times, *_ in runs for time in times] for ours, runs in found.items()}
            theirs, own = (statistics.median(times[ours]) for ours in (False, True))
            pairs = [
                statistics.median(a) / statistics.median(b) for (a, *_), (b, *_) in zip(*found.values(), strict=True)
            ]
            tokens = " / ".join(f"{statistics.mean(run[1] for run in found[ours]):,.0f}" for ours in found)
            memory = " / ".join(f"{max(run[2] for run in found[ours]) / 1e9:.2f}" for ours in found)
            cells = (f"{theirs:.2f}", f"{own:.2f}")
            ratios = (f"{theirs / own:.2f}x", f"{min(pairs):.2f}x", f"{max(pairs):.2f}x")
            table.add_row(row.what, *cells, *ratios, tokens, memory)
            print(f"{name}: {cells}, {ratios}, {tokens} tokens, {memory} GB", flush=True)
    console().print(table)


if __name__ == "__main__":
    main()
