"""Starts a program in one process, or in one per device, on one machine or on several.

    python common/launch/launcher.py PROGRAM FLAGS... [--then COMMAND...]

NUM_GPUS (default: all that are visible; 0: compute on the CPU) or, on CPUs, NUM_PROCESSES (default: 1) is the number of
processes on this machine; machines.py reads how several machines train together. Before several processes start, one
checks the input and prepares the data, so that bad input is reported once. Under torchrun or deepspeed the program just
runs.

The launcher stays the parent: nothing that it started outlives it. It hands on SIGTERM, SIGUSR1, SIGHUP and SIGINT, at
which a training saves a checkpoint and ends (training/preemption.py). --then names a command that follows where the
program has ended well, and not because of a signal.

Processes are started here and not by the agent of torchrun or Accelerate, which ends one sentence about bad input with
40 lines of traceback and exit code 1; Accelerate's also obeys a file in the user's home, and no flag turns that off.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from common.errors import UserError, exit_on_user_error, note
from common.launch.environment import LIBC, die_with
from common.launch.machines import ENDINGS, Machines, Peers, deaf, number, read_machines

PREEMPTED = 75  # the exit code of a training that a signal has ended, after it has saved a checkpoint
FROM_A_TERMINAL = 128  # SI_KERNEL of Linux: Ctrl-C, which all processes have heard
ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER of Linux
# The device files of NVIDIA's cards, under WSL, of AMD, Ascend, Intel, Cambricon, Moore Threads and Gaudi.
CARDS = ("nvidia*", "dxg", "kfd", "davinci*", "dri/renderD*", "accel*", "cambricon*", "mtgpu*", "hl*")
PCI_CLASSES = ("0x03", "0x12")  # displays and accelerators: NVIDIA's files may be made when CUDA starts
# The variables that choose the visible devices of NVIDIA, AMD, Ascend and Intel.
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")


def count_processes() -> int:
    """The number of processes on this machine.

    Raises UserError if the environment asks for more GPUs than it has, and for GPUs that can't be used.
    """
    if os.environ.get("NUM_PROCESSES") == "1" and "NUM_GPUS" not in os.environ:
        return 1
    found = 0
    if os.environ.get("NUM_GPUS") != "0" and may_have_cards():
        from common.devices import count_devices  # it imports torch, which takes seconds

        found = count_devices()
    gpus = number(os.environ, "NUM_GPUS", found)
    processes = number(os.environ, "NUM_PROCESSES", max(1, gpus))
    if processes < 1:
        raise UserError(f"NUM_PROCESSES={processes}: at least one is needed.")
    for name, count in (("NUM_GPUS", gpus), ("NUM_PROCESSES", processes if found else 0)):
        if count > found:
            raise UserError(f"{name}={count}, but {found} GPUs are visible here.")
    return processes


def may_have_cards() -> bool:
    """Whether this machine shows any sign of an accelerator."""
    files = chain.from_iterable(Path("/dev").glob(name) for name in CARDS)
    classes = (file.read_text() for file in Path("/sys/bus/pci/devices").glob("*/class"))
    return any(files) or any(found.startswith(PCI_CLASSES) for found in classes)


def set_environment(processes: int, machines: Machines) -> None:
    """Sets the variables that give all processes their number and the number of threads of each."""
    # Threads that spin while they wait take the cores from other jobs: a step of 1.5 s would take 10 on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["EXPECTED_PROCESSES"] = str(processes * machines.count)
    os.environ["PROCESSES_PER_MACHINE"] = str(processes)
    os.environ["MACHINE_RANK"] = str(machines.rank)
    os.environ["EXIT_WHEN_PREEMPTED"] = str(PREEMPTED)


def first_gpu() -> dict[str, str]:
    """The environment of a single process, which sees one GPU: with several it would fall into DataParallel."""
    chosen = {"CUDA_VISIBLE_DEVICES": "0"} | {name: os.environ[name] for name in VISIBLE if name in os.environ}
    return os.environ | {name: devices.partition(",")[0] for name, devices in chosen.items()}


def every_rank(processes: int, machines: Machines, address: str, port: int) -> list[dict[str, str]]:
    """The environment of each process of this machine, as ``torch.distributed`` reads it.

    A store of ours listens at ``port`` of machine 0; ``address`` is that of this machine in the network of all.
    """
    shared: dict[str, str] = {}
    for card, addresses in psutil.net_if_addrs().items():  # gloo would use 127.0.0.1
        if address in [entry.address for entry in addresses]:
            shared = {"GLOO_SOCKET_IFNAME": card, "NCCL_SOCKET_IFNAME": card}
    shared |= os.environ
    shared |= {"WORLD_SIZE": str(processes * machines.count), "LOCAL_WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": machines.main_ip or "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # or process 0 would open a store of its own there
    first = machines.rank * processes
    return [shared | {"RANK": str(first + local), "LOCAL_RANK": str(local)} for local in range(processes)]


class Told(SystemExit):
    """A signal ended the program, or this launcher, before there was anything to save."""


_told: set[int] = set()  # the signals that have come


def end(number: int, _: object = None) -> None:
    raise Told(128 + number)


def begin(parent: int, blocked: set[int]) -> None:
    """Prepares a new process. SIGUSR1 waits until the program listens to it, as a training does; others ignore it."""
    die_with(parent)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked | {signal.SIGUSR1})


def kill_all() -> None:
    """Kills what this process has started, and what that has started, and returns when all of it has ended."""
    while family := psutil.Process().children(recursive=True):
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family)


def run(program: list[str], environments: list[dict[str, str]], stopped: Callable[[], object] = lambda: False) -> int:
    """Runs a program once in each environment, and kills all when one fails, or after SIGTERM if ``stopped()``.

    Returns 0, PREEMPTED, or the exit code of the first process that failed; for a killed one it prints a note and
    returns 1. Raises Told for one that was killed by a signal to this launcher.
    """
    running: list[subprocess.Popen] = []
    with deaf() as blocked:  # every signal waits until ``sigwaitinfo`` takes it
        try:
            for each in environments:
                command, start = [sys.executable, "-u", *program], partial(begin, os.getpid(), blocked)
                running.append(subprocess.Popen(command, env=each, preexec_fn=start))
            while None in (codes := [process.poll() for process in running]) and {*codes} <= {None, 0, PREEMPTED}:
                news = signal.sigwaitinfo({*ENDINGS, signal.SIGCHLD})
                if stopped():
                    return 1
                if news.si_signo == signal.SIGCHLD:
                    continue
                _told.add(news.si_signo)
                for process in running if news.si_code != FROM_A_TERMINAL else ():
                    process.send_signal(news.si_signo)
        finally:
            kill_all()
    for environment, code in zip(environments, codes, strict=True):
        if code and -code in _told:
            end(-code)
        if code and code < 0:
            name, several = signal.Signals(-code).name, "LOCAL_RANK" in environment
            who, others = (f"process {environment['RANK']}", "; the others ended") if several else ("the program", "")
            hint = " (the host has run out of memory?)" if name == "SIGKILL" else ""
            note(f"error: {who} was killed by {name}{hint}{others}. Saved checkpoints are complete.")
            return 1
        if code and code != PREEMPTED:
            return code
    return PREEMPTED if PREEMPTED in codes else 0


def train_together(program: list[str], processes: int, machines: Machines) -> int:
    """Starts the program in all processes of this machine, after a check. Returns the exit code of the first failure.

    Raises UserError if another machine does not come, contradicts this one, or stops.
    """
    port = 0
    if machines.rank == 0:
        with deaf():
            # Imported before the meeting: this takes seconds, in which there would be no signs of life.
            from torch.distributed import TCPStore

            # The processes of all machines meet at this store. It listens at once, so no other program takes its port.
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = store.port
    settings = {"processes per machine": processes, "program": "/".join(Path(program[0]).parts[-2:])}
    peers = Peers(machines, settings, on_stop=lambda: os.kill(os.getpid(), signal.SIGTERM))
    code = 1
    try:
        if machines.count > 1:
            peers.meet()
        code = run([*program, "--dry_run"], [first_gpu()], lambda: peers.stopped) or run(
            program, every_rank(processes, machines, peers.address, peers.wait(port)), lambda: peers.stopped
        )
    except Told as told:
        code = int(str(told.code))
        raise
    finally:
        peers.leave(0 if code == PREEMPTED else code)
        if peers.stopped:  # then the exception on its way here is that of ``on_stop``
            raise UserError(f"{peers.stopped}; this machine was stopped too. Saved checkpoints are complete.")
    return code


def main() -> int:
    words = sys.argv[1:]
    program, then = (words[: (i := words.index("--then"))], words[i + 1 :]) if "--then" in words else (words, [])
    command = [sys.executable, *program]
    if "LOCAL_RANK" in os.environ:
        os.execv(sys.executable, command)
    if os.environ.get("NUM_GPUS") == "0":  # common/devices.py says so to us, this to the libraries
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    if "--plan" in program:  # for devices that may not be here
        os.execve(sys.executable, command, first_gpu() | {"EXPECTED_PROCESSES": os.environ.get("NUM_GPUS") or "1"})
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as nohup sets it
        ENDINGS.remove(signal.SIGHUP)
    for each in ENDINGS:
        signal.signal(each, end)
    LIBC.prctl(ADOPT_ORPHANS, 1)
    try:
        machines = read_machines(os.environ)
        with deaf():  # importing torch starts threads
            processes = count_processes()
        set_environment(processes, machines)
        alone = processes * machines.count == 1
        code = run(program, [first_gpu()]) if alone else train_together(program, processes, machines)
    except Told as told:
        note(f"ended by {signal.Signals(int(str(told.code)) - 128).name}: there was nothing to save yet.")
        raise
    if code == PREEMPTED:
        return 128 + signal.SIGINT if signal.SIGINT in _told else 0
    if code == 0 and then:
        os.execvp(then[0], then)
    return code


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
