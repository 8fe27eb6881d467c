"""An endpoint that programs for OpenAI's interface talk to: /v1/chat/completions, /v1/completions, /v1/models.

python common/chat/server.py [--checkpoint FOLDER] [--model_name_or_path BASE] [--port 8000]
"""

import argparse
import json
import os
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import uvicorn
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from transformers import PreTrainedTokenizerBase

from common.chat.answers import MOST_ROWS, ONE, Answer, Answers, failure
from common.chat.chat import FULL_WIDTH, chat_parser
from common.chat.guard import Guard, add_address_flags, find_port, listen, longest_body, names_of
from common.chat.protocol import (
    ApiError,
    ChatAsked,
    TextAsked,
    call_starts,
    new_id,
    prompt_of,
    read_request,
    split_answer,
    tool_call,
    tools_of,
)
from common.errors import UserError, exit_on_user_error, note

PATHS = re.compile(r"/(v1/(models(/[^/]+)?|chat/completions|completions)|health|metrics)")
UNDECIDED = "".join(FULL_WIDTH)  # ChatGLM-6B's punctuation gets its width from the character that follows
ABOUT = {"object": "model", "created": 0, "owned_by": "local"}


def message_of(answer: Answer, asked: ChatAsked, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], str]:
    """The assistant's message, and why it ended."""
    name, content = split_answer(answer.text, tokenizer, tools_of(asked))
    call = tool_call(name, content) if name else None
    if call:
        return {"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls"
    return {"role": "assistant", "content": f"{name}\n{content}" if name else content}, answer.finish


async def chat(answers: Answers, asked: ChatAsked, request: Request) -> Response:
    likeliest = (asked.top_logprobs or 0) if asked.logprobs else 0
    prompt = prompt_of(asked, answers.tokenizer, answers.system)
    limit, starts = asked.max_completion_tokens or asked.max_tokens, call_starts(asked, answers.tokenizer)
    answer = answers.begin(asked, prompt, limit, likeliest, starts)
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
    noted = 0  # tokens whose logprobs are sent

    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        nonlocal noted
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        if asked.logprobs:
            choice["logprobs"], noted = answer.logprobs(noted), len(answer.tokens)
        return head | {"choices": [choice]}

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
    prompt = answers.tokenizer.encode(asked.prompt if isinstance(asked.prompt, str) else asked.prompt[0])
    answer = answers.begin(asked, prompt, asked.max_tokens or 16, asked.logprobs or 0)
    head = {"id": new_id("cmpl"), "created": int(time.time()), "model": asked.model, "object": "text_completion"}

    noted = 0  # tokens whose logprobs are sent

    def choice(text: str, finish: str | None) -> dict[str, Any]:
        nonlocal noted
        logprobs = None
        if asked.logprobs is not None:
            entries, noted = answer.logprobs(noted)["content"], len(answer.tokens)
            logprobs = {
                "tokens": [entry["token"] for entry in entries],
                "token_logprobs": [entry["logprob"] for entry in entries],
                "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
            }
        return head | {"choices": [{"index": 0, "text": text, "finish_reason": finish, "logprobs": logprobs}]}

    async def stream() -> AsyncIterator[dict[str, Any]]:
        async for piece in answer.pieces():
            yield choice(piece, None)
        yield choice("", answer.finish)
        if (asked.stream_options or {}).get("include_usage"):
            yield head | {"choices": [], "usage": answer.usage()}

    if asked.stream:
        return events(stream())
    text = await answer.whole(request)
    return JSONResponse(choice(text, answer.finish) | {"usage": answer.usage()})


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
    parser.add_argument(
        "--served_name", help=f"name of the model in requests; default: {ONE}; of several, write NAME=FOLDER"
    )
    add_address_flags(parser, 8000)
    parser.add_argument(
        "--max_batch",
        type=int,
        help=f"requests that are answered at once; default: as many as fit, at most {MOST_ROWS}",
    )
    parser.add_argument("--max_waiting", type=int, default=256, help="requests that may wait beside them (%(default)s)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of the longest answer (%(default)s)")
    parser.epilog = "If API_KEY is set in the environment, requests must bring it as their bearer token."
    return parser


def refusal(sentence: str) -> dict[str, Any]:
    return ApiError(0, sentence).content


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for values with which nothing would be answered."""
    for name in ("max_batch", "max_waiting", "timeout"):
        if vars(args)[name] is not None and vars(args)[name] <= 0:
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
