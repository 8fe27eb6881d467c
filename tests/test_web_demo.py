"""The chat in the browser: the real script, looked at with a real browser; and what is behind the page."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT

from common.arguments import FullArguments, PrefixArguments
from common.chat.chat import generation_settings, stream_chat
from common.encoding import encode_chat
from common.errors import UserError
from common.loading import load_model, load_tokenizer
from common.methods.full import Full
from common.methods.prefix import PTuning

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install -r requirements-web.txt")
from common.chat import web_demo

CHROMIUM = shutil.which("chromium")
QUESTION = "类型#裙*颜色#白色*风格#甜美"
GREEDY = generation_settings(200, 0, 1)
PASSWORD = "芝麻开门"
# What the last answer of the first column was, each time that the page changed.
WATCH = """() => {
    window.seen = [];
    new MutationObserver(() => {
        const answers = document.querySelector(".chat").querySelectorAll("[data-testid=bot]");
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
    """A prefix with which the demo talks at length, and quite unlike its base."""
    folder = tmp_path_factory.mktemp("prefix")
    model = load_model("demo", pre_seq_len=16)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.base_model.prefix_encoder.embedding.weight, std=10)
    PTuning(PrefixArguments()).save(model, folder)
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
        )
        ready = process.stdout.readline()
        assert "ready: http://127.0.0.1:" in ready, (folder / "stderr").read_text()
        yield Server(process, ready.split()[3], port, folder / "stderr")
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -r tests/requirements.txt")
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt install chromium fonts-wqy-microhei")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser):
    """The page after the login. Nothing may go wrong in it, nor ask another machine for anything."""
    context = browser.new_context()
    page = context.new_page()
    errors, foreign = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith((server.url, "data:", "blob:")) else foreign.append(request.url),
    )
    page.goto(server.url)
    log_in(page)
    page.evaluate(WATCH)
    yield page
    context.close()
    assert errors == []
    assert foreign == []


def log_in(page) -> None:
    page.get_by_label("username").fill(web_demo.USER)
    page.get_by_label("password").fill(PASSWORD)
    page.get_by_role("button", name="Login").click()
    page.locator(".chat").first.wait_for()


def ask(page, question: str) -> None:
    box = page.locator("textarea").first
    box.fill(question)
    box.press("Enter")


def answer_of(page, column: int) -> str:
    """The last answer of a column, as the model wrote it."""
    answers = page.locator(".chat").nth(column).locator("[data-testid=bot]")
    return answers.last.get_attribute("aria-label").removeprefix("bot's message: ") if answers.count() else ""


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_taken_port_is_left_to_its_holder(server):
    assert (
        f"port {server.busy_port} is taken: using {int(server.url.split(':')[2].strip('/'))}."
        in server.stderr.read_text()
    )


def test_the_password_is_asked_for(server):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{server.url}config")


def test_the_answers_of_tuned_and_base_grow_side_by_side(page, prefix, demo_tokenizer):
    expected = [
        list(stream_chat(load_model("demo", ptuning_checkpoint=checkpoint), demo_tokenizer, QUESTION, **GREEDY))[-1]
        for checkpoint in (prefix, None)
    ]
    ask(page, QUESTION)
    wait_for(lambda: answer_of(page, 1) == expected[1])
    assert answer_of(page, 0) == expected[0]
    seen = page.evaluate("window.seen")
    assert len(seen) > 3
    assert [len(text) for text in seen] == sorted(len(text) for text in seen)
    shown = page.locator("[data-testid=user]").all_inner_texts()
    assert [text.strip() for text in shown] == [QUESTION, QUESTION]  # its * and # are no Markdown


def test_a_stopped_answer_grows_no_more_and_the_next_one_comes(page, prefix, demo_tokenizer):
    ask(page, QUESTION)
    wait_for(lambda: answer_of(page, 0))
    page.get_by_role("button", name="stop").click()
    time.sleep(0.3)
    stopped = answer_of(page, 0)
    time.sleep(0.7)
    assert answer_of(page, 0) == stopped
    assert answer_of(page, 1) == ""
    page.get_by_role("button", name="undo").click()
    wait_for(lambda: page.locator("textarea").first.input_value() == QUESTION)
    assert page.locator("[data-testid=user]").count() == 0
    page.locator("textarea").first.press("Enter")
    wait_for(lambda: answer_of(page, 1))  # the base is asked after the tuned model has finished
    assert len(answer_of(page, 0)) > len(stopped)
    page.get_by_role("button", name="new").click()
    wait_for(lambda: page.locator("[data-testid=user]").count() == 0)


def test_the_browser_loads_nothing_from_elsewhere(server, browser):
    page = browser.new_page()
    page.goto(server.url)
    log_in(page)
    refused = """() => new Promise(resolve => {
        document.addEventListener("securitypolicyviolation", event => resolve(event.blockedURI));
        new Image().src = "http://localhost:1/image.png";
        setTimeout(resolve, 5000, "loaded");
    })"""
    assert page.evaluate(refused) == "http://localhost:1/image.png"
    page.close()


def test_ctrl_c_ends_the_page_amid_an_answer(server, browser):
    page = browser.new_page()
    page.goto(server.url)
    log_in(page)
    ask(page, QUESTION)
    wait_for(lambda: answer_of(page, 0))
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.process.wait(timeout=20) == 0
    said = server.stderr.read_text()
    assert said.endswith("stopped\n")
    assert "Traceback" not in said
    page.close()


# What is behind the page


def load(*flags: str) -> web_demo.Chat:
    return web_demo.load(web_demo.web_parser().parse_args(list(flags)))


def answers_of(conversation: web_demo.Conversation) -> list[str | None]:
    return [rounds[-1].answer for rounds in conversation]


@pytest.mark.parametrize(("model", "known"), [("demo", False), ("demo3", True)])
def test_only_models_with_roles_have_a_system_prompt(model, known):
    args = web_demo.web_parser().parse_args(["--model_name_or_path", model])
    page = web_demo.build_page(web_demo.load(args), args)
    texts = [block for block in page.blocks.values() if isinstance(block, gradio.Textbox)]
    field = next(text for text in texts if "system prompt" in (text.label or ""))
    assert field.interactive is known
    assert ("no system prompt" in field.placeholder) is not known


def test_visitors_at_once_get_the_answers_that_they_would_get_alone(prefix):
    chat = load("--ptuning_checkpoint", str(prefix))
    settings = generation_settings(24, 0, 1)

    def converse(question: str, conversation: web_demo.Conversation) -> None:
        for _ in web_demo.reply(chat, conversation, question, "", settings):
            pass

    questions = (QUESTION, "类型#裤*风格#潮流", "类型#上衣*颜色#黑色")
    alone, together = ([[[], []] for _ in questions] for _ in range(2))
    for question, conversation in zip(questions, alone, strict=True):
        converse(question, conversation)
    visitors = [threading.Thread(target=converse, args=pair) for pair in zip(questions, together, strict=True)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert list(map(answers_of, together)) == list(map(answers_of, alone))
    assert all(tuned != base for tuned, base in map(answers_of, alone))


def test_an_abandoned_answer_gives_the_model_back(prefix):
    """As it is: with its prefix, and free for the next visitor."""
    chat = load("--ptuning_checkpoint", str(prefix))
    conversation: web_demo.Conversation = [[], []]
    answering = web_demo.reply(chat, conversation, QUESTION, "", generation_settings(24, 0, 1))
    while conversation[1][-1].answer is None if conversation[1] else True:
        next(answering)
    answering.close()
    with chat.speakers[0].model() as model:
        assert model.base_model.prefix_encoder is not None
    assert chat.turn.acquire(blocking=False)


def test_rounds_that_no_longer_fit_are_forgotten_and_the_page_says_so():
    chat = load("--model_name_or_path", "demo3")
    long = [web_demo.Round("类型#裙" * 40, "这条裙子。" * 40) for _ in range(6)]
    conversation = [[*long, web_demo.Round("never answered"), web_demo.Round("last", "好")]]
    list(web_demo.reply(chat, conversation, QUESTION, "你是客服。", generation_settings(16, 0, 1)))
    forgotten = conversation[0][-1].forgotten
    assert 0 < forgotten < 6
    remembered = [[old.query, old.answer] for old in conversation[0][forgotten:-1] if old.answer]
    prompt = encode_chat(chat.tokenizer, QUESTION, remembered, "你是客服。")
    longer = encode_chat(chat.tokenizer, QUESTION, [[long[0].query, long[0].answer], *remembered], "你是客服。")
    assert len(prompt) + 16 <= chat.context < len(longer) + 16
    expected = chat.speakers[0].model()
    with expected as model:
        *_, answer = stream_chat(
            model, chat.tokenizer, QUESTION, remembered, "你是客服。", **generation_settings(16, 0, 1)
        )
    assert answers_of(conversation) == [answer]
    notes = [message["content"][0]["text"] for message in web_demo.messages(conversation[0])]
    assert notes[-2] == f"*（最早的 {forgotten} 轮放不进上下文，已忘记 / oldest rounds forgotten: {forgotten}）*"


def test_a_question_that_does_not_fit_changes_nothing():
    chat = load("--model_name_or_path", "demo")
    conversation: web_demo.Conversation = [[]]
    with pytest.raises(UserError, match="the question is too long: it has .* room for 12"):
        next(web_demo.reply(chat, conversation, "类型#裙" * 40, "", generation_settings(500, 0, 1)))
    assert conversation == [[]]


def test_a_fully_trained_model_is_compared_with_the_base_that_it_names(tmp_path):
    trained = load_model("demo")
    torch.nn.init.zeros_(trained.lm_head.weight)
    Full(FullArguments()).save(trained, tmp_path)
    load_tokenizer("demo").save_pretrained(str(tmp_path))
    chat = load("--model_name_or_path", str(tmp_path), "--compare", "true")
    weights = []
    for speaker in chat.speakers:
        with speaker.model() as model:
            weights.append(model.lm_head.weight)
    assert weights[0].count_nonzero() == 0
    assert torch.equal(weights[1], load_model("demo").lm_head.weight)
    assert [speaker.title for speaker in load("--model_name_or_path", str(tmp_path)).speakers] == ["ChatGLM"]


def test_what_names_no_base_can_not_be_compared():
    with pytest.raises(UserError, match="--compare true: the base of demo is not at any place that it names"):
        load("--compare", "true")


@pytest.mark.parametrize(
    ("host", "port", "said"),
    [("no.such.host", 7860, "can't listen on no.such.host:7860"), ("127.0.0.1", 70000, "no free port")],
)
def test_an_address_that_is_none_is_one_sentence(host, port, said):
    with pytest.raises(UserError, match=said):
        web_demo.find_port(host, port)


@pytest.mark.parametrize("method", ["ptuning", "lora", "full"])
@pytest.mark.parametrize("script", ["web_demo.sh", "cli_demo.sh"])
def test_a_script_without_a_trained_model_says_what_to_do(method, script, tmp_path):
    variables = {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "MODEL": "nobody/untrained",
    }
    done = subprocess.run(
        ["bash", str(ROOT / method / script)], cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"train first (bash {method}/train.sh)" in done.stderr
