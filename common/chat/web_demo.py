"""Chat in the browser with a model and, beside it, the base that it was tuned from.

python common/chat/web_demo.py --checkpoint FOLDER [--model_name_or_path BASE]
"""

import argparse
import json
import os
import secrets
import signal
import sys
import threading
from pathlib import Path
from queue import SimpleQueue

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gradio as gr
import psutil
import uvicorn
from fastapi import FastAPI
from gradio.networking import setup_tunnel
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.chat import guard
from common.chat.chat import chat_parser, generation_settings
from common.chat.events import Chat
from common.chat.labels import in_html, language_of
from common.chat.page import I18N, SCRIPT, build_page
from common.chat.rounds import BASE
from common.chat.speakers import load_speakers
from common.errors import exit_on_user_error, note

USER = "chatglm"  # the user name if a password is set
# A page holds two connections, and a session the rounds of one page. Questions wait in a queue for the model.
CONNECTIONS, SESSIONS, QUESTIONS = 200, 200, 50
FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "WenQuanYi Micro Hei", "sans-serif")

# White words on Gradio's own blue are hard to read.
STRONG = {f"button_primary_background_fill{part}": "*primary_700" for part in ("", "_dark", "_hover", "_hover_dark")}


def main() -> None:
    args = web_parser().parse_args()
    port = guard.find_port(args.host, args.port)
    chat = load(args)
    # The first answer of a model is the slowest.
    list(chat.reply([], "你好", chat.first, "", generation_settings(2, 0, 1)))
    serve(build_page(chat, args), port, args, chat.context)


def web_parser() -> argparse.ArgumentParser:
    parser = chat_parser(__doc__.splitlines()[0])
    compare = "let the base answer too; auto: if that needs no second model in memory"
    parser.add_argument("--compare", choices=("auto", "true", "false"), default="auto", help=compare)
    guard.add_address_flags(parser, 7860)
    share = "also open a public link through Gradio's servers"
    parser.add_argument("--share", choices=("true", "false"), default="false", help=share)
    parser.epilog = f"If PASSWORD is set in the environment, visitors must log in as {USER}."
    return parser


def load(args: argparse.Namespace) -> Chat:
    speakers, tokenizer, model = load_speakers(args, args.compare)
    beside = args.compare != "false" and BASE in speakers and len(speakers) > 1
    return Chat(speakers, beside, tokenizer, model.config.max_position_embeddings, threading.Lock())


def serve(page: gr.Blocks, port: int, args: argparse.Namespace, context: int) -> None:
    """Shows the page until Ctrl-C; ``context`` is that of the model, in tokens."""
    password = os.environ.get("PASSWORD")
    if not password and (args.share == "true" or args.host not in ("127.0.0.1", "localhost")):
        note("warning: everybody who can reach this page may use it; set PASSWORD to ask for a password.")
    page.queue(max_size=QUESTIONS)
    page.state_session_capacity = SESSIONS
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        auth=guard.login(USER, password) if password else None,
        auth_message=in_html("login", user=USER),
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONTS).set(**STRONG),
        css_paths=Path(__file__).with_suffix(".css"),
        head=f"<script>{SCRIPT.read_text()}</script>",
        i18n=I18N,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
    )
    guarded = guard.Guard(
        in_the_language(app), args.host, guard.names_of(args.allowed_hosts), guard.longest_body(context)
    )
    listener = guard.listen(args.host, port)
    config = uvicorn.Config(
        guarded, log_level="warning", limit_concurrency=CONNECTIONS, ws="none", proxy_headers=False, server_header=False
    )
    over: SimpleQueue[None] = SimpleQueue()  # Ctrl-C may come twice at once: from the terminal and from the launcher
    signal.signal(signal.SIGINT, lambda *_: over.put(None))

    def run() -> None:
        try:
            uvicorn.Server(config).run([listener])
        finally:
            over.put(None)

    threading.Thread(target=run, daemon=True).start()
    if args.share == "true":
        share(args.host, port, guarded)
    login = f", user name {USER} and your PASSWORD" if password else ""
    url = f"http://{'localhost' if args.host == '0.0.0.0' else args.host}:{port}/"
    print(f"网页已就绪 / ready: {url} (Ctrl-C 结束 / ends it{login})", flush=True)
    over.get()
    note("stopped")
    for child in psutil.Process().children():
        child.terminate()  # the tunnel of the public link
    # Python's own exit waits for threads: one is inside a forward pass, others wait until the browsers leave.
    os._exit(0)


def in_the_language(app: ASGIApp) -> ASGIApp:
    """The application of a page of Gradio, which then takes its language from the request.

    Gradio itself goes by the browser alone, takes some kinds of Chinese for English, and has no switch.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/":
            await app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        language = language_of(headers)
        headers["accept-encoding"] = "identity"  # the body is changed below
        start: Message = {}
        body = bytearray()

        async def send_changed(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            body.extend(message.get("body", b""))
            if message.get("more_body"):
                return
            told = f'Object.defineProperty(navigator, "language", {{value: {json.dumps(language)}}})'
            page = bytes(body).replace(b'lang="en"', f'lang="{language}"'.encode(), 1)
            page = page.replace(b"<head>", f"<head><title>ChatGLM</title><script>{told}</script>".encode(), 1)
            if "content-length" in (changed := MutableHeaders(scope=start)):
                changed["content-length"] = str(len(page))
            await send(start)
            await send({"type": "http.response.body", "body": page})

        await app(scope, receive, send_changed)

    return answer


def share(host: str, port: int, guarded: guard.Guard) -> None:
    """Opens the public link, and lets visitors in by its name."""
    try:
        link = setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
    except Exception as error:  # Gradio raises errors of many kinds
        note(f"warning: no public link ({error}); the page is reached by its own address only.")
        return
    name = link.partition("://")[2].partition("/")[0]
    guarded.names.add(name)
    print(f"公网链接 / public link: https://{name}", flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
