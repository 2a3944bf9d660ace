"""How vLLM's server is started: its flags and its environment."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tapo_train.rollout.servers.gate import SERVED_VARIABLE, Gate
from tapo_train.rollout.vllm_settings import CPU_CACHE_BLOCK, MIN_PREFILL

KEEP_ALIVE_S = 60
"""[s] an unused connection is kept; longer than clients keep theirs."""

IN_ENGINE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""On CPU: computes in the engine's process. By its short name vLLM would take a process of its own
for that, and the two would wait for each other in busy loops: a quarter of the machine."""

Flags = dict[str, str | int | float | None]
"""Values by name; None: a switch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A server to be started."""

    model: Path
    dtype: Literal["float32", "bfloat16"]
    host: str
    port: int
    max_tokens: int
    """[tokens] longest sequence."""
    max_sequences: int
    """Sequences decoded together by one engine."""
    max_images: int
    """Most pictures in one sequence."""
    seed: int
    """Of requests without a seed of their own."""
    seeded: bool
    """Requests may have a seed; vLLM's CPU sampler then takes no chunked prefills."""
    data_parallel: int = 1
    """Engines behind the port."""
    tensor_parallel: int = 1
    """Devices that share one engine's weights."""
    picture_cache_gib: float = 4.0
    """[GiB] of processed pictures in the host's memory."""
    cache_gib: int | None = None
    """[GiB] keys and values on CPU; None: on GPUs."""
    transfer: Literal["nccl", "ipc"] | None = None
    """Back end of vLLM's weight transfer, where weights do not go through a folder."""

    def command(self) -> list[str]:
        """The command line."""
        flags: Flags = {
            "model": str(self.model),
            "dtype": self.dtype,
            "host": self.host,
            "port": self.port,
            "seed": self.seed,
            # One more than any sequence has: to score, vLLM samples a token that is thrown away.
            "max-model-len": self.max_tokens + 1,
            "max-num-seqs": self.max_sequences,
            "limit-mm-per-prompt": json.dumps({"image": self.max_images, "video": 0}),
            "logprobs-mode": "processed_logprobs",
            # The folder's generation_config must not change the sampled distribution.
            "generation-config": "vllm",
            "enable-prefix-caching": None,
            "scheduling-policy": "priority",  # first come, first served, but for scores
            "enable-scale-out": None,  # the token endpoint
            "enable-prompt-tokens-details": None,
            "disable-uvicorn-access-log": None,
            # Answers go on after a change of weights, with their pictures encoded anew. Kept in
            # another way, the pixels of a picture whose keys were reused are gone by then, and
            # vLLM dies of it.
            "mm-processor-cache-type": "shm",
            "mm-processor-cache-gb": self.picture_cache_gib,
            "middleware": f"{Gate.__module__}.{Gate.__qualname__}",
            "data-parallel-size": self.data_parallel,
            "tensor-parallel-size": self.tensor_parallel,
        }
        if self.cache_gib is not None:
            flags |= self._on_cpu()
        if self.seeded:
            flags["no-enable-chunked-prefill"] = None
            flags["max-num-batched-tokens"] = max(MIN_PREFILL, self.max_tokens + 1)
        if self.transfer is not None:
            flags["weight-transfer-config"] = json.dumps({"backend": self.transfer})
        # Not the command `vllm`, which does not find itself in builds for the CPU.
        words = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
        for name, value in flags.items():
            words += [f"--{name}"] if value is None else [f"--{name}", str(value)]
        return words

    def _on_cpu(self) -> Flags:
        flags: Flags = {"enforce-eager": None, "block-size": CPU_CACHE_BLOCK}
        if self.tensor_parallel == self.data_parallel == 1:
            flags["distributed-executor-backend"] = IN_ENGINE
        return flags

    def environment(self, served: str) -> dict[str, str]:
        """Variables beside those of this process.

        Args:
            served: JSON of what the server says of itself.
        """
        variables = {
            SERVED_VARIABLE: served,
            "VLLM_SERVER_DEV_MODE": "1",  # the control plane; the gate is in front of it
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S),
            "VLLM_NO_USAGE_STATS": "1",
        }
        if self.cache_gib is not None:
            variables["VLLM_CPU_KVCACHE_SPACE"] = str(self.cache_gib)
            variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if self.transfer == "ipc":
            # Handles of device memory come pickled; `serve-engine` listens on loopback only then.
            variables["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        return variables
