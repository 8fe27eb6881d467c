"""Examples -> tokenized rows in an Arrow file."""

import gc
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Features, List, Value
from numpy.typing import NDArray
from xxhash import xxh3_64

from common.arguments import DataArguments
from common.data.examples import Example, Split, questions_of
from common.encoding import EvalRow, TrainRow, encode_eval, encode_texts, encode_train
from common.errors import UserError

ROWS_PER_BATCH = 1000
# The counts of a table. An example is dropped if a text, question or answer is empty, shortened if it lost its oldest
# turns, and unlabelled if no label fits into the lengths.
COUNTS = ("rows", "dropped", "truncated", "shortened", "unlabelled")

IDS = List(Value("int32"))
ORIGIN = {  # where a row comes from, and its length in tokens before anything is cut
    **{"file": Value("int32"), "line": Value("int64")},
    **{"row": Value("int64"), "question": Value("int64")},  # hashes of the conversation, and of the turns before
    **{"asked": Value("int32"), "answered": Value("int32")},
}
MODEL_INPUTS = ["input_ids", "labels"]  # the columns of rows that a model reads
FEATURES = {
    "rows": Features({"input_ids": IDS, "labels": IDS, **ORIGIN}),
    "questions": Features({"prompt_ids": IDS, "text": Value("string"), "reference": Value("string"), **ORIGIN}),
}


def lengths_of(args: DataArguments, split: str) -> list[int]:
    """The longest question and answer in tokens, or the longest block of plain text."""
    answer = args.max_target_length if split == "train" else args.val_max_target_length
    return [args.max_source_length] if args.text_column else [args.max_source_length, answer]


def encode(split: Split, table: str, contents: list) -> list[TrainRow] | list[EvalRow]:
    """The rows of a table that examples give; rows to compare without a reference are left out."""
    lengths = lengths_of(split.args, split.name)
    if split.args.text_column:
        return encode_texts(split.tokenizer, contents, *lengths)
    if table == "questions":
        rows = encode_eval(split.tokenizer, contents, *lengths)
        return [row for row in rows if row.reference is not None] if split.name == "validation" else rows
    return encode_train(split.tokenizer, contents, *lengths)


def write_table(
    split: Split, table: str, examples: Iterable[Example], file: Path, first_batch: int = 0
) -> dict[str, Any]:
    """Tokenizes examples into an Arrow file, in batches.

    Returns the counts, the place of the first dropped one, and ``content``, a hash of the token ids: the sum of the
    hashes of all batches, each with its number in all of the data, so that the sum over shards is that of one file.
    """
    examples = iter(examples)
    hashes: list[xxh3_64] = []
    counts: dict[str, Any] = dict.fromkeys(COUNTS, 0) | {"first_dropped": ""}
    schema = FEATURES[table].arrow_schema
    gc.disable()  # it would take half of the time, for many short lists that are in no cycle
    try:
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
            while batch := list(islice(examples, ROWS_PER_BATCH)):
                whole = [example for example in batch if example.content]
                if len(whole) < len(batch):
                    first = next(example.place for example in batch if not example.content)
                    counts["first_dropped"] = counts["first_dropped"] or first
                    counts["dropped"] += len(batch) - len(whole)
                encoded = encode(split, table, [example.content for example in whole])
                columns = table_of(split, schema, whole, encoded)
                counts["rows"] += len(columns)
                counts["unlabelled"] += len(encoded) - len(columns)
                counts["truncated"] += sum([row.truncated for row in encoded])
                counts["shortened"] += sum([row.dropped_turns > 0 for row in encoded])
                writer.write_batch(columns)
                hashes.append(xxh3_64(seed=first_batch + len(hashes)))
                for ids in (column for column in columns if pyarrow.types.is_list(column.type)):
                    hashes[-1].update(ids.offsets.to_numpy())
                    hashes[-1].update(ids.values.to_numpy())
    finally:
        gc.enable()
    return counts | {"content": sum_of(found.intdigest() for found in hashes)}


def table_of(
    split: Split, schema: pyarrow.Schema, examples: Sequence[Example], rows: Sequence[Any]
) -> pyarrow.RecordBatch:
    """The columns of encoded rows (TrainRow or EvalRow), without rows that have no label."""
    if not rows:
        return pyarrow.record_batch({name: [] for name in schema.names}, schema=schema)
    found = [row.origin.conversation for row in rows]
    iterators = [questions_of(example.content) for example in examples]
    questions = [next(iterators[index]) for index in found]
    columns: dict[str, Any] = {
        "file": [examples[index].file for index in found],
        "line": [examples[index].line for index in found],
        "row": [examples[index].row for index in found],
        "question": [number for number, _ in questions],
        "asked": [row.origin.asked for row in rows],
        "answered": [row.origin.answered for row in rows],
    }
    has_label = None
    if "labels" in schema.names:
        columns["input_ids"], columns["labels"], has_label = token_columns(rows, token_without_loss(split))
    else:
        columns["prompt_ids"] = [row.prompt_ids for row in rows]
        columns["text"] = [text for _, text in questions]
        columns["reference"] = [row.reference for row in rows]
    batch = pyarrow.record_batch(columns, schema=schema)
    return batch if has_label is None or has_label.all() else batch.filter(pyarrow.array(has_label))


def token_without_loss(split: Split) -> int:
    """The pad token, which the official scripts do not learn within rows either; -1 for none.

    It is learned where it is also the end token, and in plain text, which the official scripts do not know.
    """
    pad, args = split.tokenizer.pad_token_id, split.args
    learned = not args.ignore_pad_token_for_loss or pad == split.tokenizer.eos_token_id or args.text_column
    return -1 if learned else pad


def token_columns(
    rows: Sequence[TrainRow], without_loss: int
) -> tuple[pyarrow.Array, pyarrow.Array, NDArray[np.bool_]]:
    """(token ids, labels, whether a row has a label)."""
    pieces = list(chain.from_iterable([row.pieces for row in rows]))
    lengths = np.fromiter(map(len, pieces), np.int32, len(pieces))
    values = np.concatenate(pieces)
    learned = np.repeat(list(chain.from_iterable([row.learned for row in rows])), lengths)
    labels = np.where(learned & (values != without_loss), values, np.int32(-100))
    first_pieces = np.cumsum([0, *(len(row.pieces) for row in rows[:-1])])
    lengths = np.add.reduceat(lengths, first_pieces)
    offsets = np.cumsum([0, *lengths], dtype=np.int32)
    has_label = np.logical_or.reduceat(labels != -100, offsets[:-1])
    as_lists = pyarrow.ListArray.from_arrays
    return as_lists(offsets, values), as_lists(offsets, labels), has_label


def sum_of(hashes: Iterable[int | str]) -> str:
    """16 hex digits; the hashes are numbers, or sums before them."""
    return f"{sum(found if isinstance(found, int) else int(found, 16) for found in hashes) % 2**64:016x}"


def check_any(summary: Mapping[str, Any], args: DataArguments, source: str) -> None:
    """Raises UserError, with the reason, if no row is left."""
    wanted, lacking = "a question and an answer", "lack one that is learned"
    if args.text_column:
        wanted, lacking = "text", "lack one"
    reason = f"{summary['dropped']} rows {lacking}" if summary["dropped"] else "there are no rows at all"
    if summary["unlabelled"]:
        reason = f"nothing of the answers fits {args.max_source_length} + {args.max_target_length} tokens"
    if not summary["rows"]:
        raise UserError(f"{source}: no row with {wanted}: {reason}.")
