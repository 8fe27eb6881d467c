"""Folders that are whole or absent: a manifest, written last, names the size and the hash of every file.

A folder is written under another name, sealed, and renamed. So a kill at any moment leaves a whole folder or none of
that name, and a file that changes later is noticed.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from common.files import is_inside, read_json, write_json

MANIFEST = "manifest.json"
BLOCK = 2**23  # bytes that are read at once


def digest(file: Path) -> str:
    """The XXH3 hash of a file, 32 hex digits: against damage, not against forgery; five times as fast as SHA-256."""
    found = xxh3_128()
    with open(file, "rb", buffering=0) as content:
        while block := content.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def flush(path: Path) -> None:
    """Returns when the disk holds a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sealed(file: Path) -> dict[str, Any]:
    """The entry of a file in a manifest, when the disk holds the file."""
    flush(file)
    return {"size": file.stat().st_size, "xxh3": digest(file)}


def seal(folder: Path, **about: Any) -> None:
    """Writes the manifest of a folder with ``about`` in it, and returns when the disk holds all of it."""
    paths = sorted(path for path in folder.rglob("*") if path.name != MANIFEST)
    files = {file.relative_to(folder).as_posix(): sealed(file) for file in paths if file.is_file()}
    for each in filter(Path.is_dir, paths):
        flush(each)
    write_manifest(folder, files, **about)


def write_manifest(folder: Path, files: dict[str, dict[str, Any]], **about: Any) -> None:
    """Writes a manifest of ``sealed`` files, with its own hash, and returns when the disk holds it."""
    content = about | {"files": files}
    write_json(folder / MANIFEST, content | {"xxh3": own_hash(content)})
    flush(folder / MANIFEST)
    flush(folder)


def own_hash(content: dict[str, Any]) -> str:
    return xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None if it is missing or broken."""
    found = read_json(folder / MANIFEST) or {}
    if found.pop("xxh3", "") != own_hash(found) or not isinstance(files := found.get("files"), dict):
        return None
    sound = (isinstance(entry, dict) and isinstance(entry.get("size"), int) for entry in files.values())
    return found if all(sound) and all(map(is_inside, files)) else None


def damage(folder: Path, only: str = "") -> str:
    """What is wrong with a folder, as in "optimizer.pt has changed"; "" if it is as its manifest says.

    ``only``: a pattern for the beginning of the names that matter.
    """
    if (manifest := read_manifest(folder)) is None:
        return f"{MANIFEST} is {'broken' if (folder / MANIFEST).exists() else 'missing'}"
    for name, entry in manifest["files"].items():
        file = folder / name
        if not re.match(only, name):
            continue
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{name} has {file.stat().st_size:,} bytes instead of {entry['size']:,}"
        if digest(file) != entry.get("xxh3"):
            return f"{name} has changed"
    return ""
