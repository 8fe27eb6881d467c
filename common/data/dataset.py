"""Data files -> tokenized rows on disk, in one of two places:

CACHE/datasets/HASH/            one split, written by the first job that needs it; HASH is that of its ``fingerprint``
  rows.arrow, questions.arrow   rows for the loss, questions for answers; a split has one of them or both
  summary.json                  the counts, written last: a folder with a summary is complete
train_datasets/                 training rows, written by common/preprocess.py ahead of all jobs
  shard-00000-of-00008.arrow    the rows in their order
  shard-00000-of-00008.json     the counts of that shard, written after it
  manifest.json                 fingerprint, counts and shards; written last: a folder with a manifest is complete
"""

import gc
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from common.data.rows import Row, read_rows, text_of
from common.data.sources import find_files
from common.encoding import TrainRow
from common.errors import UserError, differences
from common.files import read_json, short_hash, write_json
from common.locking import cache_folder, guard
from common.tokenizers.base import Turn
from common.trained import COLUMNS

ENCODING_VERSION = 3  # part of the fingerprint: increase it when the encoding changes
ROWS_PER_BATCH = 1000
# The counts in a summary, which also names the place of the first dropped example. An example is dropped if a text,
# question or answer is empty, shortened if it lost its oldest turns, and unlabelled if no label fits into the lengths.
COUNTS = ("rows", "dropped", "truncated", "shortened", "unlabelled")
MANIFEST = "manifest.json"

IDS = List(Value("int32"))
FEATURES = {
    "rows": Features({"input_ids": IDS, "labels": IDS}),
    "questions": Features({"prompt_ids": IDS, "reference": Value("string")}),
}
TABLES = {"train": ("rows",), "validation": ("rows", "questions"), "test": ("questions",)}  # of each split

Examples = Iterator[tuple[str, str | list[Turn]]]
"""(place, example): a text or a conversation; empty if it has nothing to learn."""


@dataclass
class Prepared:
    """The tokenized rows of a split."""

    rows: Dataset  # input_ids, labels; empty for predictions
    questions: Dataset  # prompt_ids, reference; empty for training
    files: list[str]
    cached: bool  # whether it was there before
    summary: Mapping[str, Any]  # counts of all rows; ``rows`` counts questions if there are any


Encoders = Mapping[str, Callable]  # of common.encoding, by table


class Split(NamedTuple):
    """The rows of train, validation or test, in files or in a named data set, and the encoders for them."""

    name: str
    args: DataArguments
    tokenizer: PreTrainedTokenizerBase
    source: str  # the files or the data set, as the user wrote it
    files: list[Path]
    named: Dataset | None
    encoders: Encoders

    def read(self) -> Iterator[Row]:
        if self.named is None:
            return chain.from_iterable(map(read_rows, self.files))
        return (Row(f"{self.source}, row {number}", number, row) for number, row in enumerate(self.named, 1))


def open_split(
    args: DataArguments, patterns: str | None, tokenizer: PreTrainedTokenizerBase, name: str, encoders: Encoders
) -> Split:
    """The files of ``patterns``, or without them the split of --dataset_name. Raises UserError if it does not exist."""
    if patterns:
        return Split(name, args, tokenizer, patterns, find_files(patterns), None, encoders)
    source = str(args.dataset_name)
    try:
        named = load_dataset(source, args.dataset_config_name, split=name)
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"--dataset_name {source}, split {name}: {str(error).splitlines()[0]}") from error
    return Split(name, args, tokenizer, source, [], named, encoders)


def read_examples(args: DataArguments, rows: Iterator[Row], tokenizer: PreTrainedTokenizerBase) -> Examples:
    """The example of every row. Raises UserError for a row that does not match the column flags."""
    for place, _, row, problem, _ in rows:
        if problem:
            raise UserError(f"{place}: {problem}.")
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


def mask_pads(args: DataArguments, tokenizer: PreTrainedTokenizerBase, rows: list[TrainRow]) -> list[TrainRow]:
    """Removes the labels of pad tokens within rows, as the official scripts do, unless the pad is also the end token.

    Plain text, which the official scripts do not know, keeps all labels.
    """
    pad = tokenizer.pad_token_id
    if args.text_column or not args.ignore_pad_token_for_loss or pad == tokenizer.eos_token_id:
        return rows
    return [
        row._replace(labels=[-100 if label == pad else label for label in row.labels]) if pad in row.labels else row
        for row in rows
    ]


def write_table(split: Split, table: str, rows: Iterator[Row], file: Path) -> dict[str, Any]:
    """Tokenizes rows of a split into an Arrow file, in batches. Returns the summary. Raises UserError for bad rows."""
    args, examples = split.args, read_examples(split.args, rows, split.tokenizer)
    summary: dict[str, Any] = dict.fromkeys(COUNTS, 0) | {"first_dropped": ""}
    lengths = [args.max_source_length]
    if not args.text_column:
        lengths.append(args.max_target_length if split.name == "train" else args.val_max_target_length)
    schema = FEATURES[table].arrow_schema
    gc.disable()  # it would take half of the time, for many short lists that are in no cycle
    try:
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
            while batch := list(islice(examples, ROWS_PER_BATCH)):
                dropped = [place for place, example in batch if not example]
                encoded = split.encoders[table](split.tokenizer, [example for _, example in batch if example], *lengths)
                summary["first_dropped"] = summary["first_dropped"] or next(iter(dropped), "")
                summary["dropped"] += len(dropped)
                summary["truncated"] += sum(row.truncated for row in encoded)
                summary["shortened"] += sum(row.dropped_turns > 0 for row in encoded)
                if table == "rows":
                    labelled = [row for row in mask_pads(args, split.tokenizer, encoded) if max(row.labels) >= 0]
                    summary["unlabelled"] += len(encoded) - len(labelled)
                    encoded = labelled
                summary["rows"] += len(encoded)
                columns = [pyarrow.array([row[i] for row in encoded], field.type) for i, field in enumerate(schema)]
                writer.write_batch(pyarrow.record_batch(columns, schema=schema))
    finally:
        gc.enable()
    return summary


def check_any(summary: Mapping[str, Any], args: DataArguments, source: str) -> None:
    """Raises UserError, with the reason, if no row is left."""
    wanted = "text" if args.text_column else "a question and an answer"
    reason = f"{summary['dropped']} rows lack one" if summary["dropped"] else "there are no rows at all"
    if summary["unlabelled"]:
        reason = f"nothing of the answers fits {args.max_source_length} + {args.max_target_length} tokens"
    if not summary["rows"]:
        raise UserError(f"{source}: no row with {wanted}: {reason}.")


def encoding_settings(args: DataArguments, tokenizer: PreTrainedTokenizerBase, split: str) -> dict[str, Any]:
    """The settings that decide the tokens of a row that is read; values are as JSON reads them back."""
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


def fingerprint(split: Split) -> dict[str, Any]:
    """Everything that decides the tokenized rows of a split; values are as JSON reads them back."""
    stats = [(file.resolve(), file.stat()) for file in split.files]
    return encoding_settings(split.args, split.tokenizer, split.name) | {
        "split": split.name,
        **{name: vars(split.args)[name] for name in COLUMNS},
        "files": [{"name": str(file), "size": stat.st_size, "modified": stat.st_mtime_ns} for file, stat in stats],
        "dataset": None if split.named is None else split.named._fingerprint,
    }


def prepare_dataset(
    args: DataArguments, patterns: str | None, tokenizer: PreTrainedTokenizerBase, name: str, encoders: Encoders
) -> Prepared:
    """The tokenized rows of a split (train, validation or test), from the cache or written to it.

    One job tokenizes, and all others wait. Raises UserError for bad files and rows.
    """
    split = open_split(args, patterns, tokenizer, name, encoders)
    tables = ("rows",) if args.text_column else TABLES[name]  # text asks nothing
    folder = cache_folder() / "datasets" / short_hash(json.dumps(fingerprint(split)).encode())
    with guard("data set", folder):
        summary = None if args.overwrite_cache else read_json(folder / "summary.json")
        cached = summary is not None
        if summary is None:
            summary = write_tables(split, tables, folder)
        found = {table: Dataset.from_file(str(folder / f"{table}.arrow")) for table in tables}
    rows, questions = (found.get(table, Dataset.from_dict({})) for table in FEATURES)
    return Prepared(rows, questions, list(map(str, split.files)) or [split.source], cached, summary)


def write_tables(split: Split, tables: Iterable[str], folder: Path) -> dict[str, Any]:
    """Writes a new folder of the cache; after an error there is none. Needs a lock. Returns the summary."""
    shutil.rmtree(folder, ignore_errors=True)  # a killed job may have left a part
    folder.mkdir(parents=True)
    summary: dict[str, Any] = {}
    try:
        for table in tables:
            found = write_table(split, table, split.read(), folder / f"{table}.arrow")
            check_any(found, split.args, split.source)
            summary = found | {"unlabelled": found["unlabelled"] + summary.get("unlabelled", 0)}
        write_json(folder / "summary.json", summary)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return summary


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
            raise UserError(f"{file} is missing, truncated or changed (see {MANIFEST}): copy it again, or {again}.")
    return manifest


def load_shards(args: DataArguments, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The training rows of a folder, mapped into memory.

    Raises UserError for an incomplete folder, and for one that was made with another tokenizer or other lengths.
    Files and columns are not compared, because the rows are not read again.
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
    return Prepared(rows, Dataset.from_dict({}), [str(folder)], True, manifest)
