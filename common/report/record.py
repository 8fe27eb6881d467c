"""run.json, the record of a training; report.html, predictions.csv and the model card are made from it.

A report never ends a training: what can't be read or written is named once.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import describe, note
from common.files import read_json, replaced, write_json
from common.manifest import read_manifest
from common.report.card import model_card, written_by_hand
from common.report.page import page
from common.trained import PAGE_FILE, RUN_FILE

CARD = "README.md"
SHARE = 200  # a report is written again after so many times what writing it took: half a percent
EMPTY: dict[str, Any] = {
    **{"format": 1, "status": "training", "problem": "", "updated": "", "method": "", "model": {}, "output_dir": ""},
    **{"settings": [], "pieces": [], "progress": {}, "data": [], "logs": [], "best_step": None},
    **{"samples": {"rows": [], "answers": []}, "questions": [], "scores": {}, "rows": {"total": 0, "rows": []}},
    "warnings": [],
}
START = dict.fromkeys(("first_step", "last_step", "tokens", "seconds"), 0.0) | {"device": "", "versions": {}}
# What a training needs of a record that it goes on with; 0.0 stands for a number, one item for all of a list.
SHAPE: dict[str, Any] = {
    "format": 0.0,
    "settings": [{"flag": "", "value": "", "from": ""}],
    "pieces": [START],
    "progress": {},
    "data": [{"split": "", "rows": 0.0, "hash": "", "files": [{"file": "", "format": "", "rows": 0.0}]}],
    "logs": [{"step": 0.0}],
    "samples": {"rows": [{"question": ""}], "answers": [{"step": 0.0, "answers": [""]}]},
    "questions": [""],
    "scores": {},
    "rows": {"rows": [{"row": 0.0}]},
}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def fits(value: Any, shape: Any) -> bool:
    """Whether a value from a file has the shape of another one, and perhaps more."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(name in value and fits(value[name], shape[name]) for name in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    return isinstance(value, int | float if isinstance(shape, float) else type(shape))


def is_record(found: Mapping[str, Any]) -> bool:
    """Whether a training can go on with what run.json holds."""
    if not fits(found, SHAPE) or found["format"] != EMPTY["format"]:
        return False
    numbers = [list(found["progress"].values()), *(entry.values() for entry in found["logs"])]
    scores = [column.values() if isinstance(column, dict) else [""] for column in found["scores"].values()]
    return all(fits(value, 0.0) for values in (*numbers, *scores) for value in values)


class Record:
    """The record of a folder, in the process that writes it."""

    def __init__(self, folder: Path, afresh: bool):
        """Goes on with the record that is there, unless ``afresh``."""
        self.folder, self.written, self.cost, self.fails = folder, 0.0, 0.0, False
        found = None if afresh else read_json(folder / RUN_FILE)
        if not afresh and (folder / RUN_FILE).exists() and not (found and is_record(found)):
            note(f"note: {folder / RUN_FILE} is broken: the report begins anew. Totals lack what was trained before.")
            found = None
        self.data: dict[str, Any] = deepcopy(EMPTY) | (found or {})
        self.data |= {"output_dir": str(folder.resolve()), "problem": "", "warnings": []}

    def begin_piece(self, piece: dict[str, Any]) -> None:
        """Begins a start of the training, and forgets what came after its first step."""
        first, data = piece["first_step"], self.data
        data["logs"] = [entry for entry in data["logs"] if entry["step"] <= first]
        data["status"], samples = "training", data["samples"]
        samples["answers"] = [found for found in samples["answers"] if found["step"] <= first]
        for earlier in data["pieces"]:
            earlier["last_step"] = max(earlier["first_step"], min(earlier["last_step"], first))
        data["pieces"].append(piece)

    def log(self, entry: dict[str, Any], progress: dict[str, Any], piece: dict[str, Any]) -> None:
        """Adds what was logged at a step; ``progress`` and ``piece`` bring the record up to date."""
        self.data["logs"].append(entry)
        self.data["progress"] |= progress
        self.data["pieces"][-1] |= piece
        self.write("eval_loss" in entry)

    def write(self, at_once: bool = True, card: bool = False) -> None:
        """Writes record and page, unless the last time was a moment ago; ``card``: and the model card."""
        if not at_once and time.monotonic() - self.written < SHARE * self.cost:
            return
        began = time.process_time()
        self.data["updated"] = now()
        try:
            write_json(self.folder / RUN_FILE, self.data)
            with replaced(self.folder / PAGE_FILE, newline="\n") as text:
                text.write(page(self.data))
            sealed = (read_manifest(self.folder) or {"files": {}})["files"]  # results of before hold that of PEFT
            if card and CARD not in sealed and not written_by_hand(self.folder / CARD):
                with replaced(self.folder / CARD, newline="\n") as text:
                    text.write(model_card(self.data))
        except Exception as error:  # of any kind: a mistake in a report must not end a training either
            if not self.fails:
                note(f"warning: the report in {self.folder} can't be written ({error}): all else goes on.")
            self.fails = True
        self.written, self.cost = time.monotonic(), time.process_time() - began

    @contextmanager
    def open(self) -> Iterator[None]:
        """Takes down how the program ends. A training that a signal ended is continued later.

        What is finished stays so where an evaluation fails.
        """
        before = self.data["status"]
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, (SystemExit, KeyboardInterrupt))
            self.data["status"] = "finished" if before == "finished" else "stopped" if stopped else "failed"
            if isinstance(error, Exception) and before != "finished":
                self.data["problem"] = describe(error) or f"{type(error).__name__}: {error}"
            self.write()
            raise
