"""Folders of tokenized rows: sealed when they are complete, and compared with their manifest before they are used."""

from pathlib import Path
from typing import Any

from common.files import read_json, short_hash, write_json
from common.locking import cache_folder
from common.manifest import MANIFEST, damage, read_manifest

SUMMARY = "summary.json"  # counts and findings, and of shards their settings


def problem_of(folder: Path) -> str:
    """What is wrong with a sealed folder, as in "rows.arrow has changed"; "" if nothing is.

    The hash of large files takes seconds, so no file is read again that was right and is as it was then.
    """
    if (manifest := read_manifest(folder)) is None:
        return damage(folder)
    if SUMMARY not in manifest["files"]:
        return f"{MANIFEST} is broken"
    record = cache_folder() / "checked" / f"{short_hash(str(folder.resolve()).encode())}.json"
    seen = {"files": manifest["files"], "stamps": {name: stamp(folder / name) for name in manifest["files"]}}
    if read_json(record) == seen:
        return ""
    problem = damage(folder)
    if not problem:
        record.parent.mkdir(exist_ok=True)
        write_json(record, seen)
    return problem


def stamp(file: Path) -> list[int] | None:
    """What differs when a file was written to, or replaced; None if it is missing."""
    if not file.is_file():
        return None
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def read_summary(folder: Path) -> dict[str, Any]:
    """The counts and findings of a folder without a problem."""
    return read_json(folder / SUMMARY) or {}
