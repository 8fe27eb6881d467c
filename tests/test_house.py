"""The order of the code: imports go down only, files and functions stay short, requirements name what is imported."""

import ast
import re
import sys
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

from conftest import ROOT

# From the ground up: a room imports from itself and from those before it.
ROOMS = (
    *("common", "errors", "devices", "files", "manifest", "locking", "tokenizers", "hub", "models", "deepspeed_file"),
    *("declared", "engine", "bounds", "arguments", "trained", "flags", "launch"),
    *("methods", "loading", "encoding", "data", "metrics", "memory", "report", "training", "sharding", "finetune"),
    *(
        "chat",
        "inference_hf",
        "finetune_hf",
        "merge",
        "export",
        "preprocess",
        "AdvertiseGen",
        "demo",
        "ptuning",
        "lora",
        "full",
    ),
)
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


@cache
def files() -> dict[str, Path]:
    """{module: its file} for each file of the product; a package is named as its folder."""
    tops = ("common", "ptuning", "lora", "full", "AdvertiseGen")
    found = [file for top in tops for file in (ROOT / top).rglob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in found}


@cache
def trees() -> dict[str, ast.Module]:
    return {module: ast.parse(file.read_text()) for module, file in files().items()}


def imported(tree: ast.Module) -> set[str]:
    """The dotted names that a module imports anywhere, also in its functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, "imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(module: str) -> set[str]:
    return imported(trees()[module]) & trees().keys()


def room(module: str) -> str:
    return module.removeprefix("common.").partition(".")[0]


def test_no_files_import_each_other_in_a_circle():
    TopologicalSorter({module: own_imports(module) for module in trees()}).prepare()  # raises CycleError


def test_rooms_import_from_lower_rooms_only():
    assert {room(module) for module in trees()} == set(ROOMS)
    imports = [(module, other) for module in trees() for other in own_imports(module)]
    assert [(low, high) for low, high in imports if ROOMS.index(room(low)) < ROOMS.index(room(high))] == []


def test_files_and_functions_are_short():
    lengths = {module: len(file.read_text().splitlines()) for module, file in files().items()}
    assert {module: length for module, length in lengths.items() if length > LONGEST_FILE} == {}
    functions = [
        (node.end_lineno - node.lineno + 1, module, node.name)
        for module, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [function for function in functions if function[0] > LONGEST_FUNCTION] == []


def canonical(name: str) -> str:
    """The spelling of a distribution's name that all its spellings share."""
    return re.sub("[-_.]+", "-", name).lower()


def test_requirements_name_every_package_that_is_imported():
    lines = [line for file in ROOT.glob("requirements*.txt") for line in file.read_text().splitlines()]
    required = {canonical(re.split("[=<>#;[ ]", line)[0]) for line in lines}
    packages = {name.partition(".")[0] for tree in trees().values() for name in imported(tree)}
    foreign = packages - sys.stdlib_module_names - {module.partition(".")[0] for module in trees()}
    distributions = packages_distributions()
    missing = {name for name in foreign if required.isdisjoint(map(canonical, distributions.get(name, [name])))}
    assert missing == set()
