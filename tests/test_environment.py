"""The environment that the scripts make for themselves: built once however many ask for it, never left half built."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout whose only requirement is small."""
    (tmp_path / "common" / "launch").mkdir(parents=True)
    (tmp_path / "common" / "launch" / "environment.py").write_text(
        (ROOT / "common" / "launch" / "environment.py").read_text()
    )
    (tmp_path / "requirements.txt").write_text("filelock==4.2.11\n")
    return tmp_path


def start(checkout: Path, **variables: str) -> subprocess.Popen:
    clean = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_DEFAULT_ENV")}
    command = [sys.executable, str(checkout / "common" / "launch" / "environment.py"), "requirements.txt"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=clean | variables, text=True, start_new_session=True, **pipes)


def has_filelock(checkout: Path) -> bool:
    python = checkout / ".venv" / "bin" / "python"
    return subprocess.run([python, "-c", "import filelock"], capture_output=True).returncode == 0


def test_of_eight_jobs_one_builds_and_all_go_on(checkout):
    jobs = [start(checkout) for _ in range(8)]
    said = [job.communicate(timeout=300) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 8
    assert {out.strip() for out, _ in said} == {str(checkout / ".venv" / "bin" / "python")}
    assert sum("creating" in err for _, err in said) == 1
    assert sum("waiting for the environment: built by process" in err for _, err in said) == 7
    assert has_filelock(checkout)


def test_a_killed_build_is_taken_over(checkout):
    first = start(checkout)
    while not (checkout / ".venv").exists():
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (checkout / ".venv" / "installed.json").exists()
    second = start(checkout)
    second.communicate()
    assert second.returncode == 0
    assert has_filelock(checkout)


def test_changed_requirements_are_installed(checkout):
    start(checkout).communicate()
    (checkout / "requirements.txt").write_text("filelock==4.2.11\nsix==1.16.0\n")
    job = start(checkout)
    assert "installing requirements.txt" in job.communicate()[1]
    installed = json.loads((checkout / ".venv" / "installed.json").read_text())
    assert list(installed) == ["requirements.txt"]
    python = checkout / ".venv" / "bin" / "python"
    assert subprocess.run([python, "-c", "import six"]).returncode == 0


def test_an_active_environment_is_taken_or_refused_but_never_changed(checkout):
    job = start(checkout, VIRTUAL_ENV=sys.prefix)
    assert job.communicate()[0].strip() == sys.executable
    (checkout / "requirements.txt").write_text("no-such-package==1.0\n")
    job = start(checkout, VIRTUAL_ENV=sys.prefix)
    assert "lacks no-such-package==1.0" in job.communicate()[1]
    assert job.returncode == 2
    assert not (checkout / ".venv").exists()


def test_a_failing_build_is_one_sentence(checkout):
    (checkout / "requirements.txt").write_text("no-such-package==1.0\n")
    job = start(checkout, PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    error = job.communicate()[1]
    assert job.returncode == 2
    assert "the environment could not be built" in error
    assert "Traceback" not in error
