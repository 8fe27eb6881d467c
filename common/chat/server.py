"""An endpoint that programs for OpenAI's interface talk to: /v1/chat/completions, /v1/completions, /v1/models.

python common/chat/server.py [--checkpoint FOLDER] [--model_name_or_path BASE] [--port 8000]
"""

import argparse
import asyncio
import json
import os
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import uvicorn
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from transformers import PreTrainedTokenizerBase

from common.chat import service
from common.chat.chat import FULL_WIDTH, MAX_NEW_TOKENS, chat_parser, load_chat
from common.chat.guard import Guard, add_address_flags, find_port, listen, longest_body, names_of
from common.chat.protocol import (
    ApiError,
    Asked,
    ChatAsked,
    TextAsked,
    new_id,
    prompt_of,
    read_request,
    split_answer,
    tool_call,
)
from common.encoding import stop_ids
from common.errors import UserError, exit_on_user_error, note
from common.loading import method_of

PATHS = re.compile(r"/(v1/(models(/[^/]+)?|chat/completions|completions)|health|metrics)")
UNDECIDED = "".join(FULL_WIDTH)  # ChatGLM-6B's punctuation gets its width from the character that follows
ABOUT = {"object": "model", "created": 0, "owned_by": "local"}
BROKEN = "\ufffd"  # a character of which the answer has not all bytes yet


class Answers:
    """The endpoint's model under its names, and what requests to it need."""

    def __init__(self, args: argparse.Namespace):
        model, self.tokenizer, trained = load_chat(args)
        self.context, self.longest = model.config.max_position_embeddings, args.max_new_tokens or MAX_NEW_TOKENS
        self.timeout, self.system = args.timeout, args.system_prompt
        self.temperature, self.top_p = args.temperature, args.top_p
        speakers: dict[str, service.Speaker] = {args.served_name: partial(nullcontext, model)}
        if trained:  # the same model without prefix or adapter
            speakers["base"] = partial(method_of(**trained).base, model)
        self.service = service.Service(speakers, args.max_batch, args.max_waiting)

    def check_name(self, name: str) -> None:
        """Raises ApiError for an unknown model."""
        if name not in self.service.speakers:
            names = ", ".join(self.service.speakers)
            raise ApiError(404, f"the model {name!r} does not exist; there are {names}", code="model_not_found")

    def begin(self, asked: Asked, prompt: list[int], limit: int | None, likeliest: int) -> "Answer":
        """Raises ApiError for an unknown model, a prompt that is too long, and if too many requests wait."""
        self.check_name(asked.model)
        room = self.context - len(prompt)
        if room < 1 or limit is not None and limit > room:
            message = f"the prompt has {len(prompt)} tokens and the model's context {self.context}"
            message += f"; max_tokens is {limit}" if limit else ""
            raise ApiError(400, message, code="context_length_exceeded")
        return Answer(self, asked, prompt, min(limit or self.longest, room), likeliest)


class Answer:
    """One answer as it grows: asynchronously, ``pieces`` gives its text."""

    def __init__(self, answers: Answers, asked: Asked, prompt: list[int], limit: int, likeliest: int):
        self.answers, self.asked, self.prompt = answers, asked, prompt
        self.tokens: list[service.Token] = []
        self.text, self.finish = "", ""
        self.queue: asyncio.Queue[service.Token | Exception | str] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(item: service.Token | Exception | str) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server ends
                loop.call_soon_threadsafe(self.queue.put_nowait, item)

        self.request = service.Request(
            prompt=prompt,
            speaker=asked.model,
            deliver=deliver,
            max_tokens=limit,
            stops=frozenset(stop_ids(answers.tokenizer)),
            temperature=answers.temperature if asked.temperature is None else asked.temperature,
            top_p=answers.top_p if asked.top_p is None else asked.top_p,
            seed=asked.seed,
            likeliest=likeliest,
        )
        try:
            answers.service.submit(self.request)
        except UserError as error:
            raise ApiError(429, str(error), "rate_limit_error", "rate_limit_exceeded") from error

    async def pieces(self) -> AsyncIterator[str]:
        """The text, piece by piece; a piece never ends within a character or within a text that would end the answer.

        Raises ApiError if the model fails, or takes longer than the limit.
        """
        stops, sent = self.asked.stops, 0
        at_once = not (self.asked.stream or stops)  # nobody looks at the text before its end
        longest = max(map(len, stops), default=1) - 1
        end = time.monotonic() + self.answers.timeout
        try:
            while True:
                item = await asyncio.wait_for(self.queue.get(), end - time.monotonic())
                if isinstance(item, Exception):
                    raise failure(item)
                if isinstance(item, str):
                    self.finish = item
                    break
                self.tokens.append(item)
                if at_once:
                    continue
                self.text = self.decoded()
                if places := [place for place in map(self.text.find, stops) if place >= 0]:
                    self.text, self.finish = self.text[: min(places)], "stop"
                    break
                ready = len(self.text.rstrip(BROKEN)) - longest
                if ready > sent:
                    yield self.text[sent:ready]
                    sent = ready
            if at_once:
                self.text = self.decoded()
            if len(self.text) > sent:
                yield self.text[sent:]
        except asyncio.TimeoutError as error:
            raise ApiError(504, f"the answer took longer than {self.answers.timeout} s", "timeout") from error
        finally:  # also where the visitor has left
            self.request.unwanted.set()

    def decoded(self) -> str:
        return self.answers.tokenizer.decode([token.id for token in self.tokens], skip_special_tokens=True)

    async def whole(self, request: Request) -> str:
        """All of the text; a visitor who leaves ends the answer."""

        async def watch() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(0.2)
            self.request.unwanted.set()

        watching = asyncio.create_task(watch())
        try:
            async for _ in self.pieces():
                pass
        finally:
            watching.cancel()
        return self.text

    def logprobs(self) -> dict[str, Any]:
        """Of each token, as /v1/chat/completions gives them."""
        return {"content": [self.entry(token) for token in self.tokens]}

    def entry(self, token: service.Token) -> dict[str, Any]:
        def described(number: int, logprob: float) -> dict[str, Any]:
            text = self.answers.tokenizer.decode([number])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        top = [described(*each) for each in token.likeliest]
        return described(token.id, token.logprob) | {"top_logprobs": top}

    def usage(self) -> dict[str, int]:
        prompt, answer = len(self.prompt), len(self.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def message_of(answer: Answer, asked: ChatAsked, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], str]:
    """The assistant's message, and why it ended."""
    name, content = split_answer(answer.text, tokenizer, tools_of(asked))
    call = tool_call(name, content) if name else None
    if call:
        return {"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls"
    return {"role": "assistant", "content": f"{name}\n{content}" if name else content}, answer.finish


def tools_of(asked: ChatAsked) -> list[dict[str, Any]]:
    """Those that an answer may call."""
    return asked.tools or [] if asked.tool_choice != "none" else []


async def chat(answers: Answers, asked: ChatAsked, request: Request) -> Response:
    if asked.stream and asked.logprobs:
        raise ApiError(400, "logprobs: not supported in a stream")
    likeliest = (asked.top_logprobs or 0) if asked.logprobs else 0
    prompt = prompt_of(asked, answers.tokenizer, answers.system)
    answer = answers.begin(asked, prompt, asked.max_completion_tokens or asked.max_tokens, likeliest)
    head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": asked.model}
    if asked.stream:
        return events(stream_chat(answers, asked, answer, head | {"object": "chat.completion.chunk"}))
    await answer.whole(request)
    message, finish = message_of(answer, asked, answers.tokenizer)
    choice = {"index": 0, "message": message, "finish_reason": finish}
    choice["logprobs"] = answer.logprobs() if asked.logprobs else None
    return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": answer.usage()})


async def stream_chat(
    answers: Answers, asked: ChatAsked, answer: Answer, head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    yield chunk({"role": "assistant", "content": ""})
    sent, text, waits = "", "", bool(tools_of(asked))  # with tools, the answer may be a call: its text is held back
    async for piece in answer.pieces():
        text += piece
        content = split_answer(text, answers.tokenizer, [])[1].rstrip(UNDECIDED)
        if not waits and len(content) > len(sent) and content.startswith(sent):
            yield chunk({"content": content[len(sent) :]})
            sent = content
    message, finish = message_of(answer, asked, answers.tokenizer)
    if "tool_calls" in message:
        yield chunk({"tool_calls": [call | {"index": 0} for call in message["tool_calls"]]})
    elif rest := message["content"].removeprefix(sent):
        yield chunk({"content": rest})
    yield chunk({}, finish)
    if (asked.stream_options or {}).get("include_usage"):
        yield head | {"choices": [], "usage": answer.usage()}


async def complete(answers: Answers, asked: TextAsked, request: Request) -> Response:
    if asked.stream and asked.logprobs is not None:
        raise ApiError(400, "logprobs: not supported in a stream")
    prompt = answers.tokenizer.encode(asked.prompt if isinstance(asked.prompt, str) else asked.prompt[0])
    answer = answers.begin(asked, prompt, asked.max_tokens or 16, asked.logprobs or 0)
    head = {"id": new_id("cmpl"), "created": int(time.time()), "model": asked.model, "object": "text_completion"}

    def choice(text: str, finish: str | None) -> dict[str, Any]:
        return head | {"choices": [{"index": 0, "text": text, "finish_reason": finish, "logprobs": None}]}

    async def stream() -> AsyncIterator[dict[str, Any]]:
        async for piece in answer.pieces():
            yield choice(piece, None)
        yield choice("", answer.finish)
        if (asked.stream_options or {}).get("include_usage"):
            yield head | {"choices": [], "usage": answer.usage()}

    if asked.stream:
        return events(stream())
    text = await answer.whole(request)
    content = choice(text, answer.finish) | {"usage": answer.usage()}
    if asked.logprobs is not None:
        entries = answer.logprobs()["content"]
        content["choices"][0]["logprobs"] = {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
        }
    return JSONResponse(content)


def events(chunks: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """Server-sent events; an error in the middle is one of them, because the status is sent already."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        except Exception as error:
            shown = error if isinstance(error, ApiError) else failure(error)
            yield f"data: {json.dumps(shown.content, ensure_ascii=False)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


def failure(error: Exception) -> ApiError:
    """What a visitor is told of a fault of ours; the server's own messages tell more."""
    note(f"warning: a request failed: {type(error).__name__}: {error}")
    return ApiError(500, f"the server failed: {type(error).__name__}", "server_error")


def build_app(answers: Answers, key: str) -> FastAPI:
    """``key``: what requests must bring as their bearer token; "" for none."""
    app = FastAPI(openapi_url=None)

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.content, error.status)

    @app.exception_handler(HTTPException)
    async def refuse_path(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(ApiError(error.status_code, str(error.detail)).content, error.status_code)

    @app.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(failure(error).content, 500)

    def checked(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key and not secrets.compare_digest(given.encode(), key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        counts = {"requests_running": answers.service.running(), "requests_waiting": len(answers.service.waiting)}
        return PlainTextResponse("".join(f"chatglm_{name} {value}\n" for name, value in counts.items()))

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        checked(request)
        return {"object": "list", "data": [{"id": name} | ABOUT for name in answers.service.speakers]}

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        checked(request)
        answers.check_name(name)
        return {"id": name} | ABOUT

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        checked(request)
        return await chat(answers, read_request(ChatAsked, await request.body()), request)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        checked(request)
        return await complete(answers, read_request(TextAsked, await request.body()), request)

    return app


def server_parser() -> argparse.ArgumentParser:
    parser = chat_parser(__doc__.splitlines()[0])
    parser.add_argument("--served_name", default="tuned", help="name of the model in requests (%(default)s)")
    add_address_flags(parser, 8000)
    parser.add_argument("--max_batch", type=int, default=32, help="requests that are answered at once (%(default)s)")
    parser.add_argument("--max_waiting", type=int, default=256, help="requests that may wait beside them (%(default)s)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of the longest answer (%(default)s)")
    parser.epilog = "If API_KEY is set in the environment, requests must bring it as their bearer token."
    return parser


def refusal(sentence: str) -> dict[str, Any]:
    return ApiError(0, sentence).content


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for values with which nothing would be answered."""
    for name in ("max_batch", "max_waiting", "timeout"):
        if vars(args)[name] <= 0:
            raise UserError(f"--{name} {vars(args)[name]}: it must be above 0.")
    if args.served_name in ("", "base"):
        raise UserError(f"--served_name {args.served_name!r}: choose another name; base is that of the base model.")


def main() -> None:
    args, key = server_parser().parse_args(), os.environ.get("API_KEY", "")
    check_flags(args)
    port = find_port(args.host, args.port)
    if not key and args.host not in ("127.0.0.1", "localhost"):
        note("warning: everybody who can reach this endpoint may use it; set API_KEY to ask for a key.")
    answers = Answers(args)
    names, longest = names_of(args.allowed_hosts), longest_body(answers.context)
    app = Guard(build_app(answers, key), args.host, names, longest, PATHS, refusal)
    listener = listen(args.host, port)
    print(f"ready: http://{args.host}:{port}/v1, models {', '.join(answers.service.speakers)}", flush=True)
    try:
        config = uvicorn.Config(app, log_level="warning", ws="none", proxy_headers=False, server_header=False)
        config.timeout_graceful_shutdown = 5  # seconds that answers get to end
        uvicorn.Server(config).run([listener])
    except KeyboardInterrupt:
        note("stopped")
    finally:
        answers.service.close()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
