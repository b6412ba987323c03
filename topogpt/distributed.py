"""Everything that knows about several processes: who I am, which device is mine, and sums over all ranks.

Elsewhere only `ranks.world`, `ranks.is_main`, `ranks.sum` and the like appear; every rank calls them in the
same order.
"""

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from topogpt.errors import UserError
from topogpt.ranks import read_place, set_rendezvous

# Dense bf16 tensor-core operations per second, from the makers' data sheets; the first name that fits counts.
PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A40": 150e12,
    "A10G": 70e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, on whichever device x lies."""
        if self.world > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def mean(self, x: Tensor) -> Tensor:
        return self.sum(x) / self.world  # gloo has no mean of its own

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on some rank. Travels between CPUs: the GPUs are not waited for."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(int(flag))))

    def barrier(self) -> None:
        self.any(False)

    @property
    def device_name(self) -> str:
        return (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else self.device.type.upper()
        )

    @property
    def has_flash(self) -> bool:
        """Whether the device has flash attention for bfloat16: NVIDIA's from Ampere on."""
        return self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0)

    @property
    def peak_flops(self) -> float | None:
        """bf16 operations per second of all devices together; None where the device is not in the table."""
        found = [peak for name, peak in PEAK_FLOPS.items() if name in self.device_name]
        return self.world * found[0] if found and self.device.type == "cuda" else None

    def peak_memory(self) -> float:
        """Most memory this process has used, in bytes: on its GPU where it has one, else on the host."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024


@contextmanager
def start(device: str = "auto") -> Iterator[Ranks]:
    """Join the process group of torchrun or SLURM, if there is one; or go on in the one that is joined."""
    rank, world, _, local_rank = read_place()
    device = pick_device(device, world)
    if device == "cpu":
        keep_freed_memory()
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; "
                "give torchrun a smaller --nproc_per_node, or srun fewer --ntasks-per-node"
            )
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    if dist.is_initialized():  # by whoever trains several times
        yield Ranks(rank, world, torch.device(device))
        return
    if world > 1:
        set_rendezvous(world)
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30), rank=rank, world_size=world)
    try:
        yield Ranks(rank, world, torch.device(device))
        if world > 1:
            dist.barrier()  # no rank leaves while another still talks to it
    finally:
        if world > 1:
            dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Keep large freed blocks for the next step instead of returning them to the kernel (with glibc).

    Otherwise every step maps its activations anew, page by page: a third of a small CPU step (docs/SPEED.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: only larger blocks are mapped on their own
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: this much may stay unused at the top of the heap


def pick_device(wanted: str, world: int = 1) -> str:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        there["mps"] = there["mps"] and world == 1 and can_train("mps")
        return next(name for name, is_there in there.items() if is_there)
    if not there[wanted]:
        raise UserError(
            f"device = {wanted} is not there; this machine has {', '.join(d for d in there if there[d])}"
        )
    if wanted == "mps" and world > 1:
        raise UserError(f"device = mps trains in one process, not {world}; start one, or give --device cpu")
    return wanted


def widest(device: torch.device | None) -> torch.dtype:
    """What sums are taken in: float64, or float32 where the device has no such numbers, as Apple's GPUs."""
    try:
        return torch.zeros((), dtype=torch.float64, device=device).dtype
    except TypeError:
        return torch.float32


def can_train(device: str) -> bool:
    """Whether a device runs what a step is made of, tried on a few numbers; older systems lack some of it."""
    x = torch.ones(1, 2, 8, 4, device=device, requires_grad=True)
    try:
        with torch.autocast(device, torch.bfloat16):
            attended = F.scaled_dot_product_attention(x, x, x, is_causal=True)
            logits = (attended @ x.mT).flatten(0, -2).float()
        F.cross_entropy(logits, torch.zeros(len(logits), device=device, dtype=torch.long)).backward()
        torch.optim.AdamW([x], fused=True).step()
        return bool(x.isfinite().all())
    except (RuntimeError, TypeError):  # how an operation is refused that the device does not have
        return False
