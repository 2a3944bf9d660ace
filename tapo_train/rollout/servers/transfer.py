"""New weights between GPUs, through vLLM's weight transfer; not tried on a GPU yet.

NCCL brings them to other devices, CUDA IPC to engines on the learner's own one. vLLM's trainer
side drives a whole update (start, metadata of every tensor, the tensors, finish) out of a source
that it may walk through twice. The learner's weights are gathered layer by layer and once only,
so each bucket of them is a source of its own, and start and finish go to the servers once.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
)
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from tapo_train.rollout.servers.weights import Tell, Weights

BUCKET_BYTES = 2**30
"""About how much of the model is held twice while it is sent."""


class TransferWeights:
    """The `WeightCarrier` protocol over vLLM's trainer side.

    Every rank has one, as ranks take part in each other's gathering.

    Args:
        sends: False on a rank whose servers get the weights from another rank.
    """

    def __init__(self, backend: Literal["nccl", "ipc"], *, sends: bool) -> None:
        self._backend = backend
        self.sends = sends
        self._weights: Weights = ()
        self._bucket = _Bucket()
        self._client = _Client()
        self._engine: TrainerWeightTransferEngine | None = None
        self._met: Mapping[str, int] = {}

    def prepare(self, weights: Weights, *, version: int) -> None:
        """See `WeightCarrier.prepare`: nothing can be done ahead."""
        self._weights = weights

    def deliver(self, tell: Tell, servers: Mapping[str, int]) -> None:
        """See `WeightCarrier.deliver`."""
        self._client.begin(tell, servers)
        if self._engine is None or servers != self._met:
            self._meet(servers)
        assert self._engine is not None
        for bucket in _buckets(self._weights):
            self._bucket.tensors = bucket
            self._engine.send_weights()
        self._client.end()
        self._weights, self._bucket.tensors = (), []

    def again(self) -> None:
        """See `WeightCarrier.again`: who comes back has to wait for the next weights."""

    def close(self) -> None:
        """See `WeightCarrier.close`."""
        if self._engine is not None:
            self._engine.shutdown()

    def _meet(self, servers: Mapping[str, int]) -> None:
        """Agree with the servers on how tensors travel; anew when they are not the same ones."""
        self.close()
        rank = 0 if self.sends else 1
        info: TrainerInitInfo = IPCTrainerInitInfo(rank=rank)
        if self._backend == "nccl":
            info = NCCLTrainerInitInfo(
                master_address=_address_towards(servers),
                master_port=_free_port(),
                world_size=1 + sum(servers.values()),
                rank=rank,
            )
        self._engine = WeightTransferTrainerFactory.trainer_init(
            info, client=self._client, source=self._bucket
        )
        self._met = dict(servers)


class _Bucket(WeightSource):
    """Some tensors, as often as they are asked for."""

    def __init__(self) -> None:
        self.tensors: list[tuple[str, torch.Tensor]] = []

    def metadata(self) -> list[ParamMeta]:
        """See `WeightSource`."""
        return [ParamMeta(name, each.dtype, tuple(each.shape)) for name, each in self.tensors]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors)


class _Client(HTTPVLLMWeightSyncClient):
    """vLLM's client, with our way to the servers: the secret, several at once, one update."""

    def __init__(self) -> None:
        super().__init__(base_url="")
        self._is_under_way = False

    def begin(self, tell: Tell, servers: Mapping[str, int]) -> None:
        """The update that follows is for these servers."""
        self._tell, self._servers, self._is_under_way = tell, servers, False

    def end(self) -> None:
        """All buckets were sent."""
        if self._is_under_way:
            self._tell("/finish_weight_update", lambda _: {})

    def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
        body = json or {}
        if path == "init_weight_transfer_engine":
            self._tell(f"/{path}", lambda server: {"init_info": self._placed(body, server)})
        elif path == "start_weight_update":
            if not self._is_under_way:
                self._tell(f"/{path}", lambda _: body)
            self._is_under_way = True
        elif path != "finish_weight_update":
            self._tell(f"/{path}", lambda _: body)

    def _placed(self, body: dict[str, Any], server: str) -> dict[str, Any]:
        """The workers of a server follow those of the servers before it."""
        info = dict(body["init_info"])
        if "rank_offset" in info:
            names = list(self._servers)
            before = names[: names.index(server)]
            info["rank_offset"] += sum(self._servers[name] for name in before)
        return info


def _buckets(weights: Weights) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Copies, as a tensor is valid only until the next one is asked for."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        bucket.append((name, tensor.detach().clone()))
        size += tensor.numel() * tensor.element_size()
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _address_towards(servers: Mapping[str, int]) -> str:
    """This machine's address as the servers see it."""
    host = urlsplit(next(iter(servers), "http://127.0.0.1")).hostname or "127.0.0.1"
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])
