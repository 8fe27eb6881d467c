"""A first look at the data files, without torch: a missing file or column is said at once."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

from common.data.rows import RowError, named, read_rows
from common.data.sources import find_files
from common.errors import UserError

JOBS = {"do_train": "train_file", "do_eval": "validation_file", "do_predict": "test_file"}
COLUMNS = ("prompt", "response", "history", "conversation", "text")


def check_files(flags: Mapping[str, Any]) -> None:
    """Raises UserError for a file that is missing, or whose first row lacks a column that a flag names."""
    columns = {column: name for column in COLUMNS if (name := flags[f"{column}_column"])}
    for job, file_flag in JOBS.items():
        if job == "do_train" and flags["train_datasets"] or not (flags[job] or flags["do_train"]):
            continue
        files = find_files(flags[file_flag] or "")
        for file in files[:1] if columns and not flags["skip_bad_rows"] else ():
            for row in islice(read_rows(file, flags["text_unit"]), 1):
                try:
                    for column, name in columns.items():
                        named(row.content, name, column)
                except RowError as error:
                    raise UserError(f"{row.place}: {error}.") from error
