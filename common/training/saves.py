"""Saves that are whole or absent: the checkpoints and the result in the folder of one training.

OUTPUT_DIR/
  checkpoint-12/            sealed by a manifest with its step and the settings of its training
  manifest.json             that of the result, whose files lie beside it
  checkpoint-8.damaged/     set aside at a start, because a file was not as its manifest says
  checkpoint-16.aside/      from before a training that the user continued from an earlier checkpoint
  .saving/                  a save on its way; what a kill leaves of it is removed at the next start
  .result/                  a sealed result on its way into the folder; the next start goes on with it
  .removed/                 a folder that is being removed
"""

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import SaveError, UserError, disk_problem, note
from common.files import clear, lack_of_room, read_json, write_json
from common.manifest import MANIFEST, flush, read_manifest, seal
from common.trained import LOG_FILE, ON_ITS_WAY, PAGE_FILE, RUN_FILE

SAVING, REMOVED = ".saving", ".removed"
PARTIAL = re.compile(r".+\.[0-9a-f]{8}\.partial|\w+_predictions\.partial")  # of files that are written in one step
# What an evaluation says about a result, and a new result makes untrue.
SCORES = ("eval_results.json", "predict_results.json", "generated_predictions.txt", "predictions.csv")
REPORT = (RUN_FILE, PAGE_FILE, LOG_FILE)  # of all starts of a training


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints of a training, by their steps."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(filter(Path.is_dir, found), key=lambda path: int(path.name.rpartition("-")[2]))


def remove(path: Path) -> None:
    """Removes a file or a folder. A kill leaves a folder whole, or under a name that the next start removes."""
    if path.is_dir() and not path.is_symlink() and path.name != REMOVED:
        removed = path.with_name(REMOVED)
        clear(removed)
        os.replace(path, removed)
        path = removed
    clear(path)


def put(source: Path, target: Path) -> None:
    """Renames a sealed folder, in place of another one if need be, and returns when the disk holds its name."""
    remove(target)
    os.replace(source, target)
    flush(target.parent)


def tidy(folder: Path) -> None:
    """Ends what a kill interrupted: a sealed result gets its place, and parts are removed."""
    parts = [path for path in folder.glob("*.partial") if path.is_file() and PARTIAL.fullmatch(path.name)]
    for part in (folder / SAVING, folder / REMOVED, *parts):
        remove(part)
    publish(folder)
    combine_results(folder)


def places(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Where a manifest's files lie. Raises UserError if a link leads one of them out of the folder."""
    found = {name: folder / name for name in names}
    for name, path in found.items():
        if not path.parent.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{path.parent} is a link out of {folder}, and its {MANIFEST} names {name}: remove the link."
            )
    return found


def publish(folder: Path) -> None:
    """Moves the files of a sealed result into the output folder, its manifest last, and removes those of the old one.

    After a kill the same call goes on.
    """
    new = folder / ON_ITS_WAY
    if (manifest := read_manifest(new)) is None:
        remove(new)
        return
    targets, old = places(folder, manifest["files"]), (read_manifest(folder) or {"files": {}})["files"]
    for path in places(folder, {*old, *SCORES} - targets.keys()).values():
        remove(path)
    for name in filter(lambda name: (new / name).exists(), targets):
        targets[name].parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / name, targets[name])
    os.replace(new / MANIFEST, folder / MANIFEST)
    flush(folder)
    remove(new)


def remove_training(folder: Path, files: Iterable[str]) -> None:
    """Removes the checkpoints, the result and its scores; ``files``: names of a result without a manifest."""
    result = places(folder, {*(read_manifest(folder) or {"files": {}})["files"], *SCORES, *REPORT, *files, MANIFEST})
    for checkpoint in checkpoint_folders(folder):
        print(f"starting over: {checkpoint} is deleted", flush=True)
        remove(checkpoint)
    for path in [*folder.glob("checkpoint-*.damaged"), *folder.glob("checkpoint-*.aside"), *result.values()]:
        remove(path)


def write_results(folder: Path, split: str, metrics: dict[str, Any]) -> None:
    """Writes the metrics of train, eval or predict, as the Trainer names the file."""
    write_json(folder / f"{split}_results.json", dict(sorted(metrics.items())))


def combine_results(folder: Path) -> None:
    """Writes all_results.json, the metrics of training, evaluation and prediction, as far as there are any."""
    parts = [read_json(folder / f"{split}_results.json") or {} for split in ("train", "eval", "predict")]
    if metrics := parts[0] | parts[1] | parts[2]:
        write_json(folder / "all_results.json", dict(sorted(metrics.items())))


class Saves:
    """The saves of one training, in the process that writes them.

    A thread seals a checkpoint while the training goes on, because hashing and flushing take as long as writing.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], limit: int, size: int):
        """``limit``: checkpoints to keep, 0 for all; ``size``: bytes of one, as far as is known before the first."""
        self.folder, self.settings, self.limit, self.size = folder, settings, limit, size
        self.partial = folder / SAVING
        self.thread = ThreadPoolExecutor(1)
        self.sealing: tuple[int, Future[None]] | None = None

    def begin(self) -> str:
        """Makes an empty folder for a checkpoint. Returns why there is no room for one, or ""."""
        self.wait()
        if problem := lack_of_room(self.folder, self.size):
            return problem
        self.empty()
        return ""

    def empty(self) -> None:
        remove(self.partial)
        self.partial.mkdir()

    def give_up(self, step: int, problem: str) -> None:
        """Removes a checkpoint that could not be written, and says so."""
        remove(self.partial)
        last = checkpoint_folders(self.folder)[-1:]
        kept = f"{last[0].name} stays the newest" if last else "none was saved before"
        note(f"warning: checkpoint-{step} is not saved ({self.folder}: {problem}); {kept}, and the training goes on.")

    def finish(self, step: int, best: int | None) -> None:
        """Lets the thread seal the checkpoint, and remove older ones but the ``best``."""
        self.sealing = step, self.thread.submit(self.seal_checkpoint, step, best)

    def seal_checkpoint(self, step: int, best: int | None) -> None:
        seal(self.partial, step=step, settings=self.settings)
        put(self.partial, self.folder / f"checkpoint-{step}")
        self.size = sum(file.stat().st_size for file in self.folder.glob(f"checkpoint-{step}/**/*") if file.is_file())
        self.rotate(best)

    def rotate(self, best: int | None) -> None:
        """Removes all but the newest checkpoints, by their steps, and the ``best``."""
        for checkpoint in checkpoint_folders(self.folder)[: -self.limit if self.limit else 0]:
            if checkpoint.name != f"checkpoint-{best}":
                remove(checkpoint)

    def wait(self) -> None:
        """Returns when the last checkpoint is sealed."""
        if self.sealing is None:
            return
        (step, sealed), self.sealing = self.sealing, None
        try:
            sealed.result()
        except OSError as error:
            if (problem := disk_problem(error)) is None:
                raise
            self.give_up(step, problem)

    @contextmanager
    def result(self, step: int, best: int | None) -> Iterator[Path]:
        """A folder for the files of the result, which then takes the place of the result before it.

        Raises SaveError where there is no room for it; then the result before it is as it was.
        """
        self.wait()
        self.empty()
        try:
            yield self.partial
            seal(self.partial, step=step, settings=self.settings)
            put(self.partial, self.folder / ON_ITS_WAY)
            publish(self.folder)
            combine_results(self.folder)
            self.rotate(best)
        except Exception as error:
            if (problem := disk_problem(error)) is None:
                raise
            remove(self.partial)
            last = checkpoint_folders(self.folder)[-1:]
            remedy = f"make room and give the same command again: {last[0]} is whole" if last else "make room"
            raise SaveError(f"the result could not be written to {self.folder} ({problem}): {remedy}.") from error
