"""The flags of the command line, read from the sources of their dataclasses.

The dataclasses themselves import torch and transformers, which takes seconds: a wrong flag and --help don't wait.
"""

import argparse
import ast
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

OURS = Path(__file__).with_name("arguments.py")
TRUE, FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")


class Flag(NamedTuple):
    name: str
    kinds: list[str]  # the parts of its type
    default: Any  # argparse.SUPPRESS for one that the source computes
    about: dict[str, Any]  # help, nargs and const, as argparse calls them


def truth(word: str) -> bool:
    """A switch as a word. Raises ArgumentTypeError for a word of another kind."""
    if word.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"{word}: give true or false")
    return word.lower() in TRUE


TYPES: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": truth,
    "Rows": str,
    "Switch": str,
    "dict": str,
    "Path": str,
}


@cache
def parsed(file: Path) -> dict[str, ast.stmt]:
    """The classes of a file, and what it assigns to names."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
    return found


def library(file: str) -> Path:
    """A file of transformers, which is found and not imported."""
    spec = find_spec("transformers")
    assert spec and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / file


@cache
def declared(kind: str) -> dict[str, Flag]:
    """The flags of a dataclass of common/arguments.py: the fields that may be given, also those that it inherits."""
    places = [(OURS, kind)]
    if kind == "TrainingArguments":
        bases = ("training_args.py", kind), ("training_args_seq2seq.py", "Seq2SeqTrainingArguments")
        places = [*((library(file), name) for file, name in bases), *places]
    found: dict[str, Flag | None] = {}
    for file, name in places:
        found |= dict(fields_of(file, name))  # an own field replaces an inherited one
    return {name: flag for name, flag in found.items() if flag and kind_of(flag)}


def fields_of(file: Path, kind: str) -> Iterator[tuple[str, Flag | None]]:
    """(name, flag) of each field of a class; no flag: it can't be given."""
    for node in parsed(file)[kind].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, value = node.target.id, node.value
            words = {word.arg: word.value for word in value.keywords} if isinstance(value, ast.Call) else {}
            given = "init" not in words
            yield name, Flag(name, parts_of(node.annotation), *told(file, value, words)) if given else None


def told(file: Path, value: ast.expr | None, words: dict[str | None, ast.expr]) -> tuple[Any, dict[str, Any]]:
    """(default, what argparse is told) of a field, by what is assigned to it; ``words``: the keywords of a call."""
    if not isinstance(value, ast.Call):
        return literal(file, value), {}
    if isinstance(value.func, ast.Name) and value.func.id == "flag":
        default = literal(file, value.args[1]) if value.args[1:] else None
        alone = {"nargs": "?", "const": literal(file, words["alone"])} if "alone" in words else {}
        return default, {"help": text(value.args[0]), **alone}
    about = words.get("metadata")
    assert about is None or isinstance(about, ast.Dict)
    pairs = zip(about.keys, about.values, strict=True) if about else ()
    found = {literal(file, key): literal(file, value) for key, value in pairs}
    found["help"] = text(about.values[0]) if about else ""
    default = words.get("default") or words.get("default_factory")
    return literal(file, default), {key: value for key, value in found.items() if value != argparse.SUPPRESS}


def literal(file: Path, node: ast.expr | None) -> Any:
    """The value of an expression of constants; argparse.SUPPRESS for another one."""
    if isinstance(node, ast.Lambda):
        return literal(file, node.body)
    if isinstance(node, ast.Call) and len(node.args) == 1:  # of a type that is a name for another one
        return literal(file, node.args[0])
    if isinstance(node, ast.Name) and node.id == "list":
        return []
    if isinstance(node, ast.Name) and isinstance(assigned := parsed(file).get(node.id), ast.Assign):
        return literal(file, assigned.value)
    try:
        return ast.literal_eval(node) if node else None
    except ValueError:
        return argparse.SUPPRESS


def text(node: ast.expr) -> str:
    """A string of constants, whose formatted parts are left out."""
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def parts_of(annotation: ast.expr) -> list[str]:
    """The types of a union."""
    if isinstance(annotation, ast.BinOp):
        return parts_of(annotation.left) + parts_of(annotation.right)
    return [ast.unparse(annotation)]


@cache
def choices() -> dict[str, list[str]]:
    """The values of transformers' enumerations, by the names of their classes."""
    found = {}
    for file in ("trainer_utils.py", "training_args.py", "debug_utils.py"):
        for name, node in parsed(library(file)).items():
            if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["ExplicitEnum"]:
                found[name] = [text(part.value) for part in node.body if isinstance(part, ast.Assign)]
    return found


def spellings(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def kind_of(flag: Flag) -> str:
    """The one of its types that words say; "" where they can say none."""
    kinds = [kind for kind in flag.kinds if kind != "None"]
    if len(flag.kinds) == len(kinds) == 2:  # what is not text is meant, and given as text
        kinds.remove("str")
    name = kinds[0].partition("[")[0]
    return kinds[0] if name in TYPES or name in choices() or name in ("Literal", "list") else ""


def add(parser: argparse.ArgumentParser, flag: Flag) -> None:
    """Adds a flag as transformers' HfArgumentParser does.

    --a_b and --a-b are the same; a switch that is on has --no_a_b and --no-a-b too.
    """
    kind, _, of = kind_of(flag).rstrip("]").partition("[")
    values = list(ast.literal_eval(f"({of},)")) if kind == "Literal" else choices().get(kind)
    about: dict[str, Any] = {"choices": values} if values else {}
    if kind == "list":
        about = {"nargs": "+"}
    elif kind == "bool" and (len(flag.kinds) == 1 or flag.default is not None):
        about = {"nargs": "?", "const": True}
    parser.add_argument(*spellings(flag.name), default=flag.default, type=TYPES.get(kind, str), **flag.about | about)
    if kind == "bool" and flag.default is True:
        parser.add_argument(*spellings(f"no_{flag.name}"), action="store_false", dest=flag.name, **flag.about)


def parser_of(kinds: Iterable[str], usage: str) -> argparse.ArgumentParser:
    """The parser of the flags of some dataclasses."""
    parser = argparse.ArgumentParser(
        usage=usage, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, exit_on_error=False
    )
    for kind in kinds:
        for flag in declared(kind).values():
            add(parser, flag)
    return parser
