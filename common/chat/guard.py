"""What stands between the page and the network: it answers its own visitors only, and only what the page asks for.

Any other page that a visitor has open can send requests to this server. It can also let its own name point here (DNS
rebinding), and would then read the answers. So each request must name a host of this server, and come from its page.
"""

import argparse
import asyncio
import ipaddress
import re
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import UserError, note
from common.locking import take_port

# The paths that the page asks for. Gradio has more: uploads, files, proxies, and an interface for programs.
PATHS = re.compile(
    r"/(|config|login|logout|theme\.css|favicon\.ico|(assets|static|svelte)/.+"
    r"|gradio_api/(queue/join|queue/data|cancel|reset|app_id|heartbeat/[^/]+))/?"
)
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]@/:\s]+)(:\d*)?")
OTHERS = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"  # nothing is loaded from other hosts
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds after a wrong password
MOST_WAITING = 8  # passwords that wait at once


class Guard:
    """An ASGI application around that of the page. It refuses a request by one sentence and hands on every other one.

    ``host`` is the address that the server listens on, ``names`` are more hosts under which visitors reach the page,
    and which may show it in a frame, ``longest`` is the most bytes of a request's body, ``paths`` are those that are
    answered, and ``content`` makes the body of a refusal of its sentence.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        names: set[str],
        longest: int,
        paths: re.Pattern[str] = PATHS,
        content: Callable[[str], dict[str, Any]] = lambda sentence: {"detail": sentence},
    ) -> None:
        self.app, self.names, self.longest, self.paths, self.content = app, names, longest, paths, content
        self.own = {"localhost", host.lower()}
        self.at_any_address = host in ("", "0.0.0.0")
        if self.at_any_address:
            self.own.add(socket.gethostname().lower())
        ancestors = " ".join(f"{name} {name}:*" for name in sorted(names)) or "'none'"
        self.headers = {
            "Content-Security-Policy": f"{OTHERS}; base-uri 'self'; form-action 'self'; frame-ancestors {ancestors}",
            "X-Content-Type-Options": "nosniff",
            **({} if names else {"X-Frame-Options": "DENY"}),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        refusal, body = self.refusal(scope["method"], scope["path"], Headers(scope=scope)), b""
        if not refusal:
            body = await read_body(receive, self.longest)
            if len(body) > self.longest:
                refusal = 413, f"the question is too long: it has more than {self.longest:,} bytes."
        if refusal:
            status, sentence = refusal
            response = JSONResponse(self.content(sentence), status, headers={"Connection": "close"})
            return await response(scope, receive, send_guarded)
        read: list[Message] = [{"type": "http.request", "body": body}]

        async def receive_again() -> Message:
            return read.pop() if read else await receive()

        return await self.app(scope, receive_again, send_guarded)

    def refusal(self, method: str, path: str, headers: Headers) -> tuple[int, str] | None:
        """Status and sentence for a request that is not answered, by all but its body."""
        for host in (headers.get("host", ""), *filter(None, headers.get("x-forwarded-host", "").split(","))):
            if not self.is_known(host.strip()):
                advice = "start it with ALLOWED_HOSTS (--allowed_hosts) if it should"
                return 421, f"this page does not answer to the name {host!r:.100}: {advice}."
        if not self.is_from_here(method, headers):
            return 403, "this page takes questions from its own visitors only, not from another page."
        if method not in ("GET", "HEAD", "POST") or not self.paths.fullmatch(path):
            return 404, "this page has nothing here."
        if int(headers.get("content-length", 0)) > self.longest:
            return 413, f"the question is too long: it has more than {self.longest:,} bytes."
        return None

    def is_known(self, host: str) -> bool:
        """Whether a Host header names this server. The port may be another one, that of a tunnel or a proxy."""
        if not (found := HOST.fullmatch(host.lower())):
            return False
        name = found[1].strip("[]").rstrip(".")
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self.own | self.names
        # An address is no name that a stranger could let point here; which ones lead here, a container can't know.
        return name in self.own | self.names or address.is_loopback or self.at_any_address

    def is_from_here(self, method: str, headers: Headers) -> bool:
        """Whether this page sent the request, or the visitor by opening the page; programs send neither header."""
        if origin := headers.get("origin"):
            sender = HOST.fullmatch(origin.partition("://")[2])
            return sender is not None and (sender[0] == headers["host"] or sender[1] in self.names)
        site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode")
        return site in ("same-origin", "none") or mode == "navigate" and method == "GET"


def longest_body(context: int) -> int:
    """The most bytes of a request to a model with a context of that many tokens: several times a question that fits."""
    return 2**20 + 64 * context


async def read_body(receive: Receive, longest: int) -> bytes:
    """The body of a request; of one that is longer than ``longest`` bytes only its beginning, but more than those."""
    body, more = bytearray(), True
    while more and len(body) <= longest:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def login(user: str, password: str) -> Callable[[str, str], Awaitable[bool]]:
    """Asks whether a name and a password are right, as Gradio's ``auth`` does.

    After wrong ones the next is looked at only 1, 2, 4, … seconds later, whoever sends it: a stranger has many
    addresses, and behind a proxy all visitors have one.
    """
    turn, waiting, wait, due = asyncio.Lock(), 0, 0.0, 0.0

    async def is_right(name: str, word: str) -> bool:
        nonlocal waiting, wait, due
        if waiting == MOST_WAITING:
            raise HTTPException(429, "too many visitors log in at once: try again in a minute.")
        waiting += 1
        try:
            async with turn:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                right = secrets.compare_digest(f"{name}\n{word}".encode(), f"{user}\n{password}".encode())
                wait = 0.0 if right else min(LONGEST_WAIT, max(FIRST_WAIT, 2 * wait))
                due = time.monotonic() + wait
                return right
        finally:  # also where the visitor has left
            waiting -= 1

    return is_right


def add_address_flags(parser: argparse.ArgumentParser, port: int) -> None:
    """The flags of a server; ``port``: the default."""
    address = "address to listen on; 0.0.0.0: all addresses (%(default)s)"
    parser.add_argument("--host", default="127.0.0.1", help=address)
    next_one = "port; if it is taken, the next free one (%(default)s)"
    parser.add_argument("--port", type=int, default=port, help=next_one)
    names = "more host names that it is reached by, with commas between: those of a reverse proxy"
    parser.add_argument("--allowed_hosts", default="", help=names)


def names_of(allowed_hosts: str) -> set[str]:
    """The host names of --allowed_hosts."""
    return {name.strip().lower() for name in allowed_hosts.split(",")} - {""}


def listen(host: str, port: int) -> socket.socket:
    """Raises UserError if another program has taken the port since ``find_port`` found it free."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise UserError(f"port {port} was taken while the model was loaded: start again.") from error


def find_port(host: str, first: int) -> int:
    """The first free port from ``first`` on. Raises UserError if none is free or the host is not of this machine."""
    for port in range(max(1, first), 65536):
        try:
            taken = take_port(host, port)
        except OSError as error:
            raise UserError(f"can't listen on {host}:{port} ({error.strerror}): set HOST and PORT.") from error
        if taken:
            if port != first:
                note(f"port {first} is taken: using {port}.")
            return port
    raise UserError(f"no free port from {first} on: set PORT.")
