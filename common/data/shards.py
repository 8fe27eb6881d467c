"""The training rows that common/preprocess.py tokenizes ahead of all jobs:

train_datasets/
  shard-00000-of-00008.arrow    the rows in their order
  shard-00000-of-00008.json     the counts and the hash of that shard, written after it
  held_out/                     the rows that trainings leave for their validation, as JSON lines
  summary.json                  fingerprint, counts, findings and shards
  manifest.json                 size and hash of each file, written last: a folder with it is complete
"""

from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from common.arguments import DataArguments
from common.data.dataset import Prepared, encoding_settings, prepared
from common.data.examples import check_reading
from common.data.sealed import problem_of, read_summary
from common.errors import UserError, differences


def summary_of(folder: Path) -> dict[str, Any]:
    """The summary of a complete folder. Raises UserError if a file is missing, truncated or changed."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: common/preprocess.sh makes it.")
    if problem := problem_of(folder):
        raise UserError(
            f"{folder}: {problem}: copy it again, or run common/preprocess.sh again with the same settings, "
            "which makes only what is missing or damaged."
        )
    return read_summary(folder)


def load_shards(args: DataArguments, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The training rows of a folder, mapped into memory.

    Raises UserError for an incomplete folder, and for one that was made with another tokenizer or other lengths.
    Files and columns are not compared, because the rows are not read again.
    """
    summary = summary_of(folder)
    unused = ("max_target_length", "ignore_pad_token_for_loss") if summary["text_column"] else ()
    settings = encoding_settings(args, tokenizer, "train")
    if differing := differences(summary, {name: settings[name] for name in settings if name not in unused}):
        raise UserError(
            f"{folder} was made with other settings ({differing}): train with those, or make another folder with "
            "common/preprocess.sh."
        )
    check_reading(summary, args)
    rows = concatenate_datasets([Dataset.from_file(str(folder / shard["file"])) for shard in summary["shards"]])
    held_out = summary["held_out"] if args.held_out else []
    return prepared(rows, Dataset.from_dict({}), [str(folder)], True, summary | {"held_out": held_out}, folder)
