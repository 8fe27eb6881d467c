"""Data files -> rows. JSON lines and CSV are read line by line; a JSON array is read into memory as a whole."""

import csv
import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, NamedTuple

from common.errors import UserError


class RowError(Exception):
    """The mistake in a row, without its place, which the reader of the file adds."""


class Row(NamedTuple):
    place: str
    number: int
    content: dict[str, Any]
    problem: str = ""
    excerpt: str = ""


def read_rows(file, text_unit="file"):
    if file.suffix == ".txt":
        for i, p in enumerate(file.read_text().split("\n\n"), 1):
            yield Row(f"{file}, line {i}", i, {"text": p})
        return
    with open(file, encoding="utf-8-sig", newline="") as text:
        for i, (place, row) in enumerate((read_csv if file.suffix.lower() == ".csv" else read_json)(file, text), 1):
            yield Row(place, i, row)


def read_json(file: Path, text: TextIO) -> Iterator[tuple[str, Any]]:
    is_array = next((line for line in text if line.strip()), "").lstrip().startswith("[")
    text.seek(0)
    if is_array:
        for number, row in enumerate(parse_json(file, text.read()), 1):
            yield f"{file}, row {number}", row
        return
    for number, line in enumerate(text, 1):
        if line.strip():
            yield f"{file}, line {number}", parse_json(file, line, number)


def parse_json(file: Path, text: str, line: int = 0) -> Any:
    """The value of a text: the whole file, or one ``line`` of it. Raises UserError that names the broken line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{file}, line {line or error.lineno}"
        raise UserError(f"{where}: broken JSON: {error.msg} (column {error.colno}).") from error
    except (ValueError, RecursionError) as error:  # such as an integer of thousands of digits; no position is known
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{file}{f', line {line}' if line else ''}: broken JSON: {reason}.") from error


def read_csv(file: Path, text: TextIO):
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(text, strict=True)
    try:
        for row in reader:
            place = f"{file}, line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{place}: this row has more or fewer fields than the header names.")
            yield place, row
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: broken CSV: {error}.") from error
