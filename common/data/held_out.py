"""The rows that are held out of training data, to judge a training on rows of its own kind."""

import heapq
import json
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from common.data.examples import Example, Split
from common.errors import UserError

FEWEST, MOST = 10, 500  # rows of a share; half of the rows where there are fewer than twice FEWEST


class HoldOut:
    """Watches the examples of a training, and holds out those with the smallest hashes.

    ``share``: of the different examples, or their number from 1 on. The choice depends on nothing but the texts, so it
    is the same after a resume and on other machines, and each copy of a held-out example is known by its hash. With
    ``mixed`` files only the first one is looked at: the others are there to be remembered.
    """

    def __init__(self, share: float, mixed: bool):
        self.share, self.mixed = share, mixed
        self.most = MOST if share < 1 else int(share)
        self.hashes = array("q")
        self.candidates: dict[int, Example] = {}
        self.heap: list[int] = []  # the negative hashes of the candidates: the largest hash comes first

    def watch(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Passes all examples on."""
        for example in examples:
            if example.content and not (self.mixed and example.file):
                self.hashes.append(example.row)
                if example.row not in self.candidates:
                    self.offer(example)
            yield example

    def offer(self, example: Example) -> None:
        if len(self.candidates) < self.most:
            heapq.heappush(self.heap, -example.row)
        elif -example.row > self.heap[0]:
            del self.candidates[-heapq.heapreplace(self.heap, -example.row)]
        else:
            return
        self.candidates[example.row] = example

    def choose(self, source: str) -> list[Example]:
        """The held-out examples, in the order of the files. Raises UserError where too few rows are different."""
        different = len(np.unique(np.frombuffer(self.hashes, np.int64)))
        count = int(self.share)
        if self.share < 1:
            count = min(max(FEWEST, round(self.share * different)), different // 2)
        if not 0 < count < different:
            raise UserError(
                f"{source}: {different} different rows are too few to hold {max(count, 1)} out for validation: name a "
                "file with VALIDATION_FILE (--validation_file), or train without validation by VALIDATION_SPLIT=0 "
                "(--validation_split 0)."
            )
        chosen = heapq.nsmallest(count, self.candidates)
        return sorted((self.candidates[row] for row in chosen), key=lambda example: (example.file, example.line))


def write_held_out(split: Split, examples: Iterable[Example], folder: Path) -> None:
    """Writes the held-out rows as JSON lines with the fields that they had, a file for each file of the training."""
    lines = defaultdict(list)
    for example in examples:
        name = split.files[example.file].stem if split.files else split.name
        fields = example.fields
        lines[f"{example.file + 1}-{name}.jsonl"].append(json.dumps(fields, ensure_ascii=False, default=str) + "\n")
    folder.mkdir()
    for name, rows in lines.items():
        (folder / name).write_text("".join(rows), encoding="utf-8")
