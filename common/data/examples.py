"""The rows of a split -> examples: conversations or texts, each with its place and a hash; bad rows are collected."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_64_intdigest

from common.arguments import DataArguments
from common.data.formats import Columns, FormatReader
from common.data.rows import EXCERPT, Row, RowError, read_rows
from common.data.sources import find_files
from common.data.survey import scripts_of
from common.errors import UserError
from common.tokenizers.base import Turn

SHOWN_BAD_ROWS = 20
COUNTED, COUNTED_OF = 500, 128  # characters are counted in the first rows of a file, and in one of so many after them


class Example(NamedTuple):
    """A row that was read."""

    file: int  # index of its file
    line: int
    place: str
    content: str | list[Turn]  # empty: there is nothing to learn
    row: int  # 64-bit hash of the text
    fields: dict[str, Any]  # the row as it stands in the file


@dataclass
class Reading:
    """The findings in the files of a split, complete when all its examples were read."""

    files: list[dict[str, Any]] = field(default_factory=list)  # file, format, unit, rows, unread, empty_answers
    characters: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[str, str, str]] = field(default_factory=list)  # place, problem, excerpt of the first bad rows
    bad_rows: int = 0

    def summary(self) -> dict[str, Any]:
        return {
            "findings": self.files,
            "scripts": scripts_of(self.characters),
            "bad": self.bad,
            "bad_rows": self.bad_rows,
        }


class Split(NamedTuple):
    """The rows of train, validation, test or probe, in files or in a named data set."""

    name: str
    args: DataArguments
    tokenizer: PreTrainedTokenizerBase
    source: str  # the files or the data set, as the user wrote it
    files: list[Path]
    named: Dataset | None

    def sources(self) -> Iterator[tuple[str, Iterator[Row]]]:
        """(name, rows) of each file, or of the named data set."""
        for file in self.files:
            yield str(file), read_rows(file, self.args.text_unit)
        if self.named is not None:
            rows = (Row(f"{self.source}, row {number}", number, row) for number, row in enumerate(self.named, 1))
            yield self.source, rows


def open_split(args: DataArguments, patterns: str | None, tokenizer: PreTrainedTokenizerBase, name: str) -> Split:
    """The files of ``patterns``, or without them the split of --dataset_name. Raises UserError if it does not exist."""
    if patterns:
        return Split(name, args, tokenizer, patterns, find_files(patterns), None)
    source = str(args.dataset_name)
    try:
        named = load_dataset(source, args.dataset_config_name, split=name)
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"--dataset_name {source}, split {name}: {str(error).splitlines()[0]}") from error
    return Split(name, args, tokenizer, source, [], named)


def columns_of(args: DataArguments) -> Columns:
    """The columns that the flags name."""
    names = args.prompt_column, args.response_column, args.history_column, args.conversation_column, args.text_column
    return Columns(*(name or None for name in names))


def read_examples(split: Split, reading: Reading) -> Iterator[Example]:
    """The example of every good row; ``reading`` takes down the bad ones and the findings in each file."""
    for index, (source, rows) in enumerate(split.sources()):
        reader = FormatReader(columns_of(split.args), split.tokenizer, asking=split.name == "test")
        count = 0
        for row in rows:
            problem = row.problem
            content: str | list[Turn] = ""
            try:
                content = "" if problem else reader.read(row.content)
                if isinstance(content, str) and content and not split.args.text_column:
                    raise RowError("is plain text, and here questions with answers are expected (--text_column text)")
            except RowError as error:
                problem = str(error)
            if problem:
                reading.bad_rows += 1
                if len(reading.bad) < SHOWN_BAD_ROWS:
                    excerpt = row.excerpt or json.dumps(row.content, ensure_ascii=False, default=str)[:EXCERPT]
                    reading.bad.append((row.place, problem, excerpt))
                continue
            count += 1
            key = hash_of(text_of(content))
            if split.args.source_prefix:
                content = prefixed(content, split.args.source_prefix)
            if count <= COUNTED or not key % COUNTED_OF:
                for text in [content] if isinstance(content, str) else [turn.content for turn in content]:
                    reading.characters.update(text)
            yield Example(index, row.number, row.place, content, key, row.content)
        findings = {"format": reader.name, "unit": reader.unit, "unread": dict(reader.unread)}
        reading.files.append({"file": source, "rows": count, "empty_answers": reader.empty_answers} | findings)


def prefixed(content: str | list[Turn], prefix: str) -> str | list[Turn]:
    """The example with a prefix before its last question."""
    if content and not isinstance(content, str):
        last = max(index for index, turn in enumerate(content) if turn.role == "user")
        content[last] = content[last]._replace(content=prefix + content[last].content)
    return content


def text_of(content: str | Sequence[Turn]) -> str:
    """All text of an example; examples that differ have different texts."""
    if isinstance(content, str):
        return content
    texts = []
    for turn in content:  # what is rare adds nothing elsewhere, or other rows would be held out than before
        rare = "".join([f"\x1e{text}" for text in (turn.tools, turn.reasoning_content) if text])
        texts.append(f"{turn.role}\x1e{turn.content}\x1e{turn.metadata}{rare}")
    return "\x1f".join(texts)


def hash_of(text: str) -> int:
    """64 bits of the hash of a text, as a signed integer, equal on all machines."""
    return xxh3_64_intdigest(text.encode()) - 2**63


def questions_of(content: str | Sequence[Turn]) -> Iterator[tuple[int, str]]:
    """The hash of the turns before each learned answer, and the text of the last one; without end the last pair."""
    found = 0, ""
    if not isinstance(content, str):
        for index, turn in enumerate(content):
            if turn.loss and turn.role == "assistant":
                found = hash_of(text_of(content[:index])), content[index - 1].content if index else ""
                yield found
        if content and content[-1].role != "assistant":
            found = hash_of(text_of(content)), content[-1].content
    while True:
        yield found


def check_reading(summary: dict[str, Any], args: DataArguments) -> None:
    """Raises UserError for bad rows unless --skip_bad_rows, and with --strict_data for fields that are not read."""
    count = summary["bad_rows"]
    if count and not args.skip_bad_rows:
        place, problem, _ = summary["bad"][0]
        if count > 1:
            table = Table("place", "what", "excerpt", title=f"{count:,} bad rows", title_justify="left")
            for row in summary["bad"]:
                table.add_row(*row)
            console = Console(stderr=True, width=None if Console(stderr=True).is_terminal else 160, markup=False)
            console.print(table)
        others = f"; {count - 1:,} more row{'s are' if count > 2 else ' is'} bad" if count > 1 else ""
        raise UserError(f"{place}: {problem}{others} (SKIP_BAD_ROWS=true or --skip_bad_rows goes on without bad rows).")
    for file in summary["findings"] if args.strict_data else ():
        if file["unread"]:
            fields = ", ".join(f"{name!r} ({rows:,} rows)" for name, rows in file["unread"].items())
            raise UserError(f"{file['file']}: STRICT_DATA (--strict_data) refuses fields that are not read: {fields}.")
