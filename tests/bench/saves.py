"""What a save costs: whole trainings with checkpoints, sealed and only written, in turn.

    python tests/bench/saves.py [--pairs 3] [--steps 12] [--every 4] [--hidden 512]

Sealed: flushed to the disk and hashed by a thread while the training goes on, then renamed; as it is without the bench.
Only written: neither flushed nor hashed. Full-parameter training, float32, one process; a step without a save is timed
too. The time is that of train() in seconds, without the start; the first of each kind is not counted.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

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
from common.training import saves
from common.training.report import console

ROOT = Path(__file__).resolve().parents[2]
FLAGS = f"""--do_train --train_file {ROOT}/AdvertiseGen/train.json --max_train_samples 64 --use_cpu --report_to none
--max_source_length 64 --max_target_length 64 --per_device_train_batch_size 4 --learning_rate 1e-4 --disable_tqdm true
--save_total_limit 2 --logging_steps 100"""


def only_write(folder: Path, **about) -> None:
    write_json(folder / MANIFEST, about | {"files": {}})


def seconds(model: Path, output_dir: Path, *flags: str) -> float:
    """Of the training, its result included."""
    shutil.rmtree(output_dir, ignore_errors=True)
    command = [*FLAGS.split(), "--model_name_or_path", str(model), "--output_dir", str(output_dir), *flags]
    model_args, full_args, *others = parse_arguments(FullArguments, command)
    took, train = [], finetune.train

    def timed(*args) -> None:
        begun = time.perf_counter()
        train(*args)
        took.append(time.perf_counter() - begun)

    finetune.train = timed
    try:
        finetune.run(Full(full_args), model_args, *others)
    finally:
        finetune.train = train
    return took[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=4, help="steps between two saves; 1: there is no time to seal in")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model, which has 8 layers")
    args = parser.parse_args()
    seal, steps, every = saves.seal, ["--max_steps", str(args.steps)], ["--save_steps", str(args.every)]
    kinds = {
        "no checkpoint": (only_write, ["--save_strategy", "no"]),
        "only written": (only_write, every),
        "sealed": (seal, every),
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory(dir=ROOT) as name:
        shape = (args.hidden, 8, 4, 4 * args.hidden, 3584)
        model = make_model("chatglm3", Path(name) / "chatglm3", shape, "cpu")
        for _ in range(args.pairs + 1):
            for kind, (saves.seal, flags) in kinds.items():
                found[kind].append(seconds(model, Path(name) / "out", *steps, *flags))
        size = sum(file.stat().st_size for file in Path(name).glob(f"out/checkpoint-{args.steps}/*"))
    table = Table(
        "kind", "seconds, median", "least", "most", "beside only written", title=f"{size / 1e6:,.0f} MB a save"
    )
    written = statistics.median(found["only written"][1:])
    for kind, times in found.items():
        median = statistics.median(times[1:])
        table.add_row(
            kind, f"{median:.2f}", f"{min(times[1:]):.2f}", f"{max(times[1:]):.2f}", f"{median / written:.2f}x"
        )
    console().print(table)


if __name__ == "__main__":
    main()
