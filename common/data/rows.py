"""Data files -> rows, read as a stream: JSON arrays, JSON lines and CSV, checked as they come."""

import csv
import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from common.errors import UserError

BLANK = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()
CHUNK = 1 << 20  # characters of a JSON array that are read at a time


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
        with open(file, encoding="utf-8-sig") as text:
            start = text.read(1)
            while start.isspace():
                start = text.read(1)
            text.seek(0)
            yield from read_json_array(file, text) if start == "[" else read_json_lines(file, text)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}.") from error


def read_json_lines(file: Path, lines: TextIO) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place}: broken JSON: {error}.") from error
            yield place, check_object(place, row)


def read_json_array(file: Path, text: TextIO) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of an array one by one; only what is not yet a whole object is kept in memory."""
    buffer, begin, line, number, state = "", 0, 1, 0, "start"
    while True:
        begin = BLANK.match(buffer, begin).end()  # type: ignore[union-attr]
        try:
            state, begin, row = next_of_array(buffer, begin, state)
        except ValueError as error:
            more = text.read(CHUNK)
            if more:  # perhaps the error is only that the buffer ends here
                line += buffer.count("\n", 0, begin)
                buffer, begin = buffer[begin:] + more, 0
                continue
            if state == "end" and begin == len(buffer):
                return
            where = error.pos if isinstance(error, json.JSONDecodeError) else begin
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            line += buffer.count("\n", 0, where)
            raise UserError(f"{file}, line {line}: broken JSON: {reason}.") from error
        if row is not None:
            number += 1
            place = f"{file}, row {number}"
            yield place, check_object(place, row)


def next_of_array(buffer: str, begin: int, state: str) -> tuple[str, int, Any]:
    """(state after it, where it ends, the row or None) of what stands at ``begin``, where no blank is.

    The states: start, first (a row or the end may come), next (a comma or the end), row (a row must come), end.
    Raises ValueError for anything else.
    """
    char = buffer[begin : begin + 1]
    if state == "start" and char == "[":
        return "first", begin + 1, None
    if state in ("first", "next") and char == "]":
        return "end", begin + 1, None
    if state == "next" and char == ",":
        return "row", begin + 1, None
    if state in ("first", "row"):
        try:
            row, end = DECODER.raw_decode(buffer, begin)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        return "next", end, [] if row is None else row  # null is no object either
    raise ValueError("text after the array" if state == "end" else "a comma or ] is missing")


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


def check_text(place: str, what: str, value: Any) -> str:
    """The string; "" for null. Raises UserError for what is no text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place}: {what} holds {type(value).__name__} {value!r:.40}, expected a string.")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise UserError(f"{place}: {what} holds half a character (a lone surrogate), which is no text.")
    return value


def text_of(place: str, row: dict[str, Any], column: str, flag: str) -> str:
    return check_text(place, f"column {column!r}", value_of(place, row, column, flag))


def json_of(place: str, what: str, value: Any) -> Any:
    """What a string holds as JSON, as tables write lists; other values as they are, "" as None."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {what} is not JSON: {error}.") from error
