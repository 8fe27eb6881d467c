"""Several machines: what their variables say, and those that srun sets."""

import pytest

from common.errors import UserError
from common.launch.machines import Machines, first_host, read_machines


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
        (
            {"NUM_MACHINES": "2", "MACHINE_RANK": "2", "MAIN_IP": "a"},
            "MACHINE_RANK=2 of NUM_MACHINES=2: ranks start at 0",
        ),
        ({"NUM_MACHINES": "2", "MACHINE_RANK": "-1", "MAIN_IP": "a"}, "MACHINE_RANK=-1"),
        ({"MACHINE_RANK": "1"}, "MACHINE_RANK=1 of NUM_MACHINES=1"),
        ({"NUM_MACHINES": "2"}, "NUM_MACHINES needs MAIN_IP"),
        ({"NUM_MACHINES": "two"}, "NUM_MACHINES=two is no number"),
        ({"NUM_MACHINES": "2", "MAIN_IP": "a", "MAIN_PORT": "99999"}, "MAIN_PORT=99999: ports are 1 to 65535"),
        ({"NUM_MACHINES": "2", "MAIN_IP": "a", "PEER_TIMEOUT": "soon"}, "PEER_TIMEOUT=soon is no number"),
        ({"NUM_MACHINES": "2", "MAIN_IP": "a", "RDZV_TIMEOUT": "inf"}, "RDZV_TIMEOUT=inf is no number"),
        ({"NUM_MACHINES": "1.5"}, "NUM_MACHINES=1.5 is no whole number"),
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
