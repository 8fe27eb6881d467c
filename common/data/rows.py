"""Data files -> rows. JSON lines and CSV are read line by line; a JSON array is read into memory as a whole."""

import csv
import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from common.errors import UserError


class RowError(Exception):
    """The mistake in a row, without its place, which the reader of the file adds."""


Rows = Iterator[tuple[str, dict[str, Any]]]
"""(place, row): error messages name the place, ``FILE, line N`` or ``FILE, row N``."""


def find_files(patterns: str) -> list[Path]:
    """The files of a list of paths and globs, separated by commas. Raises UserError for an entry without a file."""
    files = []
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not found or not all(os.path.isfile(file) for file in found):
            raise UserError(f"no data file {pattern} (looked in {os.getcwd()}).")
        files += found
    return [Path(file) for file in files]


def read_rows(file: Path) -> Rows:
    """The rows of a JSON, JSON lines or CSV file. Raises UserError for text that is broken or not UTF-8."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as text:
            for place, row in (read_csv if file.suffix.lower() == ".csv" else read_json)(file, text):
                if not isinstance(row, dict):
                    raise UserError(f'{place}: expected an object like {{"prompt": …}}, found {type(row).__name__}.')
                yield place, row
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error.reason}.") from error


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


def read_csv(file: Path, text: TextIO) -> Rows:
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
