"""Chat in the browser with a model and, beside it, the base that it was tuned from.

python common/chat/web_demo.py --checkpoint FOLDER [--model_name_or_path BASE]
"""

import argparse
import os
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gradio as gr
import psutil
import uvicorn
from fastapi import FastAPI
from gradio.networking import setup_tunnel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.chat import guard
from common.chat.chat import chat_parser, count_forgotten, generation_settings, load_chat, stream_chat
from common.encoding import has_roles
from common.errors import UserError, exit_on_user_error, note
from common.loading import load_model, method_of
from common.models.precision import compute_dtype
from common.models.products import pack
from common.trained import base_of

USER = "chatglm"  # the user name if a password is set
REFRESH = 0.03  # seconds between two views of a growing answer
# A page holds two connections, and a session the rounds of one page. Questions wait in a queue for the model.
CONNECTIONS, SESSIONS, QUESTIONS = 200, 200, 50
FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "WenQuanYi Micro Hei", "sans-serif")


class Round(NamedTuple):
    """A question and, per speaker, its answer (None: not begun) and how many oldest rounds its prompt left out."""

    query: str
    answers: list[str | None]
    forgotten: list[int]


Conversation = list[Round]


class Chat(NamedTuple):
    """The state that all visitors share; the page calls its methods from ``ask`` on.

    A conversation is changed in place, so an answer that was cancelled changes only its own round.
    """

    speakers: dict[str, Callable[[], AbstractContextManager[PreTrainedModel]]]  # by title: opens a context to answer in
    tokenizer: PreTrainedTokenizerBase
    context: int  # tokens of prompt and answer together
    turn: threading.Lock  # a prefix or an adapter is on or off for one visitor at a time

    def reply(self, conversation: Conversation, query: str, system: str, generation: dict) -> Iterator[None]:
        """Lets the speakers answer one after the other. Yields whenever the conversation has grown.

        Raises UserError if the question is too long; then the conversation is unchanged.
        """
        room = self.context - generation["max_new_tokens"]
        columns = range(len(self.speakers))
        histories = [[[old.query, answer] for old in conversation if (answer := old.answers[i])] for i in columns]
        forgotten = [count_forgotten(self.tokenizer, query, history, system, room) for history in histories]
        answers: list[str | None] = [None] * len(self.speakers)
        conversation.append(Round(query, answers, forgotten))
        yield
        with self.turn:
            for column, ready_model in enumerate(self.speakers.values()):
                remembered = histories[column][forgotten[column] :]
                answer, shown = "", 0.0
                with ready_model() as model:
                    for answer in stream_chat(model, self.tokenizer, query, remembered, system, **generation):
                        if answer and time.monotonic() - shown > REFRESH:
                            answers[column] = answer
                            yield
                            shown = time.monotonic()
                answers[column] = answer
                yield

    def show(self, conversation: Conversation) -> list[list[dict[str, Any]]]:
        """The messages of every column."""
        return [messages(conversation, column) for column in range(len(self.speakers))]

    def ask(self, query: str, conversation: Conversation, system: str, length: float, *sampling) -> Iterator[list]:
        """Yields the text of the question's field, then the messages of every column."""
        yield [gr.skip()] * (1 + len(self.speakers))  # Gradio empties the fields if nothing comes
        if not query.strip():
            return
        field: Any = ""  # emptied once: the next question may be typed during the answer
        try:
            generation = generation_settings(int(length), *sampling)
            for _ in self.reply(conversation, query.strip(), system, generation):
                yield [field, *self.show(conversation)]
                field = gr.skip()
        except UserError as error:  # the question stays in its field
            gr.Warning(str(error), title="提示 / note")

    def ask_again(self, conversation: Conversation, *settings) -> Iterator[list]:
        before, states = list(conversation), 0
        for _, *columns in self.ask(take_back(conversation), conversation, *settings):
            states += 1
            yield [gr.skip(), *columns]
        if states == 1:  # the question was refused; a round that is gone later is one that the visitor took back
            conversation[:] = before

    def undo(self, conversation: Conversation) -> list:
        return [take_back(conversation), *self.show(conversation)]

    def clear(self, conversation: Conversation) -> list:
        conversation.clear()
        return self.refresh(conversation)

    def refresh(self, conversation: Conversation) -> list:
        """The conversation as it is. Runs after every answer, because the last words of a cancelled one can be late."""
        return [gr.skip(), *self.show(conversation)]


def take_back(conversation: Conversation) -> str:
    """Removes the last round and returns its question."""
    return conversation.pop().query if conversation else ""


def messages(conversation: Conversation, column: int) -> list[dict[str, Any]]:
    """A column as Gradio's Chatbot takes it. Questions are shown as they were typed, answers as Markdown."""
    shown = []
    for query, answers, forgotten in conversation:
        shown.append(("user", re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", query)))
        if forgotten[column]:
            notice = f"上下文已满，忘记了最早的 {forgotten[column]} 轮 / oldest rounds forgotten: {forgotten[column]}"
            shown.append(("assistant", f"*（{notice}）*"))
        answer = answers[column]
        if answer is not None:
            shown.append(("assistant", answer or "*（空 / empty）*"))
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in shown]


def main() -> None:
    args = web_parser().parse_args()
    port = guard.find_port(args.host, args.port)
    chat = load(args)
    list(chat.reply([], "你好", "", generation_settings(2, 0, 1)))  # the first answer of a model is the slowest
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
    """The chat of all speakers. The tuned model comes first, because visitors wait for it."""
    model, tokenizer, trained = load_chat(args)
    pack(model)
    speakers: dict[str, Callable] = {"微调后 / tuned" if args.checkpoint else "ChatGLM": partial(nullcontext, model)}
    if trained and args.compare != "false":  # the same model without prefix or adapter
        speakers["基座 / base"] = partial(method_of(**trained).base, model)
    elif args.checkpoint and args.compare == "true":
        name = base_of(args.checkpoint, args.model_name_or_path)
        base = load_model(name, compute_dtype(model.device), args.quantization_bit, device=model.device)
        speakers["基座 / base"] = partial(nullcontext, base)
    return Chat(speakers, tokenizer, model.config.max_position_embeddings, threading.Lock())


def build_page(chat: Chat, args: argparse.Namespace) -> gr.Blocks:
    """The page: one column per speaker, the question, buttons, settings."""
    name = " + ".join(str(part) for part in (args.model_name_or_path, args.checkpoint) if part) or "demo"
    with gr.Blocks(title=f"ChatGLM · {name}", analytics_enabled=False) as page:
        gr.Markdown(f"### ChatGLM · {name}")
        conversation = gr.State([])
        with gr.Row():
            columns = [
                gr.Chatbot(
                    label=title,
                    placeholder="输入问题，开始对话（Shift+回车换行）<br>ask away (Shift+Enter: new line)",
                    elem_classes=["chat", "pair"] if len(chat.speakers) == 2 else "chat",
                    buttons=["copy"],
                    feedback_options=None,
                    min_width=320,
                )
                for title in chat.speakers
            ]
        enter = "回车发送 / Enter sends"
        box = gr.Textbox(show_label=False, placeholder=enter, max_lines=8, submit_btn="发送 / send", autofocus=True)
        with gr.Row():
            labels = ("停止 / stop", "重新回答 / retry", "撤回 / undo", "新对话 / new")
            buttons = [gr.Button(label, size="sm", min_width=130) for label in labels]
        with gr.Accordion("设置 / settings", open=False):
            known = has_roles(chat.tokenizer)
            system = gr.Textbox(
                args.system_prompt,
                label="系统提示 / system prompt",
                placeholder="" if known else "此模型没有系统提示 / ChatGLM-6B and ChatGLM2-6B have no system prompt",
                interactive=known,
                lines=2 if known else 1,
            )
            longest = max(args.max_new_tokens, chat.context // 2)
            with gr.Row():
                slider = partial(gr.Slider, min_width=220)
                length = slider(1, longest, args.max_new_tokens, step=1, label="最大生成长度 / max new tokens")
                temperature = slider(0, 2, args.temperature, step=0.01, label="温度 / temperature (0: 贪心 greedy)")
                top_p = slider(0.01, 1, args.top_p, step=0.01, label="top_p")
        settings = [system, length, temperature, top_p]  # in the order of the parameters of ``Chat.ask``
        connect(chat, conversation, box, columns, settings, buttons)
    return page


def connect(chat: Chat, conversation, box, columns, settings, buttons) -> None:
    """Connects each event of the page with a method of ``chat``."""
    stop, retry, undo, clear = buttons
    outputs = [box, *columns]
    generating = {"concurrency_limit": 1, "concurrency_id": "generation", "show_progress_on": columns[0]}
    hidden = {"api_visibility": "private"}
    sent = box.submit(chat.ask, [box, conversation, *settings], outputs, **generating, **hidden)
    again = retry.click(chat.ask_again, [conversation, *settings], outputs, cancels=[sent], **generating, **hidden)
    at_once = {"cancels": [sent, again], "show_progress": "hidden", **hidden}
    for answer in (sent, again):
        answer.then(chat.refresh, conversation, outputs, show_progress="hidden", **hidden)
    stop.click(None, **at_once)
    undo.click(chat.undo, conversation, outputs, **at_once)
    for event in (clear.click, *(column.clear for column in columns)):
        event(chat.clear, conversation, outputs, **at_once)


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
        auth_message=f"用户名 / user name: {USER}",
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONTS),
        css_paths=Path(__file__).with_suffix(".css"),
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
    )
    guarded = guard.Guard(app, args.host, guard.names_of(args.allowed_hosts), guard.longest_body(context))
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
