"""A model's name -> its folder, downloaded where it is not there yet: resumable, checked, by one job at a time.

    python common/hub/download.py chatglm3-6b THUDM/chatglm2-6b [--revision R] [--cache_dir FOLDER | --local_dir FOLDER]

A download that was killed goes on where it was, and every file is compared with the hub's hash, once: a file in our
cache remembers what was found right, by size and time, so that a complete model is found again without asking the hub
and without reading 12 GB. Nothing heavy is imported, so that this starts at once.
"""

import argparse
import hashlib
import os
import shutil
import sys
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import httpx2
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff, tqdm

from common.errors import UserError, exit_on_user_error, say
from common.files import read_json, short_hash, write_json
from common.hub.hubs import (
    NO_ANSWER,
    SHORT_NAMES,
    TIMEOUT,
    WEIGHTS,
    HubFile,
    checkpoint_files,
    endpoint,
    hub_errors,
    hub_id,
    is_down,
    on_modelscope,
    repository_of,
    request_headers,
)
from common.locking import cache_folder, guard

EDITABLE = (".json", ".jinja")  # text that its user may change after the download
CONNECTIONS = 8
FRUITLESS = 5  # connections in a row that brought nothing, after which we give up


class Place(NamedTuple):
    """Where files go: into ``folder``, or in Hugging Face's cache into ``blobs``, with links to them in ``folder``."""

    folder: Path
    blobs: Path | None

    def content(self, file: HubFile) -> Path:
        named = self.folder / file.path
        return named if self.blobs is None or named.exists() else self.blobs / file.digest


def place_of(repository: str, commit: str, cache_dir: str | None, local_dir: str | None) -> Place:
    if local_dir:
        return Place(Path(local_dir).expanduser().resolve(), None)
    if on_modelscope():
        cache = Path(cache_dir or cache_folder()).expanduser().resolve()
        return Place(cache / "modelscope" / commit / repository, None)
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
    storage = cache / repo_folder_name(repo_id=repository, repo_type="model")
    return Place(storage / "snapshots" / commit, storage / "blobs")


# Which files are right


def stamp(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def is_unchanged(file: Path, known: dict) -> bool:
    """Whether a file is still what was found right; text may have been edited since."""
    return file.is_file() and (known["stamp"] == stamp(file) or file.suffix in EDITABLE)


def has_digest(file: Path, size: int, digest: str) -> bool:
    """Whether a file is the hub's, by reading all of it."""
    if not file.is_file() or file.stat().st_size != size:
        return False
    found = hashlib.sha256() if len(digest) == 64 else hashlib.sha1(b"blob %d\0" % size)
    with open(file, "rb") as content:
        while block := content.read(2**20):
            found.update(block)
    return found.hexdigest() == digest


def record_file(repository: str, revision: str, cache_dir: str | None, local_dir: str | None) -> Path:
    """Where it is remembered which files of a model were found right."""
    key = f"{revision} {place_of(repository, revision, cache_dir, local_dir).folder}"
    return cache_folder() / "models" / f"{short_hash(key.encode())}.json"


def write_record(record: Path, repository: str, folder: Path, digests: dict[str, str], whole: bool = True) -> None:
    """Remembers files that are right now. ``whole``: whether they are all of the model."""
    record.parent.mkdir(exist_ok=True)
    files = {path: {"digest": digest, "stamp": stamp(folder / path)} for path, digest in digests.items()}
    write_json(record, {"repository": repository, "folder": str(folder), "whole": whole, "files": files})


def complete_folder(record: Path) -> Path | None:
    """The folder of a whole model whose files are all right and there; what has another time by now is read again."""
    content = read_json(record)
    if content is None or not content["whole"]:
        return None
    folder, files = Path(content["folder"]), content["files"]
    changed = {path: known for path, known in files.items() if not is_unchanged(folder / path, known)}
    if not all(has_digest(folder / path, known["stamp"][0], known["digest"]) for path, known in changed.items()):
        return None
    if changed:
        write_record(record, content["repository"], folder, {path: known["digest"] for path, known in files.items()})
    return folder


# Fetching


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def partial_of(content: Path) -> Path:
    return content.with_name(content.name + ".incomplete")


def receive(file: HubFile, partial: Path, bar: tqdm, stop: Event) -> None:
    """Appends what ``partial`` lacks, over as many connections as it takes, as long as they bring something.

    huggingface_hub (2.4) would begin a file anew after a kill: it writes under a name that each process draws.
    """
    partial.touch()
    fruitless = 0
    while (start := size_of(partial)) < file.size:
        failure = None
        headers = request_headers() | ({"Range": f"bytes={start}-"} if start else {})
        try:
            with http_stream_backoff(
                "GET", file.url, headers=headers, timeout=TIMEOUT, retry_on_exceptions=()
            ) as reply:
                hf_raise_for_status(reply)
                goes_on = reply.status_code == 206
                bar.update(0 if goes_on else -start)
                with open(partial, "ab" if goes_on else "wb") as content:
                    for block in reply.iter_bytes():
                        if stop.is_set():
                            raise CancelledError
                        content.write(block)
                        bar.update(len(block))
        except httpx2.TransportError as error:
            failure = error
        fruitless = 0 if size_of(partial) > start else fruitless + 1
        if fruitless == FRUITLESS:
            if failure:
                raise failure
            return  # the hub says that this is all of it: the hash will tell
        time.sleep(fruitless)


def fetch(file: HubFile, content: Path, bar: tqdm, stop: Event) -> None:
    """Puts one file where it belongs, whole and with the right hash; a wrong one is deleted and fetched once more."""
    content.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(content)
    for _ in range(2):
        receive(file, partial, bar, stop)
        if has_digest(partial, file.size, file.digest):
            os.replace(partial, content)
            return
        bar.update(-size_of(partial))
        partial.unlink()
    raise UserError(f"{file.url} came twice with another content than its hash says: try again, or from another hub.")


def fetch_side_by_side(files: list[HubFile], place: Place, bar: tqdm) -> None:
    """Where one file fails, or with Ctrl-C, the others stop; what they have brought stays for the next time."""
    stop = Event()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        try:
            for job in as_completed([pool.submit(fetch, file, place.content(file), bar, stop) for file in files]):
                job.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def discard_wrong(files: list[HubFile], place: Place, known: dict[str, dict], ours: bool) -> list[HubFile]:
    """The files that are right; the others are deleted. Raises UserError for one that is not ``ours`` to delete."""
    there = [file for file in files if place.content(file).is_file()]
    unread = [file for file in there if known.get(file.path, {}).get("digest") != file.digest]
    unread += [file for file in there if file not in unread and not is_unchanged(place.content(file), known[file.path])]
    if sum(file.size for file in unread) > 1e9:  # which takes seconds
        say(f"comparing {len(unread)} files that are there already with their hashes")
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        right = pool.map(lambda file: has_digest(place.content(file), file.size, file.digest), unread)
        wrong = [file for file, is_right in zip(unread, right, strict=True) if not is_right]
    for file in wrong:
        content = place.content(file)
        if not ours and file.path not in known:
            raise UserError(f"{content} is there and is not the hub's: move it away, or give an empty folder.")
        say(f"{content} is not what the hub has: it is fetched again")
        content.resolve().unlink()
        content.unlink(missing_ok=True)  # where it was a link
    return [file for file in there if file not in wrong]


def check_disk(repository: str, place: Place, needed: int) -> None:
    """Raises UserError where what is still missing would not fit."""
    folder = place.blobs or place.folder
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        variable = "CHATGLM_CACHE" if on_modelscope() else "HF_HOME"
        raise UserError(
            f"{repository} needs {needed / 1e9:,.2f} GB more in {folder}, and only {free / 1e9:,.2f} GB are free: "
            f"choose a larger disk by {variable}, --cache_dir or --local_dir."
        )


def fetch_all(repository: str, files: list[HubFile], place: Place, known: dict[str, dict], ours: bool) -> None:
    """Makes all files be there and right. ``known``: what was found right earlier; ``ours``: see discard_wrong."""
    right = discard_wrong(files, place, known, ours)
    missing = [file for file in files if file not in right]
    if not missing:
        return
    total = sum(file.size for file in files)
    left = sum(max(0, file.size - size_of(partial_of(place.content(file)))) for file in missing)
    check_disk(repository, place, left)
    say(
        f"downloading {repository} from {endpoint()} into {place.folder}: {len(files)} files, {total / 1e9:,.2f} GB"
        + (f", of which {(total - left) / 1e9:,.2f} GB are there" if left < total else "")
    )
    pace = 0.5 if sys.stderr.isatty() else 30.0  # seconds between two states of the bar
    with tqdm(total=total, initial=total - left, unit="B", unit_scale=True, desc=repository, mininterval=pace) as bar:
        fetch_side_by_side(missing, place, bar)


def link(place: Place, files: list[HubFile], revision: str) -> None:
    """Gives the files in Hugging Face's cache their names, as its own library does, so that both find them."""
    if place.blobs is None:
        return
    place.folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        named = place.folder / file.path
        if not named.exists():
            named.unlink(missing_ok=True)  # a link to nothing
            named.symlink_to(os.path.relpath(place.blobs / file.digest, named.parent))
    reference = place.blobs.parent / "refs" / revision
    known = reference.read_text() if reference.is_file() else revision
    if known != place.folder.name:
        reference.parent.mkdir(parents=True, exist_ok=True)
        partial = reference.with_name(f"{reference.name}.{os.getpid()}")
        partial.write_text(place.folder.name)
        os.replace(partial, reference)


# Models


def unchecked_folder(repository: str, revision: str, cache_dir: str | None, *kinds: str) -> Path | None:
    """The folder in the cache that has a file of one of these kinds, whoever put it there."""
    folder, blobs = place_of(repository, revision, cache_dir, None)
    reference = blobs.parent / "refs" / revision if blobs else None
    if reference and reference.is_file():
        folder = folder.with_name(reference.read_text())
    return folder if any(any(folder.glob(kind)) for kind in kinds) else None


def download(name: str, revision: str = "main", cache_dir: str | None = None, local_dir: str | None = None) -> Path:
    """The folder of a model, complete and checked. Raises UserError where it can't be had.

    The hub is not asked about a complete model again, so that a training that goes on tomorrow has the same base.
    Without a hub, what another program has left in the cache is taken unchecked.
    """
    repository = repository_of(name)
    record = record_file(repository, revision, cache_dir, local_dir)
    if folder := complete_folder(record):
        return folder
    with guard("model", repository), hub_errors(repository, revision):
        if folder := complete_folder(record):
            return folder
        known = (read_json(record) or {}).get("files", {})
        try:
            commit, files = checkpoint_files(repository, revision)
        except NO_ANSWER as error:
            folder = None if known or local_dir else unchecked_folder(repository, revision, cache_dir, *WEIGHTS)
            if folder is None or not is_down(error):
                raise
            say(f"note: {endpoint()} can't be reached; {folder} is taken as it is, unchecked.")
            return folder
        place = place_of(repository, commit, cache_dir, local_dir)
        fetch_all(repository, files, place, known, ours=not local_dir)
        link(place, files, revision)
        write_record(record, repository, place.folder, {file.path: file.digest for file in files})
    return place.folder


def fetch_config(name: str, revision: str = "main", cache_dir: str | None = None) -> Path:
    """The config.json of a model on a hub, beside that of its tokenizer; of the model nothing else is downloaded.

    The hub is asked only where the cache has none. Raises UserError as above.
    """
    repository = repository_of(name)
    folder = unchecked_folder(repository, revision, cache_dir, "config.json")
    if folder is None:
        with guard("model", repository), hub_errors(repository, revision):
            commit, files = checkpoint_files(repository, revision)
            place = place_of(repository, commit, cache_dir, None)
            configs = [file for file in files if file.path in ("config.json", "tokenizer_config.json")]
            fetch_all(repository, configs, place, {}, ours=True)
            link(place, configs, revision)
            folder = place.folder
            record = record_file(repository, revision, cache_dir, None)
            write_record(record, repository, folder, {file.path: file.digest for file in configs}, whole=False)
    return folder / "config.json"


def fetch_small_files(name, revision="main", cache_dir=None):
    return fetch_config(name, revision, cache_dir).parent


def find_complete(name, revision="main", cache_dir=None):
    return complete_folder(record_file(repository_of(name), revision, cache_dir, None))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="download.sh",
        description="Downloads models, goes on with what was interrupted, and checks every file. The last line on "
        "standard output is the folder.",
        epilog=f"Short names: {', '.join(SHORT_NAMES)}. Variables: HF_ENDPOINT (a mirror), HF_HOME (where the files "
        "go), HF_TOKEN (for gated models), HUB=modelscope (instead of Hugging Face).",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a short name or a hub id")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--cache_dir", metavar="FOLDER", help="a cache other than that of HF_HOME")
    where.add_argument("--local_dir", metavar="FOLDER", help="a plain folder for the files of one model")
    args = parser.parse_args()
    if not args.names:
        parser.print_help(sys.stderr)
        sys.exit(2)
    with exit_on_user_error():
        if args.local_dir and len(args.names) > 1:
            raise UserError("--local_dir is the folder of one model: give one name.")
        for name in args.names:
            hub_id(name)
        for name in args.names:
            folder = download(name, args.revision, args.cache_dir, args.local_dir)
            sizes = [file.stat().st_size for file in folder.iterdir() if file.is_file()]
            say(f"{name}: {len(sizes)} files, {sum(sizes) / 1e9:,.2f} GB in {folder}")
            print(folder, flush=True)


if __name__ == "__main__":
    main()
