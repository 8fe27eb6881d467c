"""Lists of messages, as ChatGLM3, GLM-4, OpenAI, ShareGPT (LLaMA-Factory) and ms-swift write them -> turns."""

import json
import keyword
from typing import Any

from common.data.rows import RowError
from common.tokenizers.base import Turn

# The roles of all formats. A tool message without content is ChatGLM3's: a call with its result.
ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "observation": "observation",
    "tool": "tool",
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "系统": "system",
    "用户": "user",
    "助手": "assistant",
    "function": "result",
    "function_response": "result",
    "tool_response": "result",
    "function_call": "call",
    "tool_call": "call",
}
KNOWN_ROLES = "system, user, assistant, observation, tool, human, gpt, function_call, function, developer"
FOLLOWERS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("user", "assistant"),
    "assistant": ("user", "assistant"),
}
ROLE_FIELDS, CONTENT_FIELDS = ("role", "from"), ("content", "value")
REASONING_FIELDS = ("reasoning_content", "reasoning")
# The fields of a message that decide tokens, beside role, content and reasoning.
READ = {
    "system": ("metadata", "tools"),
    "user": ("metadata",),
    "assistant": ("metadata", "tool_calls", "function_call"),
    "call": (),
    "tool": ("name", "parameters", "observation"),
    "observation": (),
    "result": (),
}
TEXT_PARTS = ("text", "input_text", "output_text")


def is_empty(value: Any) -> bool:
    """Whether a value is null or an empty string, list or object; 0 and false are not empty."""
    return not value and value != 0


def check_text(name: str, value: Any) -> str:
    """The string, "" for null. Raises RowError for other types and for lone surrogates."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{name} holds {type(value).__name__} {value!r:.40}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{name} holds half a character (a lone surrogate), which is no text") from None
    return value


def json_of(name: str, value: Any) -> Any:
    """The JSON value that a string holds, as CSV writes lists, None for a blank one; other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise RowError(f"{name} is not JSON: {error}") from error


def tools_text(name: str, value: Any) -> str:
    """The tools as JSON, "" for none. Fields of ``properties`` that are null, as tables have, are left out."""
    tools = json_of(name, value)
    if not tools:
        return ""
    if not all(isinstance(tool, dict) for tool in (tools if isinstance(tools, list) else [tools])):
        raise RowError(f"{name} must hold a list of tools, not {tools!r:.40}")
    return check_text(name, json.dumps(without_null_properties(tools), ensure_ascii=False))


def without_null_properties(value: Any) -> Any:
    if isinstance(value, list):
        return [without_null_properties(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {name: without_null_properties(item) for name, item in value.items()}
    if isinstance(properties := found.get("properties"), dict):
        found["properties"] = {name: item for name, item in properties.items() if item is not None}
    return found


def read_messages(value: Any, column: str, unread: set[str]) -> list[Turn]:
    """The turns of a conversation, with answers that are empty.

    The model learns the turns of the assistant; a message's own ``loss`` or ``weight`` overrides that. An observation
    is learned too, as the script of ChatGLM3 does, but not in a column ``messages``, nor in ShareGPT. Fields that are
    null count as missing, because tables fill up messages with them. Adds the names of fields that are not read, such
    as ``messages.name``, to ``unread``. Raises RowError for a list that is no conversation.
    """
    messages = json_of(f"column {column!r}", value)
    if not isinstance(messages, list) or not messages:
        raise RowError(f"column {column!r} must hold a list of messages, and not an empty one")
    if is_round(messages[0]):
        messages = [message for both in messages for message in split_round(both)]
    learn_observations = column.lower() != "messages" and not is_sharegpt(messages)
    turns: list[Turn] = []
    spoken, before = False, ""  # whether a turn other than the system prompt was read; the role of the last message
    for number, message in enumerate(messages, 1):
        try:
            role = role_of(message)
            if role == "system" and number > 1:
                raise RowError("a system message comes first and only once")
            if role not in ("system", "user") and not spoken:
                raise RowError(f"a conversation begins with the user, not with {role}")
            if role == before == "call":
                raise RowError("two calls in a row, but the model waits for the result before the next")
            spoken, before = spoken or role != "system", role
            turns += read_message(role, message, learn_observations, column, unread)
        except RowError as error:
            raise RowError(f"message {number}: {error}") from error
    if not spoken:
        raise RowError(f"column {column!r} holds a system message and nothing else")
    return turns


def plain_turns(messages: Any) -> list[Turn] | None:
    """The turns of messages with a role and a text each, as most are; None where there is more to look at."""
    turns: list[Turn] = []
    before = ""
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict) or len(message) != 2:
            return None
        role, text = message.get("role"), message.get("content")
        if role not in FOLLOWERS[before] or not isinstance(text, str) or not text:
            return None
        try:
            text.encode()
        except UnicodeEncodeError:
            return None
        turns.append(Turn(role, text, "", role == "assistant"))
        before = role
    return turns if before in ("user", "assistant") else None


def is_sharegpt(messages: list[Any]) -> bool:
    return isinstance(messages[0], dict) and messages[0].get("from") is not None


def is_round(message: Any) -> bool:
    """Whether it is a question with its answer, as ms-swift writes them: {"human": …, "assistant": …}."""
    return isinstance(message, dict) and "human" in message and "assistant" in message and "role" not in message


def split_round(both: Any) -> list[Any]:
    if not is_round(both):
        return [both]
    rest = {name: value for name, value in both.items() if name not in ("human", "assistant")}
    return [{"role": "user", "content": both["human"]}, rest | {"role": "assistant", "content": both["assistant"]}]


def role_of(message: Any) -> str:
    """The role of a message, one of the values of ROLES."""
    if not isinstance(message, dict):
        raise RowError(f'expected a message like {{"role": "user", "content": …}}, found {message!r:.40}')
    role = message.get(first_of(message, *ROLE_FIELDS))
    if role is None:
        raise RowError(f"a message needs role and content, or from and value; this one has {', '.join(message)}")
    name = role.strip().lower() if isinstance(role, str) else ""
    if name not in ROLES:
        raise RowError(f"unknown role {role!r}; there are {KNOWN_ROLES}")
    return ROLES[name]


def first_of(message: dict[str, Any], *names: str) -> str:
    """The first of these fields that is not null; the first name if there is none."""
    return next((name for name in names if message.get(name) is not None), names[0])


def read_message(
    role: str, message: dict[str, Any], learn_observations: bool, column: str, unread: set[str]
) -> list[Turn]:
    """The turns of a message: ChatGLM3's tool is a call and its result, and a text beside a call is a turn too."""
    content_field, reasoning_field = first_of(message, *CONTENT_FIELDS), first_of(message, *REASONING_FIELDS)
    content, reasoning = message.get(content_field), message.get(reasoning_field)
    is_result = content is not None or message.get("tool_call_id") is not None
    kind = "result" if role == "tool" and is_result else role
    read = {first_of(message, *ROLE_FIELDS), content_field, "loss", "weight", *READ[kind]}
    note_unread(message, read | {reasoning_field} if kind in ("assistant", "call") else read, column, unread)
    default = kind in ("assistant", "call", "tool") or kind == "observation" and learn_observations
    loss = loss_of(message, default, kind in ("assistant", "call", "tool"))
    if kind == "tool":
        results = [message["observation"]] if message.get("observation") is not None else []
        call = read_call(message.get("name"), message.get("parameters"), loss)
        return [call, *(Turn("observation", result_of(result, column, unread)) for result in results)]
    if kind in ("observation", "result"):
        if content is None:
            raise RowError(f"{role} without content: what did the tool return?")
        return [Turn("observation", result_of(content, column, unread), loss=loss)]
    if kind == "call":
        calls = [call_of(call, f"{column}.{content_field}", unread) for call in one_call("function_call", content)]
        if not calls:
            raise RowError("function_call without content")
        turns = [read_call(*calls[0], loss)]
    elif kind == "assistant":
        turns = read_answer(message, content, loss, column, unread)
    else:
        return [read_given(role, message, content, loss, column, unread)]
    return [turns[0]._replace(reasoning_content=check_text(reasoning_field, reasoning)), *turns[1:]]


def read_given(role: str, message: dict[str, Any], content: Any, loss: bool, column: str, unread: set[str]) -> Turn:
    """The turn of a system message, with the tools in it that GLM-4 writes there, or of a question."""
    if any(not is_empty(message.get(name)) for name in ("tool_calls", "function_call")):
        raise RowError(f"only the assistant calls tools, not {role}")
    text, metadata = content_text(content, column, unread), check_text("metadata", message.get("metadata"))
    tools = tools_text("tools", message.get("tools")) if role == "system" else ""
    if content is None and not tools:
        raise RowError(f"{role} without content")
    return Turn(role, text, metadata, loss, tools=tools)


def note_unread(fields: dict[str, Any], read: set[str], where: str, unread: set[str]) -> None:
    """Adds the names of fields that hold something and are not among those that are ``read``."""
    unread.update(f"{where}.{name}" for name, value in fields.items() if name not in read and not is_empty(value))


def loss_of(message: dict[str, Any], default: bool, is_answer: bool) -> bool:
    """Whether the model learns a message, by its ``loss`` (ChatGLM3) or its ``weight`` (OpenAI)."""
    loss, weight = message.get("loss"), message.get("weight")
    if loss is not None and not isinstance(loss, bool):
        raise RowError(f"loss must be true or false, not {loss!r}")
    if weight is None:
        return default if loss is None else loss
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"weight must be 0 or 1, not {weight!r:.40}")
    if loss is not None and loss != bool(weight):
        raise RowError(f"loss {json.dumps(loss)} contradicts weight {weight}")
    if weight and not is_answer:
        raise RowError("only a message of the assistant has a weight of 1")
    return bool(weight)


def read_answer(message: dict[str, Any], content: Any, loss: bool, column: str, unread: set[str]) -> list[Turn]:
    """The assistant's text, its call, or both."""
    calls = [
        *one_call("tool_calls", message.get("tool_calls")),
        *one_call("function_call", message.get("function_call")),
    ]
    if content is None and not calls and not any(name in message for name in CONTENT_FIELDS):
        raise RowError("assistant without content")
    if len(calls) > 1:
        raise RowError("tool_calls and function_call hold two calls, but the model waits for a result after each")
    text, metadata = content_text(content, column, unread), check_text("metadata", message.get("metadata"))
    turns = [Turn("assistant", text, metadata, loss)] if text or metadata or not calls else []
    for call in calls:
        where = f"{column}.tool_calls" if message.get("tool_calls") else f"{column}.function_call"
        turns.append(read_call(*call_of(call, where, unread), loss))
    return turns


def content_text(content: Any, column: str, unread: set[str]) -> str:
    """The text of a content, which may be a list of parts of type text."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return check_text("content", content)
    for part in content:
        if part.get("type", "text") not in TEXT_PARTS:
            raise RowError(f"content holds a part of type {part['type']}, but the model reads text only")
        note_unread(part, {"type", "text"}, f"{column}.content", unread)
    return "".join(check_text("content", part.get("text")) for part in content)


def result_of(value: Any, column: str, unread: set[str]) -> str:
    """A tool's result as text: a string unchanged, the text of parts, other values as JSON."""
    if isinstance(value, list) and value and all(is_text_part(part) for part in value):
        return content_text(value, column, unread)
    return check_text("the result", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str)


def one_call(name: str, value: Any) -> list[Any]:
    """The call in a field that holds one, or a list of one; [] for none."""
    calls = json_of(name, value) or []
    if isinstance(calls, dict):
        return [calls]
    if not isinstance(calls, list) or len(calls) > 1:
        raise RowError(f"{name} must hold one call: the model waits for the result before the next")
    return calls


def call_of(call: Any, where: str, unread: set[str]) -> tuple[Any, Any]:
    """The name of a tool and its arguments, as OpenAI's tool_calls or as a plain {"name": …, "arguments": …}."""
    function = call
    if where.endswith(".tool_calls"):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise RowError('tool_calls must hold [{"function": {"name": …, "arguments": …}}]')
        note_unread(call, {"function"} | ({"type"} if call.get("type") == "function" else set()), where, unread)
        where += ".function"
    if not isinstance(function, dict):
        raise RowError(f'function_call must hold {{"name": …, "arguments": …}}, not {function!r:.40}')
    arguments = "arguments" if function.get("arguments") is not None else "parameters"
    note_unread(function, {"name", arguments}, where, unread)
    return function.get("name"), function.get(arguments)


def read_call(name: Any, parameters: Any, loss: bool) -> Turn:
    """The assistant's turn that calls a tool, with the text of ChatGLM3's training data: tool_call(city='北京')."""
    if not isinstance(name, str) or not name:
        raise RowError('a tool call needs a "name"')
    parameters = json_of(f"the parameters of {name}", parameters) or {}
    if not isinstance(parameters, dict):
        raise RowError(f'the parameters of {name} must be like {{"city": "北京"}}, not {parameters!r:.40}')
    given = {key: value for key, value in parameters.items() if value is not None}
    other = {key: value for key, value in given.items() if not key.isidentifier() or keyword.iskeyword(key)}
    arguments = [f"{key}={value!r}" for key, value in given.items() if key not in other]
    if other:  # names that are no Python identifiers: tool_call(city='北京', **{'a-b': 1})
        arguments.append(f"**{other!r}")
    content = check_text(f"the parameters of {name}", f"```python\ntool_call({', '.join(arguments)})\n```")
    as_json = check_text(f"the parameters of {name}", json.dumps(given, ensure_ascii=False))
    return Turn("assistant", content, check_text("name", name), loss, arguments=as_json)
