"""Rows of the official data formats -> checked conversations: pairs with history, messages with tools."""

import json
import keyword
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.data.rows import check_text, json_of, text_of, value_of
from common.encoding import conversation_of, has_roles
from common.errors import UserError
from common.tokenizers.base import Turn

ROLES = ("system", "user", "assistant", "observation", "tool")


def read_pair(
    place: str, row: dict[str, Any], prompt_column: str, response_column: str, history_column: str | None
) -> list[Turn]:
    """The turns of a question, its answer and the rounds before; [] if question or answer is empty."""
    query = text_of(place, row, prompt_column, "prompt_column")
    response = text_of(place, row, response_column, "response_column")
    history = read_history(place, row, history_column) if history_column else []
    return conversation_of(query, response, history) if query and response else []


def read_history(place: str, row: dict[str, Any], column: str) -> list[list[str]]:
    """The earlier rounds [[question, answer], …], which CSV holds as JSON; empty and null mean none."""
    history = json_of(place, f"column {column!r}", value_of(place, row, column, "history_column")) or []
    if not isinstance(history, list) or not all(is_round(pair) for pair in history):
        raise UserError(f"{place}: column {column!r} must hold [[question, answer], …], all of them strings.")
    return [[check_text(place, f"column {column!r}", text) for text in pair] for pair in history]


def is_round(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def read_messages(place: str, row: dict[str, Any], column: str) -> list[Turn]:
    """The turns of a conversation in the format of ChatGLM3 ({"role", "content"}, tools in the row) or of OpenAI.

    A row's tools become the first system turn. The model learns the turns of the assistant and observations in the
    format of ChatGLM3; a message's own ``loss`` overrides that. Fields that are null count as missing, because tables
    fill up messages with them. Raises UserError for anything else.
    """
    messages = json_of(place, f"column {column!r}", value_of(place, row, column, "conversation_column"))
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place}: column {column!r} must hold a list of messages, and not an empty one.")
    tools = json_of(place, "column 'tools'", row.get("tools"))
    if tools and not isinstance(tools, (list, dict)):
        raise UserError(f"{place}: column 'tools' must hold a list of tools, not {tools!r:.40}.")
    text = check_text(place, "column 'tools'", json.dumps(tools, ensure_ascii=False))
    turns = [Turn("system", text)] if tools else []
    spoken = False  # whether a turn other than the system prompt was read
    for number, message in enumerate(messages, 1):
        here = f"{place}, message {number}"
        message = checked_message(here, message)
        role = message["role"]
        if role == "system" and number > 1:
            raise UserError(f"{here}: a system message comes first and only once.")
        if role not in ("system", "user") and not spoken:
            raise UserError(f"{here}: a conversation begins with the user, not with {role}.")
        spoken = spoken or role != "system"
        turns += read_message(here, role, message)
    if not spoken:
        raise UserError(f"{place}: column {column!r} holds a system message and nothing else.")
    return turns


def checked_message(place: str, message: Any) -> dict[str, Any]:
    """The fields of a message that are not null."""
    if not isinstance(message, dict):
        raise UserError(f'{place}: expected a message like {{"role": "user", "content": …}}, found {message!r:.40}.')
    message = {name: value for name, value in message.items() if value is not None}
    role, loss = message.get("role"), message.get("loss", False)
    if role not in ROLES:
        raise UserError(f"{place}: unknown role {role!r}; there are {', '.join(ROLES)}.")
    if not isinstance(loss, bool):
        raise UserError(f"{place}: loss must be true or false, not {loss!r}.")
    if "tool_calls" in message and role != "assistant":
        raise UserError(f"{place}: only the assistant calls tools, not {role}.")
    return message


def read_message(place: str, role: str, message: dict[str, Any]) -> list[Turn]:
    """The turns of a message in the roles of ChatGLM3: a tool call and its result are two turns."""
    loss = message.get("loss", role not in ("system", "user"))
    if role == "tool" and "content" not in message:  # ChatGLM3's format: a call with its result
        call = read_call(place, message.get("name"), message.get("parameters"), loss)
        results = [message["observation"]] if "observation" in message else []
        return [call, *(Turn("observation", result_of(place, result)) for result in results)]
    if role in ("tool", "observation"):  # a result; OpenAI names it tool, and such a result is not learned by default
        if "content" not in message:
            raise UserError(f"{place}: {role} without content: what did the tool return?")
        learned = message.get("loss", role == "observation")
        return [Turn("observation", result_of(place, message["content"]), loss=learned)]
    calls = message.get("tool_calls") or []
    if "content" not in message and not calls:
        raise UserError(f"{place}: {role} without content.")
    if not isinstance(calls, list) or len(calls) > 1:
        raise UserError(f"{place}: tool_calls must hold one call: ChatGLM3 waits for the result before the next.")
    text, metadata = (check_text(place, name, message.get(name)) for name in ("content", "metadata"))
    turns = [Turn(role, text, metadata, loss)] if text or not calls else []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise UserError(f'{place}: tool_calls must hold [{{"function": {{"name": …, "arguments": …}}}}, …].')
        turns.append(read_call(place, function.get("name"), function.get("arguments"), loss))
    return turns


def read_call(place: str, name: Any, parameters: Any, loss: bool) -> Turn:
    """The assistant's turn that calls a tool, written as in ChatGLM3's training data: tool_call(city='北京')."""
    if not isinstance(name, str) or not name:
        raise UserError(f'{place}: a tool call needs a "name".')
    parameters = json_of(place, f"the parameters of {name}", parameters) or {}
    if not isinstance(parameters, dict):
        raise UserError(f'{place}: the parameters of {name} must be like {{"city": "北京"}}, not {parameters!r:.40}.')
    given = {key: value for key, value in parameters.items() if value is not None}
    other = {key: value for key, value in given.items() if not key.isidentifier() or keyword.iskeyword(key)}
    arguments = [f"{key}={value!r}" for key, value in given.items() if key not in other]
    if other:  # names that are no Python identifiers: tool_call(city='北京', **{'a-b': 1})
        arguments.append(f"**{other!r}")
    content = f"```python\ntool_call({', '.join(arguments)})\n```"
    content = check_text(place, f"the parameters of {name}", content)
    return Turn("assistant", content, metadata=check_text(place, "name", name), loss=loss)


def result_of(place: str, value: Any) -> str:
    """A tool's result as text: a string unchanged, other values as JSON."""
    return check_text(place, "the result", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def check_roles(tokenizer: PreTrainedTokenizerBase, place: str, turns: list[Turn]) -> None:
    """Raises UserError for roles that the model does not know: ChatGLM-6B and ChatGLM2-6B know two, in alternation."""
    if has_roles(tokenizer):
        if tokenizer.is_fast and not tokenizer.chat_template:  # GLM-4; ChatGLM3's tokenizer needs no template
            raise UserError(f"{tokenizer.name_or_path} has no chat template: use the chat model for conversations.")
        return
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        reason = f"has the role {turn.role}" if turn.role != expected else ""
        if turn.metadata:
            reason = "calls a tool"
        if turn.role == "user" and turn.loss:
            reason = "is a question with loss: true"
        if reason:
            raise UserError(
                f"{place}: turn {number + 1} {reason}, but ChatGLM-6B and ChatGLM2-6B know only user and assistant in "
                "turn: use a ChatGLM3 or GLM-4 model for these conversations."
            )
    if len(turns) % 2:
        raise UserError(f"{place}: the conversation ends with a question: ChatGLM-6B and ChatGLM2-6B need its answer.")
