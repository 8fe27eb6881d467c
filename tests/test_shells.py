"""The scripts as files: under other shells than bash, started by themselves, and in a clone on Windows."""

import shutil
import subprocess
from functools import partial

import pytest
from shell import ROOT, commands_of

AGAIN = '[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"'
FILES = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
SCRIPTS = [name for name in FILES if name.endswith(".sh") and name != "common/launch.sh"]


@pytest.fixture(scope="module")
def posix_bash(tmp_path_factory) -> str:
    """bash under the name sh, which makes it follow POSIX."""
    link = tmp_path_factory.mktemp("shell") / "sh"
    link.symlink_to(shutil.which("bash"))
    return str(link)


# cuda_wheel.sh builds an environment before it starts anything.
@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "tests/bench/cuda_wheel.sh"])
def test_every_script_starts_the_same_under_any_shell(script, posix_bash):
    flags = ["--prompt_column", "two words", "--dry_run"]
    started = partial(commands_of, script, *flags, PYTHON="python3")  # gpu.sh takes the one that it is told
    expected = started()
    assert expected and expected[0][-3:] == flags
    assert started(shell=posix_bash) == expected
    assert started(shell="", inside=True) == expected
    if not shutil.which("dash"):
        pytest.skip("dash is not installed; the other shells are tested")
    assert started(shell="dash", inside=True) == expected


@pytest.mark.parametrize("script", [*SCRIPTS, ".ci/run"])
def test_bash_comes_before_every_other_command(script):
    commands = [line for line in (ROOT / script).read_text().splitlines() if line and not line.startswith("#")]
    assert commands[0] == AGAIN


def test_scripts_are_executable_in_git():
    staged = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    modes = {line.split()[3]: line.split()[0] for line in staged.splitlines()}
    scripts = [*SCRIPTS, "common/launch.sh", ".ci/run"]
    assert {script: modes[script] for script in scripts} == dict.fromkeys(scripts, "100755")


def test_a_clone_on_windows_keeps_its_line_ends(tmp_path):
    """git converts line ends there. The working tree is cloned, not the last commit."""
    git = ["git", "-c", "core.autocrlf=true", "-c", "core.eol=crlf"]
    source = tmp_path / "source"
    names = [name for name in FILES if not name.startswith("tests/")]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    author = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=source, check=True, capture_output=True)
    subprocess.run([*git, "clone", "-q", source, tmp_path / "clone"], check=True)
    for name in names:
        assert (tmp_path / "clone" / name).read_bytes() == (ROOT / name).read_bytes(), name


def flag(name: str, script: str, *flags: str, **variables: str) -> str:
    command = commands_of(script, *flags, **variables)[0]
    return command[command.index(name) + 1]


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("/data/kefu.json", "kefu"),
        ("a.b.jsonl,other.json", "a.b"),
        ("客服 数据.csv", "客服_数据"),
        ("/data/rows/", "rows"),
        ("rows/*.json", "rows"),
        (str(ROOT / "AdvertiseGen" / "train.json"), "adgen"),
    ],
)
def test_the_output_folder_is_named_after_the_data(file, word):
    expected = str(ROOT / "lora" / "output" / f"{word}-chatglm3-6b-lora-8-5e-5")
    assert flag("--output_dir", "lora/train.sh", MODEL="THUDM/chatglm3-6b", TRAIN_FILE=file) == expected
    assert flag("--output_dir", "lora/train.sh", "--train_file", file, MODEL="chatglm3-6b") == expected


def test_the_data_of_the_chat_and_text_scripts_is_named_too():
    assert flag("--output_dir", "lora/train_chat.sh").endswith("/chat-demo3-lora-8-5e-3")
    assert flag("--output_dir", "lora/train_text.sh").endswith("/text-demo-lora-8-5e-3")
    assert flag("--output_dir", "ptuning/train_chat.sh", TRAIN_FILE="mine.json").endswith("/mine-demo-pt-32-1e-1")
    assert flag("--output_dir", "full/train.sh", TRAIN_DATASETS="/data/tokens").endswith("/tokens-demo-full-1e-3")


@pytest.mark.parametrize("script", ["ptuning/train.sh", "lora/train.sh", "full/train.sh"])
def test_flags_of_a_user_are_passed_and_empty_variables_are_not(script):
    plain = commands_of(script)[0]
    assert {"--num_train_epochs", "--max_steps", "--mix", "--prompt_column", "--early_stopping"}.isdisjoint(plain)
    names = {"EPOCHS": "3", "MAX_STEPS": "5", "MIX": "1,2", "EARLY_STOPPING": "2", "VALIDATION_SPLIT": "0.1"}
    command = commands_of(script, BEST_METRIC="rouge-l", **names)[0]
    flags = ["--num_train_epochs", "--max_steps", "--mix", "--early_stopping", "--validation_split"]
    assert [command[command.index(name) + 1] for name in flags] == list(names.values())
    assert command[command.index("--metric_for_best_model") + 1] == "rouge-l"
