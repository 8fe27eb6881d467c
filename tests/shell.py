"""The scripts under bash: as a user types them, or up to a program that they start, which then runs in this process."""

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# In place of python3: it names itself as the environment's Python, and prints what it is told to run.
STAND_IN = """#!/bin/sh
case "$1" in
    *environment.py) echo "$0" ;;
    *) while [ $# -gt 0 ] && [ "$1" != --then ]; do printf '%s\\0' "$1"; shift; done; printf 'END\\0' ;;
esac
if [ "$1" = --then ]; then shift; exec "$@"; fi
"""


def environment(**variables: str) -> dict[str, str]:
    """This Python's environment is the active one, so that the scripts take it.

    In one process, unless said otherwise: to look for GPUs first takes two seconds.
    """
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    return os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": path, "NUM_PROCESSES": "1"} | variables


def bash(script: str, *flags: str, root: Path = ROOT, check: bool = True, stdin: str = "", **variables: str):
    """Runs a script of ``root`` as a user does, in processes of its own."""
    command = ["bash", str(root / script), *flags]
    done = subprocess.run(
        command, cwd=root, env=environment(**variables), input=stdin, capture_output=True, text=True, timeout=600
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def commands_of(
    script: str, *flags: str, root: Path = ROOT, shell: str = "bash", inside: bool = False, **variables: str
) -> list[list[str]]:
    """What a script would start: programs with their flags. No Python is started.

    ``shell``: "" to start the file itself. ``inside``: it is started in its own folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        stand_in = Path(folder) / "python3"
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
        environ = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | variables
        path = root / script
        command = [*filter(None, [shell]), f"./{path.name}" if inside else str(path), *flags]
        cwd = path.parent if inside else None
        done = subprocess.run(command, cwd=cwd, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    commands = [command.split("\0")[:-1] for command in done.stdout.split("END\0")[:-1]]
    return [command[1:] if command[0].endswith("launcher.py") else command for command in commands]


def flags_of(script: str, *flags: str, root: Path = ROOT, **variables: str) -> list[str]:
    """The flags that a script starts its program with."""
    return commands_of(script, *flags, root=root, **variables)[0][1:]


def run_here(script: str, *flags: str, root: Path = ROOT, check: bool = True, **variables: str) -> int:
    """Runs what a script starts in this process, which has imported everything already. Returns the exit code."""
    code = 0
    for command in commands_of(script, *flags, root=root, **variables):
        code = code or run_program(command, **variables)
    assert not check or code == 0
    return code


def run_program(command: list[str], **variables: str) -> int:
    """Runs a program with its flags in this process. Returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        patch.setattr(sys, "path", [*sys.path])
        for name, value in variables.items():
            patch.setenv(name, value)
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
    return 0
