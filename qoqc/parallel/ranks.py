"""The processes that run one model together, and how a process finds its place among them."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal

import torch
import torch.distributed as dist

from qoqc.errors import OptionError, QoqcError, Unsupported

Count = int | Literal["auto"]
"""How many ranks: a number, or all processes that were started together."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """A process among `size`: its number `rank`, its device, and the name of their group."""

    rank: int
    size: int
    device: torch.device
    group: str = ""

    def share(self, total: int, rank: int | None = None) -> range:
        """Which of `total` units this rank (or another) holds: as equal as whole units allow."""
        rank = self.rank if rank is None else rank
        return range(total * rank // self.size, total * (rank + 1) // self.size)

    def agree(self, problem: str | None, kind: type[QoqcError]) -> None:
        """Wait for all ranks; raise `kind` on each of them if one has a problem.

        A rank that went on alone would wait for the others in the model's first sum, for minutes.
        """
        found: list[Any] = [problem]
        if self.size > 1:
            found = [None] * self.size
            dist.all_gather_object(found, problem)
        for rank, text in enumerate(found):
            if text is not None:
                raise kind(text if rank == self.rank else f"rank {rank}: {text}")


def join(count: Count, device: str | torch.device) -> Ranks:
    """The place of this process among `count` ranks, each with a device of its own.

    "cuda" means the device of the process's number on its machine (LOCAL_RANK, as torchrun sets
    it). Makes torch's process group unless there is one: NCCL for CUDA, gloo for CPUs; whoever
    destroys it drops the models first, because CUDA graphs hold what belongs to NCCL. All ranks get
    the seed of the first, so that they sample the same tokens.

    Raises OptionError if `count` is not the number of processes there are, Unsupported if there
    are fewer devices than ranks.
    """
    if count != "auto" and (type(count) is not int or count < 1):
        raise OptionError(f"tp={count!r}: expected a number of ranks, or 'auto'")
    if not dist.is_initialized():
        if count == 1 or (count == "auto" and "WORLD_SIZE" not in os.environ):
            return Ranks(0, 1, torch.empty(0, device=device).device)
        _require_launcher(count)
    own = _own_device(torch.device(device))
    if not dist.is_initialized():
        if own.type == "cuda":
            dist.init_process_group("nccl", device_id=own)
        else:
            dist.init_process_group("gloo")
    size = dist.get_world_size()
    if count not in ("auto", size):
        raise OptionError(
            f"tp={count}: {size} processes were started; start as many as there are to be ranks"
        )
    seed = torch.tensor(torch.initial_seed() % 2**63, device=own)
    dist.broadcast(seed, 0)
    torch.manual_seed(int(seed))
    group = dist.group.WORLD
    assert group is not None, "init_process_group makes it"
    return Ranks(dist.get_rank(), size, own, group.group_name)


def _require_launcher(count: Count) -> None:
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise OptionError(
            f"tp={count}: this process was started alone ({missing[0]} is not set); start it with "
            f"torchrun --nproc-per-node {count} SCRIPT"
        )


def _own_device(device: torch.device) -> torch.device:
    if device.type != "cuda":
        return device
    found = torch.cuda.device_count()
    index = device.index
    if index is None:
        index = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
    if index >= found:
        raise Unsupported(
            f"a rank wants device cuda:{index}, and there are {found}; start at most {found} "
            "processes per machine"
        )
    torch.cuda.set_device(index)  # where Triton launches and NCCL gathers objects
    return torch.device("cuda", index)
