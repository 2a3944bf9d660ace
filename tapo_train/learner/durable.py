"""Files that survive a loss of power, hashed while they are written.

`write_tensors` writes the safetensors format itself: the library's writer gives no hash, and
reading a checkpoint back for one takes as long as writing it. Reading is the library's.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

CHUNK_BYTES = 2**24

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_bytes(path: Path, data: bytes) -> str:
    """Write a file and force it to the disk; its sha256."""
    return _write(path, [data])


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors on the CPU as a safetensors file and force it to the disk; its sha256."""
    # Widest first, as the library does: every tensor is then aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = struct.pack("<Q", len(text)) + text
    return _write(path, (begin, *(_bytes_of(tensors[name]) for name in order)))


def sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk: names of files made, renamed or deleted."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for part in parts:
                view = memoryview(part)
                for start in range(0, len(view), CHUNK_BYTES):
                    chunk = view[start : start + CHUNK_BYTES]
                    digest.update(chunk)
                    file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # A full disk does not say by itself which file it has no room for.
        raise OSError(error.errno, error.strerror, str(path)) from error
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's memory, little endian as on every machine torch runs on."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
