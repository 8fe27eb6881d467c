"""What a save costs: whole trainings with checkpoints, sealed and only written, in turn.

    python tests/bench/saves.py [--pairs 3] [--steps 24] [--every 8] [--hidden 512]

Sealed: flushed to the disk and hashed by a thread while the training goes on, then renamed; as it is without the bench.
Only written: neither flushed nor hashed. Full-parameter training, float32, one process. Times are medians in seconds,
without the start of the program; the first training of each kind is not counted. A save: the training stands still.
The end: the result, and the wait until the disk holds it and the last checkpoint.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import common  # noqa: F401 isort: skip  (before torch: it sets the environment)

from memory import make_model
from rich.table import Table

from common import finetune
from common.arguments import FullArguments
from common.files import write_json
from common.flags import parse_arguments
from common.manifest import MANIFEST
from common.methods.full import Full
from common.terminal import console
from common.training import saves
from common.training.trainer import FinetuneTrainer

ROOT = Path(__file__).resolve().parents[2]
FLAGS = f"""--do_train --train_file {ROOT}/AdvertiseGen/train.json --max_train_samples 64 --use_cpu --report_to none
--max_source_length 64 --max_target_length 64 --per_device_train_batch_size 4 --learning_rate 1e-4 --disable_tqdm true
--save_total_limit 2 --logging_steps 100"""


def only_write(folder: Path, **about) -> None:
    write_json(folder / MANIFEST, about | {"files": {}})


def seconds(model: Path, output_dir: Path, *flags: str) -> dict[str, float]:
    """Of a training with its result, of one of its saves, and of its end."""
    shutil.rmtree(output_dir, ignore_errors=True)
    command = [*FLAGS.split(), "--model_name_or_path", str(model), "--output_dir", str(output_dir), *flags]
    model_args, full_args, *others = parse_arguments(FullArguments, command)
    took: dict[str, list[float]] = {"whole": [], "a save": [], "the end": []}

    def timed(name: str, function):
        def call(*args) -> None:
            begun = time.perf_counter()
            function(*args)
            took[name].append(time.perf_counter() - begun)

        return call

    with (
        patch.object(finetune, "train", timed("whole", finetune.train)),
        patch.object(FinetuneTrainer, "_save_checkpoint", timed("a save", FinetuneTrainer._save_checkpoint)),
        patch.object(FinetuneTrainer, "save_result", timed("the end", FinetuneTrainer.save_result)),
    ):
        finetune.run(Full(full_args), model_args, *others)
    return {name: statistics.mean(times or [0]) for name, times in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=8, help="steps between two saves; 1: there is no time to seal in")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model, which has 8 layers")
    args = parser.parse_args()
    seal, steps, every = saves.seal, ["--max_steps", str(args.steps)], ["--save_steps", str(args.every)]
    kinds = {
        "no checkpoint": (only_write, ["--save_strategy", "no"]),
        "only written": (only_write, every),
        "sealed": (seal, every),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory(dir=ROOT) as name:
        shape = (args.hidden, 8, 4, 4 * args.hidden, 3584)
        model = make_model("chatglm3", Path(name) / "chatglm3", shape, "cpu")
        for _ in range(args.pairs + 1):
            for kind, (saves.seal, flags) in kinds.items():
                found[kind].append(seconds(model, Path(name) / "out", *steps, *flags))
        size = sum(file.stat().st_size for file in Path(name).glob(f"out/checkpoint-{args.steps}/*"))
    table = Table(title=f"{size / 1e6:,.0f} MB a checkpoint, {args.steps} steps, one each {args.every}")
    for name in ("kind", "whole", "least", "most", "beside only written, pair by pair", "a save", "the end"):
        table.add_column(name)
    for kind, times in found.items():
        whole = [each["whole"] for each in times[1:]]
        ratio = statistics.median(
            time / each["whole"] for time, each in zip(whole, found["only written"][1:], strict=True)
        )
        save, end = (statistics.median(each[name] for each in times[1:]) for name in ("a save", "the end"))
        cells = (statistics.median(whole), min(whole), max(whole))
        table.add_row(kind, *(f"{cell:.2f}" for cell in cells), f"{ratio:.2f}x", f"{save:.2f}", f"{end:.2f}")
    console().print(table)


if __name__ == "__main__":
    main()
