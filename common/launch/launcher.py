"""Starts a program in one process, or in one a device, on one machine or on several.

    python common/launch/launcher.py PROGRAM FLAGS...

NUM_GPUS (default: all that are visible) or, on CPUs, NUM_PROCESSES (default: 1) say how many processes there are on
this machine; NUM_MACHINES, MACHINE_RANK, MAIN_IP and MAIN_PORT, or srun, which machines train together (machines.py).
Where torchrun or deepspeed have already started one process a device, the program is just run.

One process is started directly. Several are started by Accelerate with everything said, so that no configuration in the
user's home matters; before that one process checks the input and prepares the data, so that bad input is said once.
"""

import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.errors import UserError, exit_on_user_error, say
from common.launch.machines import Machines, Peers, read_machines, whole_number


def count_processes() -> int:
    """Processes on this machine. Raises UserError where more GPUs are asked for than there are."""
    if os.environ.get("NUM_PROCESSES") == "1" and "NUM_GPUS" not in os.environ:
        return 1  # which needs no look at the devices, for which torch must be imported

    import torch

    found = torch.accelerator.device_count()
    gpus = whole_number(os.environ, "NUM_GPUS", found)
    processes = whole_number(os.environ, "NUM_PROCESSES", max(1, gpus))
    if processes < 1:
        raise UserError(f"NUM_PROCESSES={processes}: at least one is needed.")
    if gpus > found:
        raise UserError(f"NUM_GPUS={gpus}, but {found} GPUs are visible here.")
    if found and processes > found:
        raise UserError(f"NUM_PROCESSES={processes}, but {found} GPUs are visible here.")
    return processes


def set_environment(processes: int, machines: Machines) -> None:
    """What all processes are told: how many they are, and how many threads each may use."""
    # Threads that spin while they wait take the cores from other jobs: a step of 1.5 s would take 10 on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Accelerate would give each of several processes one thread, however many cores there are.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["EXPECTED_PROCESSES"] = str(processes * machines.count)
    os.environ["PROCESSES_PER_MACHINE"] = str(processes)
    os.environ["MACHINE_RANK"] = str(machines.rank)


def first_gpu() -> dict[str, str]:
    """The environment of a single process, which sees one GPU: with several it would fall into DataParallel."""
    visible = "" if os.environ.get("NUM_GPUS") == "0" else os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    return os.environ | {"CUDA_VISIBLE_DEVICES": visible.partition(",")[0]}


def run_here(program: list[str], environ: dict[str, str]) -> NoReturn:
    os.execve(sys.executable, [sys.executable, *program], environ)


def start(program: list[str], processes: int, machines: Machines, port: int) -> int:
    """Runs the program in all processes of this machine. Returns the exit code of the first that failed, or 0."""
    from accelerate.commands.launch import launch_command_parser, multi_gpu_launcher
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    flags = ["--multi_gpu", "--num_processes", str(processes * machines.count), "--num_machines", str(machines.count)]
    flags += ["--machine_rank", str(machines.rank), "--mixed_precision", "no", "--dynamo_backend", "no"]
    flags += ["--main_process_port", str(port), "--num_cpu_threads_per_process", os.environ["OMP_NUM_THREADS"]]
    if machines.count > 1:
        flags += ["--main_process_ip", machines.main_ip, "--rdzv_backend", "static"]
    args = launch_command_parser().parse_args([*flags, *program])
    args.gpu_ids, args.debug = "all", False  # which launch_command would take from a file in the user's home
    if machines.count == 1:
        args.standalone = True  # torch's own launcher then binds a free port itself, which nobody can take between
        args.local_addr = "127.0.0.1"
    logging.disable()  # the processes say themselves what failed
    warnings.filterwarnings("ignore", module="accelerate")
    try:
        multi_gpu_launcher(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            hint = " (the host has run out of memory?)" if name == "SIGKILL" else ""
            say(f"error: process {rank} was killed by {name}{hint}, and the others stopped; what was saved is whole.")
            return 1
        return failure.exitcode
    except SignalException as error:  # SIGTERM or Ctrl-C, and the processes have ended
        return 128 + error.sigval
    return 0


def check(program: list[str]) -> int:
    """The exit code of the program's own check of its input, in one process."""
    return subprocess.run([sys.executable, *program, "--dry_run"], env=first_gpu()).returncode


def stop_here(*_) -> NoReturn:
    sys.exit(143)


def main() -> int:
    program = sys.argv[1:]
    if "LOCAL_RANK" in os.environ:
        run_here(program, os.environ.copy())
    machines = read_machines(os.environ)
    processes = count_processes()
    set_environment(processes, machines)
    if processes * machines.count == 1:
        run_here(program, first_gpu())
    signal.signal(signal.SIGTERM, stop_here)
    if machines.count == 1:
        return check(program) or start(program, processes, machines, port=0)
    greeting = {"processes a machine": processes, "program": "/".join(Path(program[0]).parts[-2:])}
    peers = Peers(machines, greeting, on_stop=lambda: os.kill(os.getpid(), signal.SIGTERM))
    code = 1
    try:
        peers.meet()
        code = check(program)
        if code == 0:
            peers.wait()
            code = start(program, processes, machines, peers.port)
    except BaseException:
        if not peers.stopped:
            raise
    finally:
        peers.leave(code)
    if peers.stopped:
        raise UserError(f"{peers.stopped}; this machine was stopped too. Saved checkpoints are whole.")
    return code


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
