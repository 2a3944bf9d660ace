"""vLLM inside this process: no server, no worker processes, direct weight hand-over.

vLLM is given the very ids the learner sees, placeholders expanded (`vllm_inputs.py`).
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

# Read when vLLM is imported: the engine core must live in this process, so that
# weights are handed over without copies and torchrun ranks stay independent.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import numpy as np
import numpy.typing as npt
import vllm
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams

from tapo_train.errors import EngineError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import Completion, GenerationRequest, require_admissible
from tapo_train.rollout.vllm_experts import forget_expert_kernels
from tapo_train.rollout.vllm_inputs import InputBuilder
from tapo_train.rollout.vllm_settings import (
    CPU_CACHE_BLOCK,
    MIN_PREFILL,
    bans,
    sampling_parameters,
)
from tapo_train.types import Image

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """How much of the machine the engine may use."""

    dtype: Literal["float32", "bfloat16"]
    max_model_len: int
    """[tokens] at least `Limits.max_tokens`."""
    max_num_seqs: int = 256
    """Sequences decoded together."""
    memory_fraction: float = 0.5
    """Share of the device's memory on GPU (weights, keys and values, activations)."""
    cache_gib: int = 1
    """[GiB] keys and values on CPU."""
    picture_cache_bytes: int = 4 * 2**30
    """Of processed pictures, in the host's memory."""
    max_images: int = 64
    """Most pictures in one trajectory."""
    enforce_eager: bool | None = None
    """No compilation and no CUDA graphs. None is True on CPU, where compiling needs a C++
    compiler and about 20 s of a core for 1.5 times the tokens per second."""
    can_sleep: bool = False
    """Allow `sleep`: vLLM then takes its memory in a way that it can give back (GPU only)."""
    seeded: bool = False
    """Allow `Sampling.seed`. vLLM's CPU sampler cannot seed requests while prefills are
    chunked, so this switches chunking off."""
    seed: int = 0
    """Of the shared stream; the same on the ranks of a tensor-parallel group."""
    tensor_parallel: int = 1
    """Neighbouring ranks over which the model is split; see `tensor_parallel.py`."""


class VllmEngine:
    """The `Engine` protocol over one in-process vLLM replica.

    Under torchrun every rank owns a replica, or its part of one: with `tensor_parallel`
    above 1 the ranks of a group must make the same calls in the same order.
    """

    def __init__(self, chat: ChatFormat, options: VllmOptions) -> None:
        self._chat = chat
        self._options = options
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(options.cache_gib))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        _give_llvmlite_a_namespace()
        with warnings.catch_warnings():
            # Its start-up touches deprecated names of torch; nobody here can mend that.
            warnings.simplefilter("ignore", FutureWarning)
            self._llm: Any = vllm.LLM(**_arguments(chat, options))
        self._engine: Any = self._llm.llm_engine
        self._inputs = InputBuilder(chat, self._engine, cache_bytes=options.picture_cache_bytes)
        self._bias = bans(chat)
        self._in_flight: dict[str, GenerationRequest] = {}
        self._is_asleep = False
        self._has_weights = True
        self.version = 0

    def submit(self, request: GenerationRequest) -> None:
        """See `Engine.submit`."""
        require_admissible(request, self._in_flight, max_model_len=self._options.max_model_len)
        self._add(request.id, request.tokens, request.images, self._parameters(request))
        self._in_flight[request.id] = request

    def step(self) -> list[Completion]:
        """See `Engine.step`."""
        finished = [output for output in self._engine.step() if output.finished]
        return [self._completion(output) for output in finished]

    def has_unfinished(self) -> bool:
        """See `Engine.has_unfinished`."""
        return bool(self._in_flight)

    def idle_s(self) -> float:
        """See `Engine.idle_s`."""
        return 0.0

    def capacity_tokens(self) -> int | None:
        """See `Engine.capacity_tokens`."""
        cache: Any = self._engine.vllm_config.cache_config
        return int(cache.num_gpu_blocks * cache.block_size)

    def abort(self, ids: Sequence[str]) -> None:
        """See `Engine.abort`."""
        dropped = [id for id in ids if self._in_flight.pop(id, None) is not None]
        self._engine.abort_request(dropped)

    def score(
        self, tokens: npt.NDArray[np.int32], images: Sequence[Image]
    ) -> npt.NDArray[np.float32]:
        """See `Engine.score`. Cached keys are not read, so the current weights are measured."""
        self._require_idle("score")
        parameters = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._add("score", tokens, images, parameters)
        outputs: list[Any] = []
        while not outputs:
            outputs = [output for output in self._engine.step() if output.finished]
        entries = outputs[0].prompt_logprobs[1:]
        pairs = zip(tokens[1:].tolist(), entries, strict=True)
        return np.array([entry[token].logprob for token, entry in pairs], dtype=np.float32)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """See `Engine.load_weights`."""
        self._require_idle("load_weights")
        if self._is_asleep:
            raise EngineError("load_weights needs an engine that is awake")
        if current_platform.is_cpu():
            self._llm.apply_model(forget_expert_kernels)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        # Keys and values, processed pictures and encoded pictures were all computed with
        # or beside the old weights. Leaving the encoder cache out kills the next request.
        if not self._has_weights:
            # Only now: until the learner's last tensor has come, both need the device.
            self._llm.wake_up(tags=["kv_cache"])
            self._has_weights = True
        self._llm.reset_prefix_cache()
        self._engine.reset_mm_cache()
        self._engine.reset_encoder_cache()
        self.version = version

    def sleep(self) -> None:
        """See `Sleeper.sleep`. Weights, keys and values are lost: nothing goes to the host."""
        self._require_idle("sleep")
        if not self._is_asleep:
            self._llm.sleep(level=2)
            self._is_asleep, self._has_weights = True, False

    def wake(self) -> None:
        """See `Sleeper.wake`. Room for keys and values is taken when the weights are there."""
        if self._is_asleep:
            self._llm.wake_up(tags=["weights"])
            self._is_asleep = False

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.engine_core.shutdown()
        del self._engine, self._llm

    def _parameters(self, request: GenerationRequest) -> SamplingParams:
        if request.sampling.seed is not None and not self._options.seeded:
            raise EngineError("sampling.seed is set; the engine must be built with seeded=True")
        return SamplingParams(
            **sampling_parameters(request, end=self._chat.end_token_id, bias=self._bias),
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            # Made for this request alone; copying the bans is half of what submitting costs.
            skip_clone=True,
        )

    def _add(
        self,
        id: str,
        tokens: npt.NDArray[np.int32],
        images: Sequence[Image],
        parameters: SamplingParams,
    ) -> None:
        if not self._has_weights:
            raise EngineError(f"request {id}: the engine slept; wanted load_weights first")
        self._engine.add_request(id, self._inputs.build(id, tokens, images), parameters)

    def _completion(self, output: Any) -> Completion:
        request = self._in_flight.pop(output.request_id, None)
        if request is None:
            raise EngineError(f"vLLM returned {output.request_id}, which was not submitted")
        sampled = output.outputs[0]
        if sampled.finish_reason not in ("stop", "length"):
            raise EngineError(f"request {request.id}: vLLM gave up ({sampled.finish_reason})")
        return Completion(
            id=request.id,
            tokens=np.asarray(sampled.token_ids, dtype=np.int32),
            logprobs=np.asarray(sampled.logprobs.logprobs, dtype=np.float32),
            finished=sampled.finish_reason,
            cached_tokens=output.num_cached_tokens or 0,
        )

    def _require_idle(self, what: str) -> None:
        if self._in_flight:
            raise EngineError(f"{what} needs an idle engine; {len(self._in_flight)} in flight")


def _arguments(chat: ChatFormat, options: VllmOptions) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    arguments: dict[str, Any] = {
        "model": str(chat.model),
        "dtype": options.dtype,
        "seed": options.seed,
        "tensor_parallel_size": options.tensor_parallel,
        # One more than any sequence has: `score` makes vLLM sample a token it throws away.
        "max_model_len": options.max_model_len + 1,
        "max_num_seqs": options.max_num_seqs,
        "gpu_memory_utilization": options.memory_fraction,
        "enforce_eager": _is_eager(options),
        "logprobs_mode": "processed_logprobs",
        # As the learner's head: logits rounded to bf16 are off by hundredths of a nat.
        "hf_overrides": {"head_dtype": "float32"},
        "enable_prefix_caching": True,
        # Processed pictures are kept by `InputBuilder`, and once is enough.
        "mm_processor_cache_gb": 0,
        # The folder's generation_config must not change the sampled distribution.
        "generation_config": "vllm",
        "use_tqdm_on_load": False,
    }
    if chat.family.sees:
        arguments["limit_mm_per_prompt"] = {"image": options.max_images, "video": 0}
    if options.can_sleep:
        arguments["enable_sleep_mode"] = True
    if options.seeded:
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(MIN_PREFILL, options.max_model_len + 1)
    if current_platform.is_cpu():
        arguments["block_size"] = CPU_CACHE_BLOCK
    if "LOCAL_RANK" in os.environ:
        arguments["distributed_executor_backend"] = "external_launcher"
    return arguments


def _is_eager(options: VllmOptions) -> bool:
    on_cpu: bool = current_platform.is_cpu()
    return on_cpu if options.enforce_eager is None else options.enforce_eager


def _give_llvmlite_a_namespace() -> None:
    """Keep vLLM 0.32's CPU start-up from dying when a tool or library loads numba.

    It calls vars() on every object of every module. llvmlite's library object answers
    any unknown name, `__dict__` included, with a wrapped C function, which vLLM then
    uses as a dict; an entry in its function table makes the answer an empty one.
    """
    ffi: Any = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None:
        ffi.lib._fntab.setdefault("__dict__", {})
