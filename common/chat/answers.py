"""The endpoint's models under their names, and one answer as it grows."""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Request
from transformers import PreTrainedModel

from common.chat import service
from common.chat.chat import MAX_NEW_TOKENS, load_chat
from common.chat.protocol import ApiError, Asked
from common.devices import free_memory
from common.encoding import stop_ids
from common.errors import UserError, note
from common.loading import find_trained, method_of
from common.models.products import pack
from common.models.registry import open_model
from common.trained import find_training

BROKEN = "\ufffd"  # a character of which the answer has not all bytes yet
ONE = "tuned"  # name of a single model
MOST_ROWS = 32  # that are answered at once unless --max_batch says otherwise


def named_folders(given: str, name: str | None) -> dict[str, Path]:
    """{name in requests: trained folder}. One folder is called ``name`` or tuned; of several, NAME=FOLDER,FOLDER, one
    without a name has that of its folder.

    Raises UserError for a name that comes twice or belongs to no folder, and as ``find_training``.
    """
    parts = [given] if Path(given).exists() else [part.strip() for part in given.split(",") if part.strip()]
    if not parts:
        raise UserError(
            f"CHECKPOINT (--checkpoint) {given!r} names no training; empty, it serves the base model alone."
        )
    if parts[1:] and name:
        raise UserError(f"--served_name {name}: the names of several models stand before their folders, NAME=FOLDER.")
    found: dict[str, Path] = {}
    for part in parts:
        label, _, path = ("", "", part) if Path(part).exists() else part.rpartition("=")
        folder = find_training(path)
        label = label or (folder.resolve().name if parts[1:] else name or ONE)
        if label in ("base", *found):
            raise UserError(f"CHECKPOINT (--checkpoint): {label!r} would name two models: write NAME={path}.")
        found[label] = folder
    return found


def check_together(folders: list[Path], base: str | None) -> None:
    """Raises UserError unless trained folders can share a base model; ``base``: that model, if the user names it."""
    first, flag = find_trained(str(folders[0]), base)
    for folder in folders[1:]:
        own, own_flag = find_trained(str(folder), base)
        if not flag or own_flag.keys() != flag.keys():
            raise UserError(
                f"{folders[0]} and {folder} can't share a base model: give prefixes only, or adapters only."
            )
        if open_model(own).path.resolve() != open_model(first).path.resolve():
            raise UserError(
                f"{folder} was trained on {own}, and {folders[0]} on {first}: serve them apart, or name the base model "
                "of both by MODEL (--model_name_or_path)."
            )
        method_of(**own_flag).check(open_model(first), do_train=False)


def rows_that_fit(model: PreTrainedModel, free: int) -> int:
    """The answers, at most MOST_ROWS, whose keys and values have room in ``free`` bytes if each fills the context.

    A fifth stays free for what a step computes.
    """
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    row = numbers * config.max_position_embeddings * model.dtype.itemsize
    return max(1, min(MOST_ROWS, int(0.8 * free) // row))


class Answers:
    """The endpoint's models under their names, and what requests to them need."""

    def __init__(self, args: argparse.Namespace):
        folders = named_folders(args.checkpoint, args.served_name) if args.checkpoint else {}
        if folders:
            check_together([*folders.values()], args.model_name_or_path)
        name, *others = folders or [args.served_name or ONE]
        args.checkpoint = folders.get(name)
        model, self.tokenizer, trained = load_chat(args)
        self.context, self.longest = model.config.max_position_embeddings, args.max_new_tokens or MAX_NEW_TOKENS
        self.timeout, self.system = args.timeout, args.system_prompt
        self.temperature, self.top_p = args.temperature, args.top_p
        speakers: dict[str, service.Speaker] = {name: partial(nullcontext, model)}
        if trained:
            method = method_of(**trained)
            speakers |= {other: method.more(model, folders[other]) for other in others}
            speakers["base"] = partial(method.base, model)
        pack(model)
        most = args.max_batch or rows_that_fit(model, free_memory(model.device))
        self.service = service.Service(speakers, most, args.max_waiting)

    def check_name(self, name: str) -> None:
        """Raises ApiError for an unknown model."""
        if name not in self.service.speakers:
            names = ", ".join(self.service.speakers)
            raise ApiError(404, f"the model {name!r} does not exist; there are {names}", code="model_not_found")

    def begin(
        self, asked: Asked, prompt: list[int], limit: int | None, likeliest: int, starts: service.Starts = ()
    ) -> "Answer":
        """Raises ApiError for an unknown model, a prompt that is too long, and if too many requests wait."""
        self.check_name(asked.model)
        room = self.context - len(prompt)
        if room < 1 or limit is not None and limit > room:
            message = f"the prompt has {len(prompt)} tokens and the model's context {self.context}"
            message += f"; max_tokens is {limit}" if limit else ""
            raise ApiError(400, message, code="context_length_exceeded")
        return Answer(self, asked, prompt, min(limit or self.longest, room), likeliest, starts)


class Answer:
    """One answer as it grows: asynchronously, ``pieces`` gives its text."""

    def __init__(
        self, answers: Answers, asked: Asked, prompt: list[int], limit: int, likeliest: int, starts: service.Starts
    ):
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
            starts=starts,
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

    def logprobs(self, first: int = 0) -> dict[str, Any]:
        """Of each token from the ``first`` on, as /v1/chat/completions gives them."""
        return {"content": [self.entry(token) for token in self.tokens[first:]]}

    def entry(self, token: service.Token) -> dict[str, Any]:
        def described(number: int, logprob: float) -> dict[str, Any]:
            text = self.answers.tokenizer.decode([number])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        top = [described(*each) for each in token.likeliest]
        return described(token.id, token.logprob) | {"top_logprobs": top}

    def usage(self) -> dict[str, int]:
        prompt, answer = len(self.prompt), len(self.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def failure(error: Exception) -> ApiError:
    """What a visitor is told of a fault of ours; the server's own messages tell more."""
    note(f"warning: a request failed: {type(error).__name__}: {error}")
    return ApiError(500, f"the server failed: {type(error).__name__}", "server_error")
