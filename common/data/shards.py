"""Training data that was tokenized ahead: a folder of Arrow shards and the manifest that ties it to a tokenizer.

shard-00000-of-00008.arrow  …  the rows in their order
shard-00000-of-00008.json   …  what happened to the rows of each
settings.json                  what decides what the rows are
manifest.json                  the settings, the counts and the shards; written last: where it is, the folder is whole
"""

from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from common.arguments import DataArguments
from common.data.dataset import Prepared, encoding_settings
from common.errors import UserError, differences
from common.files import read_json

MANIFEST = "manifest.json"
UNUSED_BY_TEXT = ("max_target_length", "ignore_pad_token_for_loss")  # settings without effect on plain text


def shard_file(folder: Path, index: int, count: int) -> Path:
    return folder / f"shard-{index:05}-of-{count:05}.arrow"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that is whole. Raises UserError where a shard or the manifest itself is missing."""
    again = "run common/preprocess.sh again with the same settings, which makes only what is missing"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: common/preprocess.sh makes it.")
    manifest = read_json(folder / MANIFEST)
    if manifest is None or "shards" not in manifest:
        raise UserError(f"{folder} is not complete: {MANIFEST}, which is written last, is not there: {again}.")
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        if not file.is_file():
            raise UserError(f"{file} is missing, though {MANIFEST} names it: copy it again, or {again}.")
        if file.stat().st_size != shard["size"]:
            raise UserError(
                f"{file} is truncated or was changed ({file.stat().st_size:,} bytes, {MANIFEST} says "
                f"{shard['size']:,}): copy it again, or {again}."
            )
    return manifest


def load_shards(args: DataArguments, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The training rows of a folder, mapped into memory.

    Raises UserError for a folder that is not whole, or that was made with another tokenizer or other lengths. Columns
    and files are not compared: what they decide is decided.
    """
    manifest = read_manifest(folder)
    unused = UNUSED_BY_TEXT if manifest["text_column"] else ()
    settings = encoding_settings(args, tokenizer, "train").items()
    if differing := differences(manifest, {name: value for name, value in settings if name not in unused}):
        raise UserError(
            f"{folder} was made with other settings ({differing}): train with those, or make another folder with "
            "common/preprocess.sh."
        )
    rows = concatenate_datasets([Dataset.from_file(str(folder / shard["file"])) for shard in manifest["shards"]])
    return Prepared(
        rows=rows,
        questions=Dataset.from_dict({}),
        files=[str(folder)],
        dropped=manifest["dropped"],
        first_dropped=manifest["first_dropped"],
        truncated=manifest["truncated"],
        shortened=manifest["shortened"],
        total=manifest["rows"],
        unlabelled=manifest["unlabelled"],
        cached=True,
    )
