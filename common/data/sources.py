"""Data files: which ones a user means, and the kind and the encoding of each."""

import codecs
import csv
import glob
import io
import os
import re
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError, note

KINDS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".txt": "text",
    ".parquet": "parquet",
}
ENDINGS = f"{', '.join(list(KINDS)[:-1])} and {list(KINDS)[-1]}"
CHUNK = 1 << 20  # bytes
ARCHIVE, UNPACK = "an archive", "unpack it, and give the files in it"
WORKBOOK = "an Excel workbook", "save it as CSV UTF-8 (in Excel: Save As, CSV UTF-8), and give that file"
OLD_OFFICE = "an Excel workbook or another Office file", "save a table as CSV UTF-8, a text as plain text (.txt, UTF-8)"
# What a file is by its first bytes, and the remedy.
STARTS = {
    b"\x1f\x8b": (ARCHIVE, UNPACK),  # gzip
    b"BZh": (ARCHIVE, UNPACK),
    b"\xfd7zXZ\0": (ARCHIVE, UNPACK),
    b"7z\xbc\xaf\x27\x1c": (ARCHIVE, UNPACK),
    b"Rar!\x1a\x07": (ARCHIVE, UNPACK),
    b"\x28\xb5\x2f\xfd": (ARCHIVE, UNPACK),  # zstd
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": OLD_OFFICE,  # also an .xlsx with a password
    b"%PDF-": ("a PDF document", "save its text as .txt"),
    b"ARROW1": ("an Arrow file", "save it as Parquet"),
    b"version https://git-lfs.github.com/spec/": ("a Git LFS pointer, not the data", "run git lfs pull in its folder"),
}
# What a zip file is by the first folder of its parts that is found.
ZIPPED = {
    "xl/": WORKBOOK,
    "content.xml": ("a document of LibreOffice", "save a table as CSV UTF-8, a text as .txt"),
    "word/": ("a Word document", "save it as plain text (.txt, UTF-8)"),
}
WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)*<(!doctype html|html|\?xml)\b", re.IGNORECASE | re.DOTALL)
# What data sets have beside their rows in a folder: of datasets, and of LLaMA-Factory.
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
JSON_ROW = re.compile(r'\s*(\[\s*)*\{\s*"')  # no CSV header and hardly any text begins so
MARKS = {  # the longer one of two that begin alike comes first
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
ASCII = bytes(range(128))
# First bytes of GB2312's punctuation and of its 3,755 most frequent characters, which are over 99% of a Chinese text.
FREQUENT = bytes([0xA1, 0xA2, 0xA3, *range(0xB0, 0xD8)])
PRIVATE = re.compile("[\ue000-\uf8ff]")  # what GB18030 gives for bytes of no character, as those of other encodings

# Four characters of Chinese in UTF-8, which GB18030 text holds by no accident: 2 is a first byte, 1 a further one.
UTF8_BYTES = bytes(2 if 0xE4 <= byte <= 0xE9 else int(0x80 <= byte <= 0xBF) for byte in range(256))
UTF8_CHINESE = bytes([2, 1, 1] * 4)

note_once = cache(note)  # a file is looked for and read more than once


def find_files(patterns: str) -> list[Path]:
    """The files of a list of paths, folders and globs, separated by commas.

    A path that exists wins over its meaning as a list or as a glob. A folder stands for its data files, by name; what
    else it holds is named in a note. Raises UserError for an entry without a file.
    """
    parts, files = patterns.split(","), []
    while parts:
        for count in range(len(parts), 0, -1):  # a name may hold commas
            path = ",".join(parts[:count]).strip()
            if path and os.path.exists(os.path.expanduser(path)):
                break
        parts = parts[count:]
        if path:
            files += files_of(path)
    return files


def files_of(pattern: str) -> list[Path]:
    """The files of one path, folder or glob. Raises UserError if there is none."""
    path = Path(os.path.expanduser(pattern))
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
        files = [file for file in found if file.is_file() and file.suffix.lower() in KINDS]
        files = [file for file in files if file.name not in DESCRIPTIONS]
        missing = f"no data file in the folder {pattern}: {ENDINGS} are read."
    else:
        found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(pattern)]
        files = [file for file in found if file.is_file()]
        missing = f"no data file {pattern} (looked in {os.getcwd()})."
    if "**" not in pattern:  # which is meant to go through folders
        note_rest(pattern, found, files)
    if not files:
        raise UserError(missing)
    return files


def note_rest(pattern: str, found: list[Path], files: list[Path]) -> None:
    if rest := [file.name for file in found if file not in files]:
        more = f" and {len(rest) - 10} more" if len(rest) > 10 else ""
        note_once(f"note: in {pattern} these are not read: {', '.join(rest[:10])}{more}")


class Source(NamedTuple):
    """How a data file is read."""

    kind: str  # json, csv, text or parquet
    encoding: str  # Python's name; "" for parquet


def source_of(file: Path) -> Source:
    """The kind and the encoding, by the content first and by the ending second. A note says if it is GB18030.

    Text is decoded once, in pieces. Raises UserError for a file that is no data, and for text that is damaged.
    """
    status = file.stat()
    return examine(file, status.st_size, status.st_mtime_ns)


@cache  # by size and time: a file is read more than once
def examine(file: Path, size: int, changed: int) -> Source:
    with open(file, "rb") as content:
        head = content.read(4096)
    if head.startswith(b"PAR1"):
        return Source("parquet", "")
    if found := refused(file, head):
        raise UserError(f"{file} is {found[0]}: {found[1]}.")
    encoding = encoding_of(file, head)
    with open(file, encoding=encoding) as text:
        begin = text.read(4096)
    kind = KINDS.get(file.suffix.lower())
    if kind == "text" and is_table(begin, len(begin) == 4096):
        kind = "csv"
    if JSON_ROW.match(begin) or not begin.strip() or (kind is None and begin.lstrip()[0] in "{["):
        return Source("json", encoding)
    if kind is None:
        ending = f"the ending {file.suffix}" if file.suffix else "a name without ending"
        raise UserError(f"{file}: {ending} is not read unless the file holds JSON: {ENDINGS} are.")
    if kind == "parquet":
        raise UserError(f"{file} is no Parquet file: copy or download it again.")
    return Source(kind, encoding)


def is_table(begin: str, cut: bool) -> bool:
    """Whether a .txt has the same number of tabs in each row, as Excel's "Unicode text"; ``cut``: it may go on."""
    rows = [row for row in csv.reader(io.StringIO(begin), delimiter="\t") if row]
    return len(rows) > 1 < len(rows[0]) and len(set(map(len, rows[:-1] if cut else rows))) == 1


def refused(file: Path, head: bytes) -> tuple[str, str] | None:
    """What a file that can't be read is, and the remedy; None for others."""
    if file.suffix.lower().startswith(".xls"):  # also a table in HTML, which Excel opens
        return WORKBOOK
    for start, found in STARTS.items():
        if head.startswith(start):
            return found
    if head.startswith(b"PK\x03\x04"):
        try:
            names = zipfile.ZipFile(file).namelist()
        except zipfile.BadZipFile:  # truncated
            names = []
        return next((ZIPPED[part] for part in ZIPPED for name in names if name.startswith(part)), (ARCHIVE, UNPACK))
    if head[257:262] == b"ustar":  # tar
        return ARCHIVE, UNPACK
    if WEB_PAGE.match(head):
        return "a web page that was saved as data", "download the file itself, not the page that shows it"
    return None


def encoding_of(file: Path, head: bytes) -> str:
    """Python's name of the encoding. Raises UserError, with line and offset, for damaged text and for others.

    Text that is not UTF-8 is taken for GB18030 only if it reads as Chinese all through: most bytes of damaged UTF-8 are
    still UTF-8, and Western letters are no frequent characters of Chinese.
    """
    marked = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    encoding, zeros = marked or "utf-8", head.count(0)
    damage = find_damage(file, encoding)
    if damage is None and (marked or zeros <= len(head) // 20):
        return encoding
    if not marked and zeros > len(head) // 500:  # a NUL is half of each line end, at least
        raise UserError(f"{file} is UTF-16 text without a byte order mark, or no text: save it as UTF-8.")
    if not marked and is_chinese(file):
        encoding = "gb18030"
        damage = find_damage(file, encoding)
        if damage is None:
            note_once(f"note: {file} is read as GB18030, because it is not UTF-8")
            return encoding
    name = encoding.removesuffix("-sig").upper()
    raise UserError(f"{damage} is not {name} text: mend it, or save the file as UTF-8.")


def pieces(file: Path, limit: int = -1) -> Iterator[bytes]:
    """The content, or its first ``limit`` bytes, in chunks, and b"" as the end."""
    with open(file, "rb") as content:
        while chunk := content.read(CHUNK if limit < 0 else min(CHUNK, limit - content.tell())):
            yield chunk
    yield b""


def find_damage(file: Path, encoding: str) -> str | None:
    """The place of the first byte that is not in the encoding: "FILE, line N: byte 0xff at offset M"; None without."""
    decoder, position = codecs.getincrementaldecoder(encoding)(), 0
    for chunk in pieces(file):
        position += len(chunk)
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:  # its object is the rest of earlier chunks and this one
            offset = position - len(error.object) + error.start
            byte = error.object[error.start]
            return f"{file}, line {line_at(file, encoding, offset)}: byte 0x{byte:02x} at offset {offset}"
    return None


def line_at(file: Path, encoding: str, offset: int) -> int:
    """The number of the line that holds a byte, in text that is whole up to there."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    return 1 + sum(decoder.decode(chunk, final=not chunk).count("\n") for chunk in pieces(file, offset))


def is_chinese(file: Path) -> bool:
    """Whether text that is not UTF-8 looks like GB18030, whole or damaged, by its first 4 MB that are not ASCII."""
    sample = b""
    for chunk in pieces(file):
        if UTF8_CHINESE in chunk.translate(UTF8_BYTES):
            return False
        if len(sample) < 4 * CHUNK and not chunk.isascii():
            sample += chunk
    text = sample.decode("gb18030", "ignore")
    pairs = (len(text.encode("gbk", "ignore")) - len(text.encode("ascii", "ignore"))) // 2  # characters of two bytes
    starts = text.encode("gb2312", "ignore").translate(None, ASCII)[::2]
    kana = starts.count(0xA4) + starts.count(0xA5)  # of EUC-JP, which has them at the same place
    frequent = len(starts) - len(starts.translate(None, FREQUENT)) - kana
    utf8 = sample.decode("utf-8", "ignore").encode()
    # Frequent are over 95% in simplified Chinese, 50% to 70% in traditional, 15% to 30% if it is Big5.
    readable = len(PRIVATE.findall(text)) <= 0.05 * pairs
    return (
        readable
        and frequent > 0.4 * pairs
        and len(utf8.translate(None, ASCII)) < 0.7 * len(sample.translate(None, ASCII))
    )
