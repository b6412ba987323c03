"""Which of how many processes this one is: what torchrun or SLURM say in the environment. Needs no torch."""

import os
import re
from typing import NamedTuple

from topogpt.errors import UserError


class Place(NamedTuple):
    """Of this process among those that were started together."""

    rank: int
    world: int
    local_world: int  # processes on this machine
    local_rank: int  # among them; which GPU is this process's


def read_place() -> Place:
    """torchrun's environment, or that of a SLURM step (a batch script without srun is one process)."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
    elif by_slurm():
        # of the step: an allocation of four may run a step of one
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        names = ("SLURM_PROCID", tasks, "SLURM_NTASKS_PER_NODE", "SLURM_LOCALID")
    else:
        return Place(0, 1, 1, 0)
    values = []
    for name, default in zip(names, (0, 1, 1, 0), strict=True):
        said = env.get(name) or str(default)
        if not re.fullmatch(r"[0-9]{1,9}", said):
            raise UserError(f"{name} = {said[:80]!a} in the environment is no number; correct or unset it")
        values.append(int(said))
    rank, world, local_world, local_rank = values
    if rank >= world:
        raise UserError(f"{names[0]} = {rank} must be below {names[1]} = {world}; correct or unset them")
    if by_slurm() and "SLURM_GPUS_PER_TASK" in env:
        local_rank = 0  # each process sees the GPU that is its own, and no other
    return Place(rank, world, max(1, local_world), local_rank)


def by_slurm() -> bool:
    """Whether srun has started this process, and no torchrun in between."""
    env = os.environ
    launched = "RANK" in env and "WORLD_SIZE" in env
    return not launched and "SLURM_PROCID" in env and ("SLURM_STEP_ID" in env or "SLURM_JOB_ID" not in env)


def set_rendezvous(world: int) -> None:
    """Say in the environment where the processes meet, as torchrun does and srun does not."""
    env = os.environ
    if world > 1 and by_slurm():
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        env.setdefault("MASTER_ADDR", first_node(nodes))
        # one of 20,000 ports by the number of the job; steps of a job side by side have others
        numbers = [env.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
        job, step = (int(n) if n.isdecimal() else 0 for n in numbers)
        env.setdefault("MASTER_PORT", str(20_000 + (job + 101 * step) % 20_000))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if world > 1 and missing:
        raise UserError(
            f"{missing[0]} is not in the environment, so {world} processes cannot meet; start them with "
            "torchrun or srun, or unset RANK and WORLD_SIZE"
        )


def first_node(nodes: str) -> str:
    """The first host of SLURM's list: node007 of node[007-009,012],login1; rank 0 runs there."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes).group()
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)
