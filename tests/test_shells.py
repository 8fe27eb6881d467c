"""The scripts as files: under other shells than bash, started by themselves, and in a clone on Windows."""

import shutil
import subprocess

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


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_starts_the_same_under_any_shell(script, posix_bash):
    flags = ["--prompt_column", "two words", "--dry_run"]
    expected = commands_of(script, *flags)
    assert expected and expected[0][-3:] == flags
    assert commands_of(script, *flags, shell=posix_bash) == expected
    assert commands_of(script, *flags, shell="", inside=True) == expected
    if not shutil.which("dash"):
        pytest.skip("dash is not installed; the other shells are tested")
    assert commands_of(script, *flags, shell="dash", inside=True) == expected


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
