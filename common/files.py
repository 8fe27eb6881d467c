"""Weight files and JSON files, which a killed process may have left incomplete."""

import hashlib
import json
import os
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.errors import UserError


def is_complete(file: Path) -> bool:
    """Whether a weight file (.bin, .pt, .safetensors) has the length that its own table of contents gives."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "np"):  # reads the table alone
                return True
        except SafetensorError:
            return False
    # torch writes zip files, whose table is at the end. Before version 1.6 it wrote pickles, which have no table.
    with open(file, "rb") as content:
        return zipfile.is_zipfile(file) if content.read(2) == b"PK" else file.stat().st_size > 0


def check_complete(file: Path) -> None:
    """Raises UserError for a truncated weight file."""
    if not is_complete(file):
        raise UserError(f"{file} is truncated ({file.stat().st_size:,} bytes): copy or download it again.")


def short_hash(content: bytes) -> str:
    """A name for a cached folder: the first 24 hex digits of the SHA-256 of ``content``."""
    return hashlib.sha256(content).hexdigest()[:24]


def indexed_files(index: Path) -> list[Path] | None:
    """The weight files that an index names; None if the index is missing or broken."""
    weight_map = (read_json(index) or {}).get("weight_map")
    return None if weight_map is None else [index.with_name(name) for name in sorted(set(weight_map.values()))]


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder. Raises UserError for a broken index.

    If a folder has both formats, the safetensors files count, because transformers reads those.
    """
    for index in sorted(folder.glob("*.index.json"))[:1]:  # model.safetensors… comes before pytorch_model.bin…
        if (named := indexed_files(index)) is None:
            raise UserError(f"{index} is broken: copy or download it again.")
        return named
    safetensors = sorted(folder.glob("*.safetensors"))
    return safetensors or [file for file in sorted(folder.glob("*.bin")) if file.name != "training_args.bin"]


def read_json(file: Path) -> dict | None:
    """The object in a JSON file; None if the file is missing, broken or holds another value."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))  # Notepad writes the byte order mark
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(file: Path, content: dict) -> None:
    """Replaces the file in one step: a reader finds the old content or the new."""
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    os.replace(partial, file)


def gb(size: float) -> str:
    """A number of bytes as text for people, in GB."""
    return f"{size / 1e9:,.1f} GB"
