"""Reads from the environment which machines train together: from the variables of our scripts, or from srun's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from common.errors import UserError

Number = TypeVar("Number", int, float)


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
    """The value of a variable, 0 or more, and whole if ``default`` is an int; ``default`` where it is unset or empty.

    Raises UserError for other values.
    """
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
