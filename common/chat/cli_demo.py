"""Chat in the terminal with a model, or with a model and its trained prefix or adapter.

python common/chat/cli_demo.py --checkpoint FOLDER [--model_name_or_path BASE]
"""

import atexit
import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import PreTrainedTokenizerBase

from common.chat.chat import chat_parser, count_forgotten, count_tokens, generation_settings, stream_chat
from common.chat.rounds import BASE, Answer, Round, markdown, training_row
from common.chat.speakers import Speaker, described, load_speakers
from common.encoding import check_system, encode_chat
from common.errors import UserError, exit_on_user_error
from common.locking import cache_folder

LEAVE = ("stop", "exit", "quit", "/exit", "/quit")
LINES = 1000  # that the terminal remembers from one chat to the next


@dataclass
class Talk:
    """A conversation and what its answers need."""

    speakers: dict[str, Speaker]  # by name; the first answers
    tokenizer: PreTrainedTokenizerBase
    context: int  # tokens of prompt and answer together
    generation: dict[str, Any]
    system: str
    history: list[list[str]] = field(default_factory=list)  # questions with their answers
    speed: float = 0.0  # of the last answer, in tokens a second

    @property
    def first(self) -> str:
        return next(iter(self.speakers))


def main() -> None:
    """Answers questions until a word that leaves, or the end of input; Ctrl-C ends an answer early."""
    args = chat_parser(__doc__.splitlines()[0]).parse_args()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # other bytes than UTF-8 are refused as a question, and no more
    speakers, tokenizer, model = load_speakers(args, compare="false")
    generation = generation_settings(args.max_new_tokens, args.temperature, args.top_p)
    talk = Talk(speakers, tokenizer, model.config.max_position_embeddings, generation, args.system_prompt)
    speaker = speakers[talk.first]
    print(f"{speaker.about.model} · {described(talk.first, speaker, 'en')}")
    print("输入内容即可对话，/help 列出命令，exit 退出 (type a question; /help: commands, exit: leave)")
    remember_lines()
    while True:
        print()
        try:
            line = input("用户：").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line in LEAVE:
            return
        if line:
            try:
                follow(talk, "/clear" if line == "clear" else line)
            except UserError as error:
                print(f"({error})")


def remember_lines() -> None:
    """Lets a person edit a line and find earlier ones by the arrow keys, also those of earlier chats."""
    if not sys.stdin.isatty():
        return
    with suppress(ImportError, OSError, UserError):  # some Pythons lack it, and a cache may be read-only
        import readline

        file = cache_folder() / "chat_history"
        file.touch(mode=0o600)
        readline.set_history_length(LINES)
        readline.read_history_file(file)
        atexit.register(readline.write_history_file, file)


def follow(talk: Talk, line: str) -> None:
    """Runs a command, or asks a question. Raises UserError for one that can't be answered."""
    word, _, rest = line.partition(" ")
    if not line.startswith("/"):
        ask(talk, line)
    elif word in COMMANDS:
        COMMANDS[word][0](talk, rest.strip())
    else:
        print(f"没有命令 {word}，/help 列出全部命令 (no command {word}; /help lists them)")


def ask(talk: Talk, query: str) -> None:
    text = answer(talk, talk.first, query, talk.history)
    talk.history.append([query, text])


def answer(talk: Talk, name: str, query: str, history: list[list[str]]) -> str:
    """A speaker's answer, printed as it grows. Removes the rounds from ``history`` that no longer fit."""
    room = talk.context - talk.generation["max_new_tokens"]
    if forgotten := count_forgotten(talk.tokenizer, query, history, talk.system, room):
        del history[:forgotten]
        print(f"（上下文已满，忘记了最早的 {forgotten} 轮 / oldest rounds forgotten: {forgotten}）")
    print(f"\n{'ChatGLM' if name == talk.first else '基座 (base)'}：", end="", flush=True)
    with talk.speakers[name].open() as model:
        started = time.monotonic()
        text = print_answer(stream_chat(model, talk.tokenizer, query, history, talk.system, **talk.generation))
        talk.speed = count_tokens(talk.tokenizer, text) / (time.monotonic() - started)
    return text


def print_answer(answers: Iterator[str]) -> str:
    """Prints the answer as it grows and returns it. If a token changes earlier text, all is printed again."""
    shown = ""
    try:
        for answer in answers:
            print(answer[len(shown) :] if answer.startswith(shown) else f"\n{answer}", end="", flush=True)
            shown = answer
    except KeyboardInterrupt:
        pass
    print()
    return shown


def list_commands(talk: Talk, rest: str) -> None:
    for word, (_, told) in COMMANDS.items():
        print(f"{word:9}{told}")
    print(f"{'exit':9}退出，也可以用 stop、quit 或 Ctrl-D (leave; also stop, quit, Ctrl-D)")
    print(f"{'Ctrl-C':9}打断当前的回答 (end an answer early)")


def clear(talk: Talk, rest: str) -> None:
    talk.history.clear()
    print("(cleared)")


def set_system(talk: Talk, rest: str) -> None:
    check_system(talk.tokenizer, rest)
    talk.system = rest
    print(f"系统提示 (system prompt): {rest or '无 (none)'}")


def retry(talk: Talk, rest: str) -> None:
    if query := last_question(talk):
        before, talk.history = talk.history, talk.history[:-1]
        try:
            ask(talk, query)
        except UserError:  # a longer system prompt can leave no room
            talk.history = before
            raise


def let_base_answer(talk: Talk, rest: str) -> None:
    if BASE not in talk.speakers or talk.first == BASE:
        print("这里没有另外的基座 (there is no base beside this model)")
    elif query := last_question(talk):
        answer(talk, BASE, query, talk.history[:-1])


def last_question(talk: Talk) -> str:
    """The last question; "" where there is none, and then says so."""
    if not talk.history:
        print("还没有问题 (no question yet)")
        return ""
    return talk.history[-1][0]


def save(talk: Talk, rest: str) -> None:
    """Adds the conversation to a file: a row of training data for the name of a .jsonl, Markdown for any other."""
    pairs = [pair for pair in talk.history if pair[1]]
    if not rest or not pairs:
        print("用法：/save 文件，在有回答之后 (/save FILE, after an answer)")
        return
    model = talk.speakers[talk.first].about.model
    text = training_row(pairs, talk.system)
    if not rest.endswith(".jsonl"):
        text = markdown([Round(query, [Answer(talk.first, text=text)]) for query, text in pairs], model, "en")
    try:
        with open(Path(rest).expanduser(), "a", encoding="utf-8") as file:
            file.write(text)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of a user who does not exist
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{rest} can't be written: {reason}.") from error
    print(f"已保存 (saved): {rest}")


def count(talk: Talk, rest: str) -> None:
    used = len(encode_chat(talk.tokenizer, "", talk.history, talk.system)) if talk.history else 0
    left = talk.context - used
    print(f"对话 {used} 个 token，还剩 {left} 个；上次回答 {talk.speed:.1f} token/秒")
    print(f"(conversation: {used} tokens, room left: {left}; last answer: {talk.speed:.1f} tokens/s)")


COMMANDS: dict[str, tuple[Callable[[Talk, str], None], str]] = {
    "/help": (list_commands, "列出命令 (these commands)"),
    "/clear": (clear, "清空对话，也可以用 clear (new conversation; also clear)"),
    "/system": (set_system, "系统提示，后面写内容 (system prompt: /system TEXT)"),
    "/retry": (retry, "重新回答上一个问题 (answer the last question again)"),
    "/base": (let_base_answer, "让基座也回答上一个问题 (let the base answer the last question too)"),
    "/tokens": (count, "对话的长度、剩余空间和速度 (length, room left, speed)"),
    "/save": (save, "存到文件：.jsonl 存成训练数据，否则为 Markdown (/save FILE: .jsonl is a training row)"),
}


if __name__ == "__main__":
    with exit_on_user_error():
        main()
