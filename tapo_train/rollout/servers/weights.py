"""How new weights reach the servers: through a folder that all of them see.

Between GPUs `transfer.py` does it without files.
"""

from __future__ import annotations

import shutil
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from uuid import uuid4

if TYPE_CHECKING:
    import torch

FILE_BYTES = 2**30
"""About how large a file of a weights folder is."""

Weights = Iterable[tuple[str, "torch.Tensor"]]
Body = Mapping[str, Any]
Tell = Callable[[str, Callable[[str], Body]], None]
"""Posts to a path of each paused server, all at once, the body for a server of that name, and
waits. EngineError if a server does not want it; one that goes away is left out from then on."""
Stored = tuple[int, str, Body]
"""A version, and what to post where so that a server takes its weights."""


class WeightCarrier(Protocol):
    """Brings the learner's weights to servers; called in the learner's thread."""

    @property
    def sends(self) -> bool:
        """False where another rank brings the weights to this rank's servers."""
        ...

    def prepare(self, weights: Weights, *, version: int) -> None:
        """Whatever can be done while the servers go on sampling."""
        ...

    def deliver(self, tell: Tell, servers: Mapping[str, int]) -> None:
        """Have the servers, which are paused, take the weights.

        Args:
            servers: devices of each by name; one that was restarted has another name.
        """
        ...

    def again(self) -> Stored | None:
        """The last weights, for a server that comes back. Any thread."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


class ForeignWeights:
    """On a rank whose servers get the weights from another rank."""

    sends = False

    def prepare(self, weights: Weights, *, version: int) -> None:
        """See `WeightCarrier.prepare`: gathering them may take all ranks."""
        for _ in weights:
            pass

    def deliver(self, tell: Tell, servers: Mapping[str, int]) -> None:
        """See `WeightCarrier.deliver`: somebody else does."""

    def again(self) -> None:
        """See `WeightCarrier.again`: somebody else knows."""

    def close(self) -> None:
        """See `WeightCarrier.close`: there is nothing."""


class FolderWeights:
    """As safetensors below `root`, an absolute path by which the servers know it too.

    The newest is kept until the end. Ranks share `root`, so each carrier has a folder of its
    own in it, which goes with `close`, at the latest when the process ends without being killed.
    """

    sends = True

    def __init__(self, root: Path) -> None:
        self._own = root / f"weights-{uuid4().hex}"
        self._newest: Stored | None = None
        self._finish = weakref.finalize(self, _remove, self._own)

    def prepare(self, weights: Weights, *, version: int) -> None:
        """See `WeightCarrier.prepare`: they are written."""
        folder, older = self._own / uuid4().hex, list(self._own.glob("*"))
        write_weights(weights, folder)
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._newest = (version, "/collective_rpc", body)
        for each in older:
            _remove(each)

    def deliver(self, tell: Tell, servers: Mapping[str, int]) -> None:
        """See `WeightCarrier.deliver`: they are read."""
        assert self._newest is not None, "deliver before prepare"
        _, path, body = self._newest
        tell(path, lambda _: body)

    def again(self) -> Stored | None:
        """See `WeightCarrier.again`."""
        return self._newest

    def close(self) -> None:
        """See `WeightCarrier.close`."""
        self._finish()


def write_weights(weights: Weights, folder: Path) -> None:
    """Write tensors as safetensors, a file at a time, so that one file is in memory at most."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for number, held in enumerate(buckets(weights, FILE_BYTES, device="cpu")):
        file = folder / f"{number:05}.safetensors"
        save_file(held, file)
        # safetensors lets nobody else read its files; servers may be another user's processes.
        file.chmod(folder.stat().st_mode & 0o666)


def buckets(
    weights: Weights, size: int, *, device: Literal["cpu"] | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """About `size` bytes at a time, on `device` or where they are.

    Copies, as a tensor is valid only until the next one is asked for.
    """
    held: dict[str, torch.Tensor] = {}
    left = size
    for name, tensor in weights:
        held[name] = tensor.detach().to(device, copy=True).contiguous()
        left -= held[name].nbytes
        if left <= 0:
            yield held
            held, left = {}, size
    if held:
        yield held


def _remove(folder: Path) -> None:
    """Take a folder away; that it cannot be is no reason to end a run."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return  # nothing was sent
    except OSError as error:
        print(f"weights in {folder} are left behind: {error}", file=sys.stderr, flush=True)
