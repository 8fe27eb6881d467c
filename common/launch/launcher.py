"""Starts a program in one process, or in one per device, on one machine or on several.

    python common/launch/launcher.py PROGRAM FLAGS...

NUM_GPUS (default: all that are visible) or, on CPUs, NUM_PROCESSES (default: 1) is the number of processes on this
machine; machines.py reads how several machines train together. Before several processes start, one checks the input
and prepares the data, so that bad input is reported once. Under torchrun or deepspeed the program just runs.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.errors import UserError, exit_on_user_error
from common.launch.machines import Machines, read_machines
from common.launch.meeting import Peers
from common.launch.processes import count_processes, every_rank, first_gpu, run, set_environment


def handle_signals() -> None:
    """Lets the launcher end its processes before it ends itself."""

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, stop)


def run_here(program: list[str], environment: dict[str, str]) -> NoReturn:
    os.execve(sys.executable, [sys.executable, *program], environment)


def train_together(program: list[str], processes: int, machines: Machines) -> int:
    """Starts the program in all processes of this machine, after a check. Returns the exit code of the first failure.

    Raises UserError if another machine does not come, contradicts this one, or stops.
    """
    port = 0
    if machines.rank == 0:
        # Imported before the meeting: this takes seconds, in which there would be no signs of life.
        from torch.distributed import TCPStore

        # Where the processes of all machines meet, to the end. It has its port before anybody could take that.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = store.port
    settings = {"processes per machine": processes, "program": "/".join(Path(program[0]).parts[-2:])}
    peers = Peers(machines, settings, on_stop=lambda: os.kill(os.getpid(), signal.SIGTERM))
    code = 1
    try:
        if machines.count > 1:
            peers.meet()
        code = run([*program, "--dry_run"], [first_gpu()]) or run(
            program, every_rank(processes, machines, peers.address, peers.wait(port))
        )
    except BaseException:
        if not peers.stopped:
            raise
    finally:
        peers.leave(code)
    if peers.stopped:
        raise UserError(f"{peers.stopped}; this machine was stopped too. Saved checkpoints are whole.")
    return code


def main() -> int:
    program = sys.argv[1:]
    if "LOCAL_RANK" in os.environ:
        run_here(program, os.environ.copy())
    if "--plan" in program:  # for devices that may not be here
        run_here(program, first_gpu() | {"EXPECTED_PROCESSES": os.environ.get("NUM_GPUS") or "1"})
    machines = read_machines(os.environ)
    processes = count_processes()
    set_environment(processes, machines)
    if processes * machines.count == 1:
        run_here(program, first_gpu())
    handle_signals()
    return train_together(program, processes, machines)


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
