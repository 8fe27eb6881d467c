"""The documents agree with the code: commands, flags, files and links exist, data examples are read, languages agree.

Every documented command runs under bash with stand-ins for Python, torchrun and the like, which record their arguments.
"""

import ast
import inspect
import io
import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

import pytest
from transformers.integrations import integration_utils

from common.arguments import DataArguments
from common.data.dataset import prepare_dataset
from common.errors import UserError
from common.flags import REMOVED, RENAMED
from common.loading import load_tokenizer
from common.tokenizers.chatglm2 import ChatGLM2Tokenizer
from common.training.choices import choose_text

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("ptuning", "lora", "full")
PAIRS = [
    (ROOT / folder / "README.md", ROOT / folder / "README_zh.md") for folder in ("", "common", *METHODS, "AdvertiseGen")
]
(ENGLISH, CHINESE), (REFERENCE, _) = PAIRS[:2]
READMES = [readme for pair in PAIRS for readme in pair]
MOST_LINES = 330  # of the first page
PROGRAMS = [
    *(f"{method}/main.py" for method in METHODS),
    *("common/finetune_hf.py", "common/inference_hf.py", "common/merge.py", "common/preprocess.py"),
    "common/export/export.py",
    *("common/hub/download.py", "common/chat/cli_demo.py", "common/chat/web_demo.py", "common/chat/server.py"),
    *("AdvertiseGen/generate.py", "AdvertiseGen/conversations.py"),
]
FOLDERS = (*METHODS, "common", "tests", "AdvertiseGen")
SHIPPED = {str(file.relative_to(ROOT)) for folder in FOLDERS for file in ROOT.glob(f"{folder}/**/*.*")}
OF_PIP = {"PIP_INDEX_URL", "PIP_NO_INDEX", "PIP_FIND_LINKS"}  # variables
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


each_readme = pytest.mark.parametrize("readme", READMES, ids=name_of)
each_pair = pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=lambda file: name_of(file))


def blocks(text: str, language: str) -> list[str]:
    return [content for kind, content in FENCE.findall(text) if kind == language]


def prose(readme: Path) -> str:
    """The text outside of blocks, without the column about the official files in the table that compares."""
    text = FENCE.sub("", readme.read_text())
    table = re.search(r"^\| (there \| here|官方 \| 这里) \|\n(\|.*\n)+", text, re.MULTILINE)
    return text.replace(table[0], re.sub(r"^\|[^|]*\|", "|", table[0], flags=re.MULTILINE)) if table else text


def spans(text: str) -> list[str]:
    """The texts between backquotes, which may go on in the next line."""
    paragraphs = FENCE.sub("", text).split("\n\n")
    return [span for part in paragraphs for span in re.findall("`([^`]+)`", re.sub(r"\n *", " ", part))]


def sections(readme: Path) -> list[str]:
    return re.split(r"^## ", readme.read_text(), flags=re.MULTILINE)


# Data


EXAMPLES = [json.loads(line) for line in blocks(ENGLISH.read_text(), "json")[-1].splitlines()]
CALL = "query_stock\n```python\ntool_call(color='白色')\n```"
# The trained text of models with rounds, and of ChatGLM3; None: the example is refused.
LEARNED: list[tuple[list[str] | None, list[str]]] = [
    (["白色的还有三件。"], ["白色的还有三件。"]),
    (["配一件白衬衫。"], ["配一件白衬衫。"]),
    (["抱歉，暂时没有货了。"], ["抱歉，暂时没有货了。"]),
    (None, ["您好！"]),
    (None, ["您好！"]),
    (["再见！"], ["再见！"]),
    (None, [f"{CALL}还有3件。"]),
    (["一段文字，按语言模型训练。"], ["一段文字，按语言模型训练。"]),
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
def test_every_data_example_is_read_without_flags_and_encoded(kind, number, tokenizers, tmp_path):
    tokenizer, (by_rounds, by_messages) = tokenizers[kind], LEARNED[number]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(EXAMPLES[number], ensure_ascii=False))
    args = DataArguments(train_file=str(file), max_source_length=128, max_target_length=128)
    choose_text(args)
    expected = by_messages if kind == "chatglm3" else by_rounds
    if expected is None:
        with pytest.raises(UserError, match="rows.json, line 1: turn 1 has the role system"):
            prepare_dataset(args, str(file), tokenizer, "train")
        return
    prepared = prepare_dataset(args, str(file), tokenizer, "train")
    labels = [[label for label in row["labels"] if label != -100] for row in prepared.rows]
    assert [plain(tokenizer.decode(ids, skip_special_tokens=True)) for ids in labels] == list(map(plain, expected))
    assert [found["unread"] for found in prepared.summary["findings"]] == [{}]


def test_every_data_example_is_tested_and_is_the_same_in_both_languages():
    assert len(EXAMPLES) == len(LEARNED)
    assert blocks(ENGLISH.read_text(), "json") == blocks(CHINESE.read_text(), "json")


def test_the_message_about_a_missing_column_is_that_of_the_documents(tmp_path, tokenizers):
    file = tmp_path / "rows.json"
    file.write_text('{"question": "a", "answer": "b"}')
    with pytest.raises(UserError) as error:
        prepare_dataset(DataArguments(prompt_column="content"), str(file), tokenizers["chatglm"], "train")
    message = str(error.value).replace(str(file), "…").partition(" (SKIP_BAD_ROWS")[0]
    for readme in PAIRS[1]:
        assert message in spans(readme.read_text())


# Commands


RECORD = """#!/bin/bash
N=0
for word; do
    if [ "$word" = --then ]; then break; fi
    N=$((N + 1))
done
case "$1" in
    */environment.py) echo "$0" ;;
    *) printf '%s\\0' "$PWD" "${PASSWORD:-}${API_KEY:-}" "${@:1:N}" $'\\n' >> "$CALLS" ;;
esac
if [ $# -gt "$N" ]; then exec "${@:N+2}"; fi
"""
SRUN = """#!/bin/bash
until [ "$1" = bash ]; do shift; done
exec "$@"
"""


@pytest.fixture(scope="module")
def calls_of(tmp_path_factory):
    """A function: (command line, variables) -> [working directory, secret, program, flag, …] of each start."""
    stand_ins, record = tmp_path_factory.mktemp("stand_ins"), tmp_path_factory.mktemp("calls") / "calls"
    for name in ("python", "python3", "torchrun", "accelerate", "deepspeed", "srun"):
        (stand_ins / name).write_text(SRUN if name == "srun" else RECORD)
        (stand_ins / name).chmod(0o755)
    own = {"PATH": f"{stand_ins}:{os.environ['PATH']}", "CALLS": str(record), "HOME": os.environ["HOME"]}

    def calls_of(line: str, **variables: str) -> list[list[str]]:
        record.write_text("")
        subprocess.run(["bash", "-c", line], cwd=ROOT, env=own | variables, check=True, stdout=subprocess.DEVNULL)
        return [call.split("\0") for call in record.read_text().split("\0\n\0")[:-1]]

    return calls_of


def program_of(call: list[str]) -> tuple[str, list[str]]:
    """(program relative to the repository, its arguments); a launcher may stand before it."""
    folder, _, *words = call
    start = next(i for i, word in enumerate(words) if word.endswith(".py") and not word.endswith("launcher.py"))
    return os.path.relpath(os.path.join(folder, words[start]), ROOT), words[start + 1 :]


def lines_of(text: str) -> list[str]:
    """Every command line in the blocks of a text, without its comment."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", "").splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s)# .*", "", line).strip())]


@cache
def flags_of(program: str) -> set[str]:
    """The flags in a program's own --help."""
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(text), suppress(SystemExit):
        patch.setattr(sys, "argv", [program, "--help"])
        patch.setattr(sys, "path", [*sys.path])
        patch.setenv("COLUMNS", "200")
        runpy.run_path(str(ROOT / program), run_name="__main__")
    return set(re.findall(r"--\w+", text.getvalue()))


def shared_variables() -> list[str]:
    """The variables that all scripts read, by the table of common/README.md."""
    section = next(section for section in sections(REFERENCE) if section.startswith("Variables\n"))
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return [name for row in rows for name in spans(row)]


@pytest.mark.parametrize("readme", [english for english, _ in PAIRS], ids=name_of)
def test_commands_start_programs_with_flags_and_variables_that_exist(readme, calls_of):
    shared = shared_variables()
    for line in lines_of(readme.read_text()):
        calls = calls_of(line)
        for program, words in map(program_of, calls if line != "bash tests/run.sh" else []):
            flags = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert program in PROGRAMS and not flags - flags_of(program), line
        for name, value in re.findall(r"\b([A-Z_]+)=(\S*) ", line):
            assert name in {*shared, *OF_PIP} or calls != calls_of(line.replace(f"{name}={value} ", "", 1)), (
                name,
                line,
            )


def test_the_code_reads_the_shared_variables():
    code = "".join(file.read_text() for file in (ROOT / "common").glob("**/*.py"))
    for name in shared_variables():
        assert name.startswith("HF_") or f'"{name}"' in code, name


@each_readme
def test_the_text_names_files_variables_and_flags_that_exist(readme):
    scripts = "".join((ROOT / name).read_text() for name in SHIPPED if name.endswith(".sh"))
    trackers = Path(integration_utils.__file__).read_text()
    variables = {*shared_variables(), *OF_PIP, *re.findall(r"\b[A-Z][A-Z_]+\b", scripts + trackers)}
    flags = {flag for program in PROGRAMS for flag in flags_of(program)} | {f"--{name}" for name in RENAMED | REMOVED}
    for span in spans(prose(readme)):
        for word in span.split():
            if variable := re.fullmatch(r"([A-Z][A-Z_]+)=.*|([A-Z]+_[A-Z_]+)", word):
                assert (variable[1] or variable[2]) in variables, span
            if word.split("/")[0] in FOLDERS and re.search(r"\.(py|sh|yaml|json|md)$", word):
                assert word in SHIPPED, span
        if span.startswith("--"):
            assert span.split()[0] in flags, span


def test_the_measurements_name_programs_that_exist():
    named = re.findall(r"\b(?:common|tests)/[\w/]+\.(?:py|sh)\b", (ROOT / "tests" / "bench" / "RESULTS.md").read_text())
    assert named and not set(named) - SHIPPED


def anchor_of(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@each_readme
def test_links_lead_somewhere(readme):
    text = prose(readme)
    for target in re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        name, _, anchor = target.partition("#")
        file = (readme.parent / name).resolve() if name else readme
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text()), re.MULTILINE)
            assert anchor in map(anchor_of, headings), target


def test_the_python_block_calls_functions_that_exist():
    [block] = blocks(REFERENCE.read_text(), "python")
    names: dict = {}
    tree = ast.parse(block)
    exec("\n".join(ast.unparse(node) for node in tree.body if isinstance(node, ast.ImportFrom)), names)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
        inspect.signature(names[ast.unparse(call.func)]).bind(*call.args, **keywords)


# Both languages


@each_pair
def test_both_languages_have_the_same_commands_and_programs(english, chinese):
    texts = english.read_text(), chinese.read_text()
    assert lines_of(texts[0]) == lines_of(texts[1])
    assert blocks(texts[0], "python") == blocks(texts[1], "python")


def test_the_readmes_are_short_and_begin_with_the_two_commands():
    for readme in PAIRS[0]:
        text = readme.read_text()
        assert lines_of(text)[:2] == ["bash ptuning/train.sh", "bash tests/run.sh"]
        assert len(text.splitlines()) <= MOST_LINES


@each_pair
def test_both_languages_name_the_same_things_and_numbers_in_every_section(english, chinese):
    for one, other in zip(sections(english), sections(chinese), strict=True):
        assert set(spans(one)) == set(spans(other)), one.splitlines()[0]
        tables = ["".join(re.findall(r"^\|.*", text, re.MULTILINE)) for text in (one, other)]
        numbers = [re.findall(r"\d+(?:[,.]\d+)*", table) for table in tables]
        assert numbers[0] == numbers[1], one.splitlines()[0]


@each_pair
def test_both_languages_link_to_each_other_and_the_chinese_one_to_chinese_ones(english, chinese):
    tops = [readme.read_text().partition("\n## ")[0] for readme in (english, chinese)]
    assert "(README_zh.md)" in tops[0] and "(README.md)" in tops[1]
    targets = re.findall(r"\]\(([^)#]+)", prose(chinese))
    files = {(chinese.parent / target).resolve() for target in targets if "://" not in target} - {english}
    assert not files & {one for one, _ in PAIRS}


# The file tree, the ways through the code, the defaults


@pytest.mark.parametrize("readme", PAIRS[1], ids=name_of)
def test_the_file_tree_has_one_line_for_each_file(readme):
    tree = next(block for block in blocks(readme.read_text(), "") if "common/launch.sh" in block)
    files = [line.split()[0] for line in tree.splitlines()]
    assert files[:2] == ["lora/train.sh", "lora/main.py"]
    code = {name for name in SHIPPED if re.fullmatch(r"common/.*\.(py|sh|html|css|js)", name)} - {"common/__init__.py"}
    assert len(files) == len(set(files)) and set(files[2:]) ^ code == set()


@pytest.mark.parametrize("readme", PAIRS[1], ids=name_of)
def test_on_each_way_through_the_code_a_file_names_the_next(readme):
    ways = re.findall(r"`[\w/.]+`(?:\s→\s`[\w/.]+`)+", readme.read_text())
    assert [len(spans(way)) for way in ways] == [6, 4]
    for way in ways:
        files = spans(way)
        for file, following in zip(files, files[1:], strict=False):
            text = (ROOT / file).read_text()
            assert following in text or following.removesuffix(".py").replace("/", ".") in text, (file, following)


@pytest.mark.parametrize("method", METHODS)
def test_the_table_of_a_method_gives_the_variables_and_defaults_of_its_script(method, calls_of):
    """A variable of the table is read; setting the defaults of the table changes nothing."""
    rows = re.findall(r"^\| (`[A-Z].*) \|$", (ROOT / method / "README.md").read_text(), re.MULTILINE)
    cells = [[cell.strip() for cell in row.split("|")[:3]] for row in rows if row.count("|") == 3]
    line = f"bash {method}/train.sh"
    for number, model in ((1, "demo"), (2, "chatglm3-6b")):
        defaults = {
            name: value
            for row in cells
            for name, value in zip(spans(row[0]), row[number].replace("`", "").split(", "), strict=False)
            if value
        }
        assert len(defaults) >= 11
        assert calls_of(line, MODEL=model)[0] == calls_of(line, **{"MODEL": model} | defaults)[0]
    for name in [name for row in cells for name in spans(row[0])]:
        assert calls_of(line, **{name: "other"}) != calls_of(line), name


# For real


QUESTIONS = {  # about a garment, with their answers
    "有白色的吗？": "有白色的，您要什么码？",
    "怎么洗？": "请用冷水手洗，不要漂白。",
    "多少钱？": "现在一百二十九元，满两百减二十。",
    "几天能到？": "今天下单，三天之内送到。",
    "能退吗？": "七天之内可以退，吊牌请留着。",
    "适合什么季节穿？": "适合春天和秋天穿。",
}
GARMENTS = ("裙子", "衬衫", "外套", "牛仔裤", "毛衣", "风衣", "卫衣", "短裤", "帽子", "围巾")


def test_the_first_page_shows_the_output_of_its_check_of_own_data(tmp_path, monkeypatch, calls_of, capsys):
    """Time and free memory are those of another machine."""
    rows = [{"question": g + q, "answer": g + a} for q, a in QUESTIONS.items() for g in GARMENTS]
    (tmp_path / "kefu.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    [section] = [section for section in sections(ENGLISH) if section.startswith("Your own data")]
    assert lines_of(section)[0] == "TRAIN_FILE=kefu.json bash lora/train.sh --dry_run"
    assert all(row in rows for row in json.loads(blocks(section, "json")[0]))
    [call] = calls_of(lines_of(section)[0], OUTPUT_DIR=str(tmp_path / "out"))
    program, words = program_of(call)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program, *words])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(ROOT / program), run_name="__main__")

    def same_everywhere(lines: str) -> list[str]:
        figures = r"(?<=about )[\d.]+ \w+|[\d.]+(?= GB free)"
        return [re.sub(figures, "…", line.rstrip()) for line in lines.splitlines()]

    printed = same_everywhere("".join(capsys.readouterr()))
    [shown] = blocks(section, "")
    assert [line for line in same_everywhere(shown) if line not in printed] == []
    assert shown.endswith("all checks passed\n")
    assert blocks(CHINESE.read_text(), "") == blocks(ENGLISH.read_text(), "")
    places = [calls_of(line, **{"TRAIN_FILE": "kefu.json"})[0] for line in lines_of(section)[1:2]]
    output = places[0][places[0].index("--output_dir") + 1]
    assert f"{os.path.relpath(output, ROOT)}/report.html" in spans(section)
