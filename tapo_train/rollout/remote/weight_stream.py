"""Weights as frames, one parameter after the other: nobody holds a second model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tapo_train.errors import EngineError, EngineLostError
from tapo_train.rollout.remote.messages import PolicyId, Tensor
from tapo_train.rollout.remote.wire import BODY_BYTES

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in get_args(get_type_hints(Tensor)["dtype"])
}
TENSOR_BYTES = 16 * 2**30
"""Largest tensor a server takes; an embedding of 150,000 × 16,384 in float32 has 9 GiB."""
FILE_BYTES = 2**30
"""About how large a file of a weights folder is."""

Named = Iterator[tuple[str, torch.Tensor]]


def slices(name: str, tensor: torch.Tensor) -> Iterator[tuple[Tensor, memoryview]]:
    """A tensor as frames of at most BODY_BYTES; an empty one is one empty frame.

    Raises:
        EngineError: it holds something else than floating-point numbers.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise EngineError(f"weight {name} is {dtype}; wanted one of {', '.join(DTYPES)}")
    flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    data = flat.numpy().data
    for offset in range(0, max(1, len(data)), BODY_BYTES):
        header = Tensor(name=name, dtype=dtype, shape=tuple(tensor.shape), offset=offset)  # type: ignore[arg-type]
        yield header, data[offset : offset + BODY_BYTES]


def assemble(next_slice: Callable[[], tuple[Tensor, bytearray] | None]) -> Named:
    """Tensors out of their slices.

    Args:
        next_slice: waits for the next one; None when there are no more.

    Raises:
        EngineLostError: slices overlap, are missing, or promise too much.
    """
    while (slice_ := next_slice()) is not None:
        header, data = slice_
        size = math.prod(header.shape) * DTYPES[header.dtype].itemsize
        if size > TENSOR_BYTES:
            raise EngineLostError(
                f"weight {header.name} of {size} bytes; wanted at most {TENSOR_BYTES}"
            )
        held = bytearray(data)
        while header.offset + len(data) < size:
            following = next_slice()
            if following is None or following[0].name != header.name or not following[1]:
                raise EngineLostError(f"weight {header.name} ends after {len(held)} of {size}")
            if (following[0].dtype, following[0].shape) != (header.dtype, header.shape):
                raise EngineLostError(f"weight {header.name} changes its type or shape midway")
            header, data = following
            _require_next(header, len(held))
            held += data
        if header.offset + len(data) != size or len(held) != size:
            raise EngineLostError(f"weight {header.name} has {len(held)} bytes; wanted {size}")
        yield header.name, _tensor(held, header)


def _require_next(header: Tensor, position: int) -> None:
    if header.offset != position:
        raise EngineLostError(
            f"weight {header.name}: a slice at byte {header.offset}; wanted one at {position}"
        )


def _tensor(data: bytearray, header: Tensor) -> torch.Tensor:
    dtype = DTYPES[header.dtype]
    if not data:
        return torch.empty(header.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(header.shape)


def folder_name(policy: PolicyId) -> str:
    """Where a policy's weights lie below the weights root."""
    return f"{policy.run}-{policy.version}"


def write_weights(weights: Named, folder: Path) -> None:
    """Write tensors as safetensors, a file at a time, so that one file is in memory at most."""
    folder.mkdir(parents=True, exist_ok=True)
    held: dict[str, torch.Tensor] = {}
    size = written = 0
    for name, tensor in weights:
        held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += held[name].numel() * held[name].element_size()
        if size >= FILE_BYTES:
            save_file(held, folder / f"{written:05}.safetensors")
            held, size, written = {}, 0, written + 1
    if held:
        save_file(held, folder / f"{written:05}.safetensors")


def read_weights(folder: Path) -> Named:
    """Tensors of a folder that `write_weights` wrote, one at a time.

    Raises:
        EngineError: there are none, or a file is gone or damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise EngineError(f"{folder} holds no weights; is the folder shared with the trainer?")
    for file in files:
        try:
            opened: Any = safe_open(file, framework="pt")
            with opened as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    yield name, tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            # The trainer removes the folder once it has written the next one.
            raise EngineError(f"{file} cannot be read: {error}") from error
