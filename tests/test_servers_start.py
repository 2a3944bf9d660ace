"""What is in front of vLLM's server, what it is started with, and how GPUs hand weights over."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tapo_train.rollout.servers.gate import SECRET_VARIABLE, SERVED_PATH, SERVED_VARIABLE, Gate
from tapo_train.rollout.servers.launch import Launch

SECRET = "sixteen-letters-"
RIGHT = (b"authorization", f"Bearer {SECRET}".encode())

Message = MutableMapping[str, Any]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    monkeypatch.setenv(SERVED_VARIABLE, '{"identity": "x"}')

    async def app(scope: Message, receive: Any, send: Any) -> None:
        await send({"type": "inside"})

    return Gate(app)


def through(gate: Gate, **scope: Any) -> list[Message]:
    """What is sent in answer to a connection."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {}

    whole = {"type": "http", "path": "/pause", "headers": []} | scope
    asyncio.run(gate(whole, receive, send))
    return sent


def test_only_the_secret_opens_the_gate(gate: Gate) -> None:
    assert through(gate, headers=[RIGHT]) == [{"type": "inside"}]
    wrong: list[list[tuple[bytes, bytes]]] = [
        [],
        [(b"authorization", SECRET.encode())],
        [(b"authorization", b"Bearer " + SECRET.encode()[:-1])],
        [(b"authorization", "Bearer é".encode("latin-1"))],
        [RIGHT, RIGHT],
        [(b"cookie", RIGHT[1])],
    ]
    for headers in wrong:
        for path in ("/pause", SERVED_PATH, "/"):
            start, body = through(gate, headers=headers, path=path)
            assert start["status"] == 401 and SECRET.encode() not in body["body"]


def test_a_web_socket_is_closed_and_the_start_of_the_server_let_through(gate: Gate) -> None:
    (closed,) = through(gate, type="websocket")
    assert closed["type"] == "websocket.close"
    assert through(gate, type="websocket", headers=[RIGHT]) == [{"type": "inside"}]
    assert through(gate, type="lifespan") == [{"type": "inside"}]


def test_behind_the_gate_the_server_says_what_it_serves(gate: Gate) -> None:
    start, body = through(gate, path=SERVED_PATH, headers=[RIGHT])
    assert start["status"] == 200 and body["body"] == b'{"identity": "x"}'


def launch(**values: Any) -> Launch:
    return Launch(
        **{
            "model": Path("folder"),
            "dtype": "bfloat16",
            "host": "127.0.0.1",
            "port": 7001,
            "max_tokens": 1024,
            "max_sequences": 64,
            "max_images": 8,
            "seed": 5,
            "seeded": False,
            **values,
        }
    )


@pytest.mark.slow
def test_vllm_takes_every_flag_and_they_mean_what_the_engine_needs() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())

    def read(**values: Any) -> Any:
        return parser.parse_args(launch(**values).command()[3:])

    gpus = read(data_parallel=4, tensor_parallel=2, transfer="nccl")
    assert (gpus.data_parallel_size, gpus.tensor_parallel_size) == (4, 2)
    assert gpus.weight_transfer_config.backend == "nccl"
    assert gpus.max_model_len == 1025, "one more: to score, a token is sampled"
    assert (gpus.host, gpus.port, gpus.seed) == ("127.0.0.1", 7001, 5)
    assert gpus.middleware == [f"{Gate.__module__}.Gate"]
    assert gpus.logprobs_mode == "processed_logprobs" and gpus.generation_config == "vllm"
    cpu = read(cache_gib=2, seeded=True)
    assert cpu.enforce_eager and cpu.enable_chunked_prefill is False
    assert cpu.max_num_batched_tokens == 4096 and cpu.weight_transfer_config is None
    assert cpu.distributed_executor_backend.endswith(".UniProcExecutor")
    for several in (read(cache_gib=2, data_parallel=2), read(cache_gib=2, tensor_parallel=2), gpus):
        assert several.distributed_executor_backend is None
    assert cpu.scheduling_policy == gpus.scheduling_policy == "priority"


def test_only_ipc_lets_a_server_unpickle() -> None:
    name = "VLLM_ALLOW_INSECURE_SERIALIZATION"
    for transfer in (None, "nccl"):
        assert name not in launch(transfer=transfer).environment("{}")
    assert launch(transfer="ipc").environment("{}")[name] == "1"
    assert launch(cache_gib=3).environment("{}")["VLLM_CPU_KVCACHE_SPACE"] == "3"


@pytest.mark.slow
def test_weights_go_to_gpus_bucket_by_bucket_within_one_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's own trainer side, without the two calls that need a GPU."""
    from vllm.distributed.weight_transfer import nccl_engine

    from tapo_train.rollout.servers import transfer

    sent: list[tuple[str, torch.Tensor]] = []
    told: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(transfer, "BUCKET_BYTES", 40)
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: Endpoint())
    monkeypatch.setattr(
        nccl_engine,
        "packed_nccl_broadcast_producer",
        lambda iterator, **_: sent.extend(iterator),
    )
    servers = {"http://127.0.0.1:7001#0": 2, "http://127.0.0.1:7002#0": 1}

    def tell(path: str, body: Callable[[str], dict[str, Any]]) -> None:
        told.extend((path, json.loads(json.dumps(body(name)))) for name in servers)

    weights = {"a": torch.ones(8), "b": torch.arange(4.0), "c": torch.zeros(2, 3)}
    reused = torch.empty(8)

    def gathered() -> Any:
        """Each tensor is valid until the next one is asked for."""
        for name, tensor in weights.items():
            held = reused[: tensor.numel()].view(tensor.shape)
            held.copy_(tensor)
            yield name, held

    carrier = transfer.TransferWeights("nccl", sends=True)
    for version in (1, 2):
        sent.clear()
        told.clear()
        carrier.prepare(gathered(), version=version)
        carrier.deliver(tell, servers)
        assert [name for name, _ in sent] == ["a", "b", "c"]
        assert all(torch.equal(tensor, weights[name]) for name, tensor in sent)
        paths = [path for path, _ in told][::2]
        update = ["/start_weight_update", "/update_weights", "/update_weights"]
        met = ["/init_weight_transfer_engine"] if version == 1 else []
        assert paths == [*met, *update, "/finish_weight_update"]
    names = [body["update_info"]["names"] for path, body in told if path == "/update_weights"]
    assert names == [["a", "b"]] * 2 + [["c"]] * 2
    told.clear()
    servers = {"http://127.0.0.1:7001#1": 2, "http://127.0.0.1:7002#0": 1}
    carrier.prepare(iter(weights.items()), version=3)
    carrier.deliver(tell, servers)
    infos = [body["init_info"] for path, body in told if "init" in path]
    assert [info["rank_offset"] for info in infos] == [1, 3]
    assert {info["world_size"] for info in infos} == {4}
    assert {info["master_address"] for info in infos} == {"127.0.0.1"}
    carrier.close()


class Endpoint:
    """The trainer's end of an NCCL group."""

    def destroy(self) -> None:
        """Nothing to give back."""
