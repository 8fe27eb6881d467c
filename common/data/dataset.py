"""Data files -> checked rows -> a tokenized data set, prepared once for all running jobs and cached on disk."""

import gc
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, load_dataset
from datasets.arrow_writer import ArrowWriter
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from common.arguments import DataArguments
from common.data.formats import check_roles, read_messages, read_pair
from common.data.rows import find_files, read_rows, text_of
from common.encoding import EvalRow, TrainRow, Turn, encode_eval, encode_texts, encode_train
from common.errors import UserError
from common.files import short_hash, write_json
from common.locking import cache_folder, guard
from common.tokenizers.chatglm import ChatGLMTokenizer
from common.tokenizers.chatglm2 import ChatGLM2Tokenizer

ENCODING_VERSION = 3  # part of the fingerprint: to be raised when the same text shall become other tokens
ROWS_PER_BATCH = 1000
COUNTS = ("rows", "dropped", "truncated", "shortened", "unlabelled")  # what happened to the rows of a table

Example = str | list[Turn]
"""A row as it was read: plain text, or a conversation; empty where there is nothing to learn."""


@dataclass
class Prepared:
    """A tokenized data set, and what happened to its rows on the way."""

    rows: Dataset  # input_ids, labels: for training and for the loss; empty where only answers are asked for
    questions: Dataset  # prompt_ids, reference: to be answered; empty where there is only training
    files: list[str]
    dropped: int  # rows without a question or an answer
    first_dropped: str  # where the first of them stands
    truncated: int
    shortened: int  # conversations that lost their oldest turns
    total: int  # rows, or questions where there are any, before some were selected
    unlabelled: int  # conversations of which nothing that is learned fits the lengths; they are left out
    cached: bool

    def limit(self, count: int | None) -> None:
        """Keeps only the first ``count`` rows and questions."""
        if count is not None:
            self.rows = self.rows.select(range(min(count, len(self.rows))))
            self.questions = self.questions.select(range(min(count, len(self.questions))))


def read_named(args: DataArguments, split: str) -> Dataset:
    """A split of --dataset_name, on the hub or in a folder."""
    try:
        return load_dataset(args.dataset_name, args.dataset_config_name, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"--dataset_name {args.dataset_name}, split {split}: {str(error).splitlines()[0]}") from error


Rows = Iterator[tuple[str, dict[str, Any]]]
"""(place, row): the place is named in error messages."""


def read_source(args: DataArguments, files: list[Path], named: Dataset | None) -> Rows:
    """Every row of all files, or of a data set by name."""
    if named is not None:
        return ((f"{args.dataset_name}, row {number}", row) for number, row in enumerate(named, 1))
    return (place_and_row for file in files for place_and_row in read_rows(file))


def read_examples(args: DataArguments, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Example]]:
    """(place, example) of every row. Raises UserError for a row that does not hold what the flags say."""
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


def training_rows(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, examples: list, split: str
) -> list[TrainRow]:
    target_length = args.max_target_length if split == "train" else args.val_max_target_length
    if args.text_column:
        return encode_texts(tokenizer, examples, args.max_source_length)
    rows = encode_train(tokenizer, examples, args.max_source_length, target_length)
    if not args.ignore_pad_token_for_loss:
        return rows
    pad = tokenizer.pad_token_id
    if pad == tokenizer.eos_token_id:  # the end of an answer is learned, not a pad
        return rows
    return [
        row._replace(labels=[-100 if label == pad else label for label in row.labels]) if pad in row.labels else row
        for row in rows
    ]


def question_rows(args: DataArguments, tokenizer: PreTrainedTokenizerBase, examples: list, split: str) -> list[EvalRow]:
    return encode_eval(tokenizer, examples, args.max_source_length, args.val_max_target_length)


IDS = List(Value("int32"))
TABLES: dict[str, tuple[Callable, Features]] = {
    "rows": (training_rows, Features({"input_ids": IDS, "labels": IDS})),
    "questions": (question_rows, Features({"prompt_ids": IDS, "reference": Value("string")})),
}


def tables_of(split: str, args: DataArguments) -> list[str]:
    """What is needed of a split: rows for the loss, questions to be answered."""
    if split == "train" or args.text_column:
        return ["rows"]
    return ["rows", "questions"] if split == "validation" else ["questions"]


def write_table(
    file: Path,
    table: str,
    args: DataArguments,
    examples: Iterator[tuple[str, Example]],
    tokenizer: PreTrainedTokenizerBase,
    split: str,
) -> dict[str, Any]:
    """Tokenizes all examples into an Arrow file, batch by batch. Returns what happened to them.

    An example without anything to learn is dropped, as in the official script.
    """
    encode, features = TABLES[table]
    summary: dict[str, Any] = dict.fromkeys(COUNTS, 0)
    summary["first_dropped"] = ""
    with ArrowWriter(path=str(file), features=features) as writer:
        while batch := list(islice(examples, ROWS_PER_BATCH)):
            dropped = [place for place, example in batch if not example]
            summary["first_dropped"] = summary["first_dropped"] or next(iter(dropped), "")
            summary["dropped"] += len(dropped)
            rows = encode(args, tokenizer, [example for _, example in batch if example], split)
            unlabelled = [row for row in rows if table == "rows" and max(row.labels) < 0]
            summary["unlabelled"] += len(unlabelled)
            summary["truncated"] += sum(row.truncated for row in rows)
            summary["shortened"] += sum(row.dropped_turns > 0 for row in rows)
            if unlabelled:
                rows = [row for row in rows if max(row.labels) >= 0]
            if rows:
                columns = dict(zip(rows[0]._fields, zip(*rows, strict=True), strict=True))
                writer.write_batch({name: list(columns[name]) for name in features})
                summary["rows"] += len(rows)
        writer.finalize()
    return summary


def check_any(summary: dict[str, Any], args: DataArguments, source: str) -> None:
    """Raises UserError where nothing is left to learn from or to answer, saying why."""
    if summary["rows"]:
        return
    what = "text" if args.text_column else "a question and an answer"
    reason = f"{summary['dropped']} rows lack one" if summary["dropped"] else "there are no rows at all"
    if summary["unlabelled"]:
        reason = f"nothing of the answers fits {args.max_source_length} + {args.max_target_length} tokens"
    raise UserError(f"{source}: no row with {what}: {reason}.")


@contextmanager
def without_collector() -> Iterator[None]:
    """Millions of short lists wake the collector of cycles again and again, half of the time for nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def encoding_settings(args: DataArguments, tokenizer: PreTrainedTokenizerBase, split: str) -> dict[str, Any]:
    """What decides which tokens a row becomes, once it is read."""
    own = isinstance(tokenizer, (ChatGLMTokenizer, ChatGLM2Tokenizer))
    vocabulary = Path(tokenizer.vocab_file).read_bytes() if own else tokenizer.backend_tokenizer.to_str().encode()
    template = json.dumps(tokenizer.chat_template).encode() if tokenizer.chat_template else None
    return {
        "encoding_version": ENCODING_VERSION,
        "tokenizer": type(tokenizer).__name__,
        "vocabulary": short_hash(vocabulary),
        "chat_template": template and short_hash(template),
        "special_tokens": tokenizer.special_tokens_map,
        "pad_token_id": tokenizer.pad_token_id,
        "max_source_length": args.max_source_length,
        "max_target_length": args.max_target_length if split == "train" else args.val_max_target_length,
        "ignore_pad_token_for_loss": args.ignore_pad_token_for_loss,
    }


COLUMNS = ("prompt_column", "response_column", "history_column", "conversation_column", "text_column")


def fingerprint(
    args: DataArguments, files: list[Path], named: Dataset | None, tokenizer: PreTrainedTokenizerBase, split: str
) -> dict[str, Any]:
    """Everything that decides what the tokenized rows of a split are; as JSON reads it back."""
    stats = [(file.resolve(), file.stat()) for file in files]
    return encoding_settings(args, tokenizer, split) | {
        "split": split,
        **{name: vars(args)[name] for name in (*COLUMNS, "source_prefix")},
        "files": [{"name": str(file), "size": stat.st_size, "modified": stat.st_mtime_ns} for file, stat in stats],
        "dataset": None if named is None else named._fingerprint,
    }


def prepare_dataset(
    args: DataArguments, patterns: str | None, tokenizer: PreTrainedTokenizerBase, split: str
) -> Prepared:
    """The tokenized rows of one split (train, validation or test), from the cache or written to it.

    One of all running jobs does the work while the others wait for it. Raises UserError for bad files and rows.
    """
    files = find_files(patterns) if patterns else []
    named = None if files else read_named(args, split)
    key = short_hash(json.dumps(fingerprint(args, files, named, tokenizer, split)).encode())
    folder = cache_folder() / "datasets" / key
    tables = tables_of(split, args)
    with guard("data set", folder):
        cached = folder.exists() and not args.overwrite_cache
        if not cached:
            folder.parent.mkdir(exist_ok=True)
            for left_behind in folder.parent.glob(f"{key}.*"):  # by a job that was killed
                shutil.rmtree(left_behind)
            partial = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=folder.parent))
            try:
                source = patterns or str(args.dataset_name)
                summary: dict[str, Any] = {}
                for table in tables:
                    examples = read_examples(args, read_source(args, files, named), tokenizer)
                    with without_collector():
                        file = partial / f"{table}.arrow"
                        unlabelled = summary.get("unlabelled", 0)
                        summary = write_table(file, table, args, examples, tokenizer, split)
                        check_any(summary, args, source)
                        summary["unlabelled"] += unlabelled  # only rows have labels
                write_json(partial / "summary.json", summary)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        found = {table: Dataset.from_file(str(folder / f"{table}.arrow")) for table in tables}
    return Prepared(
        found.get("rows", Dataset.from_dict({})),
        found.get("questions", Dataset.from_dict({})),
        [str(file) for file in files] or [str(args.dataset_name)],
        summary["dropped"],
        summary["first_dropped"],
        summary["truncated"],
        summary["shortened"],
        summary["rows"],
        summary["unlabelled"],
        cached,
    )
