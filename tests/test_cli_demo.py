"""The chat in the terminal: its commands, and a real terminal with its line editing."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_models import save_prefix

from common.chat import cli_demo
from common.chat.chat import generation_settings, stream_chat
from common.encoding import encode_chat
from common.loading import load_model, load_tokenizer

QUESTION = "类型#裙*颜色#白色*风格#甜美"
FLAGS = ("--temperature", "0", "--max_new_tokens", "24")


@pytest.fixture
def say(monkeypatch, capsys):
    """Gives lines to a chat, and returns what it prints at its start and after each line."""

    def run(*lines: str, flags: tuple[str, ...] = ()) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["cli_demo.py", *FLAGS, *flags])
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        cli_demo.main()
        return [part.strip() for part in capsys.readouterr().out.split("用户：")]

    return run


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    folder = save_prefix(tmp_path_factory.mktemp("trainings") / "mine", 0)
    scores = {"base": {"rouge-l": 18.2}, "tuned": {"rouge-l": 61.1}}
    (folder / "run.json").write_text(json.dumps({"progress": {"step": 9}, "scores": scores}))
    return folder


@pytest.fixture(scope="module")
def answer(demo_tokenizer, prefix):
    """The answer to QUESTION after a history, by the tuned model or by the base."""
    models = {"tuned": load_model("demo", ptuning_checkpoint=prefix), "base": load_model("demo")}

    def of(speaker: str, *history: list[str]) -> str:
        settings = generation_settings(24, 0, 1)
        return list(stream_chat(models[speaker], demo_tokenizer, QUESTION, list(history), **settings))[-1]

    return of


def test_the_conversation_is_asked_again_compared_counted_and_cleared(say, prefix, answer, demo_tokenizer):
    first = answer("tuned")
    second, of_base = answer("tuned", [QUESTION, first]), answer("base", [QUESTION, first])
    assert len({first, second, of_base}) == 3
    asked = (QUESTION, QUESTION, "/retry", "/base", "/tokens", "/clear", "/tokens", QUESTION)
    start, *said = say(*asked, flags=("--checkpoint", str(prefix)))
    assert start.splitlines()[0] == "demo · P-Tuning v2 · mine · step 9 · ROUGE-L 18.20 → 61.10"
    texts = [text.partition("：")[2] for text in said]
    assert [texts[0], texts[1], texts[2], texts[7]] == [first, second, second, first]
    assert said[3] == f"基座 (base)：{of_base}"
    used = len(encode_chat(demo_tokenizer, "", [[QUESTION, first], [QUESTION, second]]))
    assert f"conversation: {used} tokens, room left: {512 - used}; last answer: " in said[4]
    assert not said[4].endswith("last answer: 0.0 tokens/s)")
    assert "conversation: 0 tokens, room left: 512" in said[6]


def test_a_saved_conversation_is_a_training_row_or_markdown(say, prefix, answer, tmp_path):
    row, text = tmp_path / "rows.jsonl", tmp_path / "chat.md"
    flags = ("--checkpoint", str(prefix))
    _, early, _, _, _, nowhere, _ = say(
        f"/save {row}", QUESTION, f"/save {row}", f"/save {text}", f"/save {tmp_path}", flags=flags
    )
    assert "after an answer" in early
    assert nowhere == f"({tmp_path} can't be written: Is a directory.)"
    first = answer("tuned")
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": first}]
    assert [json.loads(line) for line in row.read_text().splitlines()] == [{"messages": turns}]
    assert text.read_text() == f"# demo\n\n> {QUESTION}\n\n**mine**\n\n{first}\n"


def test_a_system_prompt_holds_from_its_command_on(say):
    model, tokenizer = load_model("demo3"), load_tokenizer("demo3")

    def answer(system: str) -> str:
        settings = generation_settings(24, 0, 1)
        return list(stream_chat(model, tokenizer, QUESTION, system=system, **settings))[-1]

    lines = ("/system 你是客服。", QUESTION, "/system", "/retry")
    _, shown, said, _, plain, _ = say(*lines, flags=("--model_name_or_path", "demo3"))
    assert shown == "系统提示 (system prompt): 你是客服。"
    assert [said, plain] == [f"ChatGLM：{answer('你是客服。')}", f"ChatGLM：{answer('')}"]


@pytest.mark.parametrize("word", ["stop", "exit", "quit"])
def test_every_other_line_gets_one_sentence_and_a_word_leaves(say, word):
    _, *said = say("/retry", "/base", "/foo bar", "/system x", "/help", word, "never read")
    assert said[0] == "还没有问题 (no question yet)"
    assert said[1] == "这里没有另外的基座 (there is no base beside this model)"
    assert said[2] == "没有命令 /foo，/help 列出全部命令 (no command /foo; /help lists them)"
    assert said[3].endswith("know questions and answers only.)")
    assert [line.split()[0] for line in said[4].splitlines()] == [*cli_demo.COMMANDS, "exit", "Ctrl-C"]
    assert said[5:] == [""]


def test_a_terminal_brings_earlier_lines_back_also_in_the_next_chat(tmp_path):
    """By the arrow keys; the file is the user's own."""
    environ = os.environ | {"CHATGLM_CACHE": str(tmp_path), "TERM": "xterm"}
    for typed in (b"/tokens\r\x1b[A\r\x04", b"\x1b[A\r\x04"):
        main, terminal = pty.openpty()
        command = [sys.executable, str(ROOT / "common" / "chat" / "cli_demo.py"), *FLAGS]
        with subprocess.Popen(command, env=environ, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE) as chat:
            os.close(terminal)
            shown = b""
            try:
                while "用户：" not in shown.decode(errors="replace"):
                    shown += os.read(main, 4096)
                os.write(main, typed)
                time.sleep(0.2)
                with pytest.raises(OSError):  # the chat has ended
                    while True:
                        shown += os.read(main, 4096)
            finally:
                chat.send_signal(signal.SIGKILL)
        counted = shown.decode().count("room left: 512")
        assert counted == typed.count(b"\r")
    file = tmp_path / "chat_history"
    assert (file.read_text().split(), file.stat().st_mode & 0o077) == (
        ["/tokens"],
        0,
    )  # a line that repeats the one before is kept once


def test_the_chat_in_the_terminal_needs_no_packages_of_the_page():
    names = ("gradio", "fastapi", "starlette", "uvicorn")
    code = f"import sys; sys.modules |= dict.fromkeys({names}); import common.chat.cli_demo"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
