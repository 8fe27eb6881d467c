"""Several machines that train together: their variables, or srun's, and how their launchers meet and watch each other.

They meet at machine 0 before anything starts. If one never comes, is switched off or loses its cable, all others end
with a sentence that names it.

Also tried, between two network namespaces: torchrun's rendezvous, c10d or static, waits forever after a cut cable or a
killed launcher, c10d trains on when settings differ, and other ends are 40 to 100 lines that name no machine. torch's
TCPStore hears of a killed launcher only after PEER_TIMEOUT, and its calls may hang in spite of their timeout.
"""

import json
import os
import queue
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from common.errors import UserError, note

Number = TypeVar("Number", int, float)

ALIVE_EVERY = 2.0  # seconds between two signs of life
CALL_EVERY = 1.0  # seconds between two calls of a machine that got no answer
GREETED_WITHIN = 5.0  # seconds that a caller has to greet
ENDINGS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}  # what tells a launcher to end


@dataclass(frozen=True)
class Machines:
    """The machines that train together, and the rank of this one."""

    count: int = 1
    rank: int = 0
    main_ip: str = ""
    main_port: int = 29500  # where the launchers meet; the training itself uses a free port
    patience: float = 600.0  # seconds to wait until all machines have arrived
    silence: float = 60.0  # seconds without a sign of life after which a machine counts as dead


def number(environ: Mapping[str, str], name: str, default: Number) -> Number:
    """The value of a variable, ``default`` if empty: from 0 up, and whole if ``default`` is. Else raises UserError."""
    try:
        value = float(environ.get(name) or default)
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise UserError(f"{name}={environ[name]} is no number from 0 up.")
    if isinstance(default, int) and not value.is_integer():
        raise UserError(f"{name}={environ[name]} is no whole number.")
    return type(default)(value)


def read_machines(environ: Mapping[str, str]) -> Machines:
    """Reads NUM_MACHINES, MACHINE_RANK, MAIN_IP, MAIN_PORT, or srun's own. Raises UserError for a contradiction."""
    if "NUM_MACHINES" not in environ:
        environ = slurm_variables(environ) | dict(environ)
    machines = Machines(
        count=number(environ, "NUM_MACHINES", Machines.count),
        rank=number(environ, "MACHINE_RANK", Machines.rank),
        main_ip=environ.get("MAIN_IP", ""),
        main_port=number(environ, "MAIN_PORT", Machines.main_port),
        patience=number(environ, "RDZV_TIMEOUT", Machines.patience),
        silence=number(environ, "PEER_TIMEOUT", Machines.silence),
    )
    if machines.rank >= machines.count:
        raise UserError(f"MACHINE_RANK={machines.rank} of NUM_MACHINES={machines.count}: ranks start at 0.")
    if not 0 < machines.main_port < 65536:
        raise UserError(f"MAIN_PORT={machines.main_port}: ports are 1 to 65535.")
    if machines.count > 1 and not machines.main_ip:
        raise UserError("NUM_MACHINES needs MAIN_IP, the address of the machine with MACHINE_RANK=0.")
    return machines


def slurm_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The same variables from srun, if it runs on several machines. Raises UserError unless it has one task on each."""
    if int(environ.get("SLURM_STEP_NUM_NODES", 1)) == 1:
        return {}
    if environ.get("SLURM_STEP_NUM_TASKS", "") != environ["SLURM_STEP_NUM_NODES"]:
        raise UserError("start one task per machine (srun --ntasks-per-node=1): it starts a process for each GPU.")
    return {
        "NUM_MACHINES": environ["SLURM_STEP_NUM_NODES"],
        "MACHINE_RANK": environ["SLURM_NODEID"],
        "MAIN_IP": first_host(environ["SLURM_STEP_NODELIST"]),
        # Two steps on the same machines must meet at different ports.
        "MAIN_PORT": str(20000 + (int(environ["SLURM_JOB_ID"]) * 16 + int(environ["SLURM_STEP_ID"])) % 10000),
    }


def first_host(nodes: str) -> str:
    """The first name in a list of nodes as SLURM writes it: gpu[07-09,12],cpu1 -> gpu07."""
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", nodes).partition(",")[0]


@contextmanager
def deaf() -> Iterator[set[int]]:
    """Holds these signals and SIGCHLD back, for ever from threads that start meanwhile. Yields what was held before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*ENDINGS, signal.SIGCHLD})
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Connection:
    """Carries JSON objects, one per line."""

    def __init__(self, connected: socket.socket, timeout: float):
        connected.settimeout(timeout)
        self.socket, self.reader = connected, connected.makefile("rb")

    def send(self, **message: Any) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """The next message; {} if it is no JSON object. Raises OSError if the other side is silent or gone."""
        if not (line := self.reader.readline(10_000)):
            raise ConnectionError("the connection was closed")
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            return {}


class Peers:
    """The other machines. When one stops, ``stopped`` becomes a sentence about it and a thread calls ``on_stop``."""

    def __init__(self, machines: Machines, settings: Mapping[str, Any], on_stop: Callable[[], None]):
        self.machines, self.on_stop = machines, on_stop
        self.settings = {"NUM_MACHINES": machines.count, "PEER_TIMEOUT": machines.silence, **settings}
        self.stopped, self.leaving, self.address = "", False, ""
        self.connections: dict[int, Connection] = {}  # by rank; only machine 0 has more than one
        self.listeners: list[threading.Thread] = []
        self.ports: queue.Queue[int] = queue.Queue()

    def meet(self) -> None:
        """Returns when all machines are here. Raises UserError if one does not come, or if their settings differ."""
        deadline = time.monotonic() + self.machines.patience
        try:
            self.welcome(deadline) if self.machines.rank == 0 else self.join(deadline)
        except UserError as error:
            self.tell(stopped=str(error))
            raise
        self.address = self.connections[min(self.connections)].socket.getsockname()[0]
        for rank, connection in self.connections.items():
            connection.socket.settimeout(self.machines.silence)
            self.listeners.append(threading.Thread(target=self.listen, args=(rank, connection), daemon=True))
        with deaf():  # the main thread is to hear them
            for thread in (*self.listeners, threading.Thread(target=self.sign, daemon=True)):
                thread.start()

    def welcome(self, deadline: float) -> None:
        """Machine 0 waits for the others and compares their settings with its own."""
        count, port = self.machines.count, self.machines.main_port
        try:
            server = socket.create_server(("", port))
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise UserError(f"port {port} can't be used ({reason}): set MAIN_PORT to a free one, for all.") from error
        note(f"waiting for {count - 1} other machines at port {port}")
        with server:
            while missing := sorted(set(range(1, count)) - self.connections.keys()):
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connected, address = server.accept()
                except TimeoutError as error:
                    raise UserError(
                        f"{count - len(missing)} of {count} machines arrived within {self.machines.patience:g} s; "
                        f"missing: MACHINE_RANK {', '.join(map(str, missing))}. Were they started with "
                        f"MAIN_IP={self.machines.main_ip} MAIN_PORT={port}, and can they reach that?"
                    ) from error
                self.admit(Connection(connected, GREETED_WITHIN), address[0])
        self.tell(welcome=True)

    def admit(self, connection: Connection, address: str) -> None:
        """Machine 0 accepts a machine and ignores a stranger. Raises UserError if the machine contradicts another."""
        try:
            greeting = connection.receive()
            rank, settings = greeting["machine"], greeting["settings"]
        except (OSError, KeyError):
            return
        # A machine is silent after its greeting; if there is something to read, it has gone, and may come again.
        gone, _, _ = select.select([other.socket for other in self.connections.values()], [], [], 0)
        self.connections = {known: other for known, other in self.connections.items() if other.socket not in gone}
        is_new = 0 < rank < self.machines.count and rank not in self.connections
        self.connections[rank if is_new else -1] = connection  # -1: it only receives the error
        problems = [] if is_new else [f"there is a second machine with MACHINE_RANK={rank} ({address})"]
        for name, value in self.settings.items():
            if settings.get(name) != value:
                problems.append(f"{name} is {value!r} on machine 0 and {settings.get(name)!r} on machine {rank}")
        if problems:
            raise UserError(f"{problems[-1]}: give the same command on all machines, each with its own MACHINE_RANK.")
        note(f"machine {rank} is here ({address}), {len(self.connections) + 1} of {self.machines.count}")

    def join(self, deadline: float) -> None:
        """Another machine calls machine 0 until it answers."""
        address = (self.machines.main_ip, self.machines.main_port)
        place, reason = "machine 0 at {}:{}".format(*address), OSError("no answer")
        note(f"calling {place}")
        while (left := deadline - time.monotonic()) > 0:
            try:
                self.connections[0] = Connection(socket.create_connection(address, min(left, 10)), left)
                self.connections[0].send(machine=self.machines.rank, settings=self.settings)
                answer = self.connections[0].receive()
                break
            except OSError as error:
                reason = error
                time.sleep(min(left, CALL_EVERY))
        else:
            waited = f"{place} did not answer within {self.machines.patience:g} s ({reason})"
            raise UserError(f"{waited}: is MAIN_IP its address, and do as many machines run as NUM_MACHINES says?")
        if "welcome" not in answer:
            raise UserError(f"{place}: {answer.get('stopped', 'is no launcher of this program; MAIN_PORT differs?')}")

    def wait(self, port: int) -> int:
        """The ``port`` that machine 0 gives. All machines wait here, because one may prepare its data for longer."""
        if self.machines.rank == 0:
            for _ in self.connections:
                self.ports.get()
        self.tell(port=port)
        return port if self.machines.rank == 0 else self.ports.get()

    def listen(self, rank: int, connection: Connection) -> None:
        """Runs in a thread until machine ``rank`` has finished; ends the training here if it stops or is silent."""
        try:
            while "stopped" not in (message := connection.receive()):
                if "finished" in message:
                    return
                if "port" in message:
                    self.ports.put(message["port"])
            news = message["stopped"]
        except TimeoutError:
            news = f"machine {rank} sent no sign of life for {self.machines.silence:g} s"
        except OSError:
            news = f"the launcher of machine {rank} was killed"
        if not self.stopped and not self.leaving:
            self.stopped = news
            self.tell(stopped=news)
            self.on_stop()

    def sign(self) -> None:
        while not self.stopped and not self.leaving:
            self.tell(alive=True)
            time.sleep(min(ALIVE_EVERY, self.machines.silence / 4))

    def tell(self, **message: Any) -> None:
        for connection in self.connections.values():
            with suppress(OSError):  # its listener finds out
                connection.send(**message)

    def leave(self, code: int) -> None:
        """Tells the others that this machine failed with an exit code, or waits with them until all have finished."""
        self.leaving = True
        if code:
            self.tell(stopped=f"machine {self.machines.rank} stopped with exit code {code}; its own output says why")
            return
        self.tell(finished=True)
        for listener in self.listeners:  # the launcher of machine 0 holds the store that all processes use
            listener.join()
