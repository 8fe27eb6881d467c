"""Data files -> checked rows -> a tokenized data set, prepared once for all running jobs and cached on disk."""

import csv
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.arrow_writer import ArrowWriter
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizer

from common.arguments import DataArguments
from common.encoding import build_prompt, encode_eval, encode_train
from common.errors import UserError
from common.files import write_json
from common.locking import cache_folder, guard

ENCODING_VERSION = 1  # part of the cache key: to be raised when the same text shall become other tokens
ROWS_PER_BATCH = 1000


@dataclass
class Prepared:
    """A tokenized data set, and what happened to its rows on the way."""

    rows: Dataset  # input_ids, labels; for evaluation also prompt_ids, reference
    files: list[str]
    dropped: int  # rows without a question or an answer
    first_dropped: str  # where the first of them stands
    truncated: int
    cached: bool


def find_files(patterns: str) -> list[Path]:
    """Files named one by one, separated by commas, or by a glob. Raises UserError where one does not exist."""
    files = []
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not found or not all(os.path.isfile(file) for file in found):
            raise UserError(f"no data file {pattern} (looked in {os.getcwd()}).")
        files += found
    return [Path(file) for file in files]


def read_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every row of a JSON, JSON lines or CSV file; the place is named in error messages."""
    try:
        if file.suffix.lower() == ".csv":
            yield from read_csv(file)
            return
        with open(file, encoding="utf-8-sig") as lines:
            start = lines.read(1)
            while start.isspace():
                start = lines.read(1)
            lines.seek(0)
            yield from read_json_array(file, lines.read()) if start == "[" else read_json_lines(file, lines)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}.") from error


def read_json_lines(file: Path, lines) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place}: broken JSON: {error}.") from error
            yield place, check_object(place, row)


def read_json_array(file: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: broken JSON: {error.msg} at column {error.colno}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: broken JSON: {error}.") from error
    for number, row in enumerate(rows, 1):
        place = f"{file}, row {number}"
        yield place, check_object(place, row)


def read_csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            for row in reader:
                place = f"{file}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{place}: this row has more or fewer fields than the header names.")
                yield place, row
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: broken CSV: {error}.") from error


def check_object(place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f'{place}: expected an object like {{"prompt": …}}, found {type(row).__name__}.')
    return row


def value_of(place: str, row: dict[str, Any], column: str, flag: str) -> Any:
    """What stands in a column. Raises UserError naming the columns that exist."""
    if column not in row:
        raise UserError(f"{place}: no column {column!r}; there are {', '.join(map(repr, row))} (set --{flag}).")
    return row[column]


def text_of(place: str, row: dict[str, Any], column: str, flag: str) -> str:
    """The string in a column; "" for null. Raises UserError for what is no text."""
    value = value_of(place, row, column, flag)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place}: column {column!r} holds {type(value).__name__} {value!r:.40}, expected a string.")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise UserError(f"{place}: column {column!r} holds half a character (a lone surrogate), which is no text.")
    return value


def history_of(place: str, row: dict[str, Any], column: str) -> list[list[str]]:
    """Earlier rounds [[question, answer], …]; in CSV they are written as JSON; empty and null mean none."""
    history = value_of(place, row, column, "history_column")
    if isinstance(history, str):
        try:
            history = json.loads(history or "[]")
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: column {column!r} is not JSON: {error.msg}.") from error
    history = history or []
    if not isinstance(history, list) or not all(is_round(pair) for pair in history):
        raise UserError(f"{place}: column {column!r} must hold [[question, answer], …], strings all.")
    return history


def is_round(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def read_named(args: DataArguments, split: str) -> Dataset:
    """A split of --dataset_name, on the hub or in a folder."""
    try:
        return load_dataset(args.dataset_name, args.dataset_config_name, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"--dataset_name {args.dataset_name}, split {split}: {str(error).splitlines()[0]}") from error


def read_pairs(args: DataArguments, files: list[Path], named: Dataset | None = None) -> Iterator[tuple[str, str, str]]:
    """(place, prompt, response) of every row of all files, or of a data set by name."""
    places: Iterator[tuple[str, dict[str, Any]]]
    if named is not None:
        places = ((f"{args.dataset_name}, row {number}", row) for number, row in enumerate(named, 1))
    else:
        places = (place_and_row for file in files for place_and_row in read_rows(file))
    for place, row in places:
        query = text_of(place, row, args.prompt_column, "prompt_column")
        response = text_of(place, row, args.response_column, "response_column")
        history = history_of(place, row, args.history_column) if args.history_column else []
        yield place, args.source_prefix + build_prompt(query, history) if query else "", response


def encode(
    args: DataArguments, tokenizer: PreTrainedTokenizer, prompts: list[str], responses: list[str], evaluation: bool
) -> tuple[dict[str, list], int]:
    """Columns of the data set for a batch of rows, and how many of the rows were truncated."""
    target_length = args.val_max_target_length if evaluation else args.max_target_length
    rows = encode_train(tokenizer, prompts, responses, args.max_source_length, target_length)
    columns: dict[str, list] = {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    truncated = [row.truncated for row in rows]
    if evaluation:
        asked = encode_eval(tokenizer, prompts, responses, args.max_source_length, target_length)
        columns["prompt_ids"] = [row.prompt_ids for row in asked]
        columns["reference"] = [row.reference for row in asked]
        truncated = [row.truncated for row in asked]  # the prompt is cut one token earlier than in training
    if args.ignore_pad_token_for_loss:
        pad = tokenizer.pad_token_id
        columns["labels"] = [[-100 if label == pad else label for label in labels] for labels in columns["labels"]]
    return columns, sum(truncated)


def write_dataset(
    folder: Path,
    args: DataArguments,
    source: str,
    pairs: Iterator[tuple[str, str, str]],
    tokenizer: PreTrainedTokenizer,
    split: str,
) -> None:
    """Tokenizes all rows into ``folder``: data.arrow, and summary.json with the counts.

    A row without a question or without an answer is dropped, as in the official script.
    """
    evaluation = split != "train"
    summary: dict[str, Any] = {"rows": 0, "dropped": 0, "first_dropped": "", "truncated": 0}
    with ArrowWriter(path=str(folder / "data.arrow")) as writer:
        while batch := list(islice(pairs, ROWS_PER_BATCH)):
            kept = [pair for pair in batch if pair[1] and pair[2]]
            dropped = [place for place, prompt, response in batch if not (prompt and response)]
            summary["first_dropped"] = summary["first_dropped"] or next(iter(dropped), "")
            summary["dropped"] += len(dropped)
            if kept:
                prompts, responses = [pair[1] for pair in kept], [pair[2] for pair in kept]
                columns, truncated = encode(args, tokenizer, prompts, responses, evaluation)
                writer.write_batch(columns)
                summary["rows"] += len(kept)
                summary["truncated"] += truncated
        if not summary["rows"]:
            reason = f"{summary['dropped']} rows lack one" if summary["dropped"] else "there are no rows at all"
            raise UserError(f"{source}: no row with a question and an answer: {reason}.")
        writer.finalize()
    write_json(folder / "summary.json", summary)


def cache_key(
    args: DataArguments, files: list[Path], named: Dataset | None, tokenizer: PreTrainedTokenizer, split: str
) -> str:
    """A hash of everything that decides what the tokenized rows are."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    vocabulary = hashlib.sha256(Path(tokenizer.vocab_file).read_bytes()).hexdigest()
    target_length = args.max_target_length if split == "train" else args.val_max_target_length
    what = [ENCODING_VERSION, split, stats, None if named is None else named._fingerprint, vocabulary]
    what += [args.prompt_column, args.response_column, args.history_column, args.source_prefix]
    what += [args.max_source_length, target_length, args.ignore_pad_token_for_loss]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]


def prepare_dataset(args: DataArguments, patterns: str | None, tokenizer: PreTrainedTokenizer, split: str) -> Prepared:
    """The tokenized rows of one split (train, validation or test), from the cache or written to it.

    One of all running jobs does the work while the others wait for it. Raises UserError for bad files and rows.
    """
    files = find_files(patterns) if patterns else []
    named = None if files else read_named(args, split)
    key = cache_key(args, files, named, tokenizer, split)
    folder = cache_folder() / "datasets" / key
    with guard("data set", folder):
        cached = folder.exists() and not args.overwrite_cache
        if not cached:
            folder.parent.mkdir(exist_ok=True)
            for left_behind in folder.parent.glob(f"{key}.*"):  # by a job that was killed
                shutil.rmtree(left_behind)
            partial = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=folder.parent))
            try:
                pairs = read_pairs(args, files, named)
                write_dataset(partial, args, patterns or str(args.dataset_name), pairs, tokenizer, split)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        rows = Dataset.from_file(str(folder / "data.arrow"))
    names = [str(file) for file in files] or [str(args.dataset_name)]
    return Prepared(rows, names, summary["dropped"], summary["first_dropped"], summary["truncated"], cached)
