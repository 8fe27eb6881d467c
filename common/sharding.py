"""Training data -> a folder of shards, written by all cores; what an interrupted run finished is kept."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from common.arguments import DataArguments, ModelArguments, PreprocessArguments
from common.data import dataset
from common.data.examples import Example, Reading, Split, check_reading, open_split, read_examples
from common.data.held_out import HoldOut
from common.data.sealed import SUMMARY, problem_of
from common.data.shards import load_shards
from common.data.tables import COUNTS, ROWS_PER_BATCH, check_any, sum_of, write_table
from common.errors import UserError, differences, note
from common.files import check_no_links, clear, read_json, short_hash, write_json, written
from common.loading import load_tokenizer
from common.locking import guard
from common.manifest import MANIFEST, sealed, write_manifest
from common.models.registry import open_model
from common.terminal import Progress
from common.training.checkpoints import check_writable
from common.training.choices import choose_text
from common.training.summary import print_prepared

ROOM = "make room and start again, which keeps the finished shards, or choose another --output_dir"


@dataclass
class Job:
    """The work for all workers. Each worker reads the ``examples`` of its own copy once: its shards come in order."""

    split: Split
    examples: Iterator[Example]
    bounds: list[int]  # shard i holds the examples from bounds[i] on, up to bounds[i + 1]
    files: list[Path]
    key: str  # of the settings
    position: int = 0  # number of examples that were read


def make_shards(own_args: PreprocessArguments, model_args: ModelArguments, args: DataArguments) -> None:
    """Makes the shards of the training data, or those that are missing. Raises UserError, and SaveError."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    tokenizer = load_tokenizer(open_model(name, model_args.model_revision, model_args.cache_dir))
    choose_text(args)
    args.held_out = args.validation_split > 0  # a training with a validation file takes these rows too
    split = open_split(args, args.train_file, tokenizer, "train")
    settings = dataset.fingerprint(split) | {"num_shards": own_args.num_shards}
    folder = Path(own_args.output_dir)
    check_writable(folder)
    check_no_links(folder)
    with guard("folder", folder, inside=True):
        problem = problem_of(folder)
        complete = {} if problem.startswith(SUMMARY) else read_json(folder / SUMMARY) or {}
        known = settings.keys() <= complete.keys() and not args.overwrite_cache
        if known and (differing := differences(complete, settings)):
            raise UserError(
                f"{folder} was made with other settings ({differing}): choose another --output_dir, or "
                "--overwrite_cache to make it again."
            )
        if args.overwrite_cache or problem:
            make_folder(folder, split, settings, own_args)
        else:
            count = len(list(folder.glob("shard-*-of-*.arrow")))
            print(f"{folder}: {count} of {count} shards were finished before", flush=True)
        print_prepared("train", load_shards(args, folder, tokenizer))


def make_folder(folder: Path, split: Split, settings: dict[str, Any], own_args: PreprocessArguments) -> None:
    """Makes what is missing or damaged. Raises UserError for bad rows, and SaveError; finished shards are kept then."""
    args = split.args
    reading, hold_out = Reading(), HoldOut(args.validation_split, bool(args.mix))
    bounds = shard_bounds(sum(1 for _ in hold_out.watch(read_examples(split, reading))), own_args.num_shards)
    check_reading(reading.summary(), args)
    clear(folder / MANIFEST)
    clear(folder / "held_out")
    with written(folder / "held_out", ROOM):
        findings = reading.summary() | {"held_out": dataset.choose_held_out(split, hold_out, folder)}
    count = len(bounds) - 1
    files = [folder / f"shard-{index:05}-of-{count:05}.arrow" for index in range(count)]
    job = Job(split, read_examples(split, Reading()), bounds, files, short_hash(json.dumps(settings).encode()))
    drop_shards(folder, "" if args.overwrite_cache else job.key)
    try:
        make_missing(job, own_args.num_workers or len(os.sched_getaffinity(0)))
    except BaseException:
        for file in files:  # those that the workers did not finish
            if not file.with_suffix(".json").exists():
                clear(file)
        raise
    seal_shards(folder, job, settings | findings)


def drop_shards(folder: Path, key: str) -> None:
    """Deletes the shards of other settings than ``key``, and incomplete or damaged ones."""
    for file in folder.glob("shard-*-of-*.arrow"):
        summary = read_json(file.with_suffix(".json")) or {}
        same = summary.get("settings", key) == key
        known = {"settings", "content", "first_dropped", *COUNTS} <= summary.keys()
        if same and known and file.is_file() and sealed(file).items() <= summary.items():
            continue
        if same and file.with_suffix(".json").exists():
            note(f"note: {file} has changed: it is made again")
        clear(file)
        clear(file.with_suffix(".json"))


def seal_shards(folder: Path, job: Job, content: dict[str, Any]) -> None:
    """Writes summary and manifest of finished shards. Raises UserError if they hold no row, and SaveError."""
    shards = {file.name: read_json(file.with_suffix(".json")) or {} for file in job.files}
    totals: dict[str, Any] = {name: sum(shard[name] for shard in shards.values()) for name in COUNTS}
    check_any(totals, job.split.args, job.split.source)
    totals["first_dropped"] = next(filter(None, (shard["first_dropped"] for shard in shards.values())), "")
    totals["content"] = sum_of(shard["content"] for shard in shards.values())
    totals["shards"] = [{"file": name, "rows": shard["rows"]} for name, shard in shards.items()]
    clear(folder / SUMMARY)
    with written(folder / MANIFEST, ROOM):
        write_json(folder / SUMMARY, content | totals)
        others = [folder / SUMMARY, *(folder / "held_out").glob("*")]
        files = {name: {"size": shard["size"], "xxh3": shard["xxh3"]} for name, shard in shards.items()}
        files |= {file.relative_to(folder).as_posix(): sealed(file) for file in others}
        write_manifest(folder, files)


def shard_bounds(examples: int, count: int) -> list[int]:
    """The first example of every shard, and the number of examples. Shards hold whole batches."""
    batches = -(-examples // ROWS_PER_BATCH)
    count = max(1, min(count, batches))
    return [min(examples, batches * index // count * ROWS_PER_BATCH) for index in range(count + 1)]


def make_missing(job: Job, workers: int) -> None:
    """Starts the workers. Raises UserError for the first bad row, and where a worker was killed."""
    missing = [index for index, file in enumerate(job.files) if not file.exists()]
    finished = len(job.files) - len(missing)
    if finished:
        print(f"{job.files[0].parent}: {finished} of {len(job.files)} shards were finished before", flush=True)
    if not missing:
        return
    fork = multiprocessing.get_context("fork")  # other ways import everything again, seconds for each worker
    with ProcessPoolExecutor(min(workers, len(missing)), fork, set_up_worker, (job,)) as pool:
        shards = pool.map(make_shard, missing)
        try:
            with Progress("tokenizing", len(job.files), "shards", initial=finished) as progress:
                for _ in shards:
                    progress.update()
        except BaseException as error:
            for worker in multiprocessing.active_children():  # else they would finish their shards first
                worker.kill()
            if isinstance(error, BrokenProcessPool):
                reason = "a worker was killed, perhaps for lack of memory"
                raise UserError(f"{reason}: start again with fewer --num_workers; finished shards are kept.") from error
            raise


_job: Job  # of a worker


def set_up_worker(job: Job) -> None:
    """Leaves Ctrl-C to the parent, and takes one core."""
    global _job
    _job = job
    job.split.tokenizer.num_threads = 1
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends this process when the parent is killed; else it would wait for ever and hold the lock."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def make_shard(index: int) -> None:
    """Writes a shard, its summary last. Raises UserError for a bad row, and SaveError."""
    begin, end = _job.bounds[index : index + 2]
    examples = islice(_job.examples, begin - _job.position, end - _job.position)
    _job.position = end
    file = _job.files[index]
    with written(file, ROOM):
        summary = write_table(_job.split, "rows", examples, file, begin // ROWS_PER_BATCH)
        write_json(file.with_suffix(".json"), summary | sealed(file) | {"settings": _job.key})
