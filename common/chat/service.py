"""One thread that answers the requests of all visitors together; a request joins and leaves between two tokens."""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.chat.batches import RunningBatch
from common.errors import UserError
from common.training.evaluation import head_in_parts

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
    unwanted: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.count = 0
        self.generator = torch.Generator()
        if self.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.seed)


def choose(logits: Tensor, request: Request) -> Token:
    """The next token of an answer, from logits [v]."""
    logprobs = logits.float().log_softmax(-1).cpu()
    if request.temperature == 0:
        chosen = int(logprobs.argmax())
    else:
        probabilities, order = (logits.float().cpu() / request.temperature).softmax(-1).sort(descending=True)
        probabilities[probabilities.cumsum(-1) - probabilities > request.top_p] = 0.0
        chosen = int(order[torch.multinomial(probabilities, 1, generator=request.generator)])
    best = logprobs.topk(request.likeliest) if request.likeliest else None
    likeliest = list(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else []
    return Token(chosen, float(logprobs[chosen]), likeliest)


class Group:
    """The requests to one speaker that are answered at the moment."""

    def __init__(self, model: PreTrainedModel):
        self.batch = RunningBatch(model)
        self.requests: list[Request] = []
        self.last: list[int] = []  # token of each

    def admit(self, request: Request) -> None:
        token = choose(self.batch.join(request.prompt), request)
        self.requests.append(request)
        self.last.append(token.id)
        self.hand_out([token])

    def step(self) -> None:
        logits = self.batch.step(self.last)
        tokens = [choose(row, request) for row, request in zip(logits, self.requests, strict=True)]
        self.last = [token.id for token in tokens]
        self.hand_out(tokens)

    def hand_out(self, tokens: list[Token]) -> None:
        """Delivers the tokens of the last requests, and lets those go that are answered."""
        done: set[Request] = set()
        for request, token in zip(self.requests[-len(tokens) :], tokens, strict=True):
            if token.id not in request.stops:
                request.deliver(token)
                request.count += 1
            stopped = token.id in request.stops
            if stopped or request.count >= request.max_tokens or request.unwanted.is_set():
                request.deliver("stop" if stopped else "length")
                done.add(request)
        if done:
            rows = [row for row, request in enumerate(self.requests) if request not in done]
            self.batch.keep(rows)
            self.requests, self.last = [self.requests[row] for row in rows], [self.last[row] for row in rows]


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
        return sum(len(group.requests) for group in self.groups.values())

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
        with self.changed:
            room = self.most - self.running()
            joining = [request for request in self.waiting if request.speaker == name][:room]
            for request in joining:
                self.waiting.remove(request)
        group = self.groups.get(name)
        if not joining and not (group and group.requests):
            return
        try:
            with speaker() as model, head_in_parts(model):
                group = group or self.groups.setdefault(name, Group(model))
                if group.requests:
                    group.step()
                while joining:
                    group.admit(joining[0])
                    joining.pop(0)
        except Exception as error:  # of the device, or of a prompt: other requests go on
            for request in {*joining, *(group.requests if group else ())}:
                request.deliver(error)
            self.groups.pop(name, None)
