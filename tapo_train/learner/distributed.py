"""Processes of a run: start, sums and maxima over ranks, end.

Launched by torchrun, every process reads its rank from the environment. Without
torchrun the same code is a group of one. Collectives go over gloo on CPU and over
nccl on GPUs (with gloo beside it for objects and counts).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tapo_train.errors import LearnerError

DEFAULT_TIMEOUT_S = 1800.0
"""How long a collective waits for its peers. Ranks roll out between collectives, so this
must be longer than the slowest rollout."""

_timeout = timedelta(seconds=DEFAULT_TIMEOUT_S)


def init(*, device: str = "cpu", timeout_s: float = DEFAULT_TIMEOUT_S) -> torch.device:
    """Join the process group (making one of size 1 without torchrun); this rank's device.

    Done here and not by DeepSpeed, which binds a device to the group: some versions of
    torch hang with that.

    Args:
        device: "cpu" or "cuda"; on "cuda" each process takes the card LOCAL_RANK.
    """
    global _timeout
    _complete_environment()
    cuda = device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        _timeout = timedelta(seconds=timeout_s)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_timeout)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def is_initialised() -> bool:
    """Whether a process group is up."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0-based; 0 without a group."""
    return dist.get_rank() if is_initialised() else 0


def world_size() -> int:
    """Number of processes; 1 without a group."""
    return dist.get_world_size() if is_initialised() else 1


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Element-wise sums over ranks, in float64. Every rank must send as many values."""
    if world_size() == 1:
        return [float(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return [float(value) for value in tensor.tolist()]


def all_reduce_max(value: int) -> int:
    """The largest of the ranks' values."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


def all_gather_objects(value: Any) -> list[Any]:
    """Every rank's value, by rank. Pickled: for small things."""
    gathered: list[Any] = [None] * world_size()
    if world_size() == 1:
        return [value]
    dist.all_gather_object(gathered, value)
    return gathered


def exchange_bytes(parcels: Sequence[bytes]) -> list[bytes]:
    """What each rank has for this one, by rank; `parcels` holds what this one has for each."""
    sizes = torch.tensor([len(parcel) for parcel in parcels], dtype=torch.int64)
    coming = torch.empty_like(sizes)
    dist.all_to_all_single(coming, sizes)
    sent = torch.frombuffer(bytearray(b"".join(parcels)), dtype=torch.uint8)
    received = torch.empty(int(coming.sum()), dtype=torch.uint8)
    dist.all_to_all_single(received, sent, coming.tolist(), sizes.tolist())
    return [piece.numpy().tobytes() for piece in received.split(coming.tolist())]


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    holder = [value]
    if world_size() > 1:
        dist.broadcast_object_list(holder, src=0)
    return holder[0]


def neighbours(size: int, *, backend: str | None = None) -> Any:
    """The process group of `size` neighbouring ranks that this rank is in, made by all together.

    Its collectives wait as long as those of all ranks; torch would give it a default of its own.

    Args:
        backend: None for that of all ranks.
    """
    return dist.new_subgroups(size, timeout=_timeout, backend=backend)[0]


class Subgroup:
    """Groups of `size` neighbouring ranks; this is the one of this rank. Over gloo.

    Made by all ranks together, and each of its calls is made by all ranks of the group.
    """

    def __init__(self, size: int) -> None:
        if world_size() % size:
            raise LearnerError(f"{world_size()} ranks in groups of {size}; wanted a divisor")
        self.index = rank() % size
        """This rank's place in its group; 0 leads."""
        self._leader = rank() - self.index
        self._size = size
        self._group: Any = neighbours(size, backend="gloo")

    def broadcast(self, value: Any) -> Any:
        """The leader's value, on every rank of the group. Pickled."""
        holder = [value]
        dist.broadcast_object_list(holder, src=self._leader, group=self._group)
        return holder[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of the group's ranks, in order, on each of them. Pickled."""
        gathered: list[Any] = [None] * self._size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def _complete_environment() -> None:
    """Describe a group of one where torchrun has not described another."""
    wanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if name not in os.environ]
    if not missing:
        return
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise LearnerError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} not set; "
            "start several processes with torchrun, which sets all of them"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    values = dict(zip(wanted, ("0", "1", "0", "127.0.0.1", port), strict=True))
    os.environ.update({name: values[name] for name in missing})
