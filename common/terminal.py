"""What a person sees: lines and tables above a bar on a terminal; elsewhere a line now and then instead of the bar."""

import errno
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console
from tqdm import tqdm

from common.errors import copies, say

WIDE = 160  # columns of what is no terminal: whole paths, and no line that breaks
HEARTBEAT = 30.0  # seconds between two lines of what shows no bar
streams: dict[str, TextIO] = {}
"""``people``: where their lines go, if not to standard output."""


def out() -> TextIO:
    return streams.get("people", sys.stdout)


class Lines(Console):
    def on_broken_pipe(self) -> None:
        """Goes on without readers: rich would end the training, as when `| head` has seen enough."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def console(file: TextIO | None = None) -> Console:
    """As wide as the terminal."""
    file = file or out()
    return Lines(
        file=file, width=None if file.isatty() else WIDE, highlight=False, markup=False, soft_wrap=True, emoji=False
    )


def print_on(stream: TextIO, *objects: object, sep: str = " ") -> None:
    """Prints at once, above a bar."""
    with tqdm.external_write_mode(file=stream):
        console(stream).print(*objects, sep=sep)


def show(*objects: object, sep: str = " ") -> None:
    """Prints texts and rich tables, and copies them into the log of the training."""
    print_on(out(), *objects, sep=sep)
    for file in copies:
        with suppress(OSError):  # a full disk must not end a training here
            console(file).print(*objects, sep=sep)
            file.flush()


def print_pairs(title: str, pairs: Mapping[str, object]) -> None:
    width = max(map(len, pairs))
    show(title, *(f"  {name:<{width}}  {value}" for name, value in pairs.items()), sep="\n")


def many(count: float, one: str, several: str = "") -> str:
    """As in "1 step" or "2.5 epochs"."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:.3g}"
    return f"{number} {one if count == 1 else several or f'{one}s'}"


def duration(seconds: float) -> str:
    """As in "40 s", "12 min" or "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def short(number: float) -> str:
    """As in "870", "3.4k" or "1.2M"."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


@contextmanager
def logged(for_programs: bool) -> Iterator[Callable[[Path], None]]:
    """Copies what is said, and gives a function that opens the file for it; until then the copy is in memory.

    ``for_programs``: leaves standard output to them.
    """
    if for_programs:
        streams["people"] = sys.stderr
    early = io.StringIO()
    copies.append(early)

    def into(file: Path) -> None:
        try:
            if file.is_symlink() or file.exists() and not file.is_file():  # to open a pipe would wait for a reader
                raise FileExistsError(errno.EEXIST, "it is no file")
            log = open(file, "a", encoding="utf-8")  # noqa: SIM115
            log.write(early.getvalue())
        except OSError as error:
            say(f"warning: {file} can't be written ({error.strerror}): there is no log.")
            return
        copies[copies.index(early)] = log

    try:
        yield into
    finally:
        streams.clear()
        with suppress(OSError):
            copies.pop().close()


class Progress:
    """Counts what is done: a bar on a terminal, elsewhere a line every 30 seconds. A context."""

    def __init__(self, title: str, total: int, unit: str, shown: bool = True, initial: int = 0):
        self.title, self.total, self.unit, self.shown = title, total, unit, shown
        self.first, self.done = initial, initial
        self.began = self.told = time.monotonic()
        on_terminal = shown and sys.stderr.isatty()
        look = {"unit": f" {unit}", "leave": False, "dynamic_ncols": True, "disable": not on_terminal}
        self.bar = tqdm(desc=title, total=total, initial=initial, **look)

    def update(self, count: int = 1) -> None:
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.shown and self.bar.disable and now - self.told > HEARTBEAT and self.done < self.total:
            self.told = now
            left = (now - self.began) / max(1, self.done - self.first) * (self.total - self.done)
            show(f"{self.title}: {self.done:,} of {self.total:,} {self.unit}, left {duration(left)}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.bar.close()
