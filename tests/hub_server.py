"""A local hub that answers huggingface_hub and requests for ModelScope, throttled, counted, and with faults.

A large file is answered as Hugging Face answers it: by a redirect to another host.
"""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BLOCK = 2**14


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".model"))


class Hub(ThreadingHTTPServer):
    """``repositories``: {id: {path: content}}; ``starts``: each request for content; ``sent``: {path: bytes}."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.statuses: dict[str, tuple[int, str]] = {}  # {id: (status, error code)} of repositories that are refused
        self.claimed_sizes: dict[str, int] = {}  # {path: size} that the listing says instead of the real one
        self.break_at: dict[str, int] = {}  # {path: bytes of an answer after which the connection breaks}
        self.failing: Counter = Counter()  # {path: how many requests are still to be answered by an error 503}
        self.ranges = True
        self.commit: object = COMMIT
        self.change_listing: Callable[[Any], object] = lambda listing: listing  # what a lying hub makes of it
        self.more: dict[str, bytes] = {}  # {path: bytes that follow the announced content}
        self.loops = False  # whether each listing is a redirect to itself
        self.spoilt: Counter = Counter()  # {path: how many answers with wrong content are still to be given}
        self.gate = threading.Event()  # content is sent while it is set
        self.gate.set()
        self.rate = 0.0  # bytes per second and connection; 0: as fast as possible
        self.starts: list[tuple[str, int]] = []  # (path, first byte that was asked for)
        self.sent: Counter = Counter()
        self.tokens: dict[str, set[str | None]] = {"hub": set(), "cdn": set()}  # authorizations that came with requests
        self.counting = threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """Silent, because programs are killed during requests; tests see what went missing."""

    def asked(self) -> list[str]:
        """The path of each request for content."""
        return [path for path, _ in self.starts]

    def forget(self) -> None:
        self.starts.clear()
        self.sent.clear()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        parts = unquote(url.path).strip("/").split("/")
        self.server.tokens["cdn" if parts[0] == "cdn" else "hub"].add(self.headers["Authorization"])
        if parts[:2] == ["api", "models"]:
            self.answer_hugging_face("/".join(parts[2:4]), parts[4])
        elif parts[:3] == ["api", "v1", "models"]:
            self.answer_modelscope("/".join(parts[3:5]), parts[5:], query)
        elif parts[0] == "cdn":
            repository, path = "/".join(parts[1:3]), "/".join(parts[3:])
            self.send_file(path, self.server.repositories[repository][path])
        elif self.is_there(repository := "/".join(parts[:2])):
            path = "/".join(parts[4:])
            content = self.server.repositories[repository].get(path)
            if content is None:  # with headers as Hugging Face sends them
                headers = {"X-Repo-Commit": str(self.server.commit), "ETag": 'W/"f-mY2VvLxuxB7KhsoOdQTlMTccuAQ"'}
                self.send(404, b"Entry not found", headers | {"X-Error-Code": "EntryNotFound"})
                return
            headers = {"X-Repo-Commit": str(self.server.commit), "ETag": f'"{git_sha1(content)}"'}
            if is_large(path):
                other_host = f"http://localhost:{self.server.server_port}/cdn"
                headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha256(content)}"'}
                self.send(302, b"", headers | {"Location": f"{other_host}/{repository}/{path}"})
            else:
                self.send_file(path, content, headers)

    def is_there(self, repository: str) -> bool:
        if repository in self.server.repositories and repository not in self.server.statuses:
            return True
        status, code = self.server.statuses.get(repository, (404, "RepoNotFound"))
        self.send(status, b'{"error": "refused"}', {"X-Error-Code": code})
        return False

    def answer_hugging_face(self, repository: str, kind: str) -> None:
        if not self.is_there(repository):
            return
        entries = []
        for path, content in self.server.repositories[repository].items():
            size, name = self.server.claimed_sizes.get(path, len(content)), git_sha1(content)
            entry = {"type": "file", "path": path, "rfilename": path, "size": size, "oid": name, "blobId": name}
            lfs = {"sha256": sha256(content), "oid": sha256(content), "size": size, "pointerSize": 134}
            entries.append(entry | ({"lfs": lfs} if is_large(path) else {}))
        self.send_listing(
            entries if kind == "tree" else {"id": repository, "sha": self.server.commit, "siblings": entries}
        )

    def send_listing(self, listing: Any) -> None:
        if self.server.loops:
            self.send(302, b"", {"Location": self.path})
            return
        listing = self.server.change_listing(listing)
        self.send(200, listing if isinstance(listing, bytes) else json.dumps(listing).encode())

    def answer_modelscope(self, repository: str, rest: list[str], query: dict[str, str]) -> None:
        if not self.is_there(repository):
            return
        files = self.server.repositories[repository]
        assert query["Revision"] == "master"
        if rest == ["repo"]:
            self.send_file(query["FilePath"], files[query["FilePath"]])
            return
        entries = [
            {"Path": path, "Size": len(content), "Sha256": sha256(content), "Type": "blob"}
            for path, content in files.items()
        ]
        entries.append({"Path": "folder", "Size": 0, "Sha256": "", "Type": "tree"})
        self.send_listing({"Code": 200, "Data": {"Files": entries}})

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_file(self, path: str, content: bytes, headers: dict[str, str] | None = None) -> None:
        hub = self.server
        if self.command == "HEAD":
            self.send(200, content, headers)
            return
        if hub.failing[path] > 0:
            hub.failing[path] -= 1
            self.send(503, b"")
            return
        wanted = self.headers["Range"] if hub.ranges else None
        start = int((wanted or "bytes=0-").removeprefix("bytes=").split("-")[0])
        hub.starts.append((path, start))
        if hub.spoilt[path] > 0:
            hub.spoilt[path] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        content += hub.more.get(path, b"")
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for name, value in ({"Content-Length": str(len(content) - start)} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        end = min(len(content), start + hub.break_at.get(path, len(content)))
        try:
            for place in range(start, end, BLOCK):
                hub.gate.wait()
                block = content[place : min(place + BLOCK, end)]
                self.wfile.write(block)
                with hub.counting:
                    hub.sent[path] += len(block)
                if hub.rate:
                    time.sleep(len(block) / hub.rate)
        except ConnectionError:  # the program was killed
            end = 0
        self.close_connection = end < len(content)


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
