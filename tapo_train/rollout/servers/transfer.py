"""New weights between GPUs, through vLLM's weight transfer; not tried on a GPU yet.

NCCL brings them to other devices, CUDA IPC to engines on the learner's own one. vLLM's trainer
side drives a whole update (start, metadata of every tensor, the tensors, finish) out of a source
that it may walk through twice. The learner's weights are gathered layer by layer and once only,
so each bucket of them is a source of its own, and start and finish go to the servers once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

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
from vllm.utils.network_utils import get_ip, get_open_port

from tapo_train.rollout.servers.weights import Tell, Weights, buckets

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
        self._client = _Client(base_url="")
        self._engine: TrainerWeightTransferEngine | None = None
        self._met: Mapping[str, int] = {}

    def prepare(self, weights: Weights, *, version: int) -> None:
        """See `WeightCarrier.prepare`: nothing can be done ahead."""
        self._weights = weights

    def deliver(self, tell: Tell, servers: Mapping[str, int]) -> None:
        """See `WeightCarrier.deliver`."""
        self._client.tell, self._client.servers = tell, servers
        if self._engine is None or servers != self._met:
            self._meet(servers)
        assert self._engine is not None
        tell("/start_weight_update", lambda _: {})
        for tensors in buckets(self._weights, BUCKET_BYTES):
            self._bucket.tensors = tensors
            self._engine.send_weights()
        tell("/finish_weight_update", lambda _: {})
        self._weights, self._bucket.tensors = (), {}

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
                master_address=get_ip(),
                master_port=get_open_port(),
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
        self.tensors: dict[str, torch.Tensor] = {}

    def metadata(self) -> list[ParamMeta]:
        """See `WeightSource`."""
        return [ParamMeta(name, each.dtype, tuple(each.shape)) for name, each in self]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors.items())


class _Client(HTTPVLLMWeightSyncClient):
    """vLLM's client, with our way to the servers: the secret, and several at once."""

    tell: Tell
    servers: Mapping[str, int]

    def start_weight_update(self) -> None:
        """Nothing: `deliver` does, once for all buckets."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Nothing: `deliver` does, once for all buckets."""

    def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
        self.tell(f"/{path}", lambda server: self._placed(json or {}, server))

    def _placed(self, body: dict[str, Any], server: str) -> dict[str, Any]:
        """The workers of a server follow those of the servers before it."""
        info = body.get("init_info", {})
        if "rank_offset" not in info:
            return body
        names = list(self.servers)
        before = sum(self.servers[name] for name in names[: names.index(server)])
        return {"init_info": {**info, "rank_offset": info["rank_offset"] + before}}
