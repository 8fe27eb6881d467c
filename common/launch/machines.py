"""Machines that train together: they meet at the first one before anything is started, and watch each other.

Each machine's launcher keeps one connection to that of machine 0. Over it go a greeting, the port on which the training
will meet, a sign of life every few seconds, and the news that somebody has stopped. So a machine that never arrives, is
switched off, or loses its cable ends the others with a sentence, where collective operations would wait for very long.
"""

import json
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from common.errors import UserError, say
from common.locking import free_port

ALIVE_EVERY = 2.0  # seconds between two signs of life
GREETED_WITHIN = 2.0  # seconds that a caller has to say who it is; a machine that was too slow calls again
CALL_EVERY = 1.0  # seconds between two calls of a machine that got no answer
LONGEST_LINE = 10_000  # bytes


@dataclass(frozen=True)
class Machines:
    """Where this machine stands among those that train together."""

    count: int = 1
    rank: int = 0
    main_ip: str = ""
    main_port: int = 29500  # where the launchers meet; the training itself gets a free port
    patience: float = 600.0  # seconds to wait for the others to arrive
    silence: float = 60.0  # seconds without a sign of life after which a machine counts as dead


def number(environ: Mapping[str, str], name: str, default: float) -> float:
    try:
        return float(environ.get(name) or default)
    except ValueError as error:
        raise UserError(f"{name}={environ[name]} is no number.") from error


def whole_number(environ: Mapping[str, str], name: str, default: int) -> int:
    value = number(environ, name, default)
    if value != int(value) or value < 0:
        raise UserError(f"{name}={environ[name]} is no whole number.")
    return int(value)


def read_machines(environ: Mapping[str, str]) -> Machines:
    """NUM_MACHINES, MACHINE_RANK, MAIN_IP, MAIN_PORT, or what srun says. Raises UserError for a contradiction."""
    if "NUM_MACHINES" not in environ:
        environ = from_slurm(environ) | dict(environ)
    machines = Machines(
        count=whole_number(environ, "NUM_MACHINES", 1),
        rank=whole_number(environ, "MACHINE_RANK", 0),
        main_ip=environ.get("MAIN_IP", ""),
        main_port=whole_number(environ, "MAIN_PORT", 29500),
        patience=number(environ, "RDZV_TIMEOUT", 600),
        silence=number(environ, "PEER_TIMEOUT", 60),
    )
    if not 0 <= machines.rank < machines.count:
        raise UserError(
            f"MACHINE_RANK={machines.rank}, but NUM_MACHINES={machines.count}: ranks are 0 to {machines.count - 1}."
        )
    if not 0 < machines.main_port < 65536:
        raise UserError(f"MAIN_PORT={machines.main_port}: ports are 1 to 65535.")
    if machines.count > 1 and not machines.main_ip:
        raise UserError("NUM_MACHINES needs MAIN_IP, the address of the machine with MACHINE_RANK=0.")
    return machines


def from_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """The same variables as srun tells them, where it started this on several machines; one task a machine."""
    if int(environ.get("SLURM_STEP_NUM_NODES", 1)) == 1:
        return {}
    if environ.get("SLURM_STEP_NUM_TASKS", "") != environ["SLURM_STEP_NUM_NODES"]:
        raise UserError("start one task a machine (srun --ntasks-per-node=1): it starts a process for each GPU itself.")
    return {
        "NUM_MACHINES": environ["SLURM_STEP_NUM_NODES"],
        "MACHINE_RANK": environ["SLURM_NODEID"],
        "MAIN_IP": first_host(environ["SLURM_STEP_NODELIST"]),
        # two steps on the same machines meet at different ports
        "MAIN_PORT": str(20000 + (int(environ["SLURM_JOB_ID"]) * 16 + int(environ["SLURM_STEP_ID"])) % 10000),
    }


def first_host(nodes: str) -> str:
    """The first name of a list as SLURM writes it: gpu[07-09,12],cpu1 -> gpu07."""
    name = re.match(r"([^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", name[0]) if name else nodes


class Line:
    """A connection over which JSON objects go, one a line."""

    def __init__(self, connection: socket.socket, silence: float):
        connection.settimeout(silence)
        self.connection = connection
        self.reader = connection.makefile("rb")
        self.lock = threading.Lock()

    def send(self, **message: Any) -> None:
        with self.lock:
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """The next message, {} from somebody who speaks another language. Raises OSError where nobody is there."""
        line = self.reader.readline(LONGEST_LINE)
        if not line:
            raise ConnectionError("the connection was closed")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return {}
        return message if isinstance(message, dict) else {}

    def has_news(self) -> bool:
        """Whether there is something to receive, if only that the other side has gone."""
        return bool(select.select([self.connection], [], [], 0)[0])

    def close(self) -> None:
        self.reader.close()
        self.connection.close()


class Peers:
    """The other machines. ``stopped`` becomes a sentence as soon as one of them stops; ``on_stop`` is called then."""

    def __init__(self, machines: Machines, greeting: Mapping[str, Any], on_stop: Callable[[], None]):
        self.machines = machines
        agreed = {"NUM_MACHINES": machines.count, "PEER_TIMEOUT": machines.silence}
        self.greeting = {"machine": machines.rank, **agreed, **greeting}
        self.on_stop = on_stop
        self.stopped = ""
        self.leaving = False
        self.lines: dict[int, Line] = {}
        self.port = 0
        self.ready: set[int] = set()
        self.all_ready = threading.Event()
        self.counting = threading.Lock()

    def meet(self) -> None:
        """Returns when all machines are here and agree. Raises UserError where one does not come."""
        if self.machines.rank == 0:
            self.welcome()
        else:
            self.join()
        for rank, line in self.lines.items():
            threading.Thread(target=self.listen, args=(rank, line), daemon=True).start()
            threading.Thread(target=self.sign, args=(line,), daemon=True).start()

    def welcome(self) -> None:
        """Machine 0 waits for the others and checks what they are about to do."""
        machines = self.machines
        deadline = time.monotonic() + machines.patience
        try:
            listener = socket.create_server(("", machines.main_port))
        except OSError as error:
            raise UserError(
                f"port {machines.main_port} can't be used ({os.strerror(error.errno or 0)}): another program or "
                "another training of several machines has it; set MAIN_PORT to the same free port on all machines."
            ) from error
        say(f"waiting for {machines.count - 1} other machines at port {machines.main_port}")
        with listener:
            while len(self.lines) < machines.count - 1:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, address = listener.accept()
                    self.admit(Line(connection, GREETED_WITHIN), address[0])
                except TimeoutError as error:
                    missing = sorted(set(range(1, machines.count)) - self.lines.keys())
                    self.tell(refused=f"MACHINE_RANK {', '.join(map(str, missing))} did not arrive")
                    raise UserError(
                        f"{len(self.lines) + 1} of {machines.count} machines arrived within {machines.patience:g} s; "
                        f"missing: MACHINE_RANK {', '.join(map(str, missing))}. Were they started with "
                        f"MAIN_IP={machines.main_ip} MAIN_PORT={machines.main_port}, and can they reach that?"
                    ) from error
        self.tell(welcome=True)
        name_interface(next(iter(self.lines.values())).connection)

    def admit(self, line: Line, address: str) -> None:
        """Takes a machine in; one that contradicts machine 0 ends both, a stranger is ignored."""
        try:
            hello = line.receive()
        except OSError:
            hello = {}
        if hello.keys() != self.greeting.keys():
            line.close()
            return
        # Who has greeted waits in silence, so the only news is that it was stopped meanwhile; it may come again.
        self.lines = {other: known for other, known in self.lines.items() if not known.has_news()}
        rank = hello["machine"]
        problem = ""
        if not 0 < rank < self.machines.count or rank in self.lines:
            problem = f"there is a second machine with MACHINE_RANK={rank} ({address})"
        for name, value in self.greeting.items():
            if name != "machine" and hello[name] != value:
                problem = f"{name} is {value!r} on machine 0 and {hello[name]!r} on machine {rank} ({address})"
        if problem:
            self.lines[-1] = line  # the one that contradicts is told too
            self.tell(refused=problem)
            raise UserError(f"{problem}: it must be the same command on all machines, with ranks of their own.")
        self.lines[rank] = line
        line.connection.settimeout(self.machines.silence)
        say(f"machine {rank} is here ({address}), {len(self.lines) + 1} of {self.machines.count}")

    def join(self) -> None:
        """The other machines call machine 0 until it answers."""
        machines = self.machines
        deadline = time.monotonic() + machines.patience
        place = f"{machines.main_ip}:{machines.main_port}"
        say(f"calling machine 0 at {place}")
        reason: object = "no answer"
        while time.monotonic() < deadline:
            try:
                connection = socket.create_connection((machines.main_ip, machines.main_port), timeout=10)
                line = Line(connection, max(0.01, deadline - time.monotonic()))
                line.send(**self.greeting)
                answer = line.receive()
            except OSError as error:
                reason = error
                time.sleep(min(CALL_EVERY, max(0.0, deadline - time.monotonic())))
                continue
            if "refused" in answer:
                raise UserError(f"machine 0 at {place} refused: {answer['refused']}.")
            if "welcome" not in answer:
                raise UserError(f"{place} is not a launcher of this program: is MAIN_PORT the one of machine 0?")
            connection.settimeout(machines.silence)
            self.lines[0] = line
            name_interface(connection)
            return
        raise UserError(
            f"machine 0 at {place} did not answer within {machines.patience:g} s ({reason}): was it started, is "
            "MAIN_IP its address, and are as many machines started as NUM_MACHINES says?"
        )

    def wait(self) -> None:
        """Returns when all machines have got this far, and the port for the training is known.

        One may download or prepare data for much longer than another, and must be able to say that it failed.
        """
        if self.machines.rank == 0:
            self.count(0)
        else:
            self.tell(ready=True)
        self.all_ready.wait()

    def count(self, rank: int) -> None:
        """Machine 0 notes who is ready, and chooses a port when all are."""
        with self.counting:
            self.ready.add(rank)
            if len(self.ready) == self.machines.count:
                self.port = free_port()
                self.tell(port=self.port)
                self.all_ready.set()

    def listen(self, rank: int, line: Line) -> None:
        """Until machine ``rank`` stops or falls silent."""
        try:
            while True:
                message = line.receive()
                if message.get("finished"):
                    return
                if message.get("ready"):
                    self.count(rank)
                if "port" in message:
                    self.port = message["port"]
                    self.all_ready.set()
                if "stopped" in message:
                    news = message["stopped"]
                    break
        except TimeoutError:
            news = f"machine {rank} was not heard of for {self.machines.silence:g} s"
        except OSError:
            news = f"the launcher of machine {rank} was killed"
        self.stop(news)

    def sign(self, line: Line) -> None:
        """Signs of life, until the connection breaks."""
        try:
            while not self.stopped:
                line.send()
                time.sleep(min(ALIVE_EVERY, self.machines.silence / 4))
        except OSError:
            pass

    def stop(self, news: str) -> None:
        """Remembers the first news of an end, passes it on and ends the training here."""
        if self.stopped or self.leaving:
            return
        self.stopped = news
        self.tell(stopped=news)
        self.on_stop()

    def tell(self, **message: Any) -> None:
        for line in self.lines.values():
            try:
                line.send(**message)
            except OSError:
                continue

    def leave(self, code: int) -> None:
        """Says goodbye: the others need not wait if this machine failed, nor be afraid if it has finished."""
        self.leaving = True
        if code == 0:
            self.tell(finished=True)
        elif not self.stopped:
            self.tell(stopped=f"machine {self.machines.rank} stopped with exit code {code}; its own output says why")


def name_interface(connection: socket.socket) -> None:
    """Lets gloo use the network card over which the machines see each other; it would take 127.0.0.1. NCCL too."""
    address = connection.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            for variable in ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(variable, name)
