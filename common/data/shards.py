"""The training rows that common/preprocess.py tokenizes ahead of all jobs:

train_datasets/
  shard-00000-of-00008.arrow    the rows in their order
  shard-00000-of-00008.json     the counts of that shard, written after it
  held_out/                     the rows that trainings leave for their validation, as JSON lines
  manifest.json                 fingerprint, counts, findings and shards; written last: a folder with it is complete
"""

from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from common.arguments import DataArguments
from common.data.dataset import Prepared, encoding_settings, prepared
from common.data.examples import check_reading
from common.errors import UserError, differences
from common.files import read_json

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete folder. Raises UserError if the manifest or a shard is missing or truncated."""
    again = "run common/preprocess.sh again with the same settings, which makes only what is missing"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: common/preprocess.sh makes it.")
    manifest = read_json(folder / MANIFEST)
    if manifest is None or "shards" not in manifest:
        raise UserError(f"{folder} is not complete: {MANIFEST}, which is written last, is not there: {again}.")
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        if not file.is_file() or file.stat().st_size != shard["size"]:
            raise UserError(f"{file} is missing, truncated or changed (see {MANIFEST}): copy it again, or {again}.")
    return manifest


def load_shards(args: DataArguments, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The training rows of a folder, mapped into memory.

    Raises UserError for an incomplete folder, and for one that was made with another tokenizer or other lengths.
    Files and columns are not compared, because the rows are not read again.
    """
    manifest = read_manifest(folder)
    unused = ("max_target_length", "ignore_pad_token_for_loss") if manifest["text_column"] else ()
    settings = encoding_settings(args, tokenizer, "train")
    if differing := differences(manifest, {name: settings[name] for name in settings if name not in unused}):
        raise UserError(
            f"{folder} was made with other settings ({differing}): train with those, or make another folder with "
            "common/preprocess.sh."
        )
    check_reading(manifest, args)
    rows = concatenate_datasets([Dataset.from_file(str(folder / shard["file"])) for shard in manifest["shards"]])
    held_out = manifest["held_out"] if args.held_out else []
    return prepared(rows, Dataset.from_dict({}), [str(folder)], True, manifest | {"held_out": held_out}, folder)
