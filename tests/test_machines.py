"""Machines that train together: how they meet, what they say to each other, and what ends all of them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from engine_runs import losses

from common.errors import UserError
from common.launch import launcher, machines
from common.launch.machines import Machines, Peers, first_host, read_machines
from common.locking import free_port

GUARD = 60  # seconds after which a test that hangs fails; none that passes comes near


class Machine(Peers):
    """A machine of which this test process plays the launcher; ``ended`` is set when the others have stopped it."""

    def __init__(self, rank: int, count: int, port: int, processes: int = 1, **limits: float):
        self.ended = threading.Event()
        settings = Machines(count, rank, "127.0.0.1", port, **{"patience": GUARD, "silence": GUARD} | limits)
        super().__init__(settings, {"processes a machine": processes}, on_stop=self.ended.set)

    def news(self) -> str:
        assert self.ended.wait(GUARD)
        return self.stopped

    def leave(self, code: int) -> None:
        """As its process would: what is open is closed at the end."""
        super().leave(code)
        for line in self.lines.values():
            line.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machines, "name_interface", lambda connection: None)  # it changes the environment
    monkeypatch.setattr(machines, "CALL_EVERY", 0.05)
    monkeypatch.setattr(machines, "GREETED_WITHIN", 0.2)


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def start() -> Iterator[Callable[[Machine], "Future[None]"]]:
    """Lets a machine meet the others in a thread of its own."""
    pool = ThreadPoolExecutor(8)
    yield lambda machine: pool.submit(machine.meet)
    pool.shutdown(wait=False)


@pytest.fixture
def meet(start, port) -> Callable[..., list[Machine]]:
    """Machines 0, 1, ... that have met."""

    def meet_all(count: int, **limits: float) -> list[Machine]:
        met = [Machine(rank, count, port, **limits) for rank in range(count)]
        for meeting in [start(machine) for machine in met]:
            meeting.result(GUARD)
        return met

    return meet_all


def refusal(meeting: "Future[None]") -> str:
    with pytest.raises(UserError) as error:
        meeting.result(GUARD)
    return str(error.value)


def dial(port: int) -> socket.socket:
    """A connection to machine 0, as soon as it listens."""
    until = time.monotonic() + GUARD
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=GUARD)
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.01)


def greet(port: int, rank: int, count: int, silence: float = GUARD) -> socket.socket:
    """The greeting of a machine that does nothing afterwards: no signs of life."""
    connection = dial(port)
    greeting = {"machine": rank, "NUM_MACHINES": count, "PEER_TIMEOUT": silence, "processes a machine": 1}
    connection.sendall(json.dumps(greeting).encode() + b"\n")
    return connection


@contextmanager
def listener(port: int, answer: bytes | None = None) -> Iterator[list[socket.socket]]:
    """A stranger at the port, who gives everybody the same answer, or who only listens."""
    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", port)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connections.append(connection)
                if answer is not None:
                    connection.recv(1000)
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield connections
        server.shutdown(socket.SHUT_RDWR)


# How they meet.


@pytest.mark.parametrize("count", [2, 3])
def test_machines_meet_and_get_the_same_port(meet, count):
    """When all of them have checked their input: until then there is none."""
    met = meet(count)
    assert not any(machine.port for machine in met)
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(Machine.wait, met))
    assert len({machine.port for machine in met}) == 1 and met[0].port > 0
    assert not any(machine.stopped for machine in met)


def test_a_machine_that_is_early_calls_until_machine_0_is_there(start, port, monkeypatch):
    refused = threading.Event()
    connect = socket.create_connection

    def watched(*args, **kwargs):
        try:
            return connect(*args, **kwargs)
        except ConnectionRefusedError:
            refused.set()
            raise

    monkeypatch.setattr(socket, "create_connection", watched)
    early, late = Machine(1, 2, port), Machine(0, 2, port)
    meeting = start(early)
    assert refused.wait(GUARD)
    start(late).result(GUARD)
    meeting.result(GUARD)
    assert early.port == late.port


def test_machine_0_says_who_did_not_come(start, port):
    waiting = start(Machine(0, 4, port, patience=2))
    other = start(Machine(2, 4, port))
    said = refusal(waiting)
    assert "2 of 4 machines arrived within 2 s; missing: MACHINE_RANK 1, 3." in said
    assert f"MAIN_IP=127.0.0.1 MAIN_PORT={port}" in said
    assert "MACHINE_RANK 1, 3 did not arrive" in refusal(other)


def test_the_others_say_where_they_looked_for_machine_0(start, port):
    said = refusal(start(Machine(1, 2, port, patience=0.3)))
    assert f"machine 0 at 127.0.0.1:{port} did not answer within 0.3 s" in said
    assert "refused" in said and "MAIN_IP" in said


def test_a_stranger_has_the_port_of_machine_0(start, port):
    with listener(port):
        assert f"port {port} can't be used (Address already in use)" in refusal(start(Machine(0, 2, port)))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "did not answer within 0.3 s (timed out)"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not a launcher of this program: is MAIN_PORT the one of machine 0?"),
        (b"\xff\xfe\x00\n", "is not a launcher of this program"),
        (b"[" * 5000 + b"\n", "is not a launcher of this program"),
    ],
)
def test_a_stranger_answers_in_place_of_machine_0(start, port, answer, says):
    with listener(port, answer):
        assert says in refusal(start(Machine(1, 2, port, patience=0.3 if answer is None else GUARD)))


def test_strangers_at_machine_0_disturb_nobody(start, port):
    meeting = start(main := Machine(0, 2, port))
    nonsense = [b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b'{"machine": 1}\n', b"[" * 20000]
    strangers = [dial(port) for _ in range(5)]  # the first one is silent
    for stranger, said in zip(strangers[1:], nonsense, strict=True):
        stranger.sendall(said)
    start(other := Machine(1, 2, port)).result(GUARD)
    meeting.result(GUARD)
    assert main.port == other.port and list(main.lines) == [1]


def test_two_machines_with_one_rank(start, port):
    met = [start(Machine(rank, 3, port)) for rank in (0, 1, 1)]
    for meeting in met:
        assert "there is a second machine with MACHINE_RANK=1 (127.0.0.1)" in refusal(meeting)


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"count": 2, "processes": 4}, "processes a machine is 1 on machine 0 and 4 on machine 1 (127.0.0.1)"),
        ({"count": 2, "silence": 5}, "PEER_TIMEOUT is 60 on machine 0 and 5 on machine 1"),
        ({"count": 3}, "NUM_MACHINES is 2 on machine 0 and 3 on machine 1 (127.0.0.1)"),
    ],
)
def test_machines_that_contradict_each_other(start, port, odd, says):
    main = start(Machine(0, 2, port))
    other = start(Machine(1, port=port, **odd))
    assert says in refusal(main) and says in refusal(other)


def test_a_machine_that_was_stopped_while_waiting_may_come_again(start, port):
    meeting = start(main := Machine(0, 3, port))
    with greet(port, 1, 3) as first:
        until = time.monotonic() + GUARD
        while 1 not in main.lines and time.monotonic() < until:
            time.sleep(0.01)
        first.shutdown(socket.SHUT_RDWR)
    others = [Machine(rank, 3, port) for rank in (1, 2)]
    for arriving in [meeting, *map(start, others)]:
        arriving.result(GUARD)
    assert {main.port} == {other.port for other in others}


# What ends all of them.


def test_a_machine_that_fails_ends_the_others(meet):
    met = meet(3)
    met[2].leave(3)
    for machine in met[:2]:
        assert machine.news() == "machine 2 stopped with exit code 3; its own output says why"


def test_a_machine_that_has_finished_stops_nobody(meet):
    met = meet(3)
    met[1].leave(0)
    met[2].leave(1)
    assert met[0].news().startswith("machine 2 stopped with exit code 1")


def test_a_machine_that_was_killed_ends_the_others(start, port):
    met = [Machine(rank, 3, port) for rank in (0, 2)]
    meetings = [start(machine) for machine in met]
    with greet(port, 1, 3) as killed:
        for meeting in meetings:
            meeting.result(GUARD)
        killed.shutdown(socket.SHUT_RDWR)
    assert [machine.news() for machine in met] == ["the launcher of machine 1 was killed"] * 2


def test_a_silent_machine_ends_the_others(start, port):
    met = [Machine(rank, 3, port, silence=2) for rank in (0, 2)]
    meetings = [start(machine) for machine in met]
    with greet(port, 1, 3, silence=2):
        for meeting in meetings:
            meeting.result(GUARD)
        assert met[0].news() == "machine 1 was not heard of for 2 s"
        assert met[1].news() == met[0].news()


def test_a_silent_machine_0_ends_the_others(start, port):
    machine = Machine(1, 2, port, silence=0.5)
    with listener(port, b'{"welcome": true}\n{"port": 12345}\n'):
        start(machine).result(GUARD)
        machine.wait()
        assert machine.port == 12345
        assert machine.news() == "machine 0 was not heard of for 0.5 s"


def test_machine_0_may_vanish_before_the_others_have_met(start, port):
    """Its call is taken as not made: machine 1 calls again."""
    with listener(port) as connections:
        meeting = start(machine := Machine(1, 2, port))
        until = time.monotonic() + GUARD
        while not connections and time.monotonic() < until:
            time.sleep(0.01)
        for connection in connections:
            connection.close()
    start(main := Machine(0, 2, port)).result(GUARD)
    meeting.result(GUARD)
    waiting = threading.Thread(target=main.wait, daemon=True)
    waiting.start()
    assert machine.port == 0  # machine 0 has got further, machine 1 has not
    machine.wait()
    waiting.join(GUARD)
    assert machine.port == main.port > 0


# What the variables say.


def test_one_machine_is_the_default():
    assert read_machines({}) == Machines()
    assert read_machines({"NUM_MACHINES": "1", "MAIN_PORT": ""}) == Machines()


def test_the_variables_of_several_machines():
    environ = {"NUM_MACHINES": "3", "MACHINE_RANK": "2", "MAIN_IP": "10.0.0.1", "MAIN_PORT": "1234"}
    environ |= {"RDZV_TIMEOUT": "20", "PEER_TIMEOUT": "5"}
    assert read_machines(environ) == Machines(3, 2, "10.0.0.1", 1234, 20, 5)


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"NUM_MACHINES": "2", "MACHINE_RANK": "2", "MAIN_IP": "a"}, "MACHINE_RANK=2, but NUM_MACHINES=2: ranks are 0"),
        ({"NUM_MACHINES": "2", "MACHINE_RANK": "-1", "MAIN_IP": "a"}, "MACHINE_RANK=-1"),
        ({"MACHINE_RANK": "1"}, "MACHINE_RANK=1, but NUM_MACHINES=1"),
        ({"NUM_MACHINES": "2"}, "NUM_MACHINES needs MAIN_IP"),
        ({"NUM_MACHINES": "two"}, "NUM_MACHINES=two is no number"),
        ({"NUM_MACHINES": "2", "MAIN_IP": "a", "MAIN_PORT": "99999"}, "MAIN_PORT=99999: ports are 1 to 65535"),
        ({"NUM_MACHINES": "2", "MAIN_IP": "a", "PEER_TIMEOUT": "soon"}, "PEER_TIMEOUT=soon is no number"),
    ],
)
def test_contradictions_are_said(environ, says):
    with pytest.raises(UserError, match=says):
        read_machines(environ)


def step(nodes: str, count: int, tasks: int, rank: int, step: int = 0) -> dict[str, str]:
    """What srun sets, of which some speaks of the whole job, which may be larger than the step."""
    return {
        "SLURM_JOB_ID": "200505",
        "SLURM_JOB_NODELIST": "gpu[01-16]",
        "SLURM_JOB_NUM_NODES": "16",
        "SLURM_NNODES": "16",
        "SLURM_NTASKS": "16",
        "SLURM_STEP_ID": str(step),
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_NUM_NODES": str(count),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_NODEID": str(rank),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
    }


def test_srun_says_who_trains_together():
    told = [read_machines(step("gpu[07-08]", 2, 2, rank)) for rank in range(2)]
    assert [(machine.count, machine.rank, machine.main_ip) for machine in told] == [(2, 0, "gpu07"), (2, 1, "gpu07")]
    assert told[0].main_port == told[1].main_port != read_machines(step("gpu[07-08]", 2, 2, 0, step=1)).main_port


def test_srun_with_one_node_is_one_machine():
    assert read_machines(step("gpu07", 1, 1, 0)).count == 1


def test_srun_must_start_one_task_a_machine():
    with pytest.raises(UserError, match="srun --ntasks-per-node=1"):
        read_machines(step("gpu[07-08]", 2, 8, 0))


def test_in_a_batch_script_itself_only_one_machine_runs():
    """Without srun it is one process on the first of the job's machines."""
    environ = {name: value for name, value in step("gpu[07-08]", 2, 2, 0).items() if "STEP" not in name}
    assert read_machines(environ).count == 1


def test_the_user_knows_better_than_srun():
    under_srun = step("gpu[07-08]", 2, 2, 1)
    assert read_machines(under_srun | {"NUM_MACHINES": "1", "MACHINE_RANK": "0"}).count == 1
    assert read_machines(under_srun | {"MAIN_IP": "10.0.0.7", "MAIN_PORT": "1234"}) == Machines(2, 1, "10.0.0.7", 1234)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("a-[1-3]-ib,b", "a-1-ib"),
        ("n1,n2", "n1"),
        ("node5", "node5"),
        ("n1,a[2-3]", "n1"),
        ("rack[0-1]n[2-3],x", "rack0n2"),
    ],
)
def test_the_first_name_of_a_list_of_nodes(nodes, first):
    assert first_host(nodes) == first


# The launcher, in a process of its own, with programs that only say what they were told.

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
    time.sleep(600)
while rank == "1" and not first_is_there.exists():
    time.sleep(0.05)
{ends}
"""
MARK = "CHATGLM_TEST_RUN"


def is_of(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.fixture
def mark() -> Iterator[str]:
    """What processes of this test have in their environment; none of them outlives it."""
    own = uuid.uuid4().hex
    yield own
    for process in psutil.process_iter():
        if is_of(process, own):
            process.kill()


def running(mark: str) -> list[list[str]]:
    return [process.cmdline() for process in psutil.process_iter() if is_of(process, mark)]


@pytest.fixture
def launch(tmp_path, mark) -> Callable[..., subprocess.Popen]:
    def launch_program(ends: str = "pass", check: str = "pass", **variables: str) -> subprocess.Popen:
        program = tmp_path / "program.py"
        program.write_text(PROGRAM.format(ends=ends, check=check))
        return subprocess.Popen(
            [sys.executable, str(ROOT / "common" / "launch" / "launcher.py"), str(program), "--flag"],
            env={**os.environ, MARK: mark, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return launch_program


def test_a_process_that_torchrun_started_just_runs_the_program(launch):
    said, errors = launch(LOCAL_RANK="2", RANK="2", NUM_PROCESSES="2", OMP_NUM_THREADS="7").communicate(timeout=GUARD)
    assert (said, errors) == ("rank 2 ['--flag'] threads 7\n", "")


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
    ("ends", "code", "says"),
    [
        ("print('error: wrong', file=sys.stderr); sys.exit(2)", 2, "error: wrong\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, "error: process 1 was killed by SIGKILL"),
    ],
)
def test_one_process_that_fails_ends_all(launch, mark, ends, code, says):
    run = launch(ends, NUM_PROCESSES="2", OMP_NUM_THREADS="3")
    said, errors = run.communicate(timeout=GUARD)
    assert run.returncode == code, errors
    assert sorted(said.splitlines()) == [f"rank {rank} ['--flag'] threads 3" for rank in range(2)]
    assert errors.startswith(says) and len(errors.splitlines()) == 1
    assert running(mark) == []


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_all_processes(launch, mark, stop):
    run = launch("time.sleep(600)", NUM_PROCESSES="2")
    assert {run.stdout.readline().split()[1] for _ in range(2)} == {"0", "1"}
    run.send_signal(stop)
    errors = run.communicate(timeout=GUARD)[1]
    assert run.returncode == 128 + stop, errors
    assert "torch" not in errors  # it says nothing about its own parts
    assert running(mark) == []


def test_a_machine_that_stops_ends_the_check_of_the_others(launch, mark, port):
    """Before any training has started, while each looks at its input."""
    where = {"NUM_MACHINES": "2", "MACHINE_RANK": "0", "MAIN_IP": "127.0.0.1", "MAIN_PORT": str(port)}
    run = launch(check="time.sleep(600)", **where)
    greeting = {"machine": 1, "NUM_MACHINES": 2, "PEER_TIMEOUT": 60, "processes a machine": 1}
    with dial(port) as other:
        program = "/".join(Path(run.args[2]).parts[-2:])
        other.sendall(json.dumps(greeting | {"program": program}).encode() + b"\n")
        while not any("--dry_run" in command for command in running(mark)):
            assert run.poll() is None, run.communicate()
            time.sleep(0.1)
        other.sendall(b'{"stopped": "machine 1 has had enough"}\n')
        errors = run.communicate(timeout=GUARD)[1]
    assert run.returncode == 2
    sentence = "error: machine 1 has had enough; this machine was stopped too. Saved checkpoints are whole."
    assert errors.splitlines()[-1] == sentence and "Traceback" not in errors
    assert running(mark) == []


# Two real machines: network namespaces with an address each, and the script as a user types it.

MAIN_IP, OTHER_IP = "10.77.0.1", "10.77.0.2"


def ip(command: str, check: bool = True) -> str:
    return subprocess.run(["ip", *command.split()], check=check, capture_output=True, text=True).stdout


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, joined by a cable."""
    if not shutil.which("ip"):
        pytest.skip("two machines are network namespaces, for which the program ip is needed")
    names = [f"chatglm-{os.getpid()}-{rank}" for rank in range(2)]
    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
    except subprocess.CalledProcessError as error:
        for name in names:
            ip(f"netns del {name}", check=False)
        pytest.skip(f"two machines are network namespaces, which can't be made here: {error.stderr.strip()}")
    for name, address in zip(names, (MAIN_IP, OTHER_IP), strict=True):
        ip(f"-n {name} addr add {address}/24 dev eth0")
        for card in ("lo", "eth0"):
            ip(f"-n {name} link set {card} up")
    yield names
    for name in names:
        ip(f"netns del {name}", check=False)


@pytest.fixture
def train(tmp_path, mark) -> Callable[..., subprocess.Popen]:
    """Starts full/train.sh, on one of two machines if one is named; what it says goes to the file ``said``."""

    def start_training(host: str = "", rank: int = 0, **variables: str) -> subprocess.Popen:
        where = ["ip", "netns", "exec", host] if host else []
        several = {"NUM_MACHINES": "2", "MACHINE_RANK": str(rank), "MAIN_IP": MAIN_IP} if host else {}
        here = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", MARK: mark}
        name = f"machine{rank}" if host else "alone"
        demo = {
            "OUTPUT_DIR": str(tmp_path / ("two" if host else "one")),
            "EVALUATE": "false",
            "ACCELERATE_USE_CPU": "true",
        }
        with (tmp_path / name).open("w") as said:
            return subprocess.Popen(
                [*where, "bash", str(ROOT / "full" / "train.sh"), "--logging_steps", "1", "--disable_tqdm", "true"],
                env={**os.environ, **here, **several, **demo, **variables},
                stdout=said,
                stderr=subprocess.STDOUT,
            )

    return start_training


def test_two_machines_train_as_one_does(hosts, train, tmp_path):
    """The global batch is the same, so are the losses; what is saved is saved once."""
    two = [train(host, rank, MAX_STEPS="3", BATCH_SIZE="2") for rank, host in enumerate(hosts)]
    assert [run.wait(300) for run in two] == [0, 0], [(tmp_path / f"machine{rank}").read_text() for rank in range(2)]
    alone = train(MAX_STEPS="3", BATCH_SIZE="4")
    assert alone.wait(300) == 0, (tmp_path / "alone").read_text()
    checkpoints = [[file.name for file in (tmp_path / run).glob("checkpoint-*")] for run in ("two", "one")]
    assert checkpoints == [["checkpoint-3"], ["checkpoint-3"]]
    together, by_one = (losses(tmp_path / run / "checkpoint-3") for run in ("two", "one"))
    assert len(together) == 3
    assert together == pytest.approx(by_one, abs=1e-4)


def test_a_cut_cable_ends_both_machines(hosts, train, tmp_path, mark):
    runs = [train(host, rank, MAX_STEPS="100000", BATCH_SIZE="2", PEER_TIMEOUT="5") for rank, host in enumerate(hosts)]
    said = [tmp_path / f"machine{rank}" for rank in range(2)]
    while "'loss'" not in said[0].read_text():
        assert [run.poll() for run in runs] == [None, None], [file.read_text() for file in said]
        time.sleep(0.2)
    ip(f"-n {hosts[1]} link set eth0 down")
    assert [run.wait(GUARD) for run in runs] == [2, 2]
    for other, file in zip((1, 0), said, strict=True):
        sentence = (
            f"machine {other} was not heard of for 5 s; this machine was stopped too. Saved checkpoints are whole."
        )
        assert f"error: {sentence}" in file.read_text()
    assert running(mark) == []
