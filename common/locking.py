"""Locks between jobs, one per resource, so that any number of them may start at once.

Guarded is what races: building the environment, downloading, preparing a data set, owning an output folder. Whoever
is killed loses its locks at once, because the operating system holds them, not a file's existence.
"""

import errno
import hashlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from common.errors import UserError, say
from common.files import read_json, write_json

WAIT_IN_SILENCE = 1.0  # seconds: most locks are free again before anybody wonders
REMIND_EVERY = 30.0  # seconds between two lines about a lock that we wait for


def cache_folder() -> Path:
    """Where locks and prepared data live: CHATGLM_CACHE, or a folder in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chatglm-tuning"
    folder = Path(os.environ.get("CHATGLM_CACHE") or default)
    try:
        (folder / "locks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't write to the cache {folder} ({error.strerror}): set CHATGLM_CACHE.") from error
    return folder


def lock_file(kind: str, resource: str | Path) -> Path:
    """One lock a kind and resource; a path is told by its real path, however it is written, a name by itself."""
    is_path = isinstance(resource, Path) or os.path.isabs(resource) or os.path.exists(resource)
    name = os.path.realpath(resource) if is_path else str(resource)
    return cache_folder() / "locks" / f"{kind.replace(' ', '-')}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"


def describe_holder(lock: Path) -> str:
    """Who wrote itself down as the holder last: process, machine, since when, command."""
    holder = read_json(lock.with_suffix(".holder"))
    if holder is None:
        return "another process"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']} ({holder['command']})"


def write_holder(lock: Path) -> None:
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_json(lock.with_suffix(".holder"), holder | {"command": " ".join(sys.argv)})


def make_lock(path: Path) -> BaseFileLock:
    """A lock of the operating system, or with CHATGLM_LOCKS=soft one that is a file, for shares without locks (NFS).

    The file of a soft lock names its holder. One that was killed on this machine is found out where the file system can
    exchange two files (NFS can't); of one on another machine nobody can tell: then the file must be deleted.
    """
    kind = os.environ.get("CHATGLM_LOCKS", "native")
    if kind not in ("native", "soft"):
        raise UserError(f"CHATGLM_LOCKS={kind}: there are native and soft.")
    return SoftFileLock(path.with_suffix(".soft")) if kind == "soft" else FileLock(path)


@contextmanager
def hold(path: Path, what: str, wait: bool = True) -> Iterator[None]:
    """Holds the lock at ``path``. Waiting says who has it; with ``wait=False`` a held lock raises UserError."""
    lock = make_lock(path)
    hint = f"; if that is gone, delete {lock.lock_file}" if isinstance(lock, SoftFileLock) else ""
    try:
        lock.acquire(timeout=WAIT_IN_SILENCE if wait else 0)
    except Timeout:
        if not wait:
            raise UserError(f"{what} is in use by {describe_holder(path)}{hint}.") from None
    while not lock.is_locked:
        say(f"waiting for {what}: held by {describe_holder(path)}{hint}")
        try:
            lock.acquire(timeout=REMIND_EVERY)
        except Timeout:
            continue
    write_holder(path)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def guard(kind: str, resource: str | Path, wait: bool = True) -> Iterator[None]:
    """Holds the lock of a resource, which lies in the cache; see ``hold``."""
    with hold(lock_file(kind, resource), f"{kind} {resource}", wait):
        yield


def take_port(host: str, port: int) -> int | None:
    """Takes a port that nobody listens on and that no other job of ours was given; 0 is any. None: somebody has it.

    The lock of the port is kept until this process ends: a port that was only probed could be handed out twice
    between the probe and its use. Raises OSError where nobody could listen there.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a program that ended don't matter
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return None
        port = probe.getsockname()[1]
        lock = make_lock(lock_file("port", str(port)))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return None
        _held_ports.append(lock)
        return port


def free_port() -> int:
    """Any TCP port of this machine that is free."""
    while (port := take_port("", 0)) is None:
        pass
    return port


_held_ports: list[BaseFileLock] = []
