"""Machines that train together: how they meet, what they tell each other, and what ends all of them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from conftest import ROOT
from engine_runs import command_of, losses, train_here

from common.errors import UserError
from common.launch.machines import Machines, Peers
from common.locking import free_port
from common.manifest import damage

GUARD = 300  # seconds after which a test that hangs fails; none that passes comes near


class Machine(Peers):
    """A machine of which this test process plays the launcher; ``ended`` is set when the others have stopped it."""

    def __init__(self, rank: int, count: int, port: int, processes: int = 1, **limits: float):
        self.ended = threading.Event()
        settings = Machines(count, rank, "127.0.0.1", port, **{"patience": GUARD, "silence": GUARD} | limits)
        super().__init__(settings, {"processes per machine": processes}, on_stop=self.ended.set)

    def news(self) -> str:
        assert self.ended.wait(GUARD)
        return self.stopped

    def leave(self, code: int) -> None:
        """As its process would: what is open is closed at the end."""
        super().leave(code)
        for connection in self.connections.values():
            connection.socket.shutdown(socket.SHUT_RDWR)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("common.launch.machines.CALL_EVERY", 0.1)


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    threads = ThreadPoolExecutor(8)
    yield threads
    threads.shutdown(wait=False)


@pytest.fixture
def start(pool) -> Callable[[Machine], "Future[None]"]:
    """Lets a machine meet the others in a thread of its own."""
    return lambda machine: pool.submit(machine.meet)


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
    settings = {"NUM_MACHINES": count, "PEER_TIMEOUT": silence, "processes per machine": 1}
    greeting = {"machine": rank, "settings": settings}
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
def test_machines_meet_and_get_the_port_of_machine_0(meet, count):
    """When all of them have checked their input, not earlier; and they go when all have finished."""
    met = meet(count)
    with ThreadPoolExecutor(count) as pool:
        early = [pool.submit(machine.wait, 0) for machine in met[1:]]
        assert not any(waiting.done() for waiting in early)
        assert met[0].wait(12345) == 12345
        assert [waiting.result(GUARD) for waiting in early] == [12345] * (count - 1)
        early = [pool.submit(machine.leave, 0) for machine in met[1:]]
        assert not any(leaving.done() for leaving in early)
        met[0].leave(0)
        for leaving in early:
            leaving.result(GUARD)
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


def test_machine_0_says_who_did_not_come(start, port):
    waiting = start(Machine(0, 4, port, patience=3))
    other = start(Machine(2, 4, port))
    said = refusal(waiting)
    assert "2 of 4 machines arrived within 3 s; missing: MACHINE_RANK 1, 3." in said
    assert f"MAIN_IP=127.0.0.1 MAIN_PORT={port}" in said
    assert f"machine 0 at 127.0.0.1:{port}: {said}" == refusal(other)


def test_the_others_say_where_they_looked_for_machine_0(start, port):
    said = refusal(start(Machine(1, 2, port, patience=1)))
    assert f"machine 0 at 127.0.0.1:{port} did not answer within 1 s" in said
    assert "refused" in said and "MAIN_IP" in said


def test_a_stranger_has_the_port_of_machine_0(start, port):
    with listener(port):
        assert f"port {port} can't be used (Address already in use)" in refusal(start(Machine(0, 2, port)))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "did not answer within 1 s (timed out)"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is no launcher of this program; MAIN_PORT differs?"),
        (b"\xff\xfe\x00\n", "is no launcher of this program"),
        (b"[" * 5000 + b"\n", "is no launcher of this program"),
    ],
)
def test_a_stranger_answers_in_place_of_machine_0(start, port, answer, says):
    with listener(port, answer):
        assert says in refusal(start(Machine(1, 2, port, patience=1 if answer is None else GUARD)))


def test_strangers_at_machine_0_disturb_nobody(start, port, monkeypatch):
    monkeypatch.setattr("common.launch.machines.GREETED_WITHIN", 0.1)
    meeting = start(main := Machine(0, 2, port))
    nonsense = [b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b'{"machine": 1}\n', b"[" * 20000]
    strangers = [dial(port) for _ in range(5)]  # the first one is silent
    for stranger, said in zip(strangers[1:], nonsense, strict=True):
        stranger.sendall(said)
    start(Machine(1, 2, port)).result(GUARD)
    meeting.result(GUARD)
    assert list(main.connections) == [1]


def test_two_machines_with_one_rank(start, port):
    met = [start(Machine(rank, 3, port)) for rank in (0, 1, 1)]
    for meeting in met:
        assert "there is a second machine with MACHINE_RANK=1 (127.0.0.1)" in refusal(meeting)


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"count": 2, "processes": 4}, "processes per machine is 1 on machine 0 and 4 on machine 1: give the same"),
        ({"count": 2, "silence": 5}, f"PEER_TIMEOUT is {GUARD} on machine 0 and 5 on machine 1"),
        ({"count": 3}, "NUM_MACHINES is 2 on machine 0 and 3 on machine 1"),
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
        while 1 not in main.connections and time.monotonic() < until:
            time.sleep(0.01)
        first.shutdown(socket.SHUT_RDWR)
    others = [Machine(rank, 3, port) for rank in (1, 2)]
    for arriving in [meeting, *map(start, others)]:
        arriving.result(GUARD)


# What ends all of them.


def test_a_machine_that_fails_ends_the_others(meet):
    met = meet(3)
    met[2].leave(3)
    for machine in met[:2]:
        assert machine.news() == "machine 2 stopped with exit code 3; its own output says why"


def test_a_machine_that_has_finished_stops_nobody(meet, pool):
    met = meet(3)
    pool.submit(met[1].leave, 0)
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
    met = [Machine(rank, 3, port, silence=3) for rank in (0, 2)]
    meetings = [start(machine) for machine in met]
    with greet(port, 1, 3, silence=3):
        for meeting in meetings:
            meeting.result(GUARD)
        assert met[0].news() == "machine 1 sent no sign of life for 3 s"
        assert met[1].news() == met[0].news()


def test_a_silent_machine_0_ends_the_others(start, port):
    machine = Machine(1, 2, port, silence=0.5)
    with listener(port, b'{"welcome": true}\n{"port": 12345}\n'):
        start(machine).result(GUARD)
        assert machine.wait(0) == 12345
        assert machine.news() == "machine 0 sent no sign of life for 0.5 s"


def test_machine_0_may_vanish_before_the_others_have_met(start, pool, port):
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
    waiting = pool.submit(main.wait, 12345)
    assert machine.wait(0) == waiting.result(GUARD) == 12345


# Two real machines: network namespaces with an address each.

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
        for process in ip(f"netns pids {name}").split():
            os.kill(int(process), signal.SIGKILL)
        ip(f"netns del {name}", check=False)


def test_two_machines_train_as_one_until_the_cable_is_cut(hosts, tmp_path):
    """The global batch is the same, so are the losses; then both end, and what was saved is whole."""
    endless = ["--max_steps", "100000", "--save_steps", "4", "--lr_scheduler_type", "constant"]
    program = command_of("full", "DDP", tmp_path / "two", *endless)
    launcher = [sys.executable, str(ROOT / "common" / "launch" / "launcher.py")]
    said = [tmp_path / f"machine{rank}" for rank in range(2)]
    runs = []
    for rank, host in enumerate(hosts):
        command = ["ip", "netns", "exec", host, *launcher, *program]
        where = {"NUM_MACHINES": "2", "MACHINE_RANK": str(rank), "MAIN_IP": MAIN_IP, "PEER_TIMEOUT": "8"}
        one = {"NUM_PROCESSES": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        with said[rank].open("w") as output:
            runs.append(subprocess.Popen(command, env=os.environ | where | one, stdout=output, stderr=output))
    checkpoint = tmp_path / "two" / "checkpoint-4"
    while not checkpoint.is_dir():
        assert [run.poll() for run in runs] == [None, None], [file.read_text() for file in said]
        time.sleep(0.1)
    ip(f"-n {hosts[1]} link set eth0 down")
    assert [run.wait(GUARD) for run in runs] == [2, 2]
    for other, file in zip((1, 0), said, strict=True):
        news = f"machine {other} sent no sign of life for 8 s"
        assert f"error: {news}; this machine was stopped too. Saved checkpoints are complete." in file.read_text()
    assert [ip(f"netns pids {host}") for host in hosts] == ["", ""]
    alone = train_here("full", tmp_path / "one", "--lr_scheduler_type", "constant")
    assert losses(checkpoint) == pytest.approx(alone, abs=1e-4)
    assert damage(checkpoint) == ""
