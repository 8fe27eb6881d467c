"""A first look at the data files, without torch: a missing file or column is said at once."""

from collections.abc import Mapping
from typing import Any

from common.data.rows import RowError, named, read_rows
from common.data.sources import find_files
from common.errors import UserError

JOBS = {"do_train": "train_file", "do_eval": "validation_file", "do_predict": "test_file"}


def check_files(flags: Mapping[str, Any]) -> None:
    """Raises UserError for a file that is missing, or whose first row lacks a column that a flag names."""
    for job, file_flag in JOBS.items():
        if job == "do_train" and flags["train_datasets"] or not (flags[job] or flags["do_train"]):
            continue
        files = find_files(flags[file_flag] or "")
        columns = columns_to_read(flags, job)
        if not (files and columns and flags[job]) or flags["skip_bad_rows"]:
            continue
        row = next(read_rows(files[0], flags["text_unit"]), None)
        if row is None or row.problem:  # a bad row is reported with all others, when all are read
            continue
        try:
            for column, name in columns.items():
                named(row.content, name, column)
        except RowError as error:
            raise UserError(f"{row.place}: {error}.") from error


def columns_to_read(flags: Mapping[str, Any], job: str) -> dict[str, str]:
    """The columns that a job reads, as far as flags name them: {"prompt": "question"}."""
    given = {column: flags[f"{column}_column"] for column in ("text", "conversation", "prompt", "history", "response")}
    given = {column: name for column, name in given.items() if name}
    alone = next((column for column in ("text", "conversation") if column in given), None)
    if alone:
        return {} if alone == "text" and job == "do_predict" else {alone: given[alone]}
    if job == "do_predict":  # a question needs no answer
        given.pop("response", None)
    return given
