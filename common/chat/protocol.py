"""OpenAI's interface as far as these models can follow it: requests read and checked, answers and errors written."""

import ast
import json
import secrets
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from common.chat.chat import process_response
from common.data.messages import read_messages, tools_text
from common.data.rows import RowError
from common.encoding import encode_eval, has_roles
from common.tokenizers.base import Turn

UNLIMITED = 2**30
IDS = {"messages.tool_call_id", "messages.tool_calls.id"}  # a call is followed by its result, so none is needed
Stop = str | list[str] | None


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
    stream: bool | None = False
    stream_options: dict[str, bool] | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, gt=0, le=1)
    stop: Stop = None
    seed: int | None = None
    n: Literal[1, None] = 1
    frequency_penalty: Literal[0, None] = 0
    presence_penalty: Literal[0, None] = 0
    user: str | None = None
    metadata: dict[str, Any] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatAsked(Asked):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", None] = None
    parallel_tool_calls: bool | None = None


class TextAsked(Asked):
    prompt: str
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False, None] = False


Kind = TypeVar("Kind", bound=Asked)


def read_request(kind: type[Kind], body: bytes) -> Kind:
    """Raises ApiError for what is no JSON, or no request of this kind."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        known = "" if first["type"] != "extra_forbidden" else f": {name} is not supported here"
        raise ApiError(400, f"{name}: {first['msg']}{known}" if name else first["msg"]) from error


def prompt_of(asked: ChatAsked, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a conversation that ends with a question or a tool's result. Raises ApiError for another one."""
    try:
        turns = read_messages(asked.messages, "messages", unread := set[str]())
        tools = tools_text("tools", asked.tools) if asked.tool_choice != "none" else ""
    except RowError as error:
        raise ApiError(400, str(error)) from error
    if unread := unread - IDS:
        raise ApiError(400, f"{', '.join(sorted(unread))}: not supported here")
    if turns[-1].role not in ("user", "observation"):
        raise ApiError(400, "messages: the last one must be of the user, or a tool's result")
    turns = [Turn("system", tools), *turns] if tools else turns
    if not has_roles(tokenizer):
        roles = [turn.role for turn in turns]
        if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            raise ApiError(400, "messages: this model reads questions of the user and answers of the assistant in turn")
    turns = [turn._replace(loss=False) for turn in turns]
    return encode_eval(tokenizer, [turns], UNLIMITED, UNLIMITED)[0].prompt_ids


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def split_answer(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(name of the called tool or "", content) of an answer: ChatGLM3-6B writes a line with the name before it."""
    if not has_roles(tokenizer):
        return "", process_response(text, tokenizer)
    name, line_end, content = text.partition("\n")
    return (name.strip(), content.strip()) if line_end and is_name(name.strip()) else ("", text.strip())


def is_name(text: str) -> bool:
    return bool(text) and len(text) <= 64 and not any(character.isspace() for character in text)


def tool_call(name: str, content: str) -> dict[str, Any] | None:
    """The call that an answer writes as Python, tool_call(city='北京'); None for other content. Nothing is executed."""
    code = content.strip().removeprefix("```python").removesuffix("```").strip()
    try:
        call = ast.parse(code, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or ast.unparse(call.func) != "tool_call":
            return None
        given = {word.arg or "": ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    arguments = given.pop("", {}) | given  # **{'a-b': 1} holds names that are no identifiers
    text = json.dumps(arguments, ensure_ascii=False, default=str)
    return {"id": new_id("call"), "type": "function", "function": {"name": name, "arguments": text}}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
