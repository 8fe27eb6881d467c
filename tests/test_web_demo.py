"""The chat in the browser: the real script in a real browser, and the code behind the page."""

import asyncio
import contextlib
import copy
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT
from tiny_models import save_prefix

from common.arguments import DataArguments, FullArguments
from common.chat.chat import generation_settings, stream_chat
from common.data.examples import Reading, Split, read_examples
from common.encoding import encode_chat
from common.errors import UserError
from common.loading import load_model, load_tokenizer
from common.methods.full import Full

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install -r requirements-web.txt")
from starlette.datastructures import Headers

from common.chat import guard, rounds, web_demo
from common.chat.about import About, about
from common.chat.events import COLUMNS
from common.chat.page import build_page
from common.chat.rounds import BASE, Answer, Round

QUESTION = "类型#裙*颜色#白色*风格#甜美"
GREEDY = generation_settings(200, 0, 1)
PASSWORD = "芝麻开门"
# Records the last answer of the first column whenever the page changes.
WATCH = """() => {
    window.seen = [];
    new MutationObserver(() => {
        const answers = document.querySelectorAll("#left [data-testid=bot]:not(:has(.note, .waiting))");
        const text = answers.length ? answers[answers.length - 1].innerText.trim() : "";
        if (text && text !== window.seen.at(-1)) window.seen.push(text);
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


class Server(NamedTuple):
    process: subprocess.Popen
    url: str
    busy_port: int
    stderr: Path


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """A training with a result, a checkpoint and a record; beside it lie a training on its base and other folders."""
    trainings = tmp_path_factory.mktemp("trainings")
    folder = save_prefix(trainings / "mine", 0)
    save_prefix(folder / "checkpoint-5", 1)
    save_prefix(trainings / "beside" / "checkpoint-7", 2, length=8)
    foreign = json.loads((save_prefix(trainings / "foreign", 3) / "config.json").read_text())
    (trainings / "foreign" / "config.json").write_text(json.dumps(foreign | {"_name_or_path": "demo3"}))
    (trainings / "empty").mkdir()
    (folder / "checkpoint-5" / "trainer_state.json").write_text('{"global_step": 5}')
    record = {
        "model": {"name": "demo <b>"},
        "progress": {"step": 9},
        "questions": [QUESTION, "类型#裤*风格#潮流"],
        "scores": {"base": {"rouge-l": 18.24}, "tuned": {"rouge-l": 61.1}},
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def server(prefix, tmp_path_factory):
    """`bash ptuning/web_demo.sh`, on a port that is taken already."""
    folder = tmp_path_factory.mktemp("server")
    variables = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "PASSWORD": PASSWORD}
    with socket.create_server(("127.0.0.1", 0)) as busy, open(folder / "stderr", "wb") as stderr:
        port = busy.getsockname()[1]
        process = subprocess.Popen(
            ["bash", str(ROOT / "ptuning" / "web_demo.sh"), "--temperature", "0", "--max_new_tokens", "200"],
            env=os.environ | variables | {"MODEL": "demo", "CHECKPOINT": str(prefix), "PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
            # A shell that runs the tests in the background lets every program that they start ignore Ctrl-C.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        ready = process.stdout.readline()
        assert "ready: http://127.0.0.1:" in ready, (folder / "stderr").read_text()
        yield Server(process, ready.split()[3], port, folder / "stderr")
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def context(server, browser):
    """A browser that has logged in."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.get_by_label("username").fill(web_demo.USER)
    page.get_by_label("password").fill(PASSWORD)
    page.get_by_role("button", name="Login").click()
    page.locator("#left").wait_for()
    page.close()
    yield context
    context.close()


def open_page(context, server):
    page = context.new_page()
    page.goto(server.url)
    page.locator("#header h1").wait_for()
    wait_until_idle(page)
    page.evaluate(WATCH)
    return page


@pytest.fixture
def page(server, context):
    """A new page, in which nothing may go wrong and which may ask no other host for anything."""
    errors, foreign = [], []

    def note_foreign(request) -> None:
        if not request.url.startswith((server.url, "data:", "blob:")):
            foreign.append(request.url)

    context.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    context.on("weberror", lambda error: errors.append(str(error.error)))
    context.on("request", note_foreign)
    page = open_page(context, server)
    yield page
    page.evaluate("localStorage.clear()")
    page.close()
    assert errors == []
    assert foreign == []


def ask(page, question: str) -> None:
    box = page.locator("#question textarea")
    box.fill(question)
    box.press("Enter")


def answer_of(page, column: int) -> str:
    """The last answer of a column, as the model wrote it."""
    answers = page.locator(f"#{COLUMNS[column]} [data-testid=bot]:not(:has(.note, .waiting))")
    return answers.last.get_attribute("aria-label").removeprefix("bot's message: ") if answers.count() else ""


def settled_answer(page, column: int) -> str:
    """The answer once it has not changed for a second."""
    seen, since = "", time.monotonic()
    while time.monotonic() < since + 1:
        if (now := answer_of(page, column)) != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.05)
    return seen


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never came true"
        time.sleep(0.05)


def test_a_taken_port_is_left_to_its_holder(server):
    assert (
        f"port {server.busy_port} is taken: using {int(server.url.split(':')[2].strip('/'))}."
        in server.stderr.read_text()
    )


def request(server, path: str = "/config", body: bytes | str | None = None, host: str = "", **headers: str):
    """The answer to one request, exactly as it is given; a body is posted. ``host``: that of the server by default."""
    address = server.url.removeprefix("http://").rstrip("/")
    method, sent = (
        "GET" if body is None else "POST",
        {"Host": host.replace("PORT", address.partition(":")[2]) or address},
    )
    if path.startswith("/gradio_api"):
        sent["Content-Type"] = "application/json"
    elif path == "/login":
        sent["Content-Type"] = "application/x-www-form-urlencoded"
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    sent |= {name.replace("_", "-"): value.replace("HERE", address) for name, value in headers.items()}
    if body is not None:
        sent.setdefault("Content-Length", str(len(body)))
    for name, value in sent.items():
        connection.putheader(name, value)
    connection.endheaders(body and body.encode())
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer, text


JOIN, CROSS = "/gradio_api/queue/join", {"Sec_Fetch_Site": "cross-site"}
REFUSED = [
    # DNS rebinding: the name is a stranger's, the address ours
    ({"host": "evil.example:PORT", "path": "/"}, 421, "does not answer to the name 'evil.example:"),
    ({"host": "localhost.evil.example"}, 421, "does not answer"),
    ({"host": "evil.example", "path": JOIN, "body": "{}"}, 421, "does not answer"),
    ({"host": "evil.example", "path": "/assets/index.js"}, 421, "does not answer"),
    ({"host": "127.0.0.1@evil.example"}, 421, "does not answer"),
    ({"host": "192.0.2.1:PORT"}, 421, "does not answer"),
    ({"X_Forwarded_Host": "evil.example"}, 421, "does not answer"),
    # a page elsewhere, in the browser of a visitor
    ({"Origin": "http://evil.example", "path": JOIN, "body": "{}"}, 403, "not from another page"),
    ({"Origin": "null", "path": JOIN, "body": "{}"}, 403, "not from another page"),
    ({"Origin": "http://localhost:1", "path": JOIN, "body": "{}"}, 403, "not from another page"),
    ({"Origin": "http://HERE@evil.example", "path": "/login", "body": "x"}, 403, "not from another page"),
    ({"Origin": "http://[", "path": "/"}, 403, "not from another page"),
    ({"path": "/logout", **CROSS, "Sec_Fetch_Mode": "no-cors"}, 403, "not from another page"),
    ({"path": "/login", "body": "x", **CROSS, "Sec_Fetch_Mode": "navigate"}, 403, "not from another page"),
    # what the page does not need
    ({"path": "/gradio_api/upload", "body": "x"}, 404, "nothing here"),
    ({"path": "/gradio_api/upload?upload_id=1", "body": "x"}, 404, "nothing here"),
    ({"path": "/gradio_api/file=/etc/passwd"}, 404, "nothing here"),
    ({"path": "/gradio_api/proxy=http://evil.example"}, 404, "nothing here"),
    ({"path": "/gradio_api/stream/1", "body": "x"}, 404, "nothing here"),
    ({"path": "/gradio_api/run/predict", "body": "{}"}, 404, "nothing here"),
    ({"path": "/gradio_api/call/ask", "body": "{}"}, 404, "nothing here"),
    ({"path": "/gradio_api/component_server", "body": "{}"}, 404, "nothing here"),
    ({"path": "/gradio_api/info"}, 404, "nothing here"),
    ({"path": "/docs"}, 404, "nothing here"),
    # a question of 100 MB: it is refused by its announced length, and nothing of it is sent
    ({"path": JOIN, "body": "", "Content_Length": "100000000"}, 413, "the question is too long"),
    # what remains asks for the password
    ({}, 401, "Not authenticated"),
    ({"path": JOIN, "body": '{"data": [], "session_hash": "a", "fn_index": 0}'}, 401, "Not authenticated"),
]


@pytest.mark.parametrize(("sent", "status", "sentence"), REFUSED)
def test_what_strangers_send_is_refused_by_one_sentence(server, sent, status, sentence):
    answer, text = request(server, **sent)
    assert (answer.status, sentence in text) == (status, True), text
    assert answer.headers["Access-Control-Allow-Origin"] is None
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "sent",
    [
        {},
        {"host": "localhost:PORT"},
        {"host": "LOCALHOST.:PORT"},
        {"host": "localhost:8000"},  # a tunnel may have another port
        {"host": "[::1]:PORT"},
        {"Origin": "http://HERE", "Sec_Fetch_Site": "same-origin"},
        {**CROSS, "Sec_Fetch_Mode": "navigate"},  # a link on another page
    ],
)
def test_visitors_come_in(server, sent):
    answer, _ = request(server, path="/", **sent)
    assert answer.status == 200


def test_a_question_that_never_ends_is_refused_at_the_limit(server):
    """Without an announced length. The rest of it is not read: the server closes the connection."""
    address, sent = server.url.removeprefix("http://").rstrip("/"), 0
    head = f"POST {JOIN} HTTP/1.1\r\nHost: {address}\r\nTransfer-Encoding: chunked\r\n\r\n"
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode())
        with contextlib.suppress(OSError):
            while sent < 100 * 2**20:
                connection.sendall(b"100000\r\n" + b"x" * 2**20 + b"\r\n")
                sent += 2**20
    assert sent < 100 * 2**20
    assert request(server, path="/")[0].status == 200


def test_each_wrong_password_delays_the_next_one(monkeypatch):
    monkeypatch.setattr(guard, "FIRST_WAIT", 0.05)
    is_right = guard.login("chatglm", PASSWORD)

    async def try_all() -> list[float]:
        begin, ends = time.monotonic(), []
        answers = [is_right("chatglm", word) for word in ("", "a", "芝麻", PASSWORD)]
        assert await asyncio.gather(*answers) == [False, False, False, True]  # at once, and one after the other
        ends.append(time.monotonic() - begin)
        assert await is_right("chatglm", PASSWORD)
        assert not await is_right("root", PASSWORD)
        full = [is_right("chatglm", "") for _ in range(guard.MOST_WAITING + 1)]
        found = await asyncio.gather(*full, return_exceptions=True)
        assert [getattr(error, "status_code", None) for error in found] == [None] * guard.MOST_WAITING + [429]
        return ends

    monkeypatch.setattr(guard, "LONGEST_WAIT", 0.2)
    assert asyncio.run(try_all())[0] >= 0.05 + 0.1 + 0.2


def test_a_proxy_and_other_machines_reach_the_page_by_names_that_the_user_gives():
    local = guard.Guard(None, "127.0.0.1", {"chat.example.com"}, 1)
    wide = guard.Guard(None, "0.0.0.0", set(), 1)
    assert local.is_known("chat.example.com") and not wide.is_known("chat.example.com")
    assert wide.is_known("192.0.2.1:7860") and wide.is_known(socket.gethostname())
    assert guard.Guard(None, "192.0.2.1", set(), 1).is_known("192.0.2.1:7860")
    proxied = Headers({"host": "127.0.0.1:7860", "origin": "https://chat.example.com"})
    assert local.is_from_here("POST", proxied) and not wide.is_from_here("POST", proxied)
    assert "frame-ancestors chat.example.com chat.example.com:*" in local.headers["Content-Security-Policy"]
    assert "X-Frame-Options" not in local.headers


@pytest.fixture(scope="module")
def expected(prefix, demo_tokenizer) -> dict[str, str]:
    """The answers of all speakers to QUESTION, without the page."""
    folders = {"mine": prefix, "checkpoint-5": prefix / "checkpoint-5", BASE: None}
    folders["beside/checkpoint-7"] = prefix.parent / "beside" / "checkpoint-7"
    models = {name: load_model("demo", ptuning_checkpoint=folder) for name, folder in folders.items()}
    answers = {name: list(stream_chat(each, demo_tokenizer, QUESTION, **GREEDY))[-1] for name, each in models.items()}
    assert len(set(answers.values())) == len(answers)
    return answers


def wait_for_answers(page, *texts: str) -> None:
    """Waits for the last answers of both columns, and until the page is idle."""
    wait_for(lambda: tuple(answer_of(page, column) for column in (0, 1)) == texts)
    wait_until_idle(page)


def wait_until_idle(page) -> None:
    """Gradio 6.31 loses what is sent in the moment in which it closes the stream of an answer."""
    page.locator("#stop[disabled]").wait_for()
    time.sleep(0.3)


def usable(page) -> list[str]:
    """The buttons that can be clicked."""
    return page.locator("#buttons button:enabled").all_inner_texts()


def test_the_answers_of_tuned_and_base_grow_side_by_side(page, expected):
    assert usable(page) == ["Settings"]
    ask(page, QUESTION)
    page.locator("#right .waiting").wait_for()
    wait_for(lambda: usable(page)[:4] == ["Stop (Esc)", "Retry", "Undo", "New chat"])
    wait_for_answers(page, expected["mine"], expected[BASE])
    assert usable(page) == ["Retry", "Undo", "New chat", "Export Markdown", "Export training row", "Settings"]
    seen = page.evaluate("window.seen")
    assert len(seen) > 3
    assert [len(text) for text in seen] == sorted(len(text) for text in seen)
    shown = page.locator("[data-testid=user]").all_inner_texts()
    assert [text.strip() for text in shown] == [QUESTION, QUESTION]  # its * and # are no Markdown
    notes = page.locator(".note").all_inner_texts()
    assert [note.rpartition(" · ")[0] for note in notes] == ["mine", "base"]
    assert all(float(note.split()[-2]) > 0 and note.endswith("tokens/s") for note in notes)
    assert page.locator("#header").inner_text() == "demo <b>\n\nP-Tuning v2 · mine · step 9 · ROUGE-L 18.24 → 61.10"


def test_a_stopped_answer_grows_no_more_and_the_next_one_comes(page, expected):
    page.get_by_role("button", name=QUESTION).click()  # an example
    wait_for(lambda: answer_of(page, 0))
    page.keyboard.press("Escape")
    stopped = settled_answer(page, 0)
    assert len(stopped) < len(expected["mine"])
    assert answer_of(page, 1) == ""
    assert page.locator(".waiting").count() == 0
    page.get_by_role("button", name="Retry").click()
    wait_for_answers(page, expected["mine"], expected[BASE])
    page.get_by_role("button", name="Undo").click()
    wait_for(lambda: page.locator("#question textarea").input_value() == QUESTION)
    assert page.locator("[data-testid=user]").count() == 0
    page.locator("#question textarea").press("Enter")
    wait_for(lambda: answer_of(page, 0))
    page.get_by_role("button", name="New chat").click()
    wait_for(lambda: page.locator("[data-testid=user]").count() == 0 and usable(page) == ["Settings"])


def test_a_question_is_changed_in_its_place_by_the_speaker_that_is_picked(page, expected):
    """The questions after it go, and a reload finds the conversation, and who spoke in it."""
    for count, question in enumerate(("类型#裤", "类型#上衣"), 1):
        ask(page, question)
        wait_for(lambda count=count: page.locator("#right .note").count() == count)
        wait_until_idle(page)
    page.locator("#picker input").click()
    names = [name.split("\n")[-1] for name in page.get_by_role("option").all_inner_texts()]  # without ✓
    assert names == ["mine", "checkpoint-5", "beside/checkpoint-7", "demo <b> (base)"]
    page.get_by_role("option", name="beside/checkpoint-7").click()
    wait_for(lambda: page.locator(".title").first.inner_text() == "beside/checkpoint-7")
    wait_until_idle(page)
    page.locator("#right").get_by_role("button", name="Edit").first.click()
    field = page.locator(".edit-textarea")
    assert field.input_value() == "类型#裤"
    field.fill(QUESTION)
    page.locator("#right").get_by_role("button", name="Submit").click()
    wait_for_answers(page, expected["beside/checkpoint-7"], expected[BASE])
    page.reload()
    wait_for_answers(page, expected["beside/checkpoint-7"], expected[BASE])
    assert [text.strip() for text in page.locator("#left [data-testid=user]").all_inner_texts()] == [QUESTION]
    assert page.locator("#picker input").input_value() == page.locator(".title").first.inner_text() == names[2]


def test_an_exported_conversation_is_a_row_that_the_trainer_reads(page, expected, demo_tokenizer, tmp_path):
    ask(page, QUESTION)
    wait_for_answers(page, expected["mine"], expected[BASE])
    with page.expect_download() as download:
        page.get_by_role("button", name="Export training row").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    reading = Reading()
    (example,) = read_examples(Split("train", DataArguments(), demo_tokenizer, str(file), [file], None), reading)
    assert [(turn.role, turn.content, turn.loss) for turn in example.content] == [
        ("user", QUESTION, False),
        ("assistant", expected["mine"], True),
    ]
    assert reading.bad == []
    wait_until_idle(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export Markdown").click()
    text = Path(download.value.path()).read_text()
    assert text == f"# demo <b>\n\n> {QUESTION}\n\n**mine**\n\n{expected['mine']}\n\n**base**\n\n{expected[BASE]}\n"


def test_a_question_that_is_too_long_stays_in_its_field(page, demo_tokenizer):
    ask(page, QUESTION * 40)
    length = len(encode_chat(demo_tokenizer, QUESTION * 40))
    page.get_by_text(f"The question is too long: {length:,} tokens, and there is room for 312 tokens.").wait_for()
    assert page.locator("#question textarea").input_value() == QUESTION * 40
    assert page.locator("[data-testid=user]").count() == 0


def test_a_phone_shows_one_column_in_the_language_of_its_reader(server, context, browser, expected):
    """The switch changes the language, which a new page remembers."""
    phone = browser.new_context(
        storage_state=context.storage_state(), locale="zh-HK", viewport={"width": 400, "height": 800}
    )
    page = open_page(phone, server)
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    assert page.locator("#buttons").inner_text().split("\n")[:3] == ["停止 (Esc)", "重新回答", "撤回"]
    wait_for(lambda: page.locator("#switch label").all_inner_texts() == ["微调后", "基座"])
    ask(page, QUESTION)
    wait_for_answers(page, expected["mine"], expected[BASE])
    assert [page.locator(f"#{column}").is_visible() for column in COLUMNS] == [True, False]
    page.get_by_text("基座", exact=True).click()
    assert [page.locator(f"#{column}").is_visible() for column in COLUMNS] == [False, True]
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    ask(page, QUESTION * 40)
    page.get_by_text("个 token，只放得下 312 个 token。").wait_for()
    page.get_by_role("button", name="English").click()
    page.get_by_role("button", name="Retry").wait_for()
    other = open_page(phone, server)
    assert other.locator("#buttons").inner_text().startswith("Stop (Esc)\nRetry")
    phone.close()


def test_the_browser_loads_nothing_from_elsewhere(server, context):
    page = open_page(context, server)
    refused = """() => new Promise(resolve => {
        document.addEventListener("securitypolicyviolation", event => resolve(event.blockedURI));
        new Image().src = "http://localhost:1/image.png";
        setTimeout(resolve, 5000, "loaded");
    })"""
    assert page.evaluate(refused) == "http://localhost:1/image.png"
    page.close()


def test_ctrl_c_ends_the_page_amid_an_answer(server, context):
    """At once: the bound only leaves time to a machine that does other things too."""
    page = open_page(context, server)
    ask(page, QUESTION)
    wait_for(lambda: answer_of(page, 0))
    os.killpg(server.process.pid, signal.SIGINT)
    code, stderr = server.process.wait(timeout=10), server.stderr.read_text()
    assert stderr.endswith("stopped\n")
    assert (code, "Traceback" in stderr) == (0, False)
    page.close()


# The code behind the page


@cache
def load(*flags: str) -> tuple[web_demo.Chat, Namespace]:
    args = web_demo.web_parser().parse_args(list(flags))
    return web_demo.load(args), args


READER = SimpleNamespace(headers={"accept-language": "zh"})


@pytest.mark.parametrize(("model", "known"), [("demo", False), ("demo3", True)])
def test_only_models_with_roles_have_a_system_prompt(model, known):
    page = build_page(*load("--model_name_or_path", model))
    texts = [block for block in page.blocks.values() if isinstance(block, gradio.Textbox)]
    (field,) = [text for text in texts if "system" in str(text.label)]
    assert field.interactive is known
    assert ("no_system" in str(field.placeholder)) is not known


def test_one_column_is_undone_and_cleared_as_two_are():
    """Gradio takes a list that is returned for a single field as its value, and for several as one value each."""
    chat, args = load("--model_name_or_path", "demo")
    page = build_page(chat, args)
    conversation = [Round(query, [Answer(BASE, text="好")]) for query in ("first", "last")]
    with ThreadPoolExecutor(1) as thread:  # in this one the browser's event loop runs
        for method, shown in ((chat.undo, ["first", "好"]), (chat.refresh, ["first", "好"]), (chat.clear, [])):
            event = next(event for event in page.fns.values() if event.fn == method)
            fields = page.postprocess_data(event, method(READER, conversation), None)
            _, column, *_ = thread.submit(asyncio.run, fields).result()
            assert [message["content"][0]["text"] for message in column] == shown


def test_visitors_at_once_get_the_answers_that_they_would_get_alone(prefix):
    chat, _ = load("--checkpoint", str(prefix))
    settings = generation_settings(16, 0, 1)

    def converse(question: str, picked: str, conversation: rounds.Conversation) -> None:
        for _ in chat.reply(conversation, question, picked, "", settings):
            pass

    asked = ((QUESTION, "mine"), ("类型#裤*风格#潮流", "checkpoint-5"), ("类型#上衣*颜色#黑色", "beside/checkpoint-7"))
    alone, together = ([[] for _ in asked] for _ in range(2))
    for pair, conversation in zip(asked, alone, strict=True):
        converse(*pair, conversation)
    visitors = [
        threading.Thread(target=converse, args=(*pair, each)) for pair, each in zip(asked, together, strict=True)
    ]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()

    def texts(conversations) -> list[list[str | None]]:
        return [[answer.text for answer in answers] for [(_, answers)] in conversations]

    assert texts(together) == texts(alone)
    assert all(tuned != base for tuned, base in texts(alone))


def test_an_abandoned_answer_gives_the_model_back(prefix):
    """The model has its prefix again and is free for the next visitor."""
    chat, _ = load("--checkpoint", str(prefix))
    conversation: rounds.Conversation = []
    answering = chat.reply(conversation, QUESTION, chat.first, "", generation_settings(24, 0, 1))
    next(answering)
    while conversation[0].answers[1].text is None:
        next(answering)
    answering.close()
    with chat.speakers[chat.first].open() as model:
        assert model.base_model.prefix_encoder is not None
    assert not chat.turn.locked()


def test_rounds_that_no_longer_fit_are_forgotten_and_the_page_says_so():
    chat, _ = load("--model_name_or_path", "demo3")
    settings = generation_settings(16, 0, 1)
    long = [Round("类型#裙" * 40, [Answer(BASE, text="这条裙子。" * 40)]) for _ in range(6)]
    unanswered, last = Round("never answered", [Answer(BASE)]), Round("last", [Answer(BASE, text="好")])
    conversation = [*long, unanswered, last]
    list(chat.reply(conversation, QUESTION, BASE, "你是客服。", settings))
    [answer] = conversation[-1].answers
    assert 0 < answer.forgotten < 6
    remembered = [[old.query, old.answers[0].text] for old in (*long[answer.forgotten :], last)]
    prompt = encode_chat(chat.tokenizer, QUESTION, remembered, "你是客服。")
    longer = encode_chat(
        chat.tokenizer, QUESTION, [[long[0].query, long[0].answers[0].text], *remembered], "你是客服。"
    )
    assert len(prompt) + 16 <= chat.context < len(longer) + 16
    with chat.speakers[BASE].open() as model:
        *_, alone = stream_chat(model, chat.tokenizer, QUESTION, remembered, "你是客服。", **settings)
    assert answer.text == alone
    notes = [message["content"][0]["text"] for message in rounds.messages(conversation, 0, "zh-CN")]
    assert f"上下文已满，忘记了最早的 {answer.forgotten} 轮" in notes[-3]


def test_a_question_that_does_not_fit_changes_nothing():
    chat, _ = load("--model_name_or_path", "demo")
    conversation: rounds.Conversation = []
    for question, length in (("类型#裙" * 40, "[0-9]+ tokens"), ("裙" * 10**7, "10,000,000 characters")):
        with pytest.raises(UserError, match=f"the question is too long: it has {length}, .* room for 12"):
            next(chat.reply(conversation, question, BASE, "", generation_settings(500, 0, 1)))
    with pytest.raises(UserError, match="no text in UTF-8"):
        next(chat.reply(conversation, "\ud800", BASE, "", generation_settings(5, 0, 1)))
    assert conversation == []


def test_a_changed_question_that_does_not_fit_leaves_the_conversation_as_it_was(monkeypatch):
    chat, _ = load("--model_name_or_path", "demo")
    said = []
    monkeypatch.setattr(gradio, "Warning", said.append)
    conversation = [Round(query, [Answer(BASE, text="好")]) for query in ("first", "last")]
    before = copy.deepcopy(conversation)
    *_, fields = chat.answer(READER, "类型#裙" * 40, conversation, 0, BASE, "", 500, 0, 1)
    assert conversation == before
    assert [len(message) for message in fields[1:2]] == [4]
    (text,) = said
    assert text.startswith("问题太长：") and "--" not in text


def test_a_speaker_that_is_gone_is_one_sentence(prefix, tmp_path, monkeypatch):
    """The question is back in its field."""
    shutil.copytree(prefix, tmp_path / "mine")
    chat, _ = load("--checkpoint", str(tmp_path / "mine"))
    shutil.rmtree(tmp_path / "mine" / "checkpoint-5")
    said = []
    monkeypatch.setattr(gradio, "Warning", said.append)
    conversation: rounds.Conversation = []
    *_, fields = chat.answer(READER, QUESTION, conversation, 0, "checkpoint-5", "", 5, 0, 1)
    assert (fields[0], conversation, said) == (QUESTION, [], ["现在不能用这个模型或这些设置回答。"])


def test_what_the_browser_kept_is_a_conversation_or_nothing():
    conversation = [Round("问", [Answer("mine", 2, "答", 3.5), Answer(BASE)])]
    kept = json.loads(json.dumps(rounds.to_browser(conversation)))
    assert rounds.from_browser(kept, 2) == conversation
    wrong = ("x", [["问"]], [["问", [{"speaker": 1}]]], [[None, []]], {"a": 1}, [["问", [{"text": "答"}]]])
    assert [rounds.from_browser(each, 1) for each in (*wrong, kept)] == [[]] * 7  # the last one has two columns
    long = [Round(str(number), [Answer(BASE, text="长" * 30_000)]) for number in range(5)]
    assert [query for query, _ in rounds.to_browser(long)] == ["2", "3", "4"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"scores": 3, "model": {"name": 1}, "questions": [1, " "], "progress": []}']
)
def test_a_broken_record_of_a_training_tells_nothing(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    assert about(tmp_path) == About()


def test_a_fully_trained_model_is_compared_with_the_base_that_it_names(tmp_path):
    trained = load_model("demo")
    torch.nn.init.zeros_(trained.lm_head.weight)
    Full(FullArguments()).save(trained, tmp_path)
    load_tokenizer("demo").save_pretrained(str(tmp_path))
    chat, _ = load("--checkpoint", str(tmp_path), "--compare", "true")
    weights = []
    for speaker in chat.speakers.values():
        with speaker.open() as model:
            weights.append(model.lm_head.weight)
    assert weights[0].count_nonzero() == 0
    base, _ = load("--model_name_or_path", "demo")
    with base.speakers[BASE].open() as model:
        assert torch.equal(weights[1], model.lm_head.weight)
    alone, _ = load("--checkpoint", str(tmp_path))
    assert (list(alone.speakers), alone.columns) == ([tmp_path.name], 1)


def test_what_names_no_base_can_not_be_compared(demo_folder):
    with pytest.raises(UserError, match="does not name its base model: set MODEL"):
        load("--checkpoint", str(demo_folder), "--compare", "true")


@pytest.mark.parametrize(
    ("host", "port", "said"),
    [("no.such.host", 7860, "can't listen on no.such.host:7860"), ("127.0.0.1", 70000, "no free port")],
)
def test_an_address_that_is_none_is_one_sentence(host, port, said):
    with pytest.raises(UserError, match=said):
        guard.find_port(host, port)
