"""Data files -> tokenized rows on disk, in one of two places:

CACHE/datasets/HASH/            one split, written by the first job that needs it; HASH is that of its ``fingerprint``
  rows.arrow, questions.arrow   for the loss, and to be answered; a split has one of them or both
  summary.json                  the counts
train_datasets/                 training rows, written by common/preprocess.py ahead of all jobs
  shard-00000-of-00008.arrow    the rows in their order
  shard-00000-of-00008.json     the counts of that shard
  settings.json                 the fingerprint
  manifest.json                 fingerprint, counts and shards; written last: a folder with a manifest is complete
"""

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from common.arguments import DataArguments
from common.data.formats import check_roles, read_messages, read_pair
from common.data.rows import Rows, find_files, read_rows, text_of
from common.encoding import TrainRow, Turn
from common.errors import UserError, differences
from common.files import read_json, short_hash, write_json
from common.locking import cache_folder, guard

ENCODING_VERSION = 3  # part of the fingerprint: increase it when the encoding changes
ROWS_PER_BATCH = 1000
COUNTS = ("rows", "dropped", "truncated", "shortened", "unlabelled")
MANIFEST = "manifest.json"

IDS = List(Value("int32"))
FEATURES = {
    "rows": Features({"input_ids": IDS, "labels": IDS}),
    "questions": Features({"prompt_ids": IDS, "reference": Value("string")}),
}

Examples = Iterator[tuple[str, str | list[Turn]]]
"""(place, example): a text or a conversation; empty where there is nothing to learn."""

Encode = Callable[..., list]
"""(tokenizer, examples, max_source_length[, max_target_length]) -> TrainRows or EvalRows, as in common/encoding.py."""


@dataclass
class Prepared:
    """The tokenized rows of a split, with counts."""

    rows: Dataset  # input_ids, labels; empty for predictions
    questions: Dataset  # prompt_ids, reference; empty for training
    files: list[str]
    cached: bool  # whether it was there before
    total: int  # questions, or rows where there are no questions, before ``limit``
    dropped: int  # examples with an empty text, question or answer
    first_dropped: str  # the place of the first of them
    truncated: int
    shortened: int  # conversations that lost their oldest turns
    unlabelled: int  # conversations dropped because no label fits within the lengths

    def limit(self, count: int | None) -> None:
        """Keeps only the first ``count`` rows and questions."""
        if count is not None:
            self.rows = self.rows.select(range(min(count, len(self.rows))))
            self.questions = self.questions.select(range(min(count, len(self.questions))))


def prepared_of(tables: Mapping[str, Dataset], files: list[str], cached: bool, summary: Mapping[str, Any]) -> Prepared:
    """The value for tables on disk and their summary (that of a cached split, or a manifest)."""
    rows, questions = (tables.get(name, Dataset.from_dict({})) for name in FEATURES)
    counts = {name: summary[name] for name in ("dropped", "first_dropped", "truncated", "shortened", "unlabelled")}
    return Prepared(rows, questions, files, cached, total=summary["rows"], **counts)


# Reading


class Source(NamedTuple):
    """Files, or a data set by name."""

    name: str  # as the user wrote it
    files: list[Path]
    named: Dataset | None

    def read(self) -> Rows:
        if self.named is None:
            return chain.from_iterable(map(read_rows, self.files))
        return ((f"{self.name}, row {number}", row) for number, row in enumerate(self.named, 1))


def open_source(args: DataArguments, patterns: str | None, split: str) -> Source:
    """The files of ``patterns``, or without them the split of --dataset_name. Raises UserError if it does not exist."""
    if patterns:
        return Source(patterns, find_files(patterns), None)
    name = str(args.dataset_name)
    try:
        return Source(name, [], load_dataset(name, args.dataset_config_name, split=split))
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"--dataset_name {name}, split {split}: {str(error).splitlines()[0]}") from error


def read_examples(args: DataArguments, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """The example of every row. Raises UserError for a row that does not match the column flags."""
    for place, row in rows:
        if args.text_column:
            yield place, text_of(place, row, args.text_column, "text_column")
            continue
        if args.conversation_column:
            turns = read_messages(place, row, args.conversation_column)
        else:
            turns = read_pair(place, row, args.prompt_column, args.response_column, args.history_column)
        check_roles(tokenizer, place, turns)
        if not any(turn.loss for turn in turns):
            turns = []
        if args.source_prefix and turns:
            last = max(index for index, turn in enumerate(turns) if turn.role == "user")
            turns[last] = turns[last]._replace(content=args.source_prefix + turns[last].content)
        yield place, turns


# Writing


def mask_pads(args: DataArguments, tokenizer: PreTrainedTokenizerBase, rows: list[TrainRow]) -> list[TrainRow]:
    """Removes the labels of pad tokens within rows, as the official scripts do. An end token that is the pad keeps its.

    Plain text, which the official scripts do not know, keeps all labels.
    """
    pad = tokenizer.pad_token_id
    if args.text_column or not args.ignore_pad_token_for_loss or pad == tokenizer.eos_token_id:
        return rows
    return [
        row._replace(labels=[-100 if label == pad else label for label in row.labels]) if pad in row.labels else row
        for row in rows
    ]


@contextmanager
def without_gc() -> Iterator[None]:
    """Stops the garbage collector, which spends half of the time on the many short lists, none of them in a cycle."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def write_table(
    file: Path,
    table: str,
    encode: Encode,
    args: DataArguments,
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
) -> dict[str, Any]:
    """Tokenizes all examples into an Arrow file, batch by batch. Returns COUNTS and the place of the first dropped."""
    summary: dict[str, Any] = dict.fromkeys(COUNTS, 0) | {"first_dropped": ""}
    lengths = [args.max_source_length]
    if not args.text_column:
        lengths.append(args.max_target_length if split == "train" else args.val_max_target_length)
    schema = FEATURES[table].arrow_schema
    with without_gc(), pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(examples, ROWS_PER_BATCH)):
            dropped = [place for place, example in batch if not example]
            rows = encode(tokenizer, [example for _, example in batch if example], *lengths)
            summary["first_dropped"] = summary["first_dropped"] or next(iter(dropped), "")
            summary["dropped"] += len(dropped)
            summary["truncated"] += sum(row.truncated for row in rows)
            summary["shortened"] += sum(row.dropped_turns > 0 for row in rows)
            if table == "rows":
                labelled = [row for row in mask_pads(args, tokenizer, rows) if max(row.labels) >= 0]
                summary["unlabelled"] += len(rows) - len(labelled)
                rows = labelled
            summary["rows"] += len(rows)
            columns = [pyarrow.array([row[i] for row in rows], field.type) for i, field in enumerate(schema)]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))
    return summary


def check_any(summary: Mapping[str, Any], args: DataArguments, source: Source) -> None:
    """Raises UserError, with the reason, if no row is left."""
    if summary["rows"]:
        return
    wanted = "text" if args.text_column else "a question and an answer"
    reason = f"{summary['dropped']} rows lack one" if summary["dropped"] else "there are no rows at all"
    if summary["unlabelled"]:
        reason = f"nothing of the answers fits {args.max_source_length} + {args.max_target_length} tokens"
    raise UserError(f"{source.name}: no row with {wanted}: {reason}.")


# What decides the tokens


def encoding_settings(args: DataArguments, tokenizer: PreTrainedTokenizerBase, split: str) -> dict[str, Any]:
    """The settings that decide which tokens a row becomes once it is read; values are as JSON reads them back."""
    fast = tokenizer.is_fast  # GLM-4's, of the library tokenizers; ours have a file for sentencepiece
    vocabulary = tokenizer.backend_tokenizer.to_str().encode() if fast else Path(tokenizer.vocab_file).read_bytes()
    template = tokenizer.chat_template and short_hash(json.dumps(tokenizer.chat_template).encode())
    return {
        "encoding_version": ENCODING_VERSION,
        "tokenizer": type(tokenizer).__name__,
        "vocabulary": short_hash(vocabulary),
        "chat_template": template,
        "special_tokens": tokenizer.special_tokens_map,
        "pad_token_id": tokenizer.pad_token_id,
        "max_source_length": args.max_source_length,
        "max_target_length": args.max_target_length if split == "train" else args.val_max_target_length,
        "ignore_pad_token_for_loss": args.ignore_pad_token_for_loss,
    }


COLUMNS = ("prompt_column", "response_column", "history_column", "conversation_column", "text_column")


def fingerprint(args: DataArguments, source: Source, tokenizer: PreTrainedTokenizerBase, split: str) -> dict[str, Any]:
    """Everything that decides the tokenized rows of a split; values are as JSON reads them back."""
    stats = [(file.resolve(), file.stat()) for file in source.files]
    return encoding_settings(args, tokenizer, split) | {
        "split": split,
        **{name: vars(args)[name] for name in (*COLUMNS, "source_prefix")},
        "files": [{"name": str(file), "size": stat.st_size, "modified": stat.st_mtime_ns} for file, stat in stats],
        "dataset": None if source.named is None else source.named._fingerprint,
    }


# The cache


def prepare_dataset(
    args: DataArguments,
    patterns: str | None,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    encoders: Mapping[str, Encode],
) -> Prepared:
    """The tokenized rows of a split (train, validation or test), from the cache or written to it.

    ``encoders`` has the function that encodes each table (rows, questions) that the split needs. Of all running jobs
    one tokenizes and the others wait. Raises UserError for bad files and rows.
    """
    source = open_source(args, patterns, split)
    key = short_hash(json.dumps(fingerprint(args, source, tokenizer, split)).encode())
    folder = cache_folder() / "datasets" / key
    with guard("data set", folder):
        cached = folder.exists() and not args.overwrite_cache
        if not cached:
            with replaced(folder) as partial:
                unlabelled = 0  # only rows have labels
                for table, encode in encoders.items():
                    examples = read_examples(args, source.read(), tokenizer)
                    summary = write_table(partial / f"{table}.arrow", table, encode, args, examples, tokenizer, split)
                    check_any(summary, args, source)
                    unlabelled += summary["unlabelled"]
                write_json(partial / "summary.json", summary | {"unlabelled": unlabelled})
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        tables = {table: Dataset.from_file(str(folder / f"{table}.arrow")) for table in encoders}
    return prepared_of(tables, list(map(str, source.files)) or [source.name], cached, summary)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder that replaces ``folder`` at the end, unless there is an error. Needs a lock."""
    folder.parent.mkdir(exist_ok=True)
    for left_by_killed_job in folder.parent.glob(f"{folder.name}.*"):
        shutil.rmtree(left_by_killed_job)
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir()
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# The shards of common/preprocess.py


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete folder. Raises UserError if the manifest or a shard is missing or truncated."""
    again = "run common/preprocess.sh again with the same settings, which makes only what is missing"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: common/preprocess.sh makes it.")
    manifest = read_json(folder / MANIFEST)
    if manifest is None or "shards" not in manifest:
        raise UserError(f"{folder} is not complete: {MANIFEST}, which is written last, is not there: {again}.")
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        if not file.is_file() or file.stat().st_size != shard["size"]:
            raise UserError(f"{file} is missing, truncated or changed ({MANIFEST} tells): copy it again, or {again}.")
    return manifest


def load_shards(args: DataArguments, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The training rows of a folder, mapped into memory.

    Raises UserError for an incomplete folder, and for one that was made with another tokenizer or other lengths.
    Files and columns are not compared: the rows are read already.
    """
    manifest = read_manifest(folder)
    unused = ("max_target_length", "ignore_pad_token_for_loss") if manifest["text_column"] else ()
    settings = encoding_settings(args, tokenizer, "train")
    if differing := differences(manifest, {name: settings[name] for name in settings if name not in unused}):
        raise UserError(
            f"{folder} was made with other settings ({differing}): train with those, or make another folder with "
            "common/preprocess.sh."
        )
    rows = concatenate_datasets([Dataset.from_file(str(folder / shard["file"])) for shard in manifest["shards"]])
    return prepared_of({"rows": rows}, [str(folder)], True, manifest)
