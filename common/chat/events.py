"""What the page does at each event: questions, answers, buttons, and what a visitor finds at a reload."""

import html
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import gradio as gr
from transformers import PreTrainedTokenizerBase

from common.chat import rounds
from common.chat.chat import QuestionError, count_forgotten, count_tokens, generation_settings, stream_chat
from common.chat.labels import language_of, said
from common.chat.rounds import BASE, Answer, Conversation, Round
from common.chat.speakers import Speaker, described
from common.errors import UserError

BUTTONS = ("stop", "retry", "undo", "clear", "markdown", "row")  # the keys of their labels, and their elements
COLUMNS = ("left", "right")  # the elements of the page that show the picked speaker and the base
REFRESH = 0.03  # seconds between two views of a growing answer


class Chat(NamedTuple):
    """The state that all visitors share. The methods from ``ask`` on are events of the page, and return its fields.

    A conversation is changed in place, so an answer that was cancelled changes only its own round.
    """

    speakers: dict[str, Speaker]  # by name; the first is the one that a visitor meets
    beside: bool  # whether the base answers in a second column
    tokenizer: PreTrainedTokenizerBase
    context: int  # tokens of prompt and answer together
    turn: threading.Lock  # a prefix or an adapter is on or off for one visitor at a time

    @property
    def columns(self) -> int:
        return 1 + self.beside

    @property
    def first(self) -> str:
        return next(iter(self.speakers))

    def title(self, name: str, language: str) -> str:
        """A speaker's name as a visitor reads it."""
        facts = self.speakers[name].about
        return f"{facts.model} ({said('base', language)})" if name == BASE else name

    def header(self, name: str, language: str) -> str:
        """Who talks, as HTML."""
        speaker = self.speakers[name]
        return f"<h1>{html.escape(speaker.about.model)}</h1><p>{html.escape(described(name, speaker, language))}</p>"

    def reply(
        self, conversation: Conversation, query: str, picked: str, system: str, generation: dict[str, Any]
    ) -> Iterator[None]:
        """Lets the picked speaker answer, then the base. Yields whenever the conversation has grown.

        Raises UserError if the question is too long, or the speaker can't be loaded.
        """
        room = self.context - generation["max_new_tokens"]
        histories = [rounds.answered(conversation, column) for column in range(self.columns)]
        forgotten = [count_forgotten(self.tokenizer, query, history, system, room) for history in histories]
        names = [picked, BASE][: self.columns]
        answers = [Answer(*pair) for pair in zip(names, forgotten, strict=True)]
        conversation.append(Round(query, answers))
        yield
        with self.turn:
            for answer, history in zip(answers, histories, strict=True):
                shown, started = 0.0, time.monotonic()
                with self.speakers[answer.speaker].open() as model:
                    text, remembered = "", history[answer.forgotten :]
                    try:
                        for text in stream_chat(model, self.tokenizer, query, remembered, system, **generation):
                            if text and time.monotonic() - shown > REFRESH:
                                answer.text = text
                                yield
                                shown = time.monotonic()
                    finally:  # also where the visitor has stopped it
                        answer.text = text or answer.text
                        answer.speed = count_tokens(self.tokenizer, text) / (time.monotonic() - started)
                answer.text = text
                yield

    def shown(self, conversation: Conversation, language: str, answering: bool = False) -> list[Any]:
        """The messages of each column."""
        return [rounds.messages(conversation, column, language, answering) for column in range(self.columns)]

    def usable(self, conversation: Conversation, answering: bool = False) -> list[dict[str, Any]]:
        """The buttons, on or off."""
        begun, answered = bool(conversation), bool(rounds.answered(conversation, 0))
        states = [answering, begun, begun, begun, answered, answered]
        return [gr.update(interactive=state) for state in states]

    def ask(
        self, request: gr.Request, query: str, conversation: Conversation, picked: str, *settings: Any
    ) -> Iterator[list[Any]]:
        """Yields the text of the question's field, then the columns and the buttons."""
        yield from self.answer(request, query, conversation, len(conversation), picked, *settings)

    def ask_again(
        self, request: gr.Request, conversation: Conversation, picked: str, *settings: Any
    ) -> Iterator[list[Any]]:
        query = conversation[-1].query if conversation else ""
        for _, *fields in self.answer(request, query, conversation, len(conversation) - 1, picked, *settings):
            yield [gr.skip(), *fields]

    def edit(
        self, request: gr.Request, event: gr.EditData, conversation: Conversation, picked: str, *settings: Any
    ) -> Iterator[list[Any]]:
        """Asks a changed question in the place of the old one; the rounds after it are dropped."""
        column = COLUMNS.index(event.target.elem_id)  # type: ignore[union-attr]
        shown, index = rounds.messages(conversation, column, language_of(request.headers)), cast(int, event.index)
        number = [message["role"] for message in shown[:index]].count("user")
        for _, *fields in self.answer(request, str(event.value), conversation, number, picked, *settings):
            yield [gr.skip(), *fields]

    def answer(
        self,
        request: gr.Request,
        query: str,
        conversation: Conversation,
        kept: int,
        picked: str,
        system: str,
        length: float,
        *sampling: float,
    ) -> Iterator[list[Any]]:
        """The answers to a question after the first ``kept`` rounds; the others come back if it can't be answered."""
        language, before, query = language_of(request.headers), list(conversation), query.strip()
        unchanged = [gr.skip()] * len(BUTTONS)
        yield [gr.skip()] * (1 + self.columns) + unchanged  # Gradio empties the fields if nothing comes
        if not query:
            return
        del conversation[kept:]
        begins = True
        try:
            generation = generation_settings(int(length), *sampling)
            for _ in self.reply(conversation, query, picked, system, generation):
                # The field is emptied once: the next question may be typed during the answer.
                field, buttons = ("", self.usable(conversation, True)) if begins else (gr.skip(), unchanged)
                yield [field, *self.shown(conversation, language, answering=True), *buttons]
                begins = False
        except UserError as error:
            conversation[:] = before
            gr.Warning(in_words(error, language))
            yield [query, *self.shown(conversation, language), *self.usable(conversation)]

    def undo(self, request: gr.Request, conversation: Conversation) -> list[Any]:
        """Takes the last question back into its field."""
        query = conversation.pop().query if conversation else ""
        return [query, *self.refresh(request, conversation)[1:]]

    def clear(self, request: gr.Request, conversation: Conversation) -> list[Any]:
        conversation.clear()
        return self.refresh(request, conversation)

    def refresh(self, request: gr.Request, conversation: Conversation) -> list[Any]:
        """The conversation as it is, then as the browser keeps it.

        Runs after every answer, because the last words of a cancelled one can be late.
        """
        shown = self.shown(conversation, language_of(request.headers))
        return [gr.skip(), *shown, *self.usable(conversation), rounds.to_browser(conversation)]

    def arrive(self, request: gr.Request, kept: Any, picked: str) -> list[Any]:
        """What a visitor finds: the conversation that the browser kept and who spoke last, names, columns, buttons."""
        language, conversation = language_of(request.headers), rounds.from_browser(kept, self.columns)
        last = conversation[-1].answers[0].speaker if conversation else picked
        picked = last if last in self.speakers else picked
        switch = [(said(label, language), column) for label, column in zip(("tuned", "base"), COLUMNS, strict=True)]
        speakers = [(self.title(name, language), name) for name in self.speakers]
        return [
            conversation,
            gr.update(choices=switch[: self.columns]),
            gr.update(choices=speakers, value=picked),
            *self.pick(request, picked),
            *self.shown(conversation, language),
            *self.usable(conversation),
        ]

    def pick(self, request: gr.Request, picked: str) -> list[Any]:
        """The header and the titles of the columns for a speaker in the left one."""
        language = language_of(request.headers)
        titles = [self.title(name, language) for name in (picked, BASE)[: self.columns]]
        return [self.header(picked, language), *map(html.escape, titles)]

    def markdown(self, request: gr.Request, conversation: Conversation, picked: str) -> str:
        language = language_of(request.headers)
        return rounds.markdown(conversation, self.speakers[picked].about.model, language)

    def training_row(self, conversation: Conversation, system: str) -> str:
        """The left column as a row of training data."""
        return rounds.training_row(rounds.answered(conversation, 0), system)


def in_words(error: UserError, language: str) -> str:
    """An error as the page says it, without flags and paths."""
    if not isinstance(error, QuestionError):
        return said("unusable", language)
    values = {name: said(value, language) if isinstance(value, str) else value for name, value in error.values.items()}
    return said(error.key, language, **values)
