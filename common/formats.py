"""Rows of the official data formats -> conversations, checked: pairs with history, messages with tools."""

import ast
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.encoding import ROUND_FORMATS, Turn, conversation_of
from common.errors import UserError
from common.rows import check_text, json_of, text_of, value_of

ROLES = ("system", "user", "assistant", "observation", "tool")


def read_pair(
    place: str, row: dict[str, Any], prompt_column: str, response_column: str, history_column: str | None
) -> list[Turn]:
    """A question, its answer, and the rounds before them; no turns where question or answer is empty."""
    query = text_of(place, row, prompt_column, "prompt_column")
    response = text_of(place, row, response_column, "response_column")
    history = read_history(place, row, history_column) if history_column else []
    return conversation_of(query, response, history) if query and response else []


def read_history(place: str, row: dict[str, Any], column: str) -> list[list[str]]:
    """Earlier rounds [[question, answer], …]; in CSV they are written as JSON; empty and null mean none."""
    history = json_of(place, f"column {column!r}", value_of(place, row, column, "history_column")) or []
    if not isinstance(history, list) or not all(is_round(pair) for pair in history):
        raise UserError(f"{place}: column {column!r} must hold [[question, answer], …], strings all.")
    return history


def is_round(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def read_messages(place: str, row: dict[str, Any], column: str) -> list[Turn]:
    """A conversation of the ChatGLM3 repository ({"tools": …, "conversations": [{"role", "content"}, …]}) or of OpenAI.

    A row's tools become the first system turn. System and user turns are not learned, nor is what a tool returned;
    all other turns are, and a turn's own ``loss`` decides otherwise. Raises UserError for what is no conversation.
    """
    messages = json_of(place, f"column {column!r}", value_of(place, row, column, "conversation_column"))
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place}: column {column!r} must hold a list of messages, and not an empty one.")
    tools = json_of(place, "column 'tools'", row.get("tools"))
    turns = [Turn("system", json.dumps(tools, ensure_ascii=False))] if tools else []
    spoken = False  # anything but the system prompt
    for number, message in enumerate(messages, 1):
        here = f"{place}, message {number}"
        role = check_role(here, message)
        if role == "system" and number > 1:
            raise UserError(f"{here}: a system message comes first and only once.")
        if role not in ("system", "user") and not spoken:
            raise UserError(f"{here}: a conversation begins with the user, not with {role}.")
        spoken = spoken or role != "system"
        turns += read_message(here, role, message)
    if not spoken:
        raise UserError(f"{place}: column {column!r} holds a system message and nothing else.")
    return turns


def check_role(place: str, message: Any) -> str:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise UserError(f"{place}: unknown role {role!r}; there are {', '.join(ROLES)}.")
    if not isinstance(message.get("loss", False), bool):
        raise UserError(f"{place}: loss must be true or false, not {message['loss']!r}.")
    return role


def read_message(place: str, role: str, message: dict[str, Any]) -> list[Turn]:
    """One message as turns: a call of a tool and what it returned are two, in the roles that ChatGLM3 has."""
    loss = message.get("loss", role not in ("system", "user"))
    if role == "tool" and "name" in message and "parameters" in message:  # the format of the ChatGLM3 repository
        call = call_turn(place, message["name"], message["parameters"], loss)
        return [call, Turn("observation", as_text(message.get("observation")))]
    if role == "tool":  # OpenAI's: only what the tool returned
        return [Turn("observation", as_text(message.get("content")), loss=message.get("loss", False))]
    content = message.get("content")
    if role == "observation" and not isinstance(content, str):
        content = as_text(content)
    text = check_text(place, "content", content)
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{place}: tool_calls must hold a list of calls.")
    functions = [call.get("function") or call for call in calls]
    turns = [call_turn(place, call.get("name"), call.get("arguments"), loss) for call in functions]
    metadata = check_text(place, "metadata", message.get("metadata"))
    return [*([Turn(role, text, metadata, loss)] if text or not turns else []), *turns]


def call_turn(place: str, name: Any, parameters: Any, loss: bool) -> Turn:
    """The assistant's turn that calls a tool, in the words that ChatGLM3 was trained with."""
    parameters = json_of(place, f"the parameters of {name}", parameters) or {}
    if not isinstance(name, str) or not isinstance(parameters, dict):
        raise UserError(f'{place}: a tool call needs a name and parameters like {{"city": "北京"}}.')
    keywords = [ast.keyword(arg=key, value=ast.Constant(value)) for key, value in parameters.items()]
    call = ast.unparse(ast.Call(func=ast.Name("tool_call"), args=[], keywords=keywords))
    return Turn("assistant", f"```python\n{call}\n```", metadata=name, loss=loss)


def as_text(value: Any) -> str:
    """What a tool returned: text as it stands, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def check_roles(tokenizer: PreTrainedTokenizerBase, place: str, turns: list[Turn]) -> None:
    """Raises UserError where a conversation needs roles that this generation of models does not have."""
    if type(tokenizer) not in ROUND_FORMATS:
        return
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected or turn.metadata:
            what = "calls a tool" if turn.metadata else f"has the role {turn.role}"
            raise UserError(
                f"{place}: turn {number + 1} {what}, but ChatGLM-6B and ChatGLM2-6B know only user and assistant in "
                "turn: use a ChatGLM3 or GLM-4 model for these conversations."
            )
    if len(turns) % 2:
        raise UserError(f"{place}: the conversation ends with a question: ChatGLM-6B and ChatGLM2-6B need its answer.")
