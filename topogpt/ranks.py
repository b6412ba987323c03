"""Which of how many processes this one is: what torchrun or SLURM say in the environment. Needs no torch."""

import os
from typing import NamedTuple

from topogpt.errors import UserError


class Place(NamedTuple):
    """Of this process among those that were started together."""

    rank: int
    world: int
    local_world: int  # processes on this machine


def read_place() -> Place:
    """torchrun's environment, or that of a SLURM step (a batch script without srun is one process)."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    elif "SLURM_PROCID" in env and ("SLURM_STEP_ID" in env or "SLURM_JOB_ID" not in env):
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")
    else:
        return Place(0, 1, 1)
    try:
        rank, world, local_world = (int(env.get(name) or 1) for name in names)
    except ValueError:
        raise UserError(f"{names[0]}, {names[1]} in the environment must be numbers; unset them") from None
    if not 0 <= rank < world:
        raise UserError(f"{names[0]} = {rank} must be below {names[1]} = {world}; correct or unset them")
    return Place(rank, world, max(1, local_world))
