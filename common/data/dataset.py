"""Data files -> tokenized rows in the cache:

CACHE/datasets/HASH/            one split, written by the first job that needs it; HASH is that of its ``fingerprint``
  rows.arrow, questions.arrow   rows for the loss, questions for answers; a split has one of them or both
  held_out/                     the rows that a training left for its validation, as JSON lines
  summary.json                  counts and findings
  manifest.json                 size and hash of each file, written last: a folder with it is complete
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from common.arguments import DataArguments
from common.data.examples import Example, Reading, Split, check_reading, open_split, read_examples
from common.data.held_out import HoldOut, write_held_out
from common.data.order import RowOrder, TokenBatches
from common.data.sealed import SUMMARY, problem_of, read_summary
from common.data.survey import Survey, columns_of
from common.data.tables import FEATURES, check_any, write_table
from common.errors import note
from common.files import clear, short_hash, write_json, written
from common.locking import cache_folder, guard
from common.manifest import seal
from common.trained import COLUMNS

ENCODING_VERSION = 7  # part of the fingerprint: increase it when the encoding or a table changes
TABLES = {"train": ("rows",), "validation": ("rows", "questions"), "test": ("questions",), "probe": ("rows",)}


@dataclass
class Prepared:
    """The tokenized rows of a split."""

    rows: Dataset  # input_ids, labels and their origin; empty for predictions
    questions: Dataset  # prompt_ids, text, reference and their origin; empty for training
    files: list[str]
    cached: bool  # whether it was there before
    summary: Mapping[str, Any]  # counts of all rows; ``rows`` counts questions if there are any
    held_out: str | None = None  # folder with the rows that a training leaves for its validation
    survey: Survey | None = None  # of trained and evaluated rows
    order: RowOrder | TokenBatches | None = None  # of the training rows; None: one that the Trainer knows

    @property
    def rows_per_epoch(self) -> int:
        return sum(self.order.counts) if self.order else len(self.rows)

    @property
    def content(self) -> str:
        """The hash of the token ids of all rows: the same wherever files lie, whatever they are called."""
        return self.summary["content"]


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
        **{name: vars(split.args)[name] for name in (*COLUMNS, "text_unit")},
        "holds_out": [split.args.validation_split, bool(split.args.mix)] if holds_out(split) else None,
        "files": [{"name": str(file), "size": stat.st_size, "modified": stat.st_mtime_ns} for file, stat in stats],
        "dataset": None if split.named is None else split.named._fingerprint,
    }


def holds_out(split: Split) -> bool:
    return split.name == "train" and split.args.held_out


def prepare_dataset(
    args: DataArguments, patterns: str | None, tokenizer: PreTrainedTokenizerBase, name: str
) -> Prepared:
    """The tokenized rows of a split (train, validation, test or probe), from the cache or written to it.

    One job tokenizes, and all others wait; what is damaged is written anew. Raises UserError for bad files and rows,
    and SaveError if the cache can't be written.
    """
    split = open_split(args, patterns, tokenizer, name)
    tables = ("rows",) if args.text_column else TABLES[name]  # text asks nothing
    folder = cache_folder() / "datasets" / short_hash(json.dumps(fingerprint(split)).encode())
    with guard("data set", folder):
        problem = problem_of(folder)
        cached = not (problem or args.overwrite_cache)
        if problem and folder.exists():
            note(f"note: {folder}: {problem}: the rows are tokenized again")
        if not cached:
            write_tables(split, tables, folder)
        summary = read_summary(folder)
        found = {table: Dataset.from_file(str(folder / f"{table}.arrow")) for table in tables}
    check_reading(summary, args)
    rows, questions = (found.get(table, Dataset.from_dict({})) for table in FEATURES)
    return prepared(rows, questions, list(map(str, split.files)) or [split.source], cached, summary, folder)


def prepared(
    rows: Dataset, questions: Dataset, files: list[str], cached: bool, summary: Mapping[str, Any], folder: Path
) -> Prepared:
    """The rows without those that are held out, and without their copies."""
    if not summary["held_out"]:
        return Prepared(rows, questions, files, cached, summary)
    kept = np.isin(columns_of(rows, "row")["row"], np.array(summary["held_out"], np.int64), invert=True)
    return Prepared(rows.select(np.flatnonzero(kept)), questions, files, cached, summary, str(folder / "held_out"))


def write_tables(split: Split, tables: Iterable[str], folder: Path) -> None:
    """Writes a new folder of the cache; after an error there is none. Needs a lock. Raises SaveError."""
    summary: dict[str, Any] = {}
    with written(folder, "make room, or set CHATGLM_CACHE to a folder on another disk"):
        clear(folder)  # a killed job may have left a part
        folder.mkdir(parents=True)
        for table in tables:
            reading, hold_out = Reading(), HoldOut(split.args.validation_split, bool(split.args.mix))
            examples = read_examples(split, reading)
            watched = hold_out.watch(examples) if holds_out(split) else examples
            found = write_table(split, table, watched, folder / f"{table}.arrow") | reading.summary()
            check_reading(found, split.args)
            check_any(found, split.args, split.source)
            chosen = choose_held_out(split, hold_out, folder)
            first = {"content": summary.get("content", found["content"])}
            unlabelled = found["unlabelled"] + summary.get("unlabelled", 0)
            summary = found | first | {"unlabelled": unlabelled, "held_out": chosen}
        write_json(folder / SUMMARY, summary)
        seal(folder)


def choose_held_out(split: Split, hold_out: HoldOut, folder: Path) -> list[int]:
    """Writes the held-out rows of a training, and returns their hashes."""
    if not holds_out(split):
        return []
    examples: list[Example] = hold_out.choose(split.source)
    write_held_out(split, examples, folder / "held_out")
    return [example.row for example in examples]
