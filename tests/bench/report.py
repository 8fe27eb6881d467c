"""What the report of a training costs: whole trainings, with the CPU time that the report takes in them.

    python tests/bench/report.py [--steps 250]

The report: record, page, model card and predictions.csv, also the facts that they are made of; without the sample
answers, which are a row of their own. The trainings are those of the scripts, one process, one thread.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common  # noqa: F401 isort: skip  (before torch: it sets the environment)

from rich.table import Table

from common import finetune
from common.arguments import PrefixArguments
from common.flags import parse_arguments
from common.methods.prefix import PTuning
from common.report.record import Record
from common.terminal import console
from common.training import recording, samples, scores

ROOT = Path(__file__).resolve().parents[2]
FLAGS = f"""--do_train --do_predict --evaluate_base --train_file {ROOT}/AdvertiseGen/train.json
--validation_file {ROOT}/AdvertiseGen/dev.json --test_file {ROOT}/AdvertiseGen/dev.json --max_source_length 64 --use_cpu
--max_target_length 64 --per_device_train_batch_size 16 --per_device_eval_batch_size 50 --learning_rate 2e-2
--model_name_or_path demo --pre_seq_len 32 --eval_strategy steps --eval_steps 0.2"""
REPORT = ((Record, "write"), (recording, "piece_facts"), (scores, "save_answers"))


def measured(took: Counter[str], kind: str, function: Callable) -> Callable:
    """The function, whose CPU seconds are counted, those of calls within it once."""

    def call(*args, **kwargs):
        began, before = time.process_time(), took[kind]
        try:
            return function(*args, **kwargs)
        finally:
            took[kind] = before + time.process_time() - began

    return call


def seconds(steps: int, every: int, folder: Path) -> Counter[str]:
    """CPU seconds of a training, of its report, and of its sample answers."""
    took: Counter[str] = Counter()
    flags = [*FLAGS.split(), "--max_steps", str(steps), "--logging_steps", str(every), "--output_dir", str(folder)]
    model_args, prefix_args, *others = parse_arguments(PrefixArguments, flags)
    patches = [patch.object(place, name, measured(took, "report", getattr(place, name))) for place, name in REPORT]
    patches.append(patch.object(finetune, "begin_record", measured(took, "report", recording.begin_record)))
    patches.append(patch.object(samples.Samples, "answer", measured(took, "answers", samples.Samples.answer)))
    for each in patches:
        each.start()
    began = time.process_time()
    finetune.run(PTuning(prefix_args), model_args, *others)
    took["program"] = round(time.process_time() - began, 6)
    for each in patches:
        each.stop()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    args = parser.parse_args()
    columns = ("CPU seconds", "program", "report", "share", "sample answers", "share")
    table = Table(*columns, title=f"P-Tuning v2 of the demo, {args.steps} steps of 16 rows", title_justify="left")
    with tempfile.TemporaryDirectory() as folder:
        for every in (25, 10, 1):
            took = seconds(args.steps, every, Path(folder) / str(every))
            shares = (f"{took[kind] / took['program']:.2%}" for kind in ("report", "answers"))
            cells = [f"{took[kind]:.2f}" for kind in ("program", "report", "answers")]
            table.add_row(f"a log each {every} steps", cells[0], cells[1], next(shares), cells[2], next(shares))
    console().print(table)


if __name__ == "__main__":
    main()
