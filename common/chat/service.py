"""One thread that answers the requests of all visitors together; a request joins and leaves between two tokens."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.chat.batches import RunningBatch
from common.errors import UserError
from common.training.evaluation import head_in_parts

STEPS = 8  # between two admissions: prompts that are read together cost less, and wait for some hundredths of a second

COLDEST = 1e-5  # temperature; below it the likeliest token is chosen

Starts = Sequence[Sequence[int]]
"""Tokens with one of which an answer must begin; none: it begins freely."""

Speaker = Callable[[], AbstractContextManager[PreTrainedModel]]
"""Gives a model, for as long as its context lasts: the tuned one, or the same without prefix or adapter."""


class Token(NamedTuple):
    id: int
    logprob: float
    likeliest: list[tuple[int, float]]  # (token, logprob) of the ``likeliest`` that a request asks for


@dataclass(eq=False)
class Request:
    """A prompt to answer. ``deliver`` gets each token, then "stop" or "length"; or an error. A thread calls it."""

    prompt: list[int]
    speaker: str
    deliver: Callable[[Token | Exception | str], None]
    max_tokens: int
    stops: frozenset[int]  # tokens that end an answer; they are not delivered
    temperature: float = 1.0  # 0: always the likeliest token
    top_p: float = 1.0
    seed: int | None = None
    likeliest: int = 0
    starts: Starts = ()
    unwanted: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.tokens: list[int] = []  # of the answer so far
        self.generator = torch.Generator()
        if self.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.seed)

    def allowed(self) -> list[int]:
        """The tokens that may come next; []: all."""
        length = len(self.tokens)
        return [start[length] for start in self.starts if len(start) > length and [*start[:length]] == self.tokens]


def choose(logits: Tensor, requests: Sequence[Request]) -> list[Token]:
    """The next token of each answer, from logits [b, v]."""
    logits = logits.float().cpu()
    logprobs = logits.log_softmax(-1)
    for row, request in enumerate(requests):
        if allowed := request.allowed():
            others = torch.ones_like(logits[row], dtype=torch.bool)
            others[allowed] = False
            logits[row, others] = -torch.inf
    chosen = logits.argmax(-1)
    for row, request in enumerate(requests):
        if request.temperature >= COLDEST:
            scaled = (logits[row] - logits[row].max()) / request.temperature
            probabilities, order = scaled.softmax(-1).sort(descending=True)
            probabilities[probabilities.cumsum(-1) - probabilities > request.top_p] = 0.0
            chosen[row] = order[torch.multinomial(probabilities, 1, generator=request.generator)]
    likeliest: list[list[tuple[int, float]]] = []
    for row, request in enumerate(requests):
        best = logprobs[row].topk(request.likeliest) if request.likeliest else None
        likeliest.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else [])
    found = logprobs.gather(1, chosen[:, None])[:, 0]
    return [Token(*each) for each in zip(chosen.tolist(), found.tolist(), likeliest, strict=True)]


class Group:
    """The requests to one speaker that are answered at the moment."""

    def __init__(self, model: PreTrainedModel):
        self.batch = RunningBatch(model)
        self.requests: list[Request] = []  # of each row
        self.last: list[int] = []  # token of each row
        self.done: set[Request] = set()  # their rows go at the next admission
        self.steps = 0  # since requests were admitted

    def admit(self, joining: list[Request]) -> None:
        """Lets answered requests leave, and others join."""
        rows = [row for row, request in enumerate(self.requests) if request not in self.done]
        if self.done:
            self.batch.keep(rows)
        self.requests, self.last = [self.requests[row] for row in rows], [self.last[row] for row in rows]
        self.steps, self.done = 0, set()
        if joining:
            self.take(joining, choose(self.batch.join([request.prompt for request in joining]), joining))
            self.requests += joining

    def step(self) -> None:
        self.steps += 1
        logits, self.last = self.batch.step(self.last), []
        self.take(self.requests, choose(logits, self.requests))

    def take(self, requests: list[Request], tokens: list[Token]) -> None:
        """Delivers a token to each request, and notes those that are answered."""
        self.last += [token.id for token in tokens]
        for request, token in zip(requests, tokens, strict=True):
            if request in self.done:
                continue
            stopped = token.id in request.stops
            if not stopped:
                request.deliver(token)
                request.tokens.append(token.id)
            if stopped or len(request.tokens) >= request.max_tokens or request.unwanted.is_set():
                request.deliver("stop" if stopped else "length")
                self.done.add(request)

    def running(self) -> int:
        return len(self.requests) - len(self.done)


class Service:
    """Answers at most ``most`` requests at once, and lets at most ``most_waiting`` others wait."""

    def __init__(self, speakers: dict[str, Speaker], most: int, most_waiting: int):
        self.speakers, self.most, self.most_waiting = speakers, most, most_waiting
        self.waiting: deque[Request] = deque()
        self.groups: dict[str, Group] = {}
        self.changed, self.ended = threading.Condition(), False
        self.thread = threading.Thread(target=self.run, name="answers", daemon=True)
        self.thread.start()

    def submit(self, request: Request) -> None:
        """Raises UserError if too many wait already."""
        with self.changed:
            if len(self.waiting) >= self.most_waiting:
                raise UserError(f"{len(self.waiting)} requests wait already: try again in a minute.")
            self.waiting.append(request)
            self.changed.notify()

    def close(self) -> None:
        with self.changed:
            self.ended = True
            self.changed.notify()
        self.thread.join()

    def running(self) -> int:
        return sum(group.running() for group in self.groups.values())

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.ended or self.waiting or self.running())
                if self.ended:
                    return
            for name, speaker in self.speakers.items():
                self.turn(name, speaker)

    def turn(self, name: str, speaker: Speaker) -> None:
        """Lets requests to a speaker join, and writes one token of each. An error ends those of this speaker only."""
        group = self.groups.get(name)
        joining: list[Request] = []
        if not group or not group.running() or group.steps >= STEPS:
            with self.changed:
                for request in [request for request in self.waiting if request.unwanted.is_set()]:
                    self.waiting.remove(request)
                room = self.most - self.running()
                joining = [request for request in self.waiting if request.speaker == name][:room]
                for request in joining:
                    self.waiting.remove(request)
        if not joining and not (group and group.running()):
            return
        try:
            with speaker() as model, head_in_parts(model):
                group = group or self.groups.setdefault(name, Group(model))
                if joining or group.steps >= STEPS:
                    group.admit(joining)
                if group.running():
                    group.step()
                if not group.running():
                    group.admit([])  # it holds no memory while nobody asks
        except Exception as error:  # of the device: requests to another speaker go on
            for request in {*joining, *(group.requests if group else ())} - (group.done if group else set()):
                request.deliver(error)
            self.groups.pop(name, None)
