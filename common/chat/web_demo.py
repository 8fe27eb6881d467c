"""Chat in the browser with a model and, side by side, the base that it was tuned from.

python common/chat/web_demo.py --model_name_or_path demo --ptuning_checkpoint FOLDER
"""

import argparse
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# Gradio would report that it is used, and look for its own page behind the proxy that a user may have set.
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
for _name in ("no_proxy", "NO_PROXY"):
    os.environ[_name] = ",".join(filter(None, (os.environ.get(_name), "localhost,127.0.0.1")))

import gradio as gr
import psutil
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.chat.chat import chat_parser, context_length, count_forgotten, generation_settings, load_chat, stream_chat
from common.encoding import has_roles
from common.errors import UserError, exit_on_user_error, say
from common.launch.engines import compute_dtype
from common.loading import is_base, load_model, resolve_model
from common.locking import take_port
from common.methods.prefix import without_prefix
from common.models.registry import read_config

USER = "chatglm"  # who may enter where there is a password
REFRESH = 0.03  # seconds between two looks at a growing answer
PORTS = 100  # how many are tried from --port on

FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "WenQuanYi Micro Hei", "sans-serif")
# The browser itself refuses to load anything from elsewhere, such as an image that an answer names.
ONLY_FROM_HERE = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:\">"
)
CSS = """
.gradio-container { width: 100%; max-width: 960px !important; margin: 0 auto !important; }
.gradio-container:has(.pair) { max-width: 1400px !important; }
.chat { height: calc(100dvh - 232px) !important; min-height: 240px; }
.chat .message-buttons-right { display: none; }
.submit-button { background: var(--button-primary-background-fill) !important; color: white !important; }
@media (max-width: 760px) {
    .chat { height: calc(100dvh - 330px) !important; }
    .pair { height: calc(50dvh - 175px) !important; }
}
"""


class Speaker(NamedTuple):
    """One column of the page."""

    title: str
    model: Callable[[], AbstractContextManager[PreTrainedModel]]  # the model, as it is while it answers


class Chat(NamedTuple):
    """What all visitors share."""

    speakers: list[Speaker]
    tokenizer: PreTrainedTokenizerBase
    context: int  # tokens of prompt and answer
    turn: threading.Lock  # a prefix or an adapter is on or off for one visitor at a time


@dataclass
class Round:
    query: str
    answer: str | None = None  # None: not begun
    forgotten: int = 0  # oldest rounds that were not in its prompt


Conversation = list[list[Round]]  # of every speaker its own


def main() -> None:
    args = web_parser().parse_args()
    port = find_port(args.host, args.port)
    chat = load(args)
    warm_up(chat)
    serve(build_page(chat, args), port, args)


def web_parser() -> argparse.ArgumentParser:
    parser = chat_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--compare",
        choices=("auto", "true", "false"),
        default="auto",
        help="whether the base answers beside the tuned model; auto: where that takes no second model in memory",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="where it is taken, the next free one (7860)")
    parser.add_argument(
        "--share", choices=("true", "false"), default="false", help="also open a public link through Gradio's servers"
    )
    parser.epilog = f"With PASSWORD in the environment, visitors must log in as {USER}."
    return parser


def load(args: argparse.Namespace) -> Chat:
    """Everything that answers, the tuned model first: visitors wait for it."""
    trained = args.ptuning_checkpoint or args.lora_checkpoint
    second = base_of(args.model_name_or_path) if args.compare == "true" and not trained else None
    model, tokenizer = load_chat(args)
    speakers = [Speaker("微调后 / tuned" if trained or second else "ChatGLM", partial(nullcontext, model))]
    if trained and args.compare != "false":
        speakers.append(Speaker("基座 / base", partial(base_context(args), model)))
    elif second:
        base = load_model(second, compute_dtype(model.device), args.quantization_bit, device=model.device)
        speakers.append(Speaker("基座 / base", partial(nullcontext, base)))
    return Chat(speakers, tokenizer, context_length(model), threading.Lock())


def base_context(args: argparse.Namespace) -> Callable[[PreTrainedModel], AbstractContextManager[PreTrainedModel]]:
    """What makes a model its base for a while, in the same memory."""
    if args.ptuning_checkpoint:
        return without_prefix
    from common.methods.lora import without_lora  # with PEFT, which takes two seconds to import

    return without_lora


def base_of(checkpoint: str) -> str:
    """The model that a fully trained one began as. Raises UserError where it does not say so, or it is gone."""
    base = read_config(resolve_model(checkpoint)).get("base_model_name_or_path") or ""
    if not is_base(base):
        raise UserError(f"--compare true: the base of {checkpoint} is not at {base or 'any place that it names'}.")
    return base


def warm_up(chat: Chat) -> None:
    """The first answer of a model is slower than all others."""
    for speaker in chat.speakers:
        with speaker.model() as model:
            list(stream_chat(model, chat.tokenizer, "你好", **generation_settings(2, 0, 1)))


def reply(
    chat: Chat, conversation: Conversation, query: str, system: str, generation: dict[str, Any]
) -> Iterator[None]:
    """Lets all speakers answer, one after the other. Yields whenever the conversation has grown.

    Raises UserError where the question is too long.
    """
    room = chat.context - generation["max_new_tokens"]
    histories = [[[old.query, old.answer] for old in rounds if old.answer] for rounds in conversation]
    new = [Round(query, None, count_forgotten(chat.tokenizer, query, history, system, room)) for history in histories]
    for rounds, this in zip(conversation, new, strict=True):
        rounds.append(this)
    yield
    with chat.turn:
        for speaker, history, this in zip(chat.speakers, histories, new, strict=True):
            answer, shown = "", 0.0
            with speaker.model() as model:
                remembered = history[this.forgotten :]
                for answer in stream_chat(model, chat.tokenizer, query, remembered, system, **generation):
                    if answer and time.monotonic() - shown > REFRESH:
                        this.answer = answer
                        yield
                        shown = time.monotonic()
            this.answer = answer
            yield


def messages(rounds: list[Round]) -> list[dict[str, Any]]:
    """A conversation as Gradio's Chatbot takes it. Questions are shown as they were typed, answers as Markdown."""
    shown = []
    for this in rounds:
        shown.append(("user", re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", this.query)))
        if this.forgotten:
            note = f"最早的 {this.forgotten} 轮放不进上下文，已忘记 / oldest rounds forgotten: {this.forgotten}"
            shown.append(("assistant", f"*（{note}）*"))
        if this.answer is not None:
            shown.append(("assistant", this.answer or "*（空 / empty）*"))
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in shown]


def build_page(chat: Chat, args: argparse.Namespace) -> gr.Blocks:
    """The page: a column a speaker, the question, buttons, settings."""
    trained = args.ptuning_checkpoint or args.lora_checkpoint
    with gr.Blocks(title=f"ChatGLM · {Path(args.model_name_or_path).name}") as page:
        gr.Markdown(f"### ChatGLM · {args.model_name_or_path}" + (f" + {Path(trained).name}" if trained else ""))
        conversation = gr.State([[] for _ in chat.speakers])
        with gr.Row():
            columns = [
                gr.Chatbot(
                    label=speaker.title,
                    placeholder="输入问题，开始对话（Shift+回车换行）<br>ask away (Shift+Enter: new line)",
                    elem_classes=["chat", "pair"] if len(chat.speakers) == 2 else "chat",
                    buttons=["copy"],
                    feedback_options=None,
                    min_width=320,
                )
                for speaker in chat.speakers
            ]
        box = gr.Textbox(
            show_label=False,
            placeholder="回车发送 / Enter sends",
            max_lines=8,
            submit_btn="发送 / send",
            autofocus=True,
        )
        with gr.Row():
            stop, retry, undo, clear = (
                gr.Button(label, size="sm", min_width=130)
                for label in ("停止 / stop", "重新回答 / retry", "撤回 / undo", "新对话 / new")
            )
        with gr.Accordion("设置 / settings", open=False):
            settings = build_settings(chat, args)
        connect(chat, conversation, columns, box, settings, stop, retry, undo, clear)
    return page


def build_settings(chat: Chat, args: argparse.Namespace) -> list[gr.components.Component]:
    """The fields of the system prompt and of sampling, in the order in which ``ask`` takes them."""
    known = has_roles(chat.tokenizer)
    system = gr.Textbox(
        args.system_prompt,
        label="系统提示 / system prompt",
        placeholder="" if known else "此模型没有系统提示 / ChatGLM-6B and ChatGLM2-6B have no system prompt",
        interactive=known,
        lines=2 if known else 1,
    )
    with gr.Row():
        longest = max(args.max_new_tokens, chat.context // 2)
        max_new_tokens = gr.Slider(
            1, longest, args.max_new_tokens, step=1, label="最大生成长度 / max new tokens", min_width=220
        )
        temperature = gr.Slider(
            0, 2, args.temperature, step=0.01, label="温度 / temperature (0: 贪心 greedy)", min_width=220
        )
        top_p = gr.Slider(0.01, 1, args.top_p, step=0.01, label="top_p", min_width=220)
    return [system, max_new_tokens, temperature, top_p]


def connect(chat: Chat, conversation, columns, box, settings, stop, retry, undo, clear) -> None:
    """What the buttons do. The conversation is changed in place: a generation that was left changes only its own."""

    def show(conversation: Conversation) -> list:
        return [messages(rounds) for rounds in conversation]

    def ask(query: str, conversation: Conversation, system: str, max_new_tokens: int, temperature: float, top_p: float):
        if not query.strip():
            yield [gr.skip()] * (1 + len(columns))
            return
        try:
            generation = generation_settings(int(max_new_tokens), temperature, top_p)
            field: Any = ""  # emptied once: the next question may be typed while this one is answered
            for _ in reply(chat, conversation, query.strip(), system, generation):
                yield [field, *show(conversation)]
                field = gr.skip()
        except UserError as error:
            gr.Warning(str(error), title="提示 / note")  # the question stays in its field
            yield [gr.skip()] * (1 + len(columns))

    def take_back(conversation: Conversation) -> str:
        return [rounds.pop().query for rounds in conversation if rounds][0] if conversation[0] else ""

    def ask_again(conversation: Conversation, *settings):
        before = [list(rounds) for rounds in conversation]
        for _, *shown in ask(take_back(conversation), conversation, *settings):
            yield [gr.skip(), *shown]
        if len(conversation[0]) < len(before[0]):  # it was refused
            conversation[:] = before

    def undo_last(conversation: Conversation) -> list:
        return [take_back(conversation), *show(conversation)]

    def start_anew() -> list:
        return [[[] for _ in chat.speakers], *([] for _ in columns)]

    outputs = [box, *columns]
    one_by_one = {"concurrency_limit": 1, "concurrency_id": "generation", "show_progress_on": columns[0]}
    hidden = {"api_visibility": "private"}
    sent = box.submit(ask, [box, conversation, *settings], outputs, **one_by_one, **hidden)
    again = retry.click(ask_again, [conversation, *settings], outputs, cancels=[sent], **one_by_one, **hidden)
    running = [sent, again]
    stop.click(None, cancels=running, **hidden)
    undo.click(undo_last, conversation, outputs, cancels=running, show_progress="hidden", **hidden)
    gr.on(
        [clear.click, *(column.clear for column in columns)],
        start_anew,
        None,
        [conversation, *columns],
        cancels=running,
        show_progress="hidden",
        **hidden,
    )


def serve(page: gr.Blocks, port: int, args: argparse.Namespace) -> None:
    """Shows the page until Ctrl-C."""
    password = os.environ.get("PASSWORD")
    if not password and (args.share == "true" or args.host not in ("127.0.0.1", "localhost")):
        say("warning: everybody who can reach this page may use it: set PASSWORD to ask for one.")
    try:
        _, url, _ = page.launch(
            server_name=args.host,
            server_port=port,
            share=args.share == "true",
            auth=(USER, password) if password else None,
            auth_message=f"用户名 / user name: {USER}",
            theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONTS),
            css=CSS,
            head=ONLY_FROM_HERE,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"port {port} was taken while the model was loaded: start again.") from error
    login = f", user name {USER} and your PASSWORD" if password else ""
    print(f"网页已就绪 / ready: {url} (Ctrl-C 结束 / ends it{login})", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        say("stopped")
    for child in psutil.Process().children():
        child.terminate()  # the tunnel of the public link
    # Python's own exit waits for threads: one is inside a forward pass, others wait until the browsers leave.
    os._exit(0)


def find_port(host: str, first: int) -> int:
    """The first free port from ``first`` on. Raises UserError where there is none, and for a host that is not ours."""
    for port in range(first, min(first + PORTS, 65536)):
        try:
            taken = take_port(host, port)
        except OSError as error:
            raise UserError(f"can't listen on {host}:{port} ({error.strerror}): set HOST and PORT.") from error
        if taken:
            if port != first:
                say(f"port {first} is taken: using {port}.")
            return port
    raise UserError(f"no free port from {first} on: set PORT.")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
