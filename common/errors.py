"""Errors that a user can mend: the program prints one sentence, no traceback.

It ends with exit code 2, or 3 where a file could not be written for want of room.
"""

import difflib
import errno
import io
import os
import pwd
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from common.command import with_variables

NO_ACCESS = (errno.EACCES, errno.EPERM)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)  # also of a disk that is read-only or fails
# Parts of what torch, cuBLAS, bitsandbytes and C++ say when memory of a device or of this machine runs out.
NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "bad_alloc")
# Errors of torch and DeepSpeed: (type, part of the text, sentence). The type is a name: importing torch takes seconds.
LIBRARY_ERRORS = (
    ("RuntimeError", "DataLoader worker", "{first}: fewer --dataloader_num_workers, or more memory"),
    ("DistError", "", "another process of this training can't be reached ({last})"),
    ("RuntimeError", "gloo/", "another process of this training can't be reached ({last})"),
    ("Exception", "loss scale already", "fp16 overflows in every step: use --bf16 or a lower --learning_rate"),
)


class UserError(Exception):
    """An error that a user can mend. Its text names the mistake, its place and a remedy."""

    exit_code = 2


class SaveError(UserError):
    """A file that could not be written, for want of room or because the disk fails or is read-only."""

    exit_code = 3


class OutOfMemory(UserError):
    """Memory that ran out in a batch."""


copies: list[TextIO] = []  # files that get every line too: the log of a training


def say(text: str) -> None:
    """Prints text on stderr at once and on a line of its own: a progress bar makes way."""
    for file in copies:
        with suppress(OSError):  # a full disk must not end a training here
            print(text, file=file, flush=True)
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()
    else:
        print(text, file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Prints text on stderr, where a person sees it even if standard output goes into a file.

    Of the processes that train together only the first one prints.
    """
    if os.environ.get("RANK", "0") == "0":
        say(text)


def disk_problem(error: Exception) -> str | None:
    """Why a file could not be written, as the system says it; None for an error of another kind.

    torch, safetensors and tokenizers raise errors of their own, with the system's words in their text.
    """
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return os.strerror(error.errno)
    found = next((os.strerror(code) for code in NO_ROOM if os.strerror(code) in str(error)), None)
    of_torch = any(part in str(error) for part in ("inline_container", "iostream error"))  # it does not say why
    return found or ("the disk refused to write" if of_torch else None)


def memory_ran_out(error: BaseException) -> bool:
    """Whether the memory of a device, or of this machine, ran out."""
    kinds, text = [kind.__name__ for kind in type(error).__mro__], str(error).lower()
    if "MemoryError" in kinds or "OutOfMemoryError" in kinds:
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(part in text for part in NO_MEMORY)


def first_sentences(error: BaseException) -> str:
    """The first two sentences of an error's text, without a full stop."""
    return ". ".join(str(error).split(". ")[:2]).strip().removesuffix(".")


def describe(error: Exception) -> str | None:
    """The sentence for an error that a user can mend; None for any other error."""
    text, types = str(error), [kind.__name__ for kind in type(error).__mro__]
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.errno in NO_ACCESS:
        owner = other_owner(Path(error.filename)) if error.filename else ""
        return f"{error.filename or 'a file'}: {os.strerror(error.errno)}{owner}."
    if problem := disk_problem(error):
        name = error.filename if isinstance(error, OSError) else None
        return f"{name or 'a file could not be written'}: {problem}."
    if memory_ran_out(error):
        reason = first_sentences(error) or "this machine's memory ran out"
        return f"{reason}: smaller batches, shorter lengths or --quantization_bit 4."
    for name, part, sentence in LIBRARY_ERRORS:
        if name in types and part in text:
            last = text.strip().rpartition("\n")[2].rpartition("] ")[2]  # last line, without its place in the source
            return f"{sentence.format(first=first_sentences(error), last=last)}."
    return None


def other_owner(path: Path) -> str:
    """ "; it belongs to user NAME", or the folder where it would be does; "" if that is this user."""
    path = path.absolute()
    existing = next(each for each in (path, *path.parents) if os.path.lexists(each))
    owner = existing.lstat().st_uid
    if owner == os.geteuid():
        return ""
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:  # it is known on another machine, or outside this container
        name = str(owner)
    return f"; {'it' if existing == path else existing} belongs to user {name}"


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Names the settings of ``now`` that differ from ``earlier``, with both values; "" if none differs."""
    return "; ".join(
        f"{name} was {earlier.get(name)!r:.200}, now {value!r:.200}"
        for name, value in now.items()
        if earlier.get(name) != value
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """The known name that ``word`` was probably meant to be; "" if none is near."""
    alike = [name for name in known if name[:1] == word[:1]]
    begun = [name for name in alike if name.startswith(word[:-1])] if len(word) > 4 else []
    close = difflib.get_close_matches(word, alike, n=1, cutoff=0.8)
    return close[0] if close else begun[0] if len(begun) == 1 else ""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends the program after one sentence on stderr, with the exit code of the error; Ctrl-C ends it without one."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # an ASCII terminal must not end a training with a Chinese row
    try:
        yield
    except KeyboardInterrupt:
        note("interrupted")
        sys.exit(130)
    except Exception as error:  # some errors of DeepSpeed have no narrower class
        if (sentence := describe(error)) is None:
            raise
        say(f"error: {with_variables(sentence)}")
        own = error.exit_code if isinstance(error, UserError) else UserError.exit_code
        sys.exit(SaveError.exit_code if disk_problem(error) else own)
