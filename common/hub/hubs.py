"""Hugging Face and ModelScope: the name of a model there, the files of its checkpoint, the sentence for a refusal.

HUB=modelscope chooses the second one; HF_ENDPOINT and MODELSCOPE_ENDPOINT name mirrors of them.
"""

import fnmatch
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple, cast
from urllib.parse import quote

import httpx2
from huggingface_hub import HfApi, constants, errors, get_session, hf_hub_url, set_client_factory
from huggingface_hub.utils import hf_raise_for_status, validate_repo_id
from huggingface_hub.utils._http import default_client_factory

from common.errors import UserError
from common.files import LARGEST_TEXT, is_inside

SHORT_NAMES = (
    *("chatglm-6b", "chatglm-6b-int8", "chatglm-6b-int4"),
    *("chatglm2-6b", "chatglm2-6b-32k", "chatglm2-6b-int4", "chatglm2-6b-32k-int4"),
    *("chatglm3-6b", "chatglm3-6b-base", "chatglm3-6b-32k", "chatglm3-6b-128k"),
    *("glm-4-9b", "glm-4-9b-chat", "glm-4-9b-chat-1m", "codegeex4-all-9b", "LongWriter-glm4-9b"),
    *("glm-4-9b-hf", "glm-4-9b-chat-hf", "GLM-4-9B-0414", "GLM-4-32B-0414", "GLM-Z1-9B-0414"),
    *("glm-edge-1.5b-chat", "glm-edge-4b-chat"),
)
SMALL_FILES = ("*.json", "*.jinja", "*.model")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # the first kind that exists, as transformers reads it
NO_ANSWER = (errors.HfHubHTTPError, httpx2.RequestError, httpx2.InvalidURL, errors.OfflineModeIsEnabled)
NONSENSE = (KeyError, TypeError, ValueError, AttributeError, RecursionError)  # of what parses a listing
TIMEOUT = 10.0  # seconds without a byte
LISTING_TIME = 60.0  # seconds for all bytes of a listing
MOST_FILES = 1000  # of a checkpoint
DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


class HubFile(NamedTuple):
    """``size``: bytes; ``digest``: its sha256, or for a small file on Hugging Face the sha1 by which git names it."""

    path: str
    size: int
    digest: str
    url: str


def is_weight_file(path: str) -> bool:
    return any(fnmatch.fnmatch(path, kind) for kind in WEIGHTS)


def is_hub_name(name: str) -> bool:
    """Whether a name is a short one or has the form of a hub id."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return name in SHORT_NAMES or "/" in name


def hub_id(name: str) -> str:
    """THUDM/… for a short name, any hub id as it is. Raises UserError for anything else."""
    if not is_hub_name(name):
        raise UserError(
            f"no model is known as {name}: give {', '.join(SHORT_NAMES)}, or any hub id like THUDM/chatglm3-6b."
        )
    return f"THUDM/{name}" if name in SHORT_NAMES else name


def on_modelscope() -> bool:
    """Whether the variable HUB chooses ModelScope. Raises UserError if it names no hub."""
    name = os.environ.get("HUB") or "huggingface"
    if name not in ("huggingface", "modelscope"):
        raise UserError(f"HUB={name}: choose huggingface or modelscope.")
    return name == "modelscope"


def endpoint() -> str:
    """The address of the hub in use, or of its mirror."""
    if on_modelscope():
        return os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"
    return constants.ENDPOINT


def repository_of(name: str) -> str:
    """The id on the hub in use: on ModelScope the makers of ChatGLM have another name."""
    owner, _, model = hub_id(name).partition("/")
    return f"ZhipuAI/{model}" if on_modelscope() and owner in ("THUDM", "zai-org") else f"{owner}/{model}"


def check_answer(response: httpx2.Response) -> None:
    """Raises UserError for an answer whose commit or hash is none, or for a listing that is too large or too slow.

    huggingface_hub and datasets make paths of the commit and the hash that a hub reports, and delete what is there.
    """
    headers, url = response.headers, response.request.url
    named = [headers.get("x-repo-commit")]
    if named[0] is not None and response.status_code < 400:  # that of an error page is no hash
        named.append(headers.get("x-linked-etag") or headers.get("etag"))
    if re.search("/api/(?!resolve-cache/)", url.path) and "FilePath" not in url.params:
        limit = LARGEST_TEXT // (1000 if "content-encoding" in headers else 1)  # compressed bytes may become many
        content, begun = bytearray(), time.monotonic()
        with closing(cast(httpx2.SyncByteStream, response.stream)) as stream:
            for block in stream:
                content += block
                if len(content) > limit or time.monotonic() - begun > LISTING_TIME:
                    raise lie(f"its listing has no end ({len(content):,} bytes)")
        response.stream = httpx2.ByteStream(bytes(content))
        named.append(commit_of(bytes(content)))
    if wrong := next((name for name in named if name is not None and not is_digest(name)), None):
        raise lie(f"it names a commit or a file by {wrong!r:.80}, which is no hash")


def commit_of(listing: bytes) -> str | None:
    try:
        content = json.loads(listing)
    except (ValueError, RecursionError):
        return None  # what asked for it says so
    return content.get("sha") if isinstance(content, dict) else None


def is_digest(name: object) -> bool:
    """Whether it is a SHA-1 or a SHA-256 in hex digits, also as an ETag writes one."""
    return isinstance(name, str) and bool(DIGEST.fullmatch(name.removeprefix("W/").strip('"')))


def lie(what: str) -> UserError:
    return UserError(f"{endpoint()} can't be trusted: {what}. Set HF_ENDPOINT to another mirror, or HUB=modelscope.")


def make_client() -> httpx2.Client:
    """The client of all requests in this process, those of datasets among them."""
    client = default_client_factory()
    client.headers["Accept-Encoding"] = "identity"  # so that the size of a body is known
    client.event_hooks = client.event_hooks | {"response": [check_answer]}
    return client


set_client_factory(make_client)


def list_huggingface(repository: str, revision: str) -> list[HubFile]:
    info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT)
    files = [
        HubFile(
            path=file.rfilename,
            size=file.size or 0,
            digest=(file.lfs.sha256 if file.lfs else file.blob_id) or "",
            url=hf_hub_url(repository, file.rfilename, revision=info.sha),
        )
        for file in info.siblings or []
    ]
    if not all(file.digest for file in files):
        raise UserError(f"{endpoint()} lists files without sizes and hashes: set HF_ENDPOINT to another mirror.")
    return files


def list_modelscope(repository: str, revision: str) -> list[HubFile]:
    """One request; ModelScope's own library would bring 13 packages and another cache."""
    url = f"{endpoint()}/api/v1/models/{repository}/repo"
    query = f"Revision={quote('master' if revision == 'main' else revision)}"
    response = get_session().get(f"{url}/files?{query}", timeout=TIMEOUT)
    hf_raise_for_status(response)
    return [
        HubFile(file["Path"], file["Size"], file["Sha256"], f"{url}?{query}&FilePath={quote(file['Path'])}")
        for file in response.json()["Data"]["Files"]
        if file["Type"] != "tree"
    ]


def checkpoint_files(repository: str, revision: str, weights: bool) -> list[HubFile]:
    """Config, vocabulary, chat template and, if asked for, weights in one format; no Python files and no folders.

    Raises UserError if this is no model in the format of transformers, and for names, sizes and hashes that are none.
    """
    try:
        files = (list_modelscope if on_modelscope() else list_huggingface)(repository, revision)
        top = {file.path: file for file in files if "/" not in file.path}
    except json.JSONDecodeError:
        raise
    except NONSENSE as error:
        raise lie(f"its listing of {repository} can't be read ({type(error).__name__}: {error!s:.80})") from error
    heavy = next(filter(None, (fnmatch.filter(top, kind) for kind in WEIGHTS)), [])
    if "config.json" not in top or not heavy:
        missing = "weights (model*.safetensors or pytorch_model*.bin)" if "config.json" in top else "config.json"
        raise UserError(f"{repository} is no model in the format of transformers: it has no {missing}.")
    other_index = ".bin.index.json" if heavy[0].endswith(".safetensors") else ".safetensors.index.json"
    small = [path for kind in SMALL_FILES for path in fnmatch.filter(top, kind) if not path.endswith(other_index)]
    chosen = [top[path] for path in sorted(small + heavy if weights else small)]
    if len(chosen) > MOST_FILES:
        raise lie(f"it lists {len(chosen):,} files of one model")
    for file in chosen:
        check_listed(file)
    return chosen


def check_listed(file: HubFile) -> None:
    """Raises UserError for a name that leads out of its folder, and for a size or a hash that is none."""
    if not re.fullmatch(r"[\w.+ -]+", file.path) or not is_inside(file.path):
        raise lie(f"it lists a file named {file.path!r:.80}")
    largest = sys.maxsize if is_weight_file(file.path) else LARGEST_TEXT
    if type(file.size) is not int or not 0 <= file.size <= largest:
        raise lie(f"it lists {file.path} with {file.size!r:.40} bytes")
    if not is_digest(file.digest):
        raise lie(f"it lists {file.path} with the hash {file.digest!r:.80}")


def check_revision(revision: str) -> None:
    """Raises UserError for a revision that is no name of a branch, tag or commit: folders are named after it."""
    if not re.fullmatch(r"[\w.+/-]+", revision) or not is_inside(revision):
        raise UserError(f"--revision (--model_revision) {revision!r}: give a branch, a tag or a commit, as in main.")


def is_down(error: Exception) -> bool:
    """Whether the hub can't answer now: no network, offline mode, too many requests, or an error on its side."""
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 500
    return status >= 500 or status == 429


@contextmanager
def hub_errors(repository: str, revision: str) -> Iterator[None]:
    """Turns a refusal of the hub, or a failure to reach it, into a UserError with one sentence."""
    try:
        yield
    except (*NO_ANSWER, json.JSONDecodeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if isinstance(error, errors.RevisionNotFoundError):
            sentence = f"{repository} has no revision {revision}."
        elif isinstance(error, errors.GatedRepoError) or status == 403:
            sentence = f"{repository} is gated: accept its terms at {endpoint()}/{repository}, then set HF_TOKEN."
        elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
            sentence = (
                f"there is no folder {repository}, and {endpoint()} has no such model or keeps it private: check the "
                "name, or set HF_TOKEN to a token that may read it."
            )
        else:
            sentence = (
                f"{repository} is not here and can't be downloaded from {endpoint()} ({reason}): set HF_ENDPOINT to a "
                "mirror that you can reach, or HUB=modelscope, or give a folder that holds it."
            )
        raise UserError(sentence) from error
