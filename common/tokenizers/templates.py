"""Chat templates, which come with a model from anybody: rendered within bounds of time and memory.

transformers renders them in a sandbox that keeps a template from files and code, and lets it loop and grow without end.
"""

import os
import resource
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.runtime import Context
from transformers.utils.chat_template_utils import _compile_jinja_template

from common.errors import UserError

TICK = "tick "  # a name that no template can write
LONGEST = 2**17  # characters of a template; those of GLM-4 have 2,000
LARGEST_TEXT = 2**26  # characters of a conversation
SECONDS = 2.0  # of this thread's CPU for one conversation
MEMORY = 2**29  # bytes for a few conversations
AT_ONCE = 16  # conversations under one limit: to set it takes as long as to render one
UNBOUNDED = {"lipsum", "urlize", "round", "slice", "wordwrap"}  # compute for long in one step: templates lack them
PAGE = os.sysconf("SC_PAGE_SIZE")
_memory = threading.Lock()  # held while the limit is set, which is one for all threads
_clock = threading.local()


@pass_context  # so that it is called each time, and not once in advance
def tick(context: Context, value: str) -> str:
    """Raises TemplateError when the time is over. Templates call it in each round of a loop and in each macro."""
    if time.thread_time() > _clock.end:
        raise TemplateError(f"it takes longer than {SECONDS:g} seconds")
    return value


def product(left: Any, right: Any) -> Any:
    """left * right, unless both are numbers whose digits could fill the memory: to multiply them takes no step."""
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 1000:
        raise TemplateError("it computes a number without end")
    return left * right


@contextmanager
def bounded() -> Iterator[None]:
    """Bounds the memory of this process: what exceeds it ends by MemoryError."""
    with _memory:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@lru_cache(maxsize=16)
def compiled(source: str) -> Template:
    """A template that calls ``tick`` wherever it repeats something. Raises TemplateError if that is not enough."""
    environment = _compile_jinja_template("").environment.overlay()
    environment.intercepted_binops = frozenset({"*"})
    environment.binop_table = environment.binop_table | {"*": product}
    environment.filters = {name: each for name, each in environment.filters.items() if name not in UNBOUNDED}
    environment.filters[TICK] = tick
    environment.globals = {name: each for name, each in environment.globals.items() if name not in UNBOUNDED}
    if len(source) > LONGEST:
        raise TemplateError(f"it has {len(source):,} characters")
    tree = environment.parse(source)
    if tree.find(nodes.Pow):
        raise TemplateError("it uses powers, which may take for ever")
    for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        call = nodes.Filter(nodes.Const(""), TICK, [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(call, lineno=node.lineno))
    return environment.from_string(tree)


def render(source: str, name: str, conversations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The text of a template for the values of each conversation. Raises UserError if it fails or exceeds a bound.

    ``name``: the model that the template belongs to.
    """
    texts: list[str] = []
    try:
        while len(texts) < len(conversations):
            with bounded():
                for values in conversations[len(texts) :][:AT_ONCE]:
                    _clock.end = time.thread_time() + SECONDS
                    texts.append(compiled(source).render(values))
            if len(texts[-1]) > LARGEST_TEXT:
                raise TemplateError(f"it writes {len(texts[-1]):,} characters")
        return texts
    except MemoryError:
        problem = f"it takes more than {MEMORY / 1e9:.1f} GB"
    except RecursionError:
        problem = "it calls itself without end"
    except Exception as error:  # a template may compute anything
        problem = " ".join(str(error).split())[:200] or type(error).__name__
    raise UserError(f"the chat template of {name} can't be used: {problem}. Take that of the original model.")
