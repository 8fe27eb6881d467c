"""Locks between jobs, one per resource, so that any number of jobs may start at once.

A job holds one while it downloads a model, prepares a data set, writes an output folder, or uses a port. The operating
system keeps the locks, so a job that is killed loses them at once.
"""

import errno
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from common.errors import UserError, describe, note, other_owner
from common.files import PASSING, check_no_links, read_json, short_hash, write_json

WAIT_IN_SILENCE = 1.0  # seconds; most locks are free again by then
REMIND_EVERY = 30.0  # seconds between two messages while waiting


def cache_folder() -> Path:
    """The folder of locks and data: CHATGLM_CACHE, or one in ~/.cache. Raises UserError if it can't be written.

    Users may share it: the first one takes it, and every other one gets a folder inside, unless all of it is open to
    both, as with a umask of 002 in a group.
    """
    shared = Path(os.environ.get("CHATGLM_CACHE") or default_cache())
    folder = shared
    try:
        (folder / "locks").mkdir(parents=True, exist_ok=True)
        if not is_open(folder):
            folder = shared / f"user-{os.geteuid()}"
            (folder / "locks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{error.strerror}{other_owner(shared)}"
        raise UserError(
            f"can't write to the cache {shared} ({reason}): set CHATGLM_CACHE to a folder of your own."
        ) from error
    return folder


def default_cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "chatglm-tuning")
    except RuntimeError as error:
        raise UserError("this user has no home folder: set CHATGLM_CACHE to a folder of your own.") from error


def is_open(cache: Path) -> bool:
    """Whether this user may write into the cache and its parts."""

    def may_write(part: Path) -> bool:
        found = part.stat()
        # The mode decides, because root may write everywhere. In a sticky folder a file can't replace another user's.
        others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
        return found.st_uid == os.geteuid() or bool(others) and os.access(part, os.W_OK)

    parts = [part for part in cache.iterdir() if part.is_dir() and not part.name.startswith("user-")]
    return os.access(cache, os.W_OK) and all(map(may_write, parts))


def lock_file(kind: str, resource: str | Path) -> Path:
    """The lock file of a resource in the cache; every spelling of a path gets the same lock."""
    is_path = isinstance(resource, Path) or os.path.isabs(resource) or os.path.exists(resource)
    name = os.path.realpath(resource) if is_path else str(resource)
    return cache_folder() / "locks" / f"{kind.replace(' ', '-')}-{short_hash(name.encode())[:16]}.lock"


def make_lock(path: Path) -> BaseFileLock:
    """A lock of the operating system, or with CHATGLM_LOCKS=soft a file, for network shares that have no locks.

    If the holder of a soft lock is killed on this machine, the next process takes the lock over, where the file system
    can exchange two files. If it was killed on another machine, or on NFS, the user must delete the file.
    Raises UserError for another value of CHATGLM_LOCKS.
    """
    kind = os.environ.get("CHATGLM_LOCKS", "native")
    if kind not in ("native", "soft"):
        raise UserError(f"CHATGLM_LOCKS={kind}: it must be native or soft.")
    mode = (
        path.parent.stat().st_mode & 0o666
    )  # those who may write into the folder may take the lock, whatever the umask
    return SoftFileLock(path.with_suffix(".soft"), mode=mode) if kind == "soft" else FileLock(path, mode=mode)


@contextmanager
def guard(kind: str, resource: str | Path, wait: bool = True, inside: bool = False) -> Iterator[None]:
    """Holds the lock of a resource; messages name the resource and the process that it waits for.

    ``inside``: the lock lies in the folder itself, where jobs with another cache, or on another machine, find it too;
    no link there may lead what is written on the way elsewhere (UserError).
    With ``wait=False`` it raises UserError if another process holds the lock.
    """
    if inside:
        check_no_links(Path(resource), PASSING)
    name, path = f"{kind} {resource}", Path(resource, ".lock") if inside else lock_file(kind, resource)
    lock, record = make_lock(path), path.with_suffix(".holder")
    hint = f"; if that is gone, delete {lock.lock_file}" if isinstance(lock, SoftFileLock) else ""
    timeout = WAIT_IN_SILENCE if wait else 0
    while not lock.is_locked:
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            holder = (read_json(record) or {}).get("process", "another process")
            if not wait:
                raise UserError(f"{name} is in use by {holder}{hint}.") from None
            note(f"waiting for {name}: held by {holder}{hint}")
            timeout = REMIND_EVERY
        except PermissionError as error:
            remedy = "Choose another folder." if inside else "Set CHATGLM_CACHE to a folder of your own."
            raise UserError(f"{describe(error)} {remedy}") from error
    now, command = time.strftime("%Y-%m-%d %H:%M:%S"), " ".join(sys.argv)
    write_json(record, {"process": f"process {os.getpid()} on {socket.gethostname()} since {now} ({command})"})
    try:
        yield
    finally:
        lock.release()


def take_port(host: str, port: int) -> int | None:
    """Takes a port of this machine, any if ``port`` is 0, until this process ends. Returns None if it is in use.

    The lock keeps other jobs of ours from taking it before this one listens there. Raises OSError if this machine can't
    listen on that host or port.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections of an ended program don't matter
        try:
            probe.bind((host, port))
            port = probe.getsockname()[1]
            lock = make_lock(lock_file("port", str(port)))
            lock.acquire(blocking=False)
        except OSError as error:  # Timeout is an OSError too: another job of ours has the lock
            if isinstance(error, Timeout) or error.errno == errno.EADDRINUSE:
                return None
            raise
    _port_locks.append(lock)
    return port


def free_port() -> int:
    """Takes any free TCP port of this machine until this process ends."""
    while (port := take_port("", 0)) is None:
        pass
    return port


_port_locks: list[BaseFileLock] = []
