"""How new weights reach the servers: through a folder that all of them see.

Between GPUs `transfer.py` does it without files.
"""

from __future__ import annotations

import shutil
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
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

    def again(self) -> tuple[str, Body] | None:
        """What to post where so that a server which comes back takes the last weights."""
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
        self._newest: Path | None = None
        self._finish = weakref.finalize(self, _remove, self._own)

    def prepare(self, weights: Weights, *, version: int) -> None:
        """See `WeightCarrier.prepare`: they are written."""
        before, self._newest = self._newest, self._own / f"{version:06}-{uuid4().hex[:8]}"
        write_weights(weights, self._newest)
        if before is not None:
            _remove(before)

    def deliver(self, tell: Tell, servers: Mapping[str, int]) -> None:
        """See `WeightCarrier.deliver`: they are read."""
        again = self.again()
        assert again is not None, "deliver before prepare"
        path, body = again
        tell(path, lambda _: body)

    def again(self) -> tuple[str, Body] | None:
        """See `WeightCarrier.again`."""
        if self._newest is None:
            return None
        arguments = {"weights_path": str(self._newest)}
        return "/collective_rpc", {"method": "reload_weights", "kwargs": arguments}

    def close(self) -> None:
        """See `WeightCarrier.close`."""
        self._finish()


def write_weights(weights: Weights, folder: Path) -> None:
    """Write tensors as safetensors, a file at a time, so that one file is in memory at most."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
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


def _remove(folder: Path) -> None:
    """Take a folder away; that it cannot be is no reason to end a run."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return  # nothing was sent
    except OSError as error:
        print(f"weights in {folder} are left behind: {error}", file=sys.stderr, flush=True)
