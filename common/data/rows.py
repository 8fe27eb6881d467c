"""Data files -> rows. JSON lines, CSV and Parquet are read piece by piece, other JSON into memory as a whole."""

import csv
import json
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from itertools import chain, count, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow
from pyarrow.parquet import ParquetFile

from common.data.sources import note_once, source_of
from common.errors import UserError

EXCERPT = 60  # characters
DELIMITERS = ",;\t"
NO_DELIMITER = "\x1f"  # no text holds it
SPACE = re.compile(r"[ \t\n\r\ufeff]*")  # files that were joined have byte order marks inside
# The keys of a row with lists of objects, which else would be taken for the rows of the file.
ROW_KEYS = {
    *("prompt", "response", "content", "summary", "question", "answer", "query", "instruction", "input", "output"),
    *("history", "system", "text", "messages", "conversations", "conversation", "tools", "functions"),
}


class RowError(Exception):
    """The mistake in a row, without its place, which the reader of the file adds."""


class Row(NamedTuple):
    place: str  # "FILE, line N"; of a JSON array and of Parquet "FILE, row N"
    number: int  # N: the line where the row begins, or the row
    content: dict[str, Any]  # {} for a bad row
    problem: str = ""  # the mistake in a bad row, "" for a good one
    excerpt: str = ""  # the beginning of a bad row's text, at most 60 characters


def flag_of(flag: str) -> str:
    return f"--{flag}_column or {flag.upper()}_COLUMN"


def missing(row: dict[str, Any], column: str, flag: str) -> RowError:
    return RowError(f"no column {column}; there are {', '.join(map(repr, row))} (set {flag_of(flag)})")


def named(row: dict[str, Any], column: str, flag: str) -> str:
    """The column of a flag. Raises RowError that names the existing columns where it is missing."""
    if column not in row:
        raise missing(row, repr(column), flag)
    return column


def read_rows(file: Path, text_unit: str = "file") -> Iterator[Row]:
    """The rows of a JSON, CSV, text or Parquet file; values are as the file has them.

    A .txt file gives rows {"text": …}: one for the file, or with ``text_unit`` "paragraph" one for each paragraph,
    which ends at a blank line, or at the end of each line where no blank line is between two others. Line breaks
    around a text are stripped, spaces are kept, and every line break becomes \\n.

    A bad row is yielded with its ``problem``. Raises UserError where the rest of the file can't be read either.
    """
    source = source_of(file)
    if source.kind == "parquet":
        yield from read_parquet(file)
        return
    newline = "" if source.kind == "csv" else None  # a CSV field keeps its line breaks
    with open(file, encoding=source.encoding, newline=newline) as text:
        if source.kind == "csv":
            yield from read_csv(file, text)
        elif source.kind == "text":
            yield from read_text(file, text, text_unit)
        else:
            yield from read_json(file, text)


def row_of(file: Path, number: int, value: Any, text: str, unit: str = "line") -> Row:
    """A good row, or a bad one where the value is a RowError or no object; ``text`` begins with it."""
    place = f"{file}, {unit} {number}"
    if isinstance(value, dict):
        return Row(place, number, value)
    if not isinstance(value, RowError):
        value = f'expected an object like {{"prompt": …}}, found {type(value).__name__}'
    return Row(place, number, {}, str(value), " ".join(text[:EXCERPT].split()))


# JSON


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise RowError(f"duplicate key {name!r:.40} in one object")
    return found


DECODE = json.JSONDecoder(object_pairs_hook=unique).raw_decode
SKIP = json.JSONDecoder(parse_int=float).raw_decode  # reads also what Python or ``unique`` refuses in valid JSON


def skip_space(text: str, position: int) -> int:
    return SPACE.match(text, position).end()  # type: ignore[union-attr]  # it matches everything


def value_at(text: str, start: int) -> tuple[Any, int]:
    """The value that begins there, or a RowError, and its end. Raises json.JSONDecodeError where no end can be told."""
    try:
        try:
            return DECODE(text, start)
        except json.JSONDecodeError:
            raise
        except RowError as error:
            return error, SKIP(text, start)[1]
        except ValueError as error:  # an integer of thousands of digits
            return RowError(f"broken JSON: {str(error).partition(':')[0]}"), SKIP(text, start)[1]
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", text, start) from error


def values_of(line: str) -> list[Any]:
    """The value of a line, or its objects. Raises json.JSONDecodeError."""
    values: list[Any] = []
    position = 0 if line.startswith("{") else skip_space(line, 0)
    while position < len(line):
        if values and line[position] != "{":
            raise json.JSONDecodeError("Extra data", line, position)
        value, end = value_at(line, position)
        values.append(value)
        position = end if end == len(line) else skip_space(line, end)
    return values


def read_json(file: Path, text: TextIO) -> Iterator[Row]:
    """JSON lines; else arrays, or objects over several lines, one after another; or one object that holds the rows."""
    lines = enumerate(text, 1)
    filled = (pair for pair in lines if pair[1].strip())
    begin = list(islice(filled, 2))
    if not begin:
        return
    if not is_whole(*(line for _, line in begin)):
        yield from read_lines(file, chain(begin, lines))
        return
    text.seek(0)
    content = text.read()
    try:
        yield from read_whole(file, content)
    except json.JSONDecodeError as error:
        where = f"{file}, line {error.lineno}"
        raise UserError(f"{where}: broken JSON: {error.msg} (column {error.colno}).") from error


def is_whole(first: str, second: str = "") -> bool:
    """Whether a file with these two lines is an array, one object, or objects over several lines."""
    first = first.strip("\ufeff \t\r\n")
    if first.startswith("["):
        return True
    try:
        values_of(first)
    except json.JSONDecodeError as error:
        # A broken line is followed by the next row, an unfinished one by its rest, which is an object in a list only.
        unfinished = error.pos >= len(first) and second != ""
        return unfinished and (error.msg == "Expecting value" or not second.lstrip().startswith("{"))
    return not second


def read_lines(file: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    for number, line in lines:
        try:
            values = values_of(line.rstrip("\n"))
        except json.JSONDecodeError as error:
            values = [RowError(f"broken JSON: {error.msg} (column {error.colno})")]
        for value in values:
            yield row_of(file, number, value, line)


def read_whole(file: Path, text: str) -> Iterator[Row]:
    """The rows of arrays, or objects, one after another, or of one object. Raises json.JSONDecodeError."""
    begin = position = skip_space(text, 0)
    numbers, line, counted = count(1), 1, 0
    while position < len(text):
        if text[position] != text[begin]:
            raise json.JSONDecodeError("Extra data", text, position)
        if text[position] == "[":
            position = yield from read_array(file, text, position, numbers)
            continue
        value, end = value_at(text, position)
        end = skip_space(text, end)
        alone = position == begin and end == len(text) and text[position] == "{"
        if alone and (inside := find_rows(file, text, position)):
            yield from read_array(file, text, inside, numbers)
            return
        line, counted = line + text.count("\n", counted, position), position
        yield row_of(file, line, value, text[position : position + EXCERPT])
        position = end


def read_array(file: Path, text: str, position: int, numbers: Iterator[int]) -> Generator[Row, None, int]:
    """The items of the array that begins there; returns the position after it. Raises json.JSONDecodeError."""
    position = skip_space(text, position + 1)
    closed = text.startswith("]", position)
    while not closed:
        value, end = value_at(text, position)
        yield row_of(file, next(numbers), value, text[position : position + EXCERPT], "row")
        position = skip_space(text, end)
        closed = text.startswith("]", position)
        if not closed:
            if not text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
            comma, position = position, skip_space(text, position + 1)
            if text.startswith("]", position):
                raise json.JSONDecodeError("a comma after the last row", text, comma)
    return skip_space(text, position + 1)


def find_rows(file: Path, text: str, position: int) -> int | None:
    """Where the list of rows begins in the one object of a file, {"data": […]}; None if the object is a row itself.

    What stands beside the list is named in a note. Raises UserError for several lists, and for a table that is no list.
    """
    found = members(text, position)
    values = [value for value, _ in found.values()]
    if len(values) > 1 and all(map(is_object, values)) and len(set(map(tuple, values))) == 1:
        raise UserError(
            f"{file} is a table by columns or by index: write its rows (pandas: to_json(orient='records'))."
        )
    if len(values) == 1 and is_object(values[0]):  # {"data": {"train": […]}}
        return find_rows(file, text, next(iter(found.values()))[1])
    lists = [name for name, (value, _) in found.items() if isinstance(value, list) and any(map(is_object, value))]
    if not lists or ROW_KEYS.intersection(found) or any(is_message(row) for name in lists for row in found[name][0]):
        return None
    if len(lists) > 1:
        raise UserError(f"{file} holds several lists of rows ({', '.join(lists)}): give each a file of its own.")
    if beside := [name for name in found if name not in lists]:
        note_once(f"note: {file}: the rows are in {lists[0]!r}; not read: {', '.join(map(repr, beside)):.200}")
    return found[lists[0]][1]


def members(text: str, position: int) -> dict[str, tuple[Any, int]]:
    """{name: (value, its position)} of the valid object that begins there; {} if a name stands twice in it."""
    found: list[tuple[str, tuple[Any, int]]] = []
    position = skip_space(text, position + 1)
    while text[position] != "}":
        name, colon = SKIP(text, position)
        start = skip_space(text, skip_space(text, colon) + 1)
        value, end = SKIP(text, start)
        found.append((name, (value, start)))
        position = skip_space(text, end)
        if text[position] == ",":
            position = skip_space(text, position + 1)
    return dict(found) if len(dict(found)) == len(found) else {}


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_message(value: Any) -> bool:
    return is_object(value) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


# CSV


def read_csv(file: Path, text: TextIO) -> Iterator[Row]:
    """The rows under a header. Its commas, semicolons or tabs tell the delimiter, or Excel's first line ``sep=;``."""
    csv.field_size_limit(2**31 - 1)
    head = text.read(4096)
    text.seek(0)
    begun: list[tuple[int, str]] = []  # the lines of the row that is read, with their numbers
    lines = recorded(text, begun)
    named = re.match(r'"?sep=(.)"?[ ,;\t]*[\r\n]', head, re.IGNORECASE)
    if named:
        next(lines)
        begun.clear()
    reader = csv.reader(lines, delimiter=named[1] if named else delimiter_of(file, head), strict=True)
    rows = read_fields(file, reader, begun)
    names: list[str] = []
    for fields in rows:
        number, begin = begun[0]
        if not names:
            names = column_names(f"{file}, line {number}", fields)
            continue
        if isinstance(fields, list) and len(fields) != len(names):
            counts = f"{len(fields)} instead of {len(names)}"
            fields = RowError(f"this row has more or fewer fields than the header names ({counts})")
        row = fields if isinstance(fields, RowError) else dict(zip(names, fields, strict=True))
        yield row_of(file, number, row, begin)


def column_names(place: str, header: list[str] | RowError) -> list[str]:
    """The names without spaces around them; "column N" without a name. Raises UserError for equal ones."""
    if isinstance(header, RowError):
        raise UserError(f"{place}: {header}.")
    names = [name.strip() or f"column {number}" for number, name in enumerate(header, 1)]
    check_names(place, names)
    return names


def recorded(text: TextIO, begun: list[tuple[int, str]]) -> Iterator[str]:
    for number, line in enumerate(text, 1):
        begun.append((number, line))
        yield line


def delimiter_of(file: Path, head: str) -> str:
    """The delimiter that is most frequent in the first line, outside quotes; in one column one that no text holds."""
    header = re.sub('"[^"]*"?', "name", head).lstrip("\r\n")
    header = re.split("[\r\n]", header, maxsplit=1)[0]
    if file.suffix.lower() in (".tsv", ".txt") and "\t" in header:
        return "\t"
    found = max(DELIMITERS, key=header.count)
    return found if found in header else NO_DELIMITER


def read_fields(
    file: Path, reader: Iterator[list[str]], begun: list[tuple[int, str]]
) -> Iterator[list[str] | RowError]:
    """The fields of each row, or its mistake; blank lines are left out. Empties ``begun`` for the next row."""
    while True:
        fields: list[str] | RowError | None
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if str(error) == "unexpected end of data":
                where = f"{file}, line {last_opening(begun)}"
                raise UserError(f"{where}: broken CSV: a quote is opened and never closed.") from error
            lines = f" (lines {begun[0][0]} to {begun[-1][0]})" if len(begun) > 1 else ""
            reason = str(error).replace(f"'{NO_DELIMITER}'", "the end of the line")
            fields = RowError(f"broken CSV: {reason}{lines}")
        if fields is None:
            return
        if isinstance(fields, RowError) or (fields and not (len(fields) == 1 and fields[0].isspace())):
            yield fields
        begun.clear()


def last_opening(lines: list[tuple[int, str]]) -> int:
    """The number of the line that opens the quote which is open at the end."""
    opened = 0
    for number, line in lines:
        quotes = line.replace('""', "").count('"')  # without escaped ones
        is_open = (opened > 0) ^ (quotes % 2 > 0)
        opened = (number if quotes else opened) if is_open else 0
    return opened or lines[0][0]


def check_names(place: str, names: list[str]) -> None:
    """Raises UserError for two columns of one name."""
    if repeated := [repr(name) for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{place}: more than one column is named {', '.join(repeated)}: rename or remove one.")


# Text and Parquet


def is_blank(line: str) -> bool:
    return not line.strip()


def read_text(file: Path, text: TextIO, unit: str) -> Iterator[Row]:
    if unit == "file":
        if not is_blank(content := text.read()):
            yield Row(f"{file}, line 1", 1, {"text": content.strip("\n")})
        return
    runs = list(islice((blank for blank, _ in groupby(text, is_blank)), 4))  # of blank lines and others, in turn
    text.seek(0)
    for blank, run in groupby(enumerate(text, 1), lambda pair: is_blank(pair[1])):
        paragraphs: Iterable[list[tuple[int, str]]] = ([line] for line in run)
        if runs.count(False) > 1:
            paragraphs = [list(chain.from_iterable(paragraphs))]
        for lines in paragraphs if not blank else ():
            number = lines[0][0]
            content = "".join(line for _, line in lines).strip("\n")
            yield Row(f"{file}, line {number}", number, {"text": content})


def read_parquet(file: Path) -> Iterator[Row]:
    number = 0
    try:
        table = ParquetFile(file)
        check_names(str(file), table.schema_arrow.names)
        for batch in table.iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                yield Row(f"{file}, row {number}", number, row)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{file}: broken Parquet after row {number}: {reason}: copy or download it again.") from error
