"""The environment that the scripts make for themselves: one of many jobs builds it, and it is never left half built."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from common.launch import environment

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = Path("common/launch/environment.py")


def write_package(folder: Path, name: str, version: str = "1.0") -> None:
    """A wheel with one module, which holds its version, and which pip installs without any network."""
    facts = f"{name}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}")
        wheel.writestr(f"{facts}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{facts}/RECORD", "")


def make_checkout(folder: Path) -> Path:
    (folder / PROGRAM).parent.mkdir(parents=True)
    (folder / PROGRAM).write_text((ROOT / PROGRAM).read_text())
    write_package(folder, "first")
    write_package(folder, "second")
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A checkout whose requirements are small. Its environment is built once; the tests stand in this order."""
    return make_checkout(tmp_path_factory.mktemp("checkout"))


def start(checkout: Path, *requirements: str, shell: bool = False, **variables: str) -> subprocess.Popen:
    """``shell``: as the scripts start it, from a shell that waits for the path."""
    (checkout / "requirements.txt").write_text("".join(f"{name}==1.0\n" for name in requirements))
    clean = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_DEFAULT_ENV")}
    clean |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(checkout)}
    command = [sys.executable, str(checkout / PROGRAM), "requirements.txt"]
    if shell:
        command = ["bash", "-c", 'PYTHON=$("$@") && echo "$PYTHON"', "bash", *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=clean | variables, text=True, **pipes)


def has(checkout: Path, name: str) -> bool:
    python = checkout / ".venv" / "bin" / "python"
    return subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode == 0


def test_an_active_environment_is_used_or_refused_but_never_changed(checkout):
    job = start(checkout, VIRTUAL_ENV=sys.prefix)
    assert job.communicate()[0].strip() == sys.executable
    job = start(checkout, "no-such-package", VIRTUAL_ENV=sys.prefix)
    assert "lacks no-such-package==1.0" in job.communicate()[1]
    assert job.returncode == 2
    assert not (checkout / ".venv").exists()


def test_after_a_killed_build_one_of_eight_jobs_builds_and_all_go_on(checkout):
    killed = start(checkout, "first", shell=True)
    while not (checkout / ".venv").exists():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    killed.kill()  # the shell alone
    killed.communicate()  # nobody holds its output any more
    assert not (checkout / ".venv" / "requirements.txt").exists()

    with open(checkout / ".venv.lock", "w") as held:  # until all jobs have arrived
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write("4711 since 12:00:00")
        held.flush()
        jobs = [start(checkout, "first") for _ in range(8)]
        for job in jobs:
            assert job.stderr.readline() == "waiting for the environment: process 4711 since 12:00:00 builds it\n"
    said = [job.communicate(timeout=300) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 8, said
    assert {out.strip() for out, _ in said} == {str(checkout / ".venv" / "bin" / "python")}
    assert sum("creating" in err for _, err in said) == 1
    assert has(checkout, "first")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("bin/python", "its Python does not start"),
        ("lib/*/site-packages/first-1.0.dist-info", "first/METADATA is missing"),
        ("requirements.txt", ""),
    ],
)
def test_a_damaged_environment_is_built_again(checkout, what, says):
    """A part is replaced by something else; the records alone are written again."""
    start(checkout, "first").communicate()
    (path,) = (checkout / ".venv").glob(what)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.write_bytes(b"\xff\x00garbage")
    said, error = start(checkout, "first").communicate()
    assert said.strip() == str(checkout / ".venv" / "bin" / "python"), error
    lines = [f"{checkout / '.venv'} is damaged ({says}): it is built again"] if says else []
    assert [line for line in error.splitlines() if "installing" not in line and "creating" not in line] == lines
    assert has(checkout, "first")
    assert start(checkout, "first").communicate()[1] == ""


def test_a_failing_build_is_one_sentence(checkout):
    job = start(checkout, "first", "no-such-package")
    error = job.communicate()[1]
    assert job.returncode == 2
    assert "the environment could not be built" in error
    assert "Traceback" not in error


def test_changed_requirements_are_installed_into_what_is_there(checkout):
    start(checkout, "first").communicate()
    error = start(checkout, "first", "second").communicate()[1]
    assert "installing requirements.txt" in error and "creating" not in error
    assert has(checkout, "first") and has(checkout, "second")
    assert start(checkout, "first", "second").communicate()[1] == ""


def test_another_build_of_pytorch_is_taken_from_its_index_and_kept(tmp_path):
    """The index has a newer version too, and the user's own index the usual build."""
    checkout, mirror = make_checkout(tmp_path / "checkout"), tmp_path / "mirror"
    write_package(checkout, "torch")
    for build in ("cpu", "cu126"):
        write_package(mirror / build, "torch", f"1.0+{build}")
        write_package(mirror / build, "torch", f"2.0+{build}")
    error = start(checkout, "torch", "first", TORCH_INDEX=f"{(mirror / 'cu126').as_uri()}/").communicate()[1]
    assert "creating" in error
    python = str(checkout / ".venv" / "bin" / "python")
    asked = [python, "-c", "import torch; print(torch.version)"]
    assert subprocess.check_output(asked, text=True) == "1.0+cu126\n"

    assert start(checkout, "torch", "first").communicate() == (f"{python}\n", "")
    job = start(checkout, "torch", "first", TORCH_INDEX=(mirror / "cpu").as_uri())
    error = job.communicate()[1]
    assert job.returncode == 2 and error.startswith(
        f"error: TORCH_INDEX={(mirror / 'cpu').as_uri()}, but the PyTorch of "
    )
    assert f"came from {(mirror / 'cu126').as_uri()}: when no job uses that folder, remove it" in error

    error = start(checkout, "torch", "second").communicate()[1]  # requirements that changed
    assert "installing" in error and subprocess.check_output(asked, text=True) == "1.0+cu126\n"


@pytest.mark.parametrize(
    ("asked", "address"),
    [
        ("cu126", "https://download.pytorch.org/whl/cu126"),
        ("https://mirror.example/whl/cpu/", "https://mirror.example/whl/cpu"),
        ("", ""),
    ],
)
def test_a_word_stands_for_an_index_of_pytorch(asked, address, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "FOLDER", tmp_path / ".venv")
    monkeypatch.setattr(environment, "RECORD", tmp_path / ".venv" / "torch_index")
    monkeypatch.setattr(environment, "CONTENTS", tmp_path / ".venv" / "contents")
    monkeypatch.setenv("TORCH_INDEX", asked)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("torch==2.13.0\nnumpy==2.4.6\n")
    assert environment.torch_index() == address
    flags = ["--extra-index-url", address, "--find-links", address, f"torch==2.13.0+{address.rpartition('/')[2]}"]
    assert environment.torch_build([requirements], address) == (flags if address else [])


def test_an_address_that_did_not_answer_is_not_kept(monkeypatch, tmp_path):
    for name in ("torch_index", "contents"):
        (tmp_path / name).write_text("https://dead.example/cpu")
    monkeypatch.setattr(environment, "RECORD", tmp_path / "torch_index")
    monkeypatch.setattr(environment, "CONTENTS", tmp_path / "contents")
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    assert environment.torch_index() == "https://dead.example/cpu"  # what a whole .venv was built from
    (tmp_path / "contents").unlink()
    assert environment.torch_index() == ""
    monkeypatch.setenv("TORCH_INDEX", "https://other.example/cpu")
    assert environment.torch_index() == "https://other.example/cpu"
