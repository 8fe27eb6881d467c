"""Examples -> tokenized rows in an Arrow file."""

import gc
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_128

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
    "questions": Features({"prompt_ids": IDS, "reference": Value("string"), **ORIGIN}),
}


def lengths_of(args: DataArguments, split: str) -> list[int]:
    """The longest question and answer in tokens, or the longest block of plain text."""
    answer = args.max_target_length if split == "train" else args.val_max_target_length
    return [args.max_source_length] if args.text_column else [args.max_source_length, answer]


def encode(split: Split, table: str, contents: list) -> list[TrainRow] | list[EvalRow]:
    """The rows of a table that examples give; rows without any label, or to compare without a reference, are left."""
    lengths = lengths_of(split.args, split.name)
    if split.args.text_column:
        return encode_texts(split.tokenizer, contents, *lengths)
    if table == "questions":
        rows = encode_eval(split.tokenizer, contents, *lengths)
        return [row for row in rows if row.reference is not None] if split.name == "validation" else rows
    return mask_pads(split.args, split.tokenizer, encode_train(split.tokenizer, contents, *lengths))


def mask_pads(args: DataArguments, tokenizer: PreTrainedTokenizerBase, rows: list[TrainRow]) -> list[TrainRow]:
    """Removes the labels of pad tokens within rows, as the official scripts do, unless the pad is also the end token.

    Plain text, which the official scripts do not know, keeps all labels.
    """
    pad = tokenizer.pad_token_id
    if not args.ignore_pad_token_for_loss or pad == tokenizer.eos_token_id:
        return rows
    return [
        row._replace(labels=[-100 if label == pad else label for label in row.labels]) if pad in row.labels else row
        for row in rows
    ]


def write_table(split: Split, table: str, examples: Iterable[Example], file: Path) -> dict[str, Any]:
    """Tokenizes examples into an Arrow file, in batches.

    Returns the counts, the place of the first dropped one, and ``content``, a hash of what was tokenized.
    """
    examples, content = iter(examples), xxh3_128()
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
                questions = [questions_of(example.content) for example in whole]
                cells = []
                for row in encoded:
                    index, asked, answered = row.origin
                    # Most rows end with a label, and nothing else of them needs to be looked at.
                    if isinstance(row, TrainRow) and row.labels[-1] < 0 and max(row.labels) < 0:
                        counts["unlabelled"] += 1
                        continue
                    origin, question = whole[index], next(questions[index])
                    cells.append((*row[:2], origin.file, origin.line, origin.row, question, asked, answered))
                counts["rows"] += len(cells)
                counts["truncated"] += sum(row.truncated for row in encoded)
                counts["shortened"] += sum(row.dropped_turns > 0 for row in encoded)
                values = zip(*cells, strict=True) if cells else [()] * len(schema)
                columns = [to_arrow(column, field.type) for column, field in zip(values, schema, strict=True)]
                writer.write_batch(pyarrow.record_batch(columns, schema=schema))
                for ids in (column for column in columns if pyarrow.types.is_list(column.type)):
                    content.update(ids.offsets.to_numpy())
                    content.update(ids.values.to_numpy())
    finally:
        gc.enable()
    return counts | {"content": content.hexdigest()}


def to_arrow(column: Sequence[Any], kind: pyarrow.DataType) -> pyarrow.Array:
    """A column; lists of ids go through numpy, which takes half the time."""
    if not pyarrow.types.is_list(kind):
        return pyarrow.array(column, kind)
    offsets = np.cumsum([0, *map(len, column)], dtype=np.int32)
    values = np.fromiter(chain.from_iterable(column), np.int32, offsets[-1])
    return pyarrow.ListArray.from_arrays(offsets, values)


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
