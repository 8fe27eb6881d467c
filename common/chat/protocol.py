"""OpenAI's interface as far as these models can follow it: requests read and checked, answers and errors written."""

import ast
import json
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from common.chat.chat import process_response
from common.data.messages import read_messages, tools_text
from common.data.rows import RowError
from common.encoding import encode_prompt, has_roles, with_methods
from common.tokenizers.base import Turn
from common.tokenizers.chatglm2 import ChatGLM3Tokenizer

IDS = {"messages.tool_call_id", "messages.tool_calls.id"}  # a call is followed by its result, so none is needed


class ApiError(Exception):
    """An error as OpenAI's interface reports it."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None):
        super().__init__(message)
        self.status = status
        self.content = {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Asked(BaseModel):
    """The settings that both kinds of requests share. A field that would be ignored is refused, but for notes."""

    model_config = ConfigDict(extra="forbid")

    model: str
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)  # None: that of the server's flags
    top_p: float | None = Field(None, gt=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: Literal[1, None] = 1
    frequency_penalty: Literal[0, None] = 0
    presence_penalty: Literal[0, None] = 0
    user: str | None = None
    metadata: dict[str, Any] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @property
    def stops(self) -> list[str]:
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if stop]


class Named(BaseModel):
    name: str


class NamedTool(BaseModel):
    """The tool that an answer must call."""

    type: Literal["function"] = "function"
    function: Named


class ChatAsked(Asked):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required", None] | NamedTool = None
    parallel_tool_calls: bool | None = None


class TextAsked(Asked):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False, None] = False


Kind = TypeVar("Kind", bound=Asked)


def read_request(kind: type[Kind], body: bytes) -> Kind:
    """Raises ApiError for what is no JSON, or no request of this kind."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request is no JSON: {error!s:.200}") from error
    if isinstance(content, dict):  # clients write null for what they leave open
        content = {name: value for name, value in content.items() if value is not None}
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        text = "not supported here" if first["type"] == "extra_forbidden" else first["msg"]
        raise ApiError(400, f"{name}: {text}" if name else text) from error


def prompt_of(asked: ChatAsked, tokenizer: PreTrainedTokenizerBase, system: str = "") -> list[int]:
    """The tokens of a conversation that ends with a question or a tool's result. Raises ApiError for another one.

    ``system``: the system prompt of a conversation that brings none.
    """
    try:
        turns = read_messages(asked.messages, "messages", unread := set[str]())
        tools = tools_text("tools", asked.tools) if asked.tool_choice != "none" else ""
    except RowError as error:
        raise ApiError(400, str(error)) from error
    if not all(isinstance(tool.get("function", tool), dict) for tool in asked.tools or []) or not all(
        name and isinstance(name, str) for name in names_of(asked.tools or [])
    ):
        raise ApiError(400, 'tools: each must be like {"type": "function", "function": {"name": "weather"}}')
    if unread := unread - IDS:
        raise ApiError(400, f"{', '.join(sorted(unread))}: not supported here")
    if turns[-1].role not in ("user", "observation"):
        raise ApiError(400, "messages: the last one must be of the user, or a tool's result")
    if system and turns[0].role != "system":
        turns = [Turn("system", system), *turns]
    turns = [Turn("system", "", tools=tools), *turns] if tools else turns
    if not has_roles(tokenizer):
        roles = [turn.role for turn in turns]
        if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            raise ApiError(400, "messages: this model reads questions of the user and answers of the assistant in turn")
    return encode_prompt(tokenizer, turns)


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def tools_of(asked: ChatAsked) -> list[dict[str, Any]]:
    """Those that an answer may call."""
    return asked.tools or [] if asked.tool_choice != "none" else []


def names_of(tools: Sequence[dict[str, Any]]) -> list[Any]:
    return [tool.get("function", tool).get("name") for tool in tools]


def call_starts(asked: ChatAsked, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens with one of which an answer begins that must call a tool: its name, and of ChatGLM3-6B more.

    Raises ApiError where there is no such tool.
    """
    if asked.tool_choice in (None, "auto", "none"):
        return []
    known = names = names_of(tools_of(asked))
    if isinstance(asked.tool_choice, NamedTool):
        names = [name for name in known if name == asked.tool_choice.function.name]
    if not names:
        raise ApiError(400, f"tool_choice: there is no such tool; there are {', '.join(known) or 'none'}")
    parts = ["```python\ntool_call"] if type(tokenizer) is ChatGLM3Tokenizer else []  # GLM-4 writes JSON
    encode = with_methods(tokenizer).encode_batch
    return [[number for ids in encode([f"{name}\n", *parts]) for number in ids.tolist()] for name in names]


def split_answer(text: str, tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """(name of the called tool or "", content) of an answer: the line before a call has the tool's name."""
    name, _, content = text.partition("\n")
    names = names_of(tools)
    if names and (call := whole_call(text, names)):  # a stream looks at each piece, without tools
        return call
    return (name.strip(), content.strip()) if name.strip() in names else ("", process_response(text, tokenizer))


def whole_call(content: str, names: Sequence[str]) -> tuple[str, str] | None:
    """(name, arguments) of a call that is one JSON object, as in the data of GLM-4's repository; else None."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.keys() != {"name", "arguments"} or found["name"] not in names:
        return None
    return found["name"], json.dumps(found["arguments"], ensure_ascii=False)


def tool_call(name: str, content: str) -> dict[str, Any] | None:
    """The call that an answer writes: ChatGLM3-6B as Python, tool_call(city='北京'), GLM-4 as JSON, {"city": "北京"}.

    None for other content. Nothing is executed.
    """
    code = content.strip().removeprefix("```python").removesuffix("```").strip()
    try:
        if code.startswith("{"):
            arguments = json.loads(code)
        else:
            call = ast.parse(code, mode="eval").body
            if not isinstance(call, ast.Call) or call.args or ast.unparse(call.func) != "tool_call":
                return None
            given = {word.arg or "": ast.literal_eval(word.value) for word in call.keywords}
            arguments = given.pop("", {}) | given  # **{'a-b': 1} holds names that are no identifiers
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return {"id": new_id("call"), "type": "function", "function": {"name": name, "arguments": text}}
