"""The endpoint, asked by the real OpenAI client, by LangChain and by plain HTTP."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
import torch
from langchain_openai import ChatOpenAI
from shell import ROOT, environment

from common.arguments import LoraArguments, PrefixArguments
from common.chat.chat import generation_settings, stream_chat
from common.chat.protocol import ApiError, ChatAsked, call_starts, prompt_of, split_answer, tool_call
from common.encoding import encode_chat
from common.loading import load_model, load_tokenizer
from common.methods.lora import Lora, attach_lora
from common.methods.prefix import PTuning, attach_prefix

QUESTIONS = ["类型#裙*颜色#白色*风格#甜美", "类型#裤*裤型#阔腿裤", "类型#上衣*材质#棉*图案#条纹", "类型#裙*裙型#A字"]
KEY = "secret"
SERVED = {"first": "one", "two": "two"}  # a prefix's name in requests, and that of its folder


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> dict[str, Path]:
    """Two prefixes of different lengths."""
    torch.manual_seed(0)
    folders = {}
    for name, length in (("one", 4), ("two", 7)):
        attach_prefix(model := load_model("demo"), length)
        folders[name] = tmp_path_factory.mktemp("prefixes") / name
        PTuning(PrefixArguments()).save(model, folders[name])
        config = json.loads((folders[name] / "config.json").read_text())
        (folders[name] / "config.json").write_text(json.dumps(config | {"_name_or_path": "demo"}))
    return folders


@pytest.fixture(scope="module")
def addresses(prefixes) -> Iterator[dict[str, str]]:
    """Two endpoints: demo3 with a key, and two prefixes of demo beside their base."""
    jobs, found = {}, {}
    checkpoint = f"first={prefixes['one']},{prefixes['two']}"
    flags = {"demo3": ["--model_name_or_path", "demo3"], "prefix": ["--checkpoint", checkpoint]}
    for name, given in flags.items():
        command = [sys.executable, str(ROOT / "common/chat/server.py"), *given]
        environ = environment(API_KEY=KEY if name == "demo3" else "")
        jobs[name] = subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    try:
        for name, job in jobs.items():
            assert (ready := re.search("ready: (http://127.0.0.1:[0-9]+)/v1", job.stdout.readline()))
            found[name] = ready[1]
        yield found
    finally:
        for job in jobs.values():
            job.terminate()
            job.wait()


@pytest.fixture(scope="module")
def client(addresses) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{addresses['demo3']}/v1", api_key=KEY, max_retries=0)


def ask(client: openai.OpenAI, question: str, model: str = "tuned", **settings):
    settings = {"temperature": 0, "max_tokens": 60} | settings
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], **settings)


def alone(model, tokenizer, question: str, tokens: int = 60) -> str:
    *_, answer = stream_chat(model, tokenizer, question, **generation_settings(tokens, 0, 1))
    return answer


def test_an_answer_is_that_of_the_chat_and_is_counted(client):
    model, tokenizer = load_model("demo3"), load_tokenizer("demo3")
    reply = ask(client, QUESTIONS[0])
    assert reply.choices[0].message.content == alone(model, tokenizer, QUESTIONS[0])
    assert reply.choices[0].finish_reason == "stop" and reply.model == "tuned"
    assert reply.usage.prompt_tokens == len(encode_chat(tokenizer, QUESTIONS[0]))
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_gives_the_same_text_in_pieces_that_are_whole_characters(client):
    whole = ask(client, QUESTIONS[0]).choices[0].message.content
    chunks = list(ask(client, QUESTIONS[0], stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert (
        "".join(pieces) == whole and len([piece for piece in pieces if piece]) > 5 and "\ufffd" not in "".join(pieces)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens > 5


def test_length_stop_seed_and_logprobs_do_what_they_say(client):
    whole = ask(client, QUESTIONS[0], logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    entries = whole.choices[0].logprobs.content
    assert len(entries) == whole.usage.completion_tokens
    assert all(entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob for entry in entries)
    chunks = ask(client, QUESTIONS[0], logprobs=True, top_logprobs=2, stream=True)
    assert [entry.token for chunk in chunks for entry in chunk.choices[0].logprobs.content] == [
        e.token for e in entries
    ]
    short = ask(client, QUESTIONS[0], max_tokens=6).choices[0]
    assert short.finish_reason == "length" and text.startswith(short.message.content) and short.message.content
    stop = text[4:6]
    for streamed in (False, True):
        reply = ask(client, QUESTIONS[0], stop=[stop, "never"], stream=streamed)
        said = (
            "".join(chunk.choices[0].delta.content or "" for chunk in reply)
            if streamed
            else reply.choices[0].message.content
        )
        assert said == text[:4]
    seeds = [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]
    sampled = [ask(client, QUESTIONS[0], temperature=2, seed=seed).choices[0].message.content for seed in seeds]
    assert sampled[:5] == sampled[5:] and len(set(sampled)) > 1


def test_requests_at_once_get_the_answers_that_they_get_alone(client):
    expected = [ask(client, question).choices[0].message.content for question in QUESTIONS]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda number: ask(client, QUESTIONS[number % 4]).choices[0].message.content, range(48)))
    assert found == expected * 12


def test_prefixes_and_their_base_answer_beside_each_other(addresses, prefixes):
    """ChatGLM-6B with its two kinds of positions, with one of two prefixes and without any, in one server."""
    client = openai.OpenAI(base_url=f"{addresses['prefix']}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["first", "two", "base"]
    tokenizer = load_tokenizer("demo")
    expected = {"base": load_model("demo")}
    expected |= {name: load_model("demo", ptuning_checkpoint=prefixes[own]) for name, own in SERVED.items()}
    jobs = [(name, question) for question in QUESTIONS for name in expected]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: ask(client, job[1], job[0], max_tokens=24).choices[0].message.content, jobs))
    for (name, question), answer in zip(jobs, found, strict=True):
        assert answer == alone(expected[name], tokenizer, question, 24), (name, question)


def test_plain_text_is_completed(client):
    reply = client.completions.create(model="tuned", prompt="这条裙子", max_tokens=5, temperature=0, logprobs=1)
    assert reply.choices[0].text and reply.choices[0].finish_reason == "length"
    assert len(reply.choices[0].logprobs.tokens) == reply.usage.completion_tokens == 5
    pieces = client.completions.create(model="tuned", prompt="这条裙子", max_tokens=5, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == reply.choices[0].text
    pieces = client.completions.create(
        model="tuned", prompt="这条裙子", max_tokens=5, temperature=0, stream=True, logprobs=1
    )
    assert [token for piece in pieces for token in piece.choices[0].logprobs.tokens] == reply.choices[0].logprobs.tokens


def test_langchain_asks_and_streams(addresses):
    model = ChatOpenAI(
        model="tuned", base_url=f"{addresses['demo3']}/v1", api_key=KEY, temperature=0, max_tokens=60, max_retries=0
    )
    answer = model.invoke(QUESTIONS[0]).content
    assert answer == alone(load_model("demo3"), load_tokenizer("demo3"), QUESTIONS[0])
    assert "".join(chunk.content for chunk in model.stream(QUESTIONS[0])) == answer


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "the model 'gpt' does not exist; there are tuned"),
        ({"max_tokens": 5000}, openai.BadRequestError, "tokens and the model's context 1024; max_tokens is 5000"),
        ({"question": "裙" * 3000}, openai.BadRequestError, "the prompt has .* tokens and the model's context 1024"),
        ({"n": 2}, openai.BadRequestError, "n: "),
        ({"temperature": 3}, openai.BadRequestError, "temperature: "),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format"),
        ({"logit_bias": {"5": 1}}, openai.BadRequestError, "logit_bias: not supported here"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice: there is no such tool; there are none"),
        ({"tools": [{"function": "x"}]}, openai.BadRequestError, "tools: each must be like"),
        ({"tools": [{}], "tool_choice": "required"}, openai.BadRequestError, "tools: each must be like"),
        ({"tool_choice": "some"}, openai.BadRequestError, "tool_choice"),
        ({"seed": 2**64}, openai.BadRequestError, "seed: "),
    ],
)
def test_bad_settings_are_refused_as_openai_does(client, settings, error, sentence):
    settings = dict(settings)
    question = settings.pop("question", "你好")
    with pytest.raises(error, match=sentence):
        ask(client, question, **settings)


def test_wrong_keys_broken_requests_and_other_pages_are_refused(addresses, client):
    wrong = openai.OpenAI(base_url=f"{addresses['demo3']}/v1", api_key="wrong", max_retries=0)
    for request in (lambda: ask(wrong, "你好"), lambda: wrong.models.list()):
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            request()
    address, headers = f"{addresses['demo3']}/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
    reply = httpx.post(address, content=b'{"model": "tuned", ', headers=headers)
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"
    body = {"model": "tuned", "messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "x"}]}
    assert (
        "the last one must be of the user" in httpx.post(address, json=body, headers=headers).json()["error"]["message"]
    )
    body["messages"] = [{"role": "judge", "content": "x"}]
    assert (
        "message 1: unknown role 'judge'" in httpx.post(address, json=body, headers=headers).json()["error"]["message"]
    )
    page = headers | {"Origin": "http://evil.example"}
    assert httpx.post(address, json=body, headers=page).status_code == 403
    assert httpx.post(address, json=body, headers=headers | {"Host": "evil.example"}).status_code == 421
    for method, path, status in (
        ("GET", "/docs", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/embeddings", 404),
    ):
        reply = httpx.request(method, addresses["demo3"] + path, headers=headers)
        assert reply.status_code == status and reply.json()["error"]["message"]
    assert client.models.retrieve("tuned").id == "tuned"


def test_what_clients_leave_open_or_write_in_other_ways_is_taken(addresses, client):
    address, headers = f"{addresses['demo3']}/v1", {"Authorization": f"Bearer {KEY}"}
    body = {"model": "tuned", "messages": [{"role": "user", "content": QUESTIONS[0]}], "seed": 5, "logit_bias": None}
    body |= {
        "temperature": 1e-40,
        "top_p": None,
        "stream": None,
        "stop": ["", "never"],
        "response_format": {"type": "text"},
    }
    reply = httpx.post(f"{address}/chat/completions", json=body, headers=headers).json()
    assert reply["choices"][0]["message"]["content"] == ask(client, QUESTIONS[0]).choices[0].message.content
    texts = [
        client.completions.create(model="tuned", prompt=prompt, max_tokens=5, temperature=0).choices[0].text
        for prompt in ("这条裙子", ["这条裙子"])
    ]
    assert texts[0] == texts[1]


def test_a_client_that_leaves_in_the_middle_harms_nobody(addresses, client):
    body = {"model": "tuned", "stream": True, "temperature": 1.8, "max_tokens": 900, "seed": 1}
    body["messages"] = [{"role": "user", "content": QUESTIONS[0]}]
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{addresses['demo3']}/v1/chat/completions", json=body, headers=headers) as stream:
        next(stream.iter_lines())
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(
            f"{addresses['demo3']}/v1/chat/completions", json=body | {"stream": False}, headers=headers, timeout=0.1
        )
    assert ask(client, QUESTIONS[1]).choices[0].message.content
    for _ in range(100):
        if "requests_running 0" in httpx.get(f"{addresses['demo3']}/metrics").text:
            break
        time.sleep(0.1)
    assert "requests_running 0\nchatglm_requests_waiting 0" in httpx.get(f"{addresses['demo3']}/metrics").text


def test_models_without_roles_take_questions_and_answers_only(addresses):
    client = openai.OpenAI(base_url=f"{addresses['prefix']}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="reads questions of the user and answers of"):
        client.chat.completions.create(
            model="two", messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
        )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--max_batch", "0"], "--max_batch 0: it must be above 0"),
        (["--served_name", "base"], "base is that of the base model"),
        (["--model_name_or_path", "nowhere"], "no model folder nowhere"),
        (["--checkpoint", "a={one},b={adapter}"], "can't share a base model: give prefixes only, or adapters only"),
        (["--checkpoint", "{one},{two}", "--served_name", "x"], "--served_name x: the names of several models stand"),
        (["--checkpoint", ","], "',' names no training"),
        (["--checkpoint", "{one},{one}"], "'one' would name two models"),
        (["--checkpoint", "{one},b={other}"], "was trained on demo3, and"),
        (["--host", "203.0.113.7"], "can't listen on 203.0.113.7"),
    ],
)
def test_bad_flags_end_the_program_before_a_model_is_loaded(flags, sentence, prefixes, tmp_path):
    folders = prefixes | {"adapter": tmp_path / "adapter", "other": tmp_path / "other"}
    shutil.copytree(prefixes["one"], folders["other"])
    (folders["other"] / "config.json").write_text('{"pre_seq_len": 4, "_name_or_path": "demo3"}')
    Lora(LoraArguments()).save(attach_lora(load_model("demo"), LoraArguments()), folders["adapter"])
    flags = [flag.format(**folders) for flag in flags]
    done = subprocess.run(
        [sys.executable, str(ROOT / "common/chat/server.py"), *flags], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 2 and sentence in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


# Tools

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("get", "get_time")
]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_begins_with_the_call_that_a_request_demands(client, stream):
    for choice, names in (
        ({"type": "function", "function": {"name": "get_time"}}, ["get_time"]),
        ("required", ["get", "get_time"]),
    ):
        reply = ask(client, QUESTIONS[0], tools=TOOLS, tool_choice=choice, stream=stream)
        text = "".join(c.choices[0].delta.content or "" for c in reply) if stream else reply.choices[0].message.content
        name, fence, call = text.split("\n", 2)
        assert name in names and fence == "```python" and call.startswith("tool_call")  # the demo knows no arguments


def test_tools_and_their_results_reach_the_model_as_they_are_trained():
    tokenizer = load_tokenizer("demo3")
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
    asked = ChatAsked(
        model="tuned",
        messages=[
            {"role": "user", "content": "天气"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "3°"},
        ],
        tools=[{"type": "function", "function": {"name": "weather"}}],
    )
    text = tokenizer.decode(prompt_of(asked, tokenizer))
    assert '<|system|> \n [{"type": "function", "function": {"name": "weather"}}]' in text
    assert "<|assistant|> weather\n ```python\ntool_call(city='北京')\n``` <|observation|> \n 3° <|assistant|>" in text
    assert "<|system|>" not in tokenizer.decode(prompt_of(asked.model_copy(update={"tool_choice": "none"}), tokenizer))
    with pytest.raises(ApiError, match="messages.name: not supported here"):
        prompt_of(asked.model_copy(update={"messages": [{"role": "user", "content": "x", "name": "y"}]}), tokenizer)


@pytest.mark.parametrize(
    ("content", "arguments"),
    [
        ("```python\ntool_call(city='北京', days=3)\n```", {"city": "北京", "days": 3}),
        ("tool_call(**{'a-b': [1, None]})", {"a-b": [1, None]}),
        ("tool_call()", {}),
        ("tool_call(city=open('/etc/passwd'))", None),
        ("__import__('os').system('true')", None),
        ("你好", None),
        ("tool_call(1)", None),
        ("tool_call(a={[1]: 2})", None),
        ("tool_call(**[1])", None),
        ("tool_call(a={(1, 2): 3})", None),
        ("tool_call(a='\\ud800')", None),
        ("tool_call(a=1e999)", None),
    ],
)
def test_a_call_is_read_and_never_executed(content, arguments):
    call = tool_call("weather", content)
    assert (call and json.loads(call["function"]["arguments"])) == arguments
    assert call is None or call["function"]["name"] == "weather"


def test_glm4_reads_tools_and_begins_calls_in_its_own_form(tokenizer4):
    named = {"type": "function", "function": {"name": "get_time"}}
    asked = ChatAsked(model="tuned", messages=[{"role": "user", "content": "几点"}], tools=TOOLS, tool_choice=named)
    text = tokenizer4.decode(prompt_of(asked, tokenizer4))
    assert text.startswith("[gMASK]<sop><|system|>") and '## get_time\n\n{\n    "name": "get_time",' in text
    assert text.endswith("<|user|>\n几点<|assistant|>")
    assert [tokenizer4.decode(start) for start in call_starts(asked, tokenizer4)] == ["get_time\n"]


def test_a_call_of_glm4_is_json():
    assert tool_call("weather", '{"city": "北京"}')["function"]["arguments"] == '{"city": "北京"}'
    assert tool_call("weather", '{"city": NaN}') is None and tool_call("weather", "[1]") is None


def test_the_line_before_a_call_names_the_tool():
    tokenizer, tools = load_tokenizer("demo3"), [{"type": "function", "function": {"name": "weather"}}]
    assert split_answer("weather\n tool_call()", tokenizer, tools) == ("weather", "tool_call()")
    assert split_answer("weather\n tool_call()", tokenizer, []) == ("", "weather\n tool_call()")
    whole = '{"name": "weather", "arguments": {"city": "北京"}}'
    assert split_answer(whole, tokenizer, tools) == ("weather", '{"city": "北京"}')
    assert split_answer(whole, tokenizer, [])[0] == ""
    assert split_answer("\n 你好\n再见", tokenizer, tools) == ("", "你好\n再见")
    assert split_answer("标题：\n\n正文", tokenizer, tools) == ("", "标题：\n\n正文")
