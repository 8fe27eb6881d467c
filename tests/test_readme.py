"""The documents keep to the code: data examples are read, commands name what exists, both languages say the same."""

import ast
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import pytest

from common.arguments import (
    DataArguments,
    FullArguments,
    LoraArguments,
    ModelArguments,
    PrefixArguments,
    TrainingArguments,
)
from common.data.dataset import prepare_dataset, read_examples
from common.data.rows import read_rows
from common.errors import UserError
from common.flags import REMOVED, RENAMED, FlagParser
from common.loading import load_tokenizer
from common.tokenizers.chatglm2 import ChatGLM2Tokenizer

ROOT = Path(__file__).resolve().parents[1]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README_zh.md"
METHODS = {"ptuning": PrefixArguments, "lora": LoraArguments, "full": FullArguments}
READMES = [ENGLISH, CHINESE, *(ROOT / method / "README.md" for method in METHODS)]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"([A-Z][A-Z_]*)=(.*)")


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def each_readme(test):
    return pytest.mark.parametrize("readme", READMES, ids=name_of)(test)


def blocks(readme: Path, language: str) -> list[str]:
    return [content for kind, content in FENCE.findall(readme.read_text()) if kind == language]


def prose(readme: Path) -> str:
    """What stands outside of blocks; of the table that compares, without the column about the official files."""
    text = FENCE.sub("", readme.read_text())
    table = re.search(r"^\| (there \| here|官方 \| 这里) \|\n(\|.*\n)+", text, re.MULTILINE)
    return text.replace(table[0], re.sub(r"^\|[^|]*\|", "|", table[0], flags=re.MULTILINE)) if table else text


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


# Data


EXAMPLES = [json.loads(line) for line in blocks(ENGLISH, "json")[0].splitlines()]
# columns of an example, and what is learned of it by models with rounds, and by ChatGLM3; None: it is refused
PAIR = {"prompt_column": "content", "response_column": "summary"}
HISTORY = {"prompt_column": "prompt", "response_column": "response", "history_column": "history"}
CALL = "query_stock\n```python\ntool_call(color='白色')\n```"
LEARNED: list[tuple[dict[str, str], list[str] | None, list[str]]] = [
    (PAIR, ["白色的裙子……"], ["白色的裙子……"]),
    (HISTORY, ["配一件白衬衫。"], ["配一件白衬衫。"]),
    ({"conversation_column": "conversations"}, None, ["您好！"]),
    ({"conversation_column": "conversations"}, None, [f"{CALL}还有3件。"]),
    ({"conversation_column": "messages"}, ["再见！"], ["再见！"]),
    ({"text_column": "text"}, ["一段文字，按语言模型训练。"], ["一段文字，按语言模型训练。"]),
]


@pytest.fixture(scope="module")
def tokenizers() -> dict:
    third = load_tokenizer("demo3")
    return {"chatglm": load_tokenizer("demo"), "chatglm2": ChatGLM2Tokenizer(third.vocab_file), "chatglm3": third}


def plain(text: str) -> str:
    """Without spaces, and with the punctuation that ChatGLM-6B's vocabulary, which is normalised, makes of it."""
    for full, half in {"，": ",", "！": "!", "……": "......", "：": ":"}.items():
        text = text.replace(full, half)
    return "".join(text.split())


@pytest.mark.parametrize("kind", ["chatglm", "chatglm2", "chatglm3"])
@pytest.mark.parametrize("number", range(len(LEARNED)))
def test_every_data_example_is_read_and_encoded(kind, number, tokenizers, tmp_path):
    tokenizer, (columns, by_rounds, by_messages) = tokenizers[kind], LEARNED[number]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(EXAMPLES[number], ensure_ascii=False))
    args = DataArguments(**columns, max_source_length=128, max_target_length=128)
    expected = by_messages if kind == "chatglm3" else by_rounds
    if expected is None:
        with pytest.raises(UserError, match="rows.json, line 1: turn 1 has the role system"):
            prepare_dataset(args, str(file), tokenizer, "train")
        return
    rows = prepare_dataset(args, str(file), tokenizer, "train").rows
    labels = [[label for label in row["labels"] if label != -100] for row in rows]
    assert [plain(tokenizer.decode(ids, skip_special_tokens=True)) for ids in labels] == list(map(plain, expected))


def test_there_is_nothing_about_an_example_that_is_not_tested():
    assert len(EXAMPLES) == len(LEARNED)
    for readme in READMES:
        assert blocks(readme, "json") in ([], blocks(ENGLISH, "json")), readme


def test_a_missing_column_is_said_as_the_readme_says_it(tmp_path, tokenizers):
    file = tmp_path / "rows.json"
    file.write_text('{"question": "a", "answer": "b"}')
    with pytest.raises(UserError) as said:
        list(read_examples(DataArguments(**PAIR), read_rows(file), tokenizers["chatglm"]))
    for readme in (ENGLISH, CHINESE):
        assert str(said.value).replace(str(file), "…") in spans(prose(readme))


# Commands


class Command(NamedTuple):
    """A call of one of our scripts or programs."""

    variables: dict[str, str]
    file: Path
    arguments: list[str]


def lines_of(readme: Path) -> list[list[str]]:
    """The words of every command line in its blocks, without comments."""
    lines = "".join(blocks(readme, "bash")).replace("\\\n", "").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def commands_of(readme: Path) -> list[Command]:
    commands = []
    for line in lines_of(readme):
        folder = ROOT
        for part in " ".join(map(shlex.quote, line)).split(" '&&' "):
            words = shlex.split(part)
            if words[0] == "cd":
                folder = folder / words[1]
                continue
            start = next(i for i, word in enumerate(words) if word in ("bash", "python", "python3"))
            variables = dict(found.groups() for word in words[:start] if (found := ASSIGNMENT.fullmatch(word)))
            commands.append(Command(variables, folder / words[start + 1], words[start + 2 :]))
    return commands


@cache
def chain(script: Path) -> list[Path]:
    """A shell script and those that it starts or sources."""
    named = re.findall(r'(?:bash|source) ".*?(\$ROOT)?/([\w./]+\.sh)"', script.read_text())
    started = [(ROOT if root else script.parent) / name for root, name in named]
    return [script, *(further for file in started for further in chain(file.resolve()))]


def programs_of(file: Path) -> list[Path]:
    """The Python programs behind a script."""
    if file.suffix == ".py":
        return [file]
    found = [name for script in chain(file) for name in re.findall(r'"\$ROOT/([\w/]+\.py)"', script.read_text())]
    return [ROOT / name for name in found]


@cache
def flags_of(program: Path) -> set[str]:
    """The flags that a program knows, old spellings included."""
    kinds = [METHODS[program.parent.name]] if program.name == "main.py" else list(METHODS.values())
    text = program.read_text()
    flags = set(re.findall(r'add_argument\(\s*"--(\w+)"', text))
    if "chat_parser" in text:
        flags |= set(re.findall(r'add_argument\("--(\w+)"', (ROOT / "common" / "chat" / "chat.py").read_text()))
    if program.name in ("main.py", "finetune_hf.py"):
        for kind in kinds:
            parser = FlagParser((ModelArguments, kind, DataArguments, TrainingArguments), allow_abbrev=False)
            flags |= {option[2:] for action in parser._actions for option in action.option_strings}
        flags |= RENAMED.keys() | REMOVED.keys()
    if program.name == "preprocess.py":
        flags |= {*ModelArguments.__dataclass_fields__, *DataArguments.__dataclass_fields__}
        flags |= set(re.findall(r"^    (\w+): .* = told\(", text, re.MULTILINE))
    return flags | {"help"}


def read_by(files: list[Path]) -> set[str]:
    """The variables that scripts take from the environment, and those that every start reads."""
    own = {name for file in files for name in re.findall(r"\$\{([A-Z_]+)[:-]", file.read_text())}
    return own | read_by_python()


@cache
def read_by_python() -> set[str]:
    texts = [file.read_text() for file in (ROOT / "common").glob("*.py")]
    hub = Path(huggingface_hub.__file__).parent
    texts += [(hub / name).read_text() for name in ("constants.py", "utils/_auth.py")]
    return {name for text in texts for name in re.findall(r'"([A-Z][A-Z_]+)"', text)}


def shipped() -> set[str]:
    """The files of the repository, as git knows them where this is a checkout."""
    if (ROOT / ".git").exists():
        return set(subprocess.run(["git", "ls-files"], cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.split())
    return {
        name_of(file)
        for folder in (*METHODS, "common", "tests", "AdvertiseGen")
        for file in ROOT.glob(f"{folder}/**/*")
    }


SHIPPED = shipped()


@each_readme
def test_every_command_names_what_exists(readme):
    """Scripts, the variables that they read, the flags that their programs know."""
    commands = [command for command in commands_of(readme) if command.file.name != "run.sh"]
    assert len(commands) >= 6
    for command in commands:
        assert name_of(command.file) in SHIPPED, command
        programs = programs_of(command.file)
        known = read_by(chain(command.file)) if command.file.suffix == ".sh" else read_by_python()
        assert not command.variables.keys() - known, command
        for flag in (word[2:].partition("=")[0] for word in command.arguments if word.startswith("--")):
            assert any(flag in flags_of(program) for program in programs), (flag, command)


@each_readme
def test_what_the_text_names_exists(readme):
    """Files, variables and flags between backquotes."""
    scripts = [ROOT / name for name in SHIPPED if re.fullmatch(r"(ptuning|lora|full|common|tests)/\w+\.sh", name)]
    variables = read_by(scripts)
    flags = {flag for program in map(ROOT.joinpath, SHIPPED) if is_program(program) for flag in flags_of(program)}
    for span in spans(prose(readme)):
        for word in span.split():
            if assignment := re.fullmatch(r"([A-Z][A-Z_]{1,})(=.*)?", word):
                assert assignment[1] in variables, span
            if re.fullmatch(r"(ptuning|lora|full|common|tests|AdvertiseGen)/[\w/.]+\.(py|sh|yaml|json)", word):
                assert word in SHIPPED, span
        if span.startswith("--"):
            assert span[2:].split()[0] in flags, span


def is_program(file: Path) -> bool:
    return file.name == "main.py" or file.parent == ROOT / "common" and file.suffix == ".py"


def anchor_of(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@each_readme
def test_links_lead_somewhere(readme):
    for target in re.findall(r"\]\(([^)]+)\)", prose(readme)):
        name, _, anchor = target.partition("#")
        file = (readme.parent / name).resolve() if name else readme
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text()), re.MULTILINE)
            assert anchor in map(anchor_of, headings), target


@each_readme
def test_python_blocks_call_what_there_is(readme):
    for block in blocks(readme, "python"):
        names: dict = {}
        tree = ast.parse(block)
        exec("\n".join(ast.unparse(node) for node in tree.body if isinstance(node, ast.ImportFrom)), names)
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
            inspect.signature(names[ast.unparse(call.func)]).bind(*call.args, **keywords)


# Both languages, and the file tree


def sections(readme: Path) -> list[str]:
    return re.split(r"^## ", readme.read_text(), flags=re.MULTILINE)


def test_both_languages_have_the_same_commands_and_programs():
    assert lines_of(ENGLISH) == lines_of(CHINESE)
    assert blocks(ENGLISH, "python") == blocks(CHINESE, "python")
    assert lines_of(ENGLISH)[:2] == [["bash", "ptuning/train.sh"], ["bash", "tests/run.sh"]]


def test_both_languages_name_the_same_things_in_the_same_order():
    for english, chinese in zip(sections(ENGLISH), sections(CHINESE), strict=True):
        title = english.splitlines()[0]
        named, also = (set(spans(FENCE.sub("", text))) for text in (english, chinese))
        assert named == also, title
        tables = ["".join(re.findall(r"^\|.*", text, re.MULTILINE)) for text in (english, chinese)]
        numbers, same = (re.findall(r"\d+(?:[,.]\d+)*", table) for table in tables)
        assert numbers == same, title


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=name_of)
def test_the_file_tree_names_what_there_is(readme):
    tree = next(block for block in blocks(readme, "") if "common/launch.sh" in block)
    first, *rest = tree.splitlines()
    for method in METHODS:
        assert all((ROOT / method / name).is_file() for name in re.findall(r"\w+\.(?:py|md)", first))
    for name in re.findall(r"[A-Za-z_/]+(?:\.(?:py|sh)|/)(?=\W|$)", "\n".join(rest)):
        assert (ROOT / name).exists() or (ROOT / "common" / name).exists(), name
    for file in (ROOT / "common").glob("*.*"):
        assert file.name == "__init__.py" or re.search(rf"(?<!\w){file.name}", tree), file


def defaults_of(script: Path) -> dict[str, dict[str, str]]:
    """The defaults of a script's variables for the demos and for a real model."""
    text = script.read_text()
    start, middle, end = (text.index(word) for word in ("    demo | demo3)", "    *)", "esac"))
    parts = {"demo": text[:start] + text[start:middle] + text[end:], "real": text[:start] + text[middle:]}
    return {kind: dict(re.findall(r"\b([A-Z_]+)=\$\{\1:?-([^}]*)\}", part)) for kind, part in parts.items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_tables_of_the_methods_give_the_defaults_of_their_scripts(method):
    defaults = defaults_of(ROOT / method / "train.sh")
    rows = re.findall(r"^\| (`[A-Z].*) \|$", (ROOT / method / "README.md").read_text(), re.MULTILINE)
    cells = [[cell.strip() for cell in row.split("|")[:3]] for row in rows if row.count("|") == 3]
    told = [
        (kind, name, value)
        for names, *columns in cells
        for kind, column in zip(("demo", "real"), columns, strict=True)
        for name, value in zip(spans(names), column.replace("`", "").split(", "), strict=False)
    ]
    wrong = [row for row in told if row[2] and defaults[row[0]][row[1]] != row[2]]
    assert not wrong
    assert sum(bool(value) for _, _, value in told) > 20


# For real


def test_own_files_and_columns_as_the_quick_start_has_them(tmp_path):
    """With the demo in place of the real model, up to its loading."""
    command = next(command for command in commands_of(ENGLISH) if "my_train.json" in command.variables.values())
    row = json.dumps({"question": "类型#裙", "answer": "一条裙子。"}, ensure_ascii=False)
    for name, count in (("my_train.json", 3), ("my_dev.json", 2)):
        (tmp_path / name).write_text(f"{row}\n" * count)
    variables = command.variables | {"MODEL": "demo", "OUTPUT_DIR": str(tmp_path / "out")}
    variables |= {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    program = ["bash", str(command.file), *command.arguments, "--dry_run"]
    done = subprocess.run(program, env=os.environ | variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train: 3 rows tokenized" in done.stdout and "test: 2 rows tokenized" in done.stdout
