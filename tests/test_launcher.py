"""The launcher: how many processes it starts, what each is told, and how all of them end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from cards import pretend
from conftest import ROOT
from engine_runs import command_of, losses, train_here

from common.errors import UserError
from common.launch import launcher
from common.launch.machines import Machines
from common.locking import free_port

GUARD = 300  # seconds after which a test that hangs fails; none that passes comes near
LAUNCHER = ROOT / "common" / "launch" / "launcher.py"
MARK = "CHATGLM_TEST_RUN"
SCRIPTS = [file for folder in ("common", "full", "lora", "ptuning") for file in sorted((ROOT / folder).glob("*.sh"))]
SCRIPTS.remove(ROOT / "common" / "launch.sh")
# A program that only prints what it was told: the first process waits to be ended, the second does as the test wants.
PROGRAM = r"""
import os, signal, sys, time
from pathlib import Path
if sys.argv[-1] == "--dry_run":
    {check}
    sys.exit()
rank = os.environ["RANK"]
os.write(1, f"rank {{rank}} {{sys.argv[1:]}} threads {{os.environ.get('OMP_NUM_THREADS')}}\n".encode())
first_is_there = Path(__file__).with_suffix(".there")
if rank == "0":
    first_is_there.touch()
    {first}
while rank == "1" and not first_is_there.exists():
    time.sleep(0.02)
{second}
"""


def running(mark: str) -> list[list[str]]:
    """The commands of the processes that have the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.cmdline())
        except psutil.Error:
            continue
    return found


@pytest.fixture
def mark() -> Iterator[str]:
    own = uuid.uuid4().hex
    yield own
    assert running(own) == []


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    def write_program(second: str = "pass", first: str = "time.sleep(600)", check: str = "pass") -> Path:
        program = tmp_path / "program.py"
        program.write_text(PROGRAM.format(first=first, second=second, check=check))
        return program

    return write_program


@pytest.fixture
def launch(mark) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts the launcher; it is ended after the test, and with it all that it started."""
    started: list[subprocess.Popen] = []

    def launch_program(program: Path, *then: str, **variables: str) -> subprocess.Popen:
        command = [sys.executable, str(LAUNCHER), str(program), "--flag", *then]
        environment = os.environ | {MARK: mark, "OMP_NUM_THREADS": "3"} | variables
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=environment, text=True, **pipes))
        return started[-1]

    yield launch_program
    for process in started:
        process.terminate()
        process.communicate(timeout=GUARD)


def of_two(rank: int, port: int) -> dict[str, str]:
    """The variables of one of two machines, which has one process."""
    machines = {"NUM_MACHINES": "2", "MACHINE_RANK": str(rank), "MAIN_IP": "127.0.0.1", "MAIN_PORT": str(port)}
    return machines | {"NUM_PROCESSES": "1"}


def test_a_process_that_torchrun_started_just_runs_the_program(launch, write):
    said, errors = launch(write(), LOCAL_RANK="2", RANK="2", NUM_PROCESSES="2").communicate(timeout=GUARD)
    assert (said, errors) == ("rank 2 ['--flag'] threads 3\n", "")


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"NUM_GPUS": "99"}, r"NUM_GPUS=99, but \d+ GPUs are visible here"),
        ({"NUM_PROCESSES": "0"}, "NUM_PROCESSES=0: at least one is needed"),
        ({"NUM_PROCESSES": "all"}, "NUM_PROCESSES=all is no number"),
    ],
)
def test_wrong_numbers_of_processes_are_said(monkeypatch, variables, says):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        launcher.count_processes()


def test_the_cores_are_shared_out_as_threads(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    launcher.set_environment(4, Machines(2, 1, "a"))
    assert (os.environ["OMP_NUM_THREADS"], os.environ["EXPECTED_PROCESSES"]) == ("3", "8")
    os.environ["OMP_NUM_THREADS"] = "5"
    launcher.set_environment(4, Machines())
    assert (os.environ["OMP_NUM_THREADS"], os.environ["EXPECTED_PROCESSES"]) == ("5", "4")


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, {"CUDA_VISIBLE_DEVICES": "0"}),
        ({"CUDA_VISIBLE_DEVICES": "3,5"}, {"CUDA_VISIBLE_DEVICES": "3"}),
        ({"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": ""}),
        ({"ASCEND_RT_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "0", "ASCEND_RT_VISIBLE_DEVICES": "4"}),
    ],
)
def test_a_single_process_sees_the_first_device(given, seen, monkeypatch):
    monkeypatch.setattr(os, "environ", given)
    assert launcher.first_gpu() == seen


def test_num_gpus_0_hides_all_cards_from_every_process(monkeypatch):
    monkeypatch.setattr(os, "environ", {"NUM_GPUS": "0", "NUM_PROCESSES": "3", "CUDA_VISIBLE_DEVICES": "1,2"})
    monkeypatch.setattr(launcher, "train_together", lambda *_: 0)
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    with pretend("8 x A100"):
        assert launcher.main() == 0
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["EXPECTED_PROCESSES"]) == ("", "3")


def test_every_process_is_told_its_rank_and_the_card_of_the_network(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")  # left behind by another program
    told = launcher.every_rank(2, Machines(3, 1, "10.0.0.1"), "127.0.0.1", 12345)
    assert [(rank["RANK"], rank["LOCAL_RANK"]) for rank in told] == [("2", "0"), ("3", "1")]
    assert {(rank["MASTER_ADDR"], rank["MASTER_PORT"], rank["WORLD_SIZE"]) for rank in told} == {
        ("10.0.0.1", "12345", "6")
    }
    assert {rank["GLOO_SOCKET_IFNAME"] for rank in told} == {"lo"}


def test_one_process_that_fails_ends_all(launch, write):
    run = launch(write("print('error: wrong', file=sys.stderr); sys.exit(2)"), NUM_PROCESSES="2")
    said, errors = run.communicate(timeout=GUARD)
    assert sorted(said.splitlines()) == [f"rank {rank} ['--flag'] threads 3" for rank in range(2)]
    assert (run.returncode, errors) == (2, "error: wrong\n")


# The program of a training as far as signals are concerned, whose line stays whole beside that of another process; and
# one that starts what never ends by itself.
SAVES = """
def save(code, _):
    os.write(1, f"saves at {signal.Signals(code).name}\\n".encode())
    time.sleep(0.3 * int(rank))  # the others must be waited for
    sys.exit(int(os.environ["EXIT_WHEN_PREEMPTED"]))
for end in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(end, save)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
print("ready")
time.sleep(600)
"""
STARTS = """
import subprocess
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("ready")
time.sleep(600)
"""


def until_ready(run: subprocess.Popen, count: int = 1) -> None:
    while count:
        line = run.stdout.readline()
        assert line, run.communicate()
        count -= line == "ready\n"


@pytest.mark.parametrize(("number", "code", "processes"), [("SIGTERM", 0, 2), ("SIGUSR1", 0, 1), ("SIGINT", 130, 1)])
def test_a_signal_reaches_all_processes_and_then_nothing_follows(launch, write, number, code, processes):
    program, then = write(SAVES, SAVES.replace("\n", "\n    ")), ["--then", "echo", "what follows"]
    run = launch(program, *then, RANK="0", NUM_PROCESSES=str(processes))
    until_ready(run, processes)
    run.send_signal(signal.Signals[number])
    said, errors = run.communicate(timeout=GUARD)
    assert (run.returncode, errors) == (code, "")
    assert said.splitlines() == [f"saves at {number}"] * processes


@pytest.mark.parametrize(("ending", "code"), [("pass", 0), ("sys.exit(3)", 3), ("os.abort()", 1)])
def test_what_follows_a_program_takes_the_place_of_the_launcher(launch, write, ending, code):
    then = ["--then", sys.executable, "-c", "import os; print('what follows', os.getpid())"]
    run = launch(write(first=ending), *then, RANK="0", NUM_PROCESSES="1")
    said, errors = run.communicate(timeout=GUARD)
    assert said.splitlines()[1:] == ([] if code else [f"what follows {run.pid}"])
    assert run.returncode == code
    assert errors.startswith("error: the program was killed by SIGABRT" if code == 1 else "")


def test_sigusr1_kills_no_program_that_does_not_listen_to_it(launch, write, tmp_path):
    program = write("first_is_there.touch()\nprint('ready')\nwhile first_is_there.exists(): time.sleep(0.02)")
    run = launch(program, RANK="2", NUM_PROCESSES="1")
    until_ready(run)
    run.send_signal(signal.SIGUSR1)
    (tmp_path / "program.there").unlink()
    assert run.communicate(timeout=GUARD) == ("", "") and run.returncode == 0


@pytest.mark.parametrize("where", ["check", "first"])
def test_sigterm_ends_a_program_that_does_not_listen_to_it(launch, write, where):
    run = launch(write(**{where: "print('ready'); time.sleep(600)"}), NUM_PROCESSES="2")
    until_ready(run)
    run.terminate()
    errors = run.communicate(timeout=GUARD)[1]
    assert (run.returncode, errors) == (128 + signal.SIGTERM, "ended by SIGTERM: there was nothing to save yet.\n")


@pytest.mark.parametrize("where", ["check", "first"])
def test_a_killed_launcher_takes_all_processes_with_it(launch, write, where):
    run = launch(write(**{where: "print('ready'); time.sleep(600)"}), NUM_PROCESSES="2")
    until_ready(run)
    run.kill()
    run.communicate(timeout=GUARD)  # nobody holds its output any more


def test_a_killed_process_takes_the_others_and_its_own_children_with_it(launch, write):
    run = launch(write(STARTS), NUM_PROCESSES="2")
    until_ready(run)
    next(each for each in psutil.Process(run.pid).children() if each.environ()["RANK"] == "1").kill()
    errors = run.communicate(timeout=GUARD)[1]
    assert run.returncode == 1 and errors.startswith("error: process 1 was killed by SIGKILL")


@pytest.mark.parametrize("script", [str(file.relative_to(ROOT)) for file in SCRIPTS])
def test_a_script_becomes_what_it_starts(script, tmp_path):
    """So a signal to the script, and its exit code, are those of the launcher."""
    stand_in = tmp_path / "python3"
    stand_in.write_text('#!/bin/sh\ncase "$1" in\n    *environment.py) echo "$0" ;;\n    *) echo $$ ;;\nesac\n')
    stand_in.chmod(0o755)
    run = subprocess.Popen(
        ["bash", str(ROOT / script)],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.communicate(timeout=GUARD)[0] == f"{run.pid}\n"


def test_two_machines_finish_together_or_fail_together(launch, write):
    """The exit code of a process is that of its launcher; Ctrl-C on one machine ends both."""
    port = free_port()
    runs = [launch(write(first="time.sleep(1)"), **of_two(rank, port)) for rank in range(2)]
    said = [run.communicate(timeout=GUARD) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert [out for out, _ in said] == [f"rank {rank} ['--flag'] threads 3\n" for rank in range(2)]

    runs = [launch(write("sys.exit(3)"), **of_two(rank, port)) for rank in range(2)]
    said = [run.communicate(timeout=GUARD) for run in runs]
    assert [run.returncode for run in runs] == [2, 3], said
    news = "machine 1 stopped with exit code 3; its own output says why"
    assert f"error: {news}; this machine was stopped too. Saved checkpoints are complete." in said[0][1].splitlines()

    runs = [launch(write("time.sleep(600)"), **of_two(rank, port)) for rank in range(2)]
    assert runs[1].stdout.readline().startswith("rank 1")
    runs[1].send_signal(signal.SIGINT)
    said = [run.communicate(timeout=GUARD) for run in runs]
    assert [run.returncode for run in runs] == [2, 128 + signal.SIGINT], said
    assert "error: machine 1 stopped with exit code 130;" in said[0][1]


def test_a_machine_that_stops_ends_the_check_of_the_others(launch, write, mark):
    """Before any training has started, while each looks at its input."""
    port = free_port()
    run = launch(write(check="time.sleep(600)"), **of_two(0, port))
    settings = {"NUM_MACHINES": 2, "PEER_TIMEOUT": 60, "processes per machine": 1}
    settings["program"] = "/".join(Path(run.args[2]).parts[-2:])
    other = None
    while other is None:
        try:
            other = socket.create_connection(("127.0.0.1", port), timeout=GUARD)
        except ConnectionRefusedError:
            assert run.poll() is None, run.communicate()
            time.sleep(0.05)
    with other:
        other.sendall(json.dumps({"machine": 1, "settings": settings}).encode() + b"\n")
        while not any("--dry_run" in command for command in running(mark)):
            assert run.poll() is None, run.communicate()
            time.sleep(0.1)
        other.sendall(b'{"stopped": "machine 1 has had enough"}\n')
        errors = run.communicate(timeout=GUARD)[1]
    assert run.returncode == 2
    sentence = "error: machine 1 has had enough; this machine was stopped too. Saved checkpoints are complete."
    assert errors.splitlines()[-1] == sentence and "Traceback" not in errors


def test_accelerate_trains_the_same(tmp_path):
    """As a user types it, with nothing of ours around; the agent inside is that of torchrun."""
    # Standalone: torchrun's fixed port could be in use. HF_HOME: where Accelerate looks for the user's own settings.
    own = {"PET_STANDALONE": "1", "HF_HOME": str(tmp_path), "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    command = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2"]
    program = command_of("full", "DDP", tmp_path / "two", "--max_steps", "1")
    run = subprocess.run([*command, *program], env=os.environ | own, capture_output=True, text=True, timeout=2 * GUARD)
    assert run.returncode == 0, run.stdout + run.stderr
    alone = train_here("full", tmp_path / "one", "--max_steps", "1")
    assert losses(tmp_path / "two") == pytest.approx(alone, abs=1e-4)
