"""Tokenizes training data ahead, on all cores, into a folder that --train_datasets of every training takes.

python common/preprocess.py --train_file FILE --model_name_or_path MODEL --output_dir train_datasets [--num_shards 8]

A run that was killed goes on where it was when it is started again with the same flags.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from common.arguments import DataArguments, ModelArguments, flag
from common.data.dataset import (
    COUNTS,
    ROWS_PER_BATCH,
    Example,
    check_any,
    fingerprint,
    read_examples,
    read_named,
    read_source,
    without_collector,
    write_table,
)
from common.data.rows import find_files
from common.data.shards import MANIFEST, load_shards, shard_file
from common.errors import UserError, differences, exit_on_user_error
from common.files import read_json, write_json
from common.flags import parse_dataclasses
from common.loading import load_tokenizer
from common.locking import hold
from common.models.registry import open_model
from common.training.checkpoints import check_writable
from common.training.report import print_prepared

SETTINGS_FILE = "settings.json"


@dataclass
class PreprocessArguments:
    output_dir: str = flag("Folder for the shards", "train_datasets")
    num_shards: int = flag("Files to write; fewer where there are fewer than 1000 rows for each", 8)
    num_workers: int | None = flag("Processes that work at the same time; default: one for each core")

    def __post_init__(self):
        for name in ("num_shards", "num_workers"):
            if vars(self)[name] is not None and vars(self)[name] < 1:
                raise ValueError(f"--{name} must be at least 1")


class Job(NamedTuple):
    """What every worker knows."""

    args: DataArguments
    files: list[Path]
    named: Dataset | None
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    bounds: list[int]  # the rows of shard i begin at bounds[i] and end before bounds[i + 1]
    done: "Synchronized[int]"  # rows, by all workers
    stopped: Event

    def file(self, index: int) -> Path:
        return shard_file(self.folder, index, len(self.bounds) - 1)


def main(argv: list[str] | None = None) -> None:
    own_args, model_args, data_args = parse_dataclasses(
        (PreprocessArguments, ModelArguments, DataArguments),
        "preprocess.py --train_file FILE --model_name_or_path MODEL --output_dir FOLDER [--flag value ...]",
        argv,
    )
    preprocess(own_args, model_args, data_args)


def preprocess(own_args: PreprocessArguments, model_args: ModelArguments, args: DataArguments) -> None:
    """Fills the output folder, or what is missing of it. Raises UserError for bad files, rows and settings."""
    if not (args.train_file or args.dataset_name):
        raise UserError("nothing to do: give --train_file (or --dataset_name).")
    files = find_files(args.train_file) if args.train_file else []
    name = model_args.tokenizer_name or model_args.model_name_or_path
    tokenizer = load_tokenizer(open_model(name, model_args.model_revision, model_args.cache_dir))
    named = None if files else read_named(args, "train")
    settings = fingerprint(args, files, named, tokenizer, "train") | {"num_shards": own_args.num_shards}
    folder = Path(own_args.output_dir)
    check_writable(folder)
    with hold(folder / ".lock", f"folder {folder}"):
        start_or_continue(folder, settings, args.overwrite_cache)
        bounds = shard_bounds(sum(1 for _ in read_source(args, files, named)), own_args.num_shards)
        context = multiprocessing.get_context("fork")  # to import everything again takes seconds for each worker
        job = Job(args, files, named, tokenizer, folder, bounds, context.Value("q", 0), context.Event())
        shards = make_missing(job, own_args.num_workers or len(os.sched_getaffinity(0)), context)
        write_manifest(job, settings, shards)
        print_prepared("train", load_shards(args, folder, tokenizer))


def start_or_continue(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Leaves in the folder only what was made with these settings, and writes them down.

    Raises UserError for a finished folder with others; what is unfinished is of no use to anybody.
    """
    earlier = read_json(folder / SETTINGS_FILE) or {}
    differing = differences(earlier, settings)
    if earlier and differing and not overwrite:
        if (folder / MANIFEST).exists():
            raise UserError(
                f"{folder} was made with other settings ({differing}): choose another --output_dir, or "
                "--overwrite_cache to make it again."
            )
        print(f"{folder} was begun with other settings ({differing}): starting over", flush=True)
    if differing or overwrite:
        for file in (folder / MANIFEST, folder / SETTINGS_FILE, *folder.glob("shard-*-of-*")):
            file.unlink(missing_ok=True)
        write_json(folder / SETTINGS_FILE, settings)


def shard_bounds(rows: int, shards: int) -> list[int]:
    """Where the shards begin, and the end of the last one: at multiples of a batch, so that batches are the same."""
    batches = -(-rows // ROWS_PER_BATCH)
    shards = max(1, min(shards, batches))
    return [min(rows, batches * index // shards * ROWS_PER_BATCH) for index in range(shards + 1)]


def summary_of(file: Path) -> dict[str, Any] | None:
    """What happened to the rows of a shard; None where it is not there or not whole."""
    summary = read_json(file.with_suffix(".json"))
    whole = summary is not None and file.is_file() and file.stat().st_size == summary["size"]
    return summary if whole else None


def make_missing(job: Job, workers: int, context: Any) -> list[dict[str, Any]]:
    """The summaries of all shards, after the workers made those that were missing."""
    count = len(job.bounds) - 1
    missing = [index for index in range(count) if summary_of(job.file(index)) is None]
    if len(missing) < count:
        print(f"{job.folder}: {count - len(missing)} of {count} shards were finished before", flush=True)
    workers = min(workers, len(missing))
    # Each worker takes shards that follow one another, so that it reads the files once.
    runs = [missing[len(missing) * i // workers : len(missing) * (i + 1) // workers] for i in range(workers)]
    if missing:
        (job.folder / MANIFEST).unlink(missing_ok=True)
        todo = sum(job.bounds[index + 1] - job.bounds[index] for index in missing)
        with ProcessPoolExecutor(workers, context, set_up_worker, (job,)) as pool:
            pending = {pool.submit(make_shards, run) for run in runs}
            with tqdm(total=job.bounds[-1], initial=job.bounds[-1] - todo, unit=" rows", desc="tokenizing") as bar:
                try:
                    while pending:
                        finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                        bar.update(job.bounds[-1] - todo + job.done.value - bar.n)
                        for future in finished:
                            future.result()
                except BrokenProcessPool as error:
                    raise UserError(
                        "a worker was killed, perhaps for lack of memory: start again with fewer --num_workers; "
                        "finished shards are kept."
                    ) from error
                finally:
                    job.stopped.set()
    return [summary_of(job.file(index)) or {} for index in range(count)]


def write_manifest(job: Job, settings: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    totals = {name: sum(shard[name] for shard in shards) for name in COUNTS}
    check_any(totals, job.args, job.args.train_file or str(job.args.dataset_name))
    first_dropped = next((shard["first_dropped"] for shard in shards if shard["first_dropped"]), "")
    files = [
        {"file": job.file(index).name, "size": shard["size"], "rows": shard["rows"]}
        for index, shard in enumerate(shards)
    ]
    content = settings | totals | {"first_dropped": first_dropped, "num_shards": len(files), "shards": files}
    write_json(job.folder / MANIFEST, content)


# In the workers


def set_up_worker(job: Job) -> None:
    """One thread each; Ctrl-C is for the parent to handle, and without a parent there is nothing left to do."""
    global _job
    _job = job
    job.tokenizer.num_threads = 1
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


_job: Job


def end_with_parent() -> None:
    """Ends this process at once when the parent was killed, which would leave it waiting and holding the lock."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def make_shards(run: list[int]) -> None:
    """Writes shards, in increasing order, each whole or not at all. Raises UserError for a bad row."""
    rows, position = read_source(_job.args, _job.files, _job.named), 0
    with without_collector():
        for index in run:
            begin, end = _job.bounds[index : index + 2]
            next(islice(rows, begin - position, begin - position), None)  # passes over what is not ours
            examples = counted(read_examples(_job.args, islice(rows, end - begin), _job.tokenizer))
            file, position = _job.file(index), end
            partial = file.with_suffix(".partial")
            summary = write_table(partial, "rows", _job.args, examples, _job.tokenizer, "train")
            write_json(file.with_suffix(".json"), summary | {"size": partial.stat().st_size})
            os.replace(partial, file)


def counted(examples: Iterator[tuple[str, Example]]) -> Iterator[tuple[str, Example]]:
    """The same examples, reported to the parent batch by batch. Raises UserError where another worker has failed."""
    while batch := list(islice(examples, ROWS_PER_BATCH)):
        if _job.stopped.is_set():
            raise UserError("another worker has failed.")
        yield from batch
        with _job.done.get_lock():
            _job.done.value += len(batch)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
