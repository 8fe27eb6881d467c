"""Locks between real processes: what they exclude, the messages while waiting, and what a kill leaves."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from common.errors import UserError
from common.locking import free_port, guard, lock_file

# Holds the lock of a resource from "held" until its stdin is closed.
HOLD = """
import sys
from pathlib import Path
from common.locking import guard
kind, resource, log = sys.argv[1:]
with guard(kind, Path(resource)):
    open(log, "a").write("held\\n")
    print("held", flush=True)
    sys.stdin.read()
    open(log, "a").write("released\\n")
"""
# Takes a port, then adds 1 to a number in a file many times: reading and writing apart, so that two would lose some.
COUNT = """
import sys
from pathlib import Path
from common.locking import free_port, guard
print(free_port(), flush=True)
file = Path(sys.argv[1])
for _ in range(10):
    with guard("counter", file):
        file.write_text(str(int(file.read_text()) + 1))
sys.stdin.read()
"""
# Makes the folder that it holds, as a training job makes its output folder.
MAKE = """
import sys
from pathlib import Path
from common.locking import guard
with guard("output", Path(sys.argv[1])):
    Path(sys.argv[1]).mkdir()
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path):
    """Starts one of the programs above; kills those that still run after the test."""
    processes = []
    # Were a lock broken, a test could wait for a line for ever: this ends it. No test that passes takes so long.
    watchdog = threading.Timer(300, lambda: [process.kill() for process in processes])
    watchdog.start()

    def start_program(code: str, *arguments: object, cwd: Path = tmp_path) -> subprocess.Popen:
        program = tmp_path / f"program{len(processes)}.py"
        program.write_text(code)
        process = subprocess.Popen(
            [sys.executable, str(program), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        processes.append(process)
        return process

    yield start_program
    watchdog.cancel()
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def hold(start, tmp_path):
    """Starts a process and returns when it holds the lock."""

    def hold_resource(kind: str, resource: object, **kwargs) -> subprocess.Popen:
        process = start(HOLD, kind, resource, tmp_path / "log", **kwargs)
        assert process.stdout.readline() == "held\n", process.stderr.read()
        return process

    return hold_resource


@pytest.fixture(params=["native", "soft"])
def kind_of_lock(request, monkeypatch) -> str:
    monkeypatch.setenv("CHATGLM_LOCKS", request.param)
    return request.param


def is_free(kind: str, resource: object) -> bool:
    try:
        with guard(kind, resource, wait=False):
            return True
    except UserError:
        return False


def test_the_second_process_waits_and_says_for_whom(start, hold, tmp_path):
    folder = tmp_path / "folder"
    first = hold("output", folder)
    second = start(HOLD, "output", folder, tmp_path / "log")
    line = second.stderr.readline()
    assert line.startswith(f"waiting for output {folder}: held by process {first.pid} on ")
    assert f"({first.args[1]} output {folder}" in line  # the command, with its arguments
    first.communicate()
    assert second.stdout.readline() == "held\n"
    second.communicate()
    assert (tmp_path / "log").read_text().split() == ["held", "released", "held", "released"]


def test_eight_jobs_at_once_lose_no_update_and_share_no_port(kind_of_lock, start, tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [start(COUNT, counter) for _ in range(8)]
    ports = [int(process.stdout.readline()) for process in processes]
    assert len(set(ports)) == 8 and all(1024 <= port < 65536 for port in ports)
    for process in processes:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    assert counter.read_text() == "80"


def test_without_waiting_a_held_lock_is_an_error(hold, tmp_path):
    process = hold("output", tmp_path / "folder")
    with pytest.raises(UserError) as error, guard("output", tmp_path / "folder", wait=False):
        pass
    assert f"process {process.pid} on " in str(error.value) and process.args[1] in str(error.value)
    process.communicate()
    assert is_free("output", tmp_path / "folder")


def test_a_killed_holder_frees_its_lock(kind_of_lock, start, hold, tmp_path):
    folder = tmp_path / "folder"
    first = hold("output", folder)
    second = start(HOLD, "output", folder, tmp_path / "log")
    assert "waiting" in second.stderr.readline()
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert second.stdout.readline() == "held\n"  # who was waiting goes on
    second.send_signal(signal.SIGKILL)
    second.wait()
    assert is_free("output", folder)


def test_a_soft_lock_says_which_file_to_delete(monkeypatch, start, hold, tmp_path):
    """Of a holder on another machine nobody can tell whether it still runs."""
    monkeypatch.setenv("CHATGLM_LOCKS", "soft")
    folder = tmp_path / "folder"
    first = hold("output", folder)
    first.kill()
    first.wait()
    file = lock_file("output", folder).with_suffix(".soft")
    file.write_text(file.read_text().replace(f"\n{socket.gethostname()}", "\nanother-machine"))
    with pytest.raises(UserError) as error, guard("output", folder, wait=False):
        pass
    assert str(error.value).endswith(f"; if that is gone, delete {file}.")
    second = start(HOLD, "output", folder, tmp_path / "log")
    assert second.stderr.readline().endswith(f"; if that is gone, delete {file}\n")
    file.unlink()
    assert second.stdout.readline() == "held\n"


def test_a_wrong_kind_of_lock_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("CHATGLM_LOCKS", "hard")
    with pytest.raises(UserError, match="CHATGLM_LOCKS=hard: it must be native or soft"), guard("output", tmp_path):
        pass


def test_an_error_inside_frees_the_lock(kind_of_lock, tmp_path):
    with pytest.raises(KeyError), guard("output", tmp_path):
        assert not is_free("output", tmp_path)
        raise KeyError
    assert is_free("output", tmp_path)


def test_different_resources_do_not_block_each_other(hold, tmp_path):
    hold("output", tmp_path / "a")
    assert not is_free("output", tmp_path / "a")
    assert is_free("output", tmp_path / "b")
    assert is_free("data", tmp_path / "a")
    assert is_free("output", tmp_path)
    assert is_free("model", "THUDM/chatglm-6b")


def test_every_spelling_of_a_folder_gets_the_same_lock(hold, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    hold("output", folder)
    monkeypatch.chdir(tmp_path)
    absolute = [folder, str(folder), f"{folder}/", tmp_path / "link"]
    ways = [*absolute, "folder", "folder/", "./folder", "link", Path("folder"), Path("link")]
    assert [way for way in ways if is_free("output", way)] == []
    monkeypatch.chdir(folder)
    assert not is_free("output", "../folder") and not is_free("output", ".")


def test_a_folder_that_its_holder_makes_stays_locked(start, tmp_path, monkeypatch):
    """Relative and not there yet when the first job comes, there when the second one comes: one lock all the same."""
    first = start(MAKE, "folder")
    assert first.stdout.readline() == "held\n", first.stderr.read()
    monkeypatch.chdir(tmp_path)
    assert not is_free("output", Path("folder")) and not is_free("output", tmp_path / "folder")


def test_a_port_can_be_bound():
    port = free_port()
    with socket.socket() as listener:
        listener.bind(("", port))
        listener.listen()
        assert listener.getsockname()[1] == port
