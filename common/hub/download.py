"""A model's name -> its folder, downloaded if need be: resumable, verified, by one job at a time.

    python common/hub/download.py chatglm3-6b THUDM/chatglm2-6b [--revision R] [--cache_dir FOLDER | --local_dir FOLDER]

A killed download resumes where it stopped. Every file is compared with the hub's hash once: a record keeps the size and
time of each verified file, so that a complete model is found again without asking the hub and without reading 12 GB.
The imports are light, so that this starts at once.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, tqdm

from common.errors import UserError, describe, exit_on_user_error, note
from common.files import clear, is_complete, read_json, short_hash, weight_files, write_json
from common.hub import hubs
from common.locking import cache_folder, guard

EDITABLE = (".json", ".jinja")  # text that its user may change after the download
CONNECTIONS = 8
ATTEMPTS = 5  # connections in a row without a byte, before we give up


def model_folder(name: str, revision: str, cache_dir: str | None, local_dir: str | None = None) -> Path:
    """The plain folder of a model; its last part is the model's name, which distinguishes ChatGLM2 from ChatGLM3."""
    hubs.check_revision(revision)
    if local_dir:
        return Path(local_dir).expanduser().resolve()
    cache, ours = (cache_folder(), "modelscope") if hubs.on_modelscope() else (constants.HF_HUB_CACHE, "chatglm-tuning")
    return Path(cache_dir or cache).expanduser().resolve() / ours / revision / hubs.repository_of(name)


def place_flags() -> str:
    """The variable and the flags that choose where a model lies."""
    return f"{'CHATGLM_CACHE' if hubs.on_modelscope() else 'HF_HOME'}, --cache_dir or --local_dir"


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def stamp(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def has_digest(file: Path, digest: str) -> bool:
    """Whether the file's sha256, or the sha1 by which git names it, is ``digest``. Reads all of the file."""
    found = hashlib.sha256() if len(digest) == 64 else hashlib.sha1(b"blob %d\0" % file.stat().st_size)
    with open(file, "rb") as content:
        while block := content.read(2**20):
            found.update(block)
    return found.hexdigest() == digest


def wrong_files(folder: Path, digests: dict[str, str], known: dict[str, dict]) -> set[str]:
    """The paths in ``digests`` with missing or wrong files; does not read ``known``, unchanged files again."""

    def is_wrong(path: str) -> bool:
        file, entry = folder / path, known.get(path, {})
        if not file.is_file():
            return True
        if entry.get("digest") == digests[path] and (entry["stamp"] == stamp(file) or file.suffix in EDITABLE):
            return False
        if size_of(file) > 1e9:  # which takes seconds
            note(f"comparing {file} with its hash")
        return not has_digest(file, digests[path])

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return {path for path, wrong in zip(digests, pool.map(is_wrong, digests), strict=True) if wrong}


def open_record(folder: Path, revision: str) -> tuple[Path, dict[str, dict]]:
    """The record of a folder, and its {path: {digest, stamp}} of verified files: all, all but the weights, or none."""
    record = cache_folder() / "models" / f"{short_hash(f'{revision} {folder}'.encode())}.json"
    files = (read_json(record) or {}).get("files")
    return record, files if files and is_record(files) else {}  # without one all files are verified again


def is_record(files: object) -> bool:
    entries = list(files.values()) if isinstance(files, dict) else [None]
    known = (entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("digest"), str))
    return sum("stamp" in entry for entry in known) == len(entries)


def write_record(record: Path, folder: Path, digests: dict[str, str], known: dict[str, dict]) -> None:
    files = {path: {"digest": digest, "stamp": stamp(folder / path)} for path, digest in digests.items()}
    if files != known:
        record.parent.mkdir(exist_ok=True)
        write_json(record, {"folder": str(folder), "files": files})


def find_complete(
    name: str, revision: str = "main", cache_dir: str | None = None, local_dir: str | None = None, weights: bool = True
) -> Path | None:
    """The folder of a model if it is verified, whole or without its ``weights``, else None; does not ask the hub.

    Raises UserError for a name that can't be one of a hub.
    """
    folder = model_folder(name, revision, cache_dir, local_dir)
    record, known = open_record(folder, revision)
    digests = {path: entry["digest"] for path, entry in known.items() if weights or not hubs.is_weight_file(path)}
    whole = any(map(hubs.is_weight_file, digests)) if weights else bool(digests)
    if not whole or wrong_files(folder, digests, known):
        return None
    if weights:
        write_record(record, folder, digests, known)  # a file with a new time is not read again
    return folder


def partial_of(target: Path) -> Path:
    return target.with_name(target.name + ".incomplete")


def receive(file: hubs.HubFile, partial: Path, bar: tqdm, stop: Event) -> None:
    """Appends what ``partial`` lacks, over as many connections as it takes, while they bring something.

    huggingface_hub (2.4) starts a file again after a kill: it writes to a name that each process draws.
    """
    partial.touch()
    fruitless = 0
    while (start := size_of(partial)) < file.size:
        failure: Exception = UserError(f"{file.url} ends after {start:,} bytes instead of {file.size:,}.")
        # The user's token is for Hugging Face. A compressed answer could not be resumed.
        headers = build_hf_headers(token=False if hubs.on_modelscope() else None) | {"Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={start}-"} if start else {}
        try:
            with get_session().stream("GET", file.url, headers=headers, timeout=hubs.TIMEOUT) as reply:
                hf_raise_for_status(reply)
                resumes = reply.status_code == 206
                bar.update(0 if resumes else -start)
                with open(partial, "ab" if resumes else "wb") as content:
                    for block in reply.iter_raw():
                        if stop.is_set():
                            raise CancelledError
                        if content.tell() + len(block) > file.size:
                            raise hubs.lie(f"it sends more than the {file.size:,} bytes of {file.path} that it listed")
                        content.write(block)
                        bar.update(len(block))
        except hubs.NO_ANSWER as error:
            if not hubs.is_down(error):
                raise
            failure = error
        fruitless = 0 if size_of(partial) > start else fruitless + 1
        if fruitless == ATTEMPTS:
            raise failure
        time.sleep(fruitless)


def fetch(file: hubs.HubFile, target: Path, bar: tqdm, stop: Event) -> None:
    """Puts one file in its place, whole and with the right hash; a wrong one is deleted and fetched once more."""
    partial = partial_of(target)
    if partial.is_symlink():  # which would be followed
        partial.unlink()
    for _ in range(2):
        receive(file, partial, bar, stop)
        if has_digest(partial, file.digest):
            os.replace(partial, target)
            return
        bar.update(-size_of(partial))
        partial.unlink()
    raise UserError(f"{file.url} arrived twice, both times with a wrong hash: try again, or another hub.")


def fetch_wrong(repository: str, files: list[hubs.HubFile], folder: Path, known: dict[str, dict], ours: bool) -> None:
    """Fetches missing and wrong files.

    Raises UserError for a wrong file that is neither ``known`` nor ``ours``, and if the disk is too small.
    """
    wrong = wrong_files(folder, {file.path: file.digest for file in files}, known)
    for target in sorted(folder / path for path in wrong if (folder / path).exists()):
        if not ours and target.name not in known:
            raise UserError(f"{target} differs from the hub's file: move it away, or give an empty folder.")
        note(f"{target} differs from the hub's file: downloading it again")
        clear(target)
    missing = [file for file in files if file.path in wrong]
    if not missing:
        return
    total = sum(file.size for file in files)
    left = sum(max(0, file.size - size_of(partial_of(folder / file.path))) for file in missing)
    free = shutil.disk_usage(folder).free
    if left > free:
        raise UserError(
            f"{repository} needs {left / 1e9:,.2f} GB more in {folder}, and only {free / 1e9:,.2f} GB are free: "
            f"choose a larger disk by {place_flags()}."
        )
    there = f", {(total - left) / 1e9:,.2f} GB are here already" if left < total else ""
    source = f"{repository} from {hubs.endpoint()} into {folder}"
    note(f"downloading {source}: {len(files)} files, {total / 1e9:,.2f} GB{there}")
    pace = 0.5 if sys.stderr.isatty() else 30.0  # seconds between two states of the bar
    with tqdm(total=total, initial=total - left, unit="B", unit_scale=True, desc=repository, mininterval=pace) as bar:
        pool, stop = ThreadPoolExecutor(CONNECTIONS), Event()
        try:
            for job in as_completed([pool.submit(fetch, file, folder / file.path, bar, stop) for file in missing]):
                job.result()
        finally:  # if one file fails, or on Ctrl-C, the others stop; the bytes they brought stay for the next time
            stop.set()
            pool.shutdown(cancel_futures=True)


def seems_whole(folder: Path, weights: bool) -> bool:
    """Whether a folder has a config and, if asked for, complete weights, as far as this shows without a hub."""
    files = weight_files(folder) if weights else []
    whole = all(file.is_file() and is_complete(file) for file in files)
    return bool(files) == weights and whole and read_json(folder / "config.json") is not None


def download(
    name: str, revision: str = "main", cache_dir: str | None = None, local_dir: str | None = None, weights: bool = True
) -> Path:
    """The folder of a model, verified: complete, or with ``weights=False`` all but those. Raises UserError if it fails.

    The hub is not asked about a complete model again, so that a training that resumes tomorrow has the same base.
    If the hub does not answer, a whole model that another program left in the cache is taken unverified.
    """
    if complete := find_complete(name, revision, cache_dir, local_dir, weights):
        return complete
    repository, folder = hubs.repository_of(name), model_folder(name, revision, cache_dir, local_dir)
    with guard("model", repository), hubs.hub_errors(repository, revision):
        if complete := find_complete(name, revision, cache_dir, local_dir, weights):
            return complete
        record, known = open_record(folder, revision)
        cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        cached = None if local_dir else try_to_load_from_cache(repository, "config.json", cache, revision)
        snapshot = Path(cached).parent if isinstance(cached, str) else folder
        try:
            files = hubs.checkpoint_files(repository, revision, weights)
        except hubs.NO_ANSWER as error:
            candidates = [] if known or local_dir else [folder, snapshot]  # not a folder that we know to be incomplete
            unverified = [found for found in candidates if seems_whole(found, weights)]
            if not unverified or not hubs.is_down(error):
                raise
            note(f"note: {hubs.endpoint()} can't be reached; {unverified[0]} is taken as it is, unchecked.")
            return unverified[0]
        if folder.resolve() != folder:
            raise UserError(f"{folder} leads through a link to {folder.resolve()}: remove it, or choose --local_dir.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:  # those of Hugging Face's cache are verified, and not downloaded again
                origin, target = snapshot / file.path, folder / file.path
                if origin.is_file() and not target.is_file():
                    target.unlink(missing_ok=True)  # a link to a file that was deleted
                    target.symlink_to(origin.resolve())
            fetch_wrong(repository, files, folder, known, ours=not local_dir)
        except PermissionError as error:
            raise UserError(f"{describe(error)} Choose another folder by {place_flags()}.") from error
        write_record(record, folder, {file.path: file.digest for file in files}, known)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="download.sh",
        description="Downloads models, resumes what was interrupted, and verifies every file. The last line on "
        "standard output is the folder.",
        epilog=f"Short names: {', '.join(hubs.SHORT_NAMES)}. Variables: HF_ENDPOINT (a mirror), HF_HOME (where files "
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
            hubs.hub_id(name)
        for name in args.names:
            folder = download(name, args.revision, args.cache_dir, args.local_dir)
            sizes = [file.stat().st_size for file in folder.iterdir() if file.is_file()]
            note(f"{name}: {len(sizes)} files, {sum(sizes) / 1e9:,.2f} GB in {folder}")
            print(folder, flush=True)


if __name__ == "__main__":
    main()
