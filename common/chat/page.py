"""The elements of the page, and the event that each of them starts."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from common.chat.events import BUTTONS, COLUMNS, Chat
from common.chat.labels import translations
from common.encoding import has_roles

HIDDEN: dict[str, Any] = {"api_visibility": "private"}
I18N = gr.I18n(**translations())
SCRIPT = Path(__file__).with_name("web_demo.js")


class Elements(NamedTuple):
    """What the events read and change."""

    conversation: gr.State
    kept: gr.BrowserState  # the conversation, as the browser keeps it over a reload
    header: gr.HTML
    picker: gr.Dropdown
    switch: gr.Radio  # between the columns, on a narrow screen
    titles: list[gr.HTML]
    columns: list[gr.Chatbot]
    examples: list[gr.Button]  # a question each
    box: gr.Textbox
    buttons: dict[str, gr.Button]
    settings: list[Any]  # in the order of the parameters of ``Chat.answer``
    exported: gr.Textbox
    language: gr.Button


def build_page(chat: Chat, args: argparse.Namespace) -> gr.Blocks:
    """One column per speaker, the question, buttons, settings."""
    facts = chat.speakers[chat.first].about
    with gr.Blocks(title=f"ChatGLM · {facts.model}", analytics_enabled=False, fill_height=True) as page:
        header, picker, language, switch = top_of(chat)
        with gr.Row(elem_id="columns"):
            titles, columns = zip(*(column(chat, number) for number in range(chat.columns)), strict=True)
        with gr.Row(elem_id="examples"):
            examples = [gr.Button(question, size="sm", min_width=100) for question in facts.questions]
        box = gr.Textbox(
            show_label=False,
            label=I18N("question"),
            placeholder=I18N("question"),
            max_lines=8,
            submit_btn=str(I18N("send")),
            autofocus=True,
            elem_id="question",
        )
        with gr.Row(elem_id="buttons"):
            small: dict[str, Any] = {"size": "sm", "min_width": 80}
            buttons = {key: gr.Button(I18N(key), interactive=False, elem_id=key, **small) for key in BUTTONS}
            gr.Button(I18N("settings"), **small).click(None, js="toggleSettings", **HIDDEN)
        settings = settings_of(chat, args)
        elements = Elements(
            conversation=gr.State([]),
            # Of a conversation with another model the browser can't read what it kept.
            kept=gr.BrowserState([], storage_key="conversation", secret=chat.first + facts.model),
            header=header,
            picker=picker,
            switch=switch,
            titles=list(titles),
            columns=list(columns),
            examples=examples,
            box=box,
            buttons=buttons,
            settings=settings,
            exported=gr.Textbox(visible="hidden"),
            language=language,
        )
        connect(page, chat, elements)
    return page


def top_of(chat: Chat) -> tuple[gr.HTML, gr.Dropdown, gr.Button, gr.Radio]:
    """Who talks, the choice of another speaker, and the two switches; ``Chat.arrive`` fills in the words."""
    bare: dict[str, Any] = {"show_label": False, "container": False}
    with gr.Row(elem_id="top"):
        header = gr.HTML(elem_id="header")
        names = list(chat.speakers)
        picker = gr.Dropdown(
            names, value=chat.first, label=I18N("picker"), elem_id="picker", visible=len(names) > 1, **bare
        )
        language = gr.Button(I18N("switch"), size="sm", elem_id="language")
    columns = [("…", column) for column in COLUMNS[: chat.columns]]
    switch = gr.Radio(
        columns,
        value=COLUMNS[0],
        interactive=True,
        label=I18N("shown"),
        elem_id="switch",
        visible=chat.beside,
        **bare,
    )
    return header, picker, language, switch


def column(chat: Chat, number: int) -> tuple[gr.HTML, gr.Chatbot]:
    """The title and the messages of a speaker."""
    with gr.Column(elem_classes="column", min_width=320):
        title = gr.HTML("", elem_classes="title", visible=chat.beside)
        messages = gr.Chatbot(
            show_label=False,
            placeholder=str(I18N("welcome")),
            elem_id=COLUMNS[number],
            buttons=["copy"],
            editable="user",
            group_consecutive_messages=False,
            feedback_options=None,
        )
    return title, messages


def settings_of(chat: Chat, args: argparse.Namespace) -> list[Any]:
    """The fields beside the conversation."""
    with gr.Sidebar(label=I18N("settings"), open=False, position="right", elem_id="settings"):
        known = has_roles(chat.tokenizer)
        system = gr.Textbox(
            args.system_prompt,
            label=I18N("system"),
            placeholder=None if known else I18N("no_system"),
            interactive=known,
            lines=4 if known else 1,
            max_lines=12,
        )
        longest = max(args.max_new_tokens, chat.context // 2)
        length = gr.Slider(1, longest, args.max_new_tokens, step=1, label=I18N("length"))
        temperature = gr.Slider(0, 2, args.temperature, step=0.01, label=I18N("temperature"))
        top_p = gr.Slider(0.01, 1, args.top_p, step=0.01, label=I18N("top_p"))
    return [system, length, temperature, top_p]


def connect(page: gr.Blocks, chat: Chat, elements: Elements) -> None:
    """Connects each event of the page with a method of ``chat``."""
    conversation, picker, buttons, columns = elements.conversation, elements.picker, elements.buttons, elements.columns
    asked = [conversation, picker, *elements.settings]
    fields = [elements.box, *columns, *buttons.values()]
    generating: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "generation", **HIDDEN}
    generating |= {"outputs": fields, "show_progress_on": columns}
    answers: list[Any] = [
        elements.box.submit(chat.ask, [elements.box, *asked], **generating),
        *(example.click(chat.ask, [example, *asked], **generating) for example in elements.examples),
        *(column.edit(chat.edit, asked, **generating) for column in columns),
    ]
    answers.append(buttons["retry"].click(chat.ask_again, asked, cancels=list(answers), **generating))
    quiet: dict[str, Any] = {"show_progress": "hidden", **HIDDEN}
    at_once = {"cancels": answers, **quiet}
    whole = [*fields, elements.kept]
    for answer in answers:
        answer.then(chat.refresh, conversation, whole, **quiet)
    buttons["stop"].click(None, **at_once)
    buttons["undo"].click(chat.undo, conversation, whole, **at_once)
    buttons["clear"].click(chat.clear, conversation, whole, **at_once)
    names = [elements.header, *elements.titles]
    found = [conversation, elements.switch, picker, *names, *fields[1:]]
    page.load(chat.arrive, [elements.kept, picker], found, **quiet)
    picker.change(chat.pick, picker, names, **quiet)
    elements.language.click(None, None, None, js="switchLanguage", **HIDDEN)
    exports = {
        "markdown": (chat.markdown, [conversation, picker]),
        "row": (chat.training_row, [conversation, elements.settings[0]]),
    }
    for key, (export, read) in exports.items():
        exported = buttons[key].click(export, read, elements.exported, **quiet)
        exported.then(None, elements.exported, None, js=f"text => download({key!r}, text)", **HIDDEN)
